"""Bring units of weights when somebody asks for them: experts, of which no one knows ahead who is needed.

Knows units and their order; knows neither experts nor tokens. Each unit that is asked for is read once and handed over
in the order asked; what is expected behind them is read ahead as far as the ring has room.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from slowllm.streaming.reader import Reader, ReadStats
from slowllm.streaming.stops import Stops, Weights


@dataclass
class DemandStats:
    """What was asked for so far.

    Attributes:
        num_asked: units that were handed over.
        num_resident: those of them that were in memory to stay.
        num_calls: calls of `bring`.
    """

    num_asked: int = 0
    num_resident: int = 0
    num_calls: int = 0


class DemandStops:
    """Units that are brought on demand, for one visitor at a time.

    Args:
        reader: of the units, each a stop there.
        stops: the same in the compute dtype; the reader itself where nothing is cast.
        resident: units that stay in memory once they are read.
    Attributes:
        stats: what was asked for so far.
    """

    def __init__(self, reader: Reader, stops: Stops, resident: frozenset[int] = frozenset()) -> None:
        self.stats = DemandStats()
        self._reader, self._stops, self._resident = reader, stops, resident

    @property
    def read_stats(self) -> ReadStats:
        """What reading cost so far."""
        return self._reader.stats

    def bring(self, units: Sequence[int], then: Sequence[int] = ()) -> Iterator[tuple[int, Weights]]:
        """Yield units with their weights, which are valid until the next is asked for.

        Args:
            units: each once, in the order in which they are used.
            then: expected by the next call, in order; a wrong guess costs a read.
        Raises:
            CheckpointError, OSError, RideError: see `Reader.visit`; the units behind one that cannot be read are brought
                by another call.
        """
        self.stats.num_calls += 1
        for place, unit in enumerate(units):
            with self.holding(unit, [*units[place + 1 :], *then]) as weights:
                yield unit, weights

    @contextlib.contextmanager
    def holding(self, unit: int, upcoming: Sequence[int] = ()) -> Iterator[Weights]:
        """Hold one unit; `upcoming` are read meanwhile."""
        with self._stops.visit(unit, upcoming) as weights:
            self.stats.num_asked += 1
            self.stats.num_resident += unit in self._resident
            yield weights

    def prefetch(self, units: Sequence[int]) -> None:
        """Have units read ahead that are expected next, instead of those that were expected before."""
        self._reader.prefetch(units)
