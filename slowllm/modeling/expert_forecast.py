"""Which experts will the next block's router choose, as far as it can be told from what routers chose before?

Counts what was chosen. Pure bookkeeping: reads nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

# From this share of a block's experts on, the next block's are read ahead of its router: most of them will be needed, and
# as few as the ring holds are read in vain. Below, each is read when the router has named it.
NEARLY_ALL = 0.75


class ExpertForecast:
    """What routers chose so far.

    Args:
        counts: of the experts of each module, in the order of the blocks.
    Attributes:
        chosen: how many sweeps needed each unit, (U,) int64.
        num_sweeps: that passed each module, by the unit of its first expert.
        num_ahead: units that were named to be read ahead of a router.
        num_hit: those of them that the router then chose.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        ends = list(itertools.accumulate(counts, initial=0))
        self._following = dict(itertools.pairwise(ends[:-1]))
        self._size = dict(zip(ends, counts, strict=False))
        self._last: dict[int, list[int]] = {}
        self._named: dict[int, set[int]] = {}
        self.chosen = np.zeros(ends[-1], dtype=np.int64)
        self.num_sweeps = dict.fromkeys(ends[:-1], 0)
        self.num_ahead = self.num_hit = 0

    def saw(self, first: int, chosen: Iterable[int]) -> None:
        """Note which experts of a module a sweep needed.

        Args:
            first: the unit of the module's first expert.
            chosen: numbers in the module.
        """
        self._last[first] = sorted(chosen)
        units = [first + number for number in self._last[first]]
        self.chosen[units] += 1
        self.num_sweeps[first] += 1
        named = self._named.pop(first, set())
        self.num_hit += len(named & set(units))

    def ahead_of(self, first: int, chosen: Sequence[int]) -> list[int]:
        """Return the units that are worth reading ahead while a module computes: of the next module, in order.

        Behind the last module nothing is, because another sweep may not come.

        Args:
            first: the unit of the module's first expert.
            chosen: numbers in the module that this sweep needs.
        """
        following = self._following.get(first)
        if following is None:
            return []
        size, before = self._size[following], self._last.get(following)
        share = len(chosen) / self._size[first] if before is None else len(before) / size
        if share < NEARLY_ALL:
            return []
        units = [following + number for number in (range(size) if before is None else before)]
        self.num_ahead += len(units)
        self._named[following] = set(units)
        return units
