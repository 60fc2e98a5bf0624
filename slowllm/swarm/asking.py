"""How a client asks one server, once: the seam between those who know the servers, check answers, and go on after failures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from torch import Tensor

from slowllm.modeling.remote_spans import Hop, Kept, Need
from slowllm.modeling.span import SpanCall, SpanGrads

# A deadline that is over: what is known must do, and nothing is waited for.
NO_WAIT = -math.inf


class AsksServers(Protocol):
    """Asks one server, once; `hops.Hops` does."""

    def route(
        self, first: int, need: Need, end: int | None = None, *, deadline: float = math.inf
    ) -> Sequence[Hop]:
        """Return hops from block `first` to block `end` - 1, or to the last block.

        Where those that are known do not do, others are looked for until the deadline, a time of `time.monotonic`.
        """

    def forward(self, call: SpanCall, hop: Hop, session: str | None, deadline: float) -> dict[int, Tensor]:
        """Compute a span at its server; give up at a time of `time.monotonic`."""

    def replay(
        self, calls: Sequence[SpanCall], hop: Hop, session: str, deadline: float, *, returns: bool
    ) -> list[dict[int, Tensor]]:
        """Fill a session by the calls in which it grew elsewhere; give up at a time of `time.monotonic`.

        Returns:
            what `forward` returns, of each call, if that is wanted.
        """

    def backward(self, call: SpanCall, hop: Hop, grads: Mapping[int, Tensor], deadline: float) -> SpanGrads:
        """Return the gradients of a call's inputs; give up at a time of `time.monotonic`."""

    def end_session(self, kept: Kept) -> Future[Any] | None:
        """Let a server forget a session; return what comes when it has, None where there is nothing to wait for."""

    def soon(self, work: Callable[[], object]) -> None:
        """Do a short piece of work on another thread. Takes no lock."""

    def is_leaving(self, peer: str) -> bool:
        """Whether a server has said that it will be gone soon."""

    def ban(self, peer: str, until: float) -> None:
        """Leave a server out of routes until a time of `time.monotonic`."""

    def name_of(self, peer: str) -> str:
        """Return how people know a server."""
