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


class Spans(Protocol):
    """The machines that hold the blocks. `forward` and `backward` block until they are answered."""

    def route(self, first: int, num_tokens: int, *, keeps_cache: bool, wants_grad: bool) -> Sequence[Hop]:
        """Return hops from block `first` to the last block, for one call of the model.

        Args:
            first: the block that is to be computed next.
            num_tokens: of the call.
            keeps_cache: whether later calls will continue this one.
            wants_grad: whether a backward pass will follow.
        """

    def forward(self, call: SpanCall, hop: Hop, session: str | None) -> dict[int, Tensor]:
        """Compute a span; within a session, its keys and values are read and kept.

        Returns:
            the hidden states (B, T, ...) behind the last block, or behind each if the call asks for all.
        """

    def backward(self, call: SpanCall, hop: Hop, grads: Mapping[int, Tensor]) -> SpanGrads:
        """Return the gradients of a call's inputs."""

    def end_session(self, kept: Kept) -> None:
        """Let go of what a session keeps. Does not wait, does not raise, and takes no lock: finalizers call it."""


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
