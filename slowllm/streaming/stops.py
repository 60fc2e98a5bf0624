"""The interface between a carousel and the source of its weights: a disk, memory, or other machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

Weights = Mapping[str, Tensor]
Direction = Literal["up", "down"]


class Stops(Protocol):
    """A source of weights, stop by stop."""

    num_stops: int

    def visit(self, stop: int, upcoming: Sequence[int] = ()) -> AbstractContextManager[Weights]:
        """Hold the weights of a stop for the length of the context; `upcoming` are the stops expected next."""


@runtime_checkable
class HeldStops(Stops, Protocol):
    """Stops that stay where they are, so that the weights of several may be used at once and by any thread."""

    def held_weights(self, stop: int) -> Weights | None:
        """Return the weights of a stop, which stay valid until the stops are closed; None where `visit` must bring them."""


@dataclass(frozen=True)
class Passage:
    """What happened at one stop.

    Attributes:
        stop: its number.
        direction: in which the carousel went.
        num_passed: visits served.
        wait_seconds: until the stop's weights were there.
        compute_seconds: that the visits took.
        began_at: when the carousel came to the stop, by `time.perf_counter`.
    """

    stop: int
    direction: Direction
    num_passed: int
    wait_seconds: float
    compute_seconds: float
    began_at: float = 0.0


@dataclass(frozen=True)
class StopRead:
    """How a stop came from files into memory.

    Attributes:
        stop: its number.
        began_at: when its first read began, by `time.perf_counter`.
        ended_at: when its last read ended; reads of other stops may lie between the two.
        read_bytes: bytes read from files.
    """

    stop: int
    began_at: float
    ended_at: float
    read_bytes: int


@dataclass
class Totals:
    """The sums of all passages since the carousel began; complete whenever a result is handed over."""

    num_passages: int = 0
    num_passed: int = 0
    wait_seconds: float = 0.0
    compute_seconds: float = 0.0
