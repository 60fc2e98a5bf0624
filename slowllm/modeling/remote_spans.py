"""What a client's blocks know of the machines that hold them: hops, sessions, and how both are asked.

The seam between a model whose blocks are elsewhere (`remote_block`) and whatever asks the machines (`swarm.failover`, or
a test).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from slowllm.modeling.cache_labels import LabelSource
from slowllm.modeling.cutting import BlockForm
from slowllm.modeling.span import SpanCall, SpanGrads


@dataclass(frozen=True)
class Hop:
    """Blocks that one machine computes in one go.

    Attributes:
        first: the first block.
        end: the number after the last.
        peer: the machine's name.
    """

    first: int
    end: int
    peer: str = ""


@dataclass(frozen=True)
class Kept:
    """Where the keys and values of a hop's blocks are kept.

    Attributes:
        hop: whose machine keeps them.
        session: their name there.
    """

    hop: Hop
    session: str


@dataclass(frozen=True)
class Need:
    """What calls of the model need of the machines that compute them.

    Attributes:
        num_tokens: of the largest request.
        length: of the longest sequence, with what is kept of it, at the end of its session.
        session_tokens: that a session keeps at its end; 0 where later calls do not continue these.
        wants_grad: whether a backward pass will follow.
    """

    num_tokens: int
    length: int
    session_tokens: int = 0
    wants_grad: bool = False


def need_of(*calls: SpanCall, keeps_cache: bool = False, wants_grad: bool = False) -> Need:
    """Return what calls of one session need, or a single call without one."""
    rows = max(len(call.hidden) for call in calls)
    num_tokens = max(len(call.hidden) * call.hidden.shape[1] for call in calls)
    length = max(
        max(call.length + call.hidden.shape[1], call.final_length if keeps_cache else 0) for call in calls
    )
    return Need(num_tokens, length, rows * length * keeps_cache, wants_grad)


class Spans(Protocol):
    """The machines that hold the blocks. `forward` and `backward` block until they are answered."""

    def deadline(self) -> float:
        """Return when a call of the model that begins now is given up, on the clock of `time.monotonic`."""

    def route(self, first: int, need: Need, deadline: float) -> Sequence[Hop]:
        """Return hops from block `first` to the last block, for one call of the model and those that continue it."""

    def forward(self, call: SpanCall, hop: Hop, session: str | None, deadline: float) -> dict[int, Tensor]:
        """Compute a span by the deadline of the model's call; within a session, its keys and values are read and kept.

        Returns:
            the hidden states (B, T, ...) behind the last block, or behind each if the call asks for all.
        """

    def backward(self, call: SpanCall, hop: Hop, grads: Mapping[int, Tensor], deadline: float) -> SpanGrads:
        """Return the gradients of a call's inputs by the deadline of the model's backward pass."""

    def end_session(self, kept: Kept) -> None:
        """Let go of what a session keeps. Does not wait, does not raise, and takes no lock: finalizers call it."""


class CallTime:
    """The time of one call of the model, for all of its hops together, and that of the backward pass behind it.

    Args:
        spans: the machines that are asked.
    Attributes:
        deadline: when the call is given up, on the clock of `time.monotonic`.
    """

    def __init__(self, spans: Spans) -> None:
        self._spans = spans
        self.deadline = spans.deadline()
        self._backward_deadline = self.deadline
        self._reached: int | None = None

    def backward(self, first: int) -> float:
        """Return when the backward pass is given up that has come down to the hop that begins at block `first`."""
        # One that is not below the last hop has begun at the top again.
        if self._reached is None or first >= self._reached:
            self._backward_deadline = self._spans.deadline()
        self._reached = first
        return self._backward_deadline


class Away(Protocol):
    """Runs work while other riders run; `Carousel.away` is one."""

    def __call__(self, work: Callable[[], Any]) -> Any: ...


@dataclass(frozen=True)
class Remote:
    """What the remote blocks of one model share.

    Attributes:
        spans: the machines.
        form: how the model's blocks are called.
        config: of the text model.
        away: runs a call to the machines.
        labels: of all caches.
    """

    spans: Spans
    form: BlockForm
    config: Any
    away: Away
    labels: LabelSource
