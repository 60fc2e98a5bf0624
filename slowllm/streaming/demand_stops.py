"""Bring units of weights when somebody asks for them: experts, of which no one knows ahead who is needed.

Knows units and their order; knows neither experts nor tokens. Each unit that is asked for is read once and handed over
in the order asked; what is expected behind them is read ahead as far as the ring has room. Where the order is free, units that
are in memory come first, so that the others are read meanwhile.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

from slowllm.streaming.stops import Stops, Weights


class DemandStops:
    """Units that are brought on demand, for one visitor at a time.

    Args:
        stops: units in the compute dtype, where they are computed with; some of them may stay in memory.
        is_kept: whether a unit is in memory to stay for now.
    Attributes:
        num_asked: units that were handed over.
        wait_seconds: that they were waited for.
    """

    def __init__(self, stops: Stops, is_kept: Callable[[int], bool]) -> None:
        self.num_asked, self.wait_seconds = 0, 0.0
        self._stops, self._is_kept = stops, is_kept

    def soonest_first(self, units: Sequence[int], ahead: Sequence[int] = ()) -> list[int]:
        """Return units in the order in which the disk is waited for least.

        Those that are in memory to stay come first, then those that were to be read ahead, then the others.

        Args:
            units: each once; among equals, their order stays.
            ahead: units that the last call expected (`then`), in the order in which they are read.
        """
        places = {unit: place for place, unit in enumerate(ahead)}
        return sorted(units, key=lambda unit: -1 if self._is_kept(unit) else places.get(unit, len(places)))

    def bring(self, units: Sequence[int], then: Sequence[int] = ()) -> Iterator[tuple[int, Weights]]:
        """Yield units with their weights, which are valid until the next is asked for.

        Args:
            units: each once, in the order in which they are used.
            then: expected by the next call, in order; a wrong guess costs a read.
        Raises:
            CheckpointError, OSError, RideError: see `Reader.visit`; the units behind one that cannot be brought come by
                another call.
        """
        for place, unit in enumerate(units):
            with self.holding(unit, [*units[place + 1 :], *then]) as weights:
                yield unit, weights

    @contextlib.contextmanager
    def holding(self, unit: int, upcoming: Sequence[int] = ()) -> Iterator[Weights]:
        """Hold one unit; `upcoming` are read meanwhile."""
        started = time.perf_counter()
        with self._stops.visit(unit, upcoming) as weights:
            self.wait_seconds += time.perf_counter() - started
            self.num_asked += 1
            yield weights
