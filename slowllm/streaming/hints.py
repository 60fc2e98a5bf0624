"""What a thread says of the stops that it will visit, so that no others are prefetched."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Reach:
    """Where a thread will go: a hint for the reader, which would else read what nobody waits for.

    Attributes:
        first: the lowest stop that it comes to, but for a first visit to those below.
        end: the number of stops from 0 that it comes to on the way up; None for all.
        turn: the number of stops from 0 that it comes to again on the way down, where it comes down; None for all.
        again: whether it, or another after it, goes up again when it has come down.
    """

    first: int = 0
    end: int | None = None
    turn: int | None = None
    again: bool = True


reach: ContextVar[Reach] = ContextVar("reach", default=Reach())  # noqa: B039 (frozen)
