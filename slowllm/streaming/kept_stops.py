"""Keep the units that are asked for most in memory, a fixed number of each group, replaced slowly.

A layer between the reader of units and whoever asks for them. Knows how often each was asked for; knows neither experts nor
tokens. One visitor at a time, on any thread; another thread may ask meanwhile what is kept. Not the least recently used one gives way: a sweep comes round to each group once, and would evict just what it
needs next. A unit takes another's place when it has been asked for clearly more often. Where counts of earlier runs say which
units will stay, those take their places when they are first read, whatever was there before.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from slowllm.rounding import round_up
from slowllm.storage.spans import ALIGNMENT, Placement
from slowllm.streaming.buffers import Buffer
from slowllm.streaming.reader import Reader
from slowllm.streaming.stops import Stops, Weights

# A unit takes another's place when it was asked for so many times more often, and once more.
MARGIN = 1.5
# The counts of a group are halved when its units were asked for so many times on average, so that what was asked for long ago does
# not keep out for as long what is asked for now.
ENOUGH_COUNTS = 64


def _slot_bytes_of(unit: Sequence[Placement]) -> int:
    """Return the bytes that a unit takes in a slot, each tensor aligned."""
    return sum(round_up(placement.num_bytes, ALIGNMENT) for placement in unit)


class KeptStops(Stops):
    """Units of which some stay in memory.

    Args:
        reader: of all units.
        units: the tensors of each.
        groups: the units of each group, consecutive ones.
        num_kept: units of each group that may stay.
        counts: how often each unit was asked for in earlier runs, (U,) int64; by default nothing is known of any.
    Attributes:
        counts: how often each unit was asked for, what was long ago for less, (U,) int64.
        num_hits: how often a unit was asked for that was here.
    """

    def __init__(
        self,
        reader: Reader,
        units: Sequence[Sequence[Placement]],
        groups: Sequence[range],
        num_kept: int,
        counts: np.ndarray | None = None,
    ) -> None:
        self.num_stops, self.num_hits = len(units), 0
        self.counts = np.zeros(len(units), dtype=np.int64) if counts is None else counts.copy()
        self._reader, self._units = reader, units
        self._slot_bytes = max(map(_slot_bytes_of, units), default=0)
        self._groups = groups
        self._group_of = {unit: number for number, group in enumerate(groups) for unit in group}
        self._num_kept = [min(num_kept, len(group)) for group in groups]
        self._buffer = Buffer(self._slot_bytes * sum(self._num_kept))
        ends = list(itertools.accumulate(self._num_kept, initial=0))
        self._free = [list(range(first, end)) for first, end in itertools.pairwise(ends)]
        self._kept: list[dict[int, tuple[int, dict[str, Tensor]]]] = [{} for _ in groups]
        self._totals = [int(self.counts[group.start : group.stop].sum()) for group in groups]
        # Of each group, those that have a place by what was counted before.
        self._expected = [
            self._most_asked(group, count) for group, count in zip(groups, self._num_kept, strict=True)
        ]

    @property
    def buffers(self) -> list[np.ndarray]:
        """The memory that units are handed out in which stay, of whole pages; others are in that of the reader."""
        return [self._buffer.bytes]

    def is_kept(self, unit: int) -> bool:
        """Whether a unit is in memory to stay for now."""
        return unit in self._kept[self._group_of[unit]]

    @contextlib.contextmanager
    def visit(self, stop: int, upcoming: Sequence[int] = ()) -> Iterator[Weights]:
        """Hold a unit; see `Reader.visit`. What is here is not read ahead."""
        upcoming = [unit for unit in upcoming if not self.is_kept(unit)]
        self._count(stop)
        if (kept := self._kept[self._group_of[stop]].get(stop)) is not None:
            self.num_hits += 1
            self._reader.prefetch(upcoming)
            yield kept[1]
            return
        with self._reader.visit(stop, upcoming) as weights:
            yield weights
            if (slot := self._slot_for(stop)) is not None:
                self._kept[self._group_of[stop]][stop] = slot, self._copied(stop, weights, slot)

    def close(self) -> None:
        """Let the memory go. Weights handed out stay readable."""
        self._kept = [{} for _ in self._kept]
        self._buffer.release()

    def _most_asked(self, group: range, count: int) -> set[int]:
        """Return the units of a group that were asked for most, at most so many."""
        asked = [unit for unit in group if self.counts[unit]]
        return set(sorted(asked, key=lambda unit: -self.counts[unit])[:count])

    def _count(self, unit: int) -> None:
        number = self._group_of[unit]
        group = self._groups[number]
        self.counts[unit] += 1
        self._totals[number] += 1
        if self._totals[number] > ENOUGH_COUNTS * len(group):
            own = self.counts[group.start : group.stop]
            own //= 2
            self._totals[number] = int(own.sum())

    def _slot_for(self, unit: int) -> int | None:
        """Return a slot for a unit, which may be another's that gives way; None where it is not worth it."""
        number = self._group_of[unit]
        kept, free, expected = self._kept[number], self._free[number], self._expected[number]
        if free:
            return free.pop()
        if not kept:
            return None
        # Whoever came before one that is expected has had its slot for as long only.
        others = [one for one in kept if one not in expected] if unit in expected else []
        least = min(others or kept, key=lambda one: self.counts[one])
        if self.counts[unit] <= (self.counts[least] if others else MARGIN * self.counts[least] + 1):
            return None
        if not others:
            expected.discard(least)
        return kept.pop(least)[0]

    def _copied(self, unit: int, weights: Weights, slot: int) -> dict[str, Tensor]:
        memory = torch.from_numpy(self._buffer.bytes)
        begin = slot * self._slot_bytes
        copies = {}
        for placement in self._units[unit]:
            own = memory[begin : begin + placement.num_bytes]
            copy = own.view(placement.stored_dtype).view(placement.stored_shape)
            copies[placement.name] = copy.copy_(weights[placement.name])
            begin += round_up(placement.num_bytes, ALIGNMENT)
        return copies
