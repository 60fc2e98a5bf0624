"""Which stops the carousel will probably visit next, so that those are prefetched and no others.

Pure functions of what waiting visits say of themselves. The reader goes by the guess: a wrong one costs one read.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from slowllm.streaming.stops import Direction


@dataclass(frozen=True)
class Reach:
    """Which stops a thread will visit. Without it, stops would be read that no rider waits for.

    Attributes:
        first: the lowest stop that it visits more than once; those below it are visited at most once.
        end: the number of stops from 0 that it visits on the way up; None for all.
        turn: the number of stops from 0 that it visits again on the way down, if it comes down; None for all.
        again: whether it, or another after it, goes up again after coming down.
    """

    first: int = 0
    end: int | None = None
    turn: int | None = None
    again: bool = True


class Hinting(Protocol):
    """A visit that waits, with its hints; see `riders.Visit`."""

    stop: int
    direction: Direction
    comes_back: bool
    comes_round: bool
    reach: Reach


def expected_stops(
    stop: int, direction: Direction, num_stops: int, waiting: Collection[Hinting], *, has_jobs: bool
) -> list[int]:
    """Return the stops that are expected after this one, in order, each once.

    Args:
        stop: where the carousel is.
        direction: in which it goes.
        num_stops: of the carousel.
        waiting: visits that are not served yet, those at `stop` included.
        has_jobs: whether a job waits for a seat.
    """
    reaches = [visit.reach for visit in waiting] or [Reach()]
    first = min(reach.first for reach in reaches)
    end = max(num_stops if reach.end is None else reach.end for reach in reaches)
    if direction == "down":
        # The way up begins with the stop at which the way down ended, which need not be read twice.
        upward = range(first, end) if any(reach.again for reach in reaches) else ()
        return list(dict.fromkeys([*range(stop - 1, first - 1, -1), *upward]))
    onward = range(stop + 1, end)
    if any(visit.comes_back or visit.direction == "down" for visit in waiting):
        turn = max(end if reach.turn is None else reach.turn for reach in reaches)
        return list(dict.fromkeys([*onward, *range(turn - 1, first - 1, -1)]))
    # Stops below are visited next only if a visit waits there, or one is likely to come.
    goes_round = has_jobs or any(visit.stop < stop or visit.comes_round for visit in waiting)
    return [*onward, *range(first, stop)] if goes_round else [*onward]
