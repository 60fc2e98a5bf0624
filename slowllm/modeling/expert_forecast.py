"""Which experts will the next block's router choose, as far as it can be told from what routers chose before?

Counts what was chosen. Pure bookkeeping: reads nothing.
"""

from __future__ import annotations

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
        num_ahead: units that were named to be read ahead of a router.
        num_hit: those of them that the router then chose.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self._counts = list(counts)
        self._firsts = [int(first) for first in np.cumsum([0, *counts[:-1]])] if counts else []
        self._next = dict(zip(self._firsts, [*self._firsts[1:], *self._firsts[:1]], strict=True))
        self._size = dict(zip(self._firsts, counts, strict=True))
        self._last: dict[int, list[int]] = {}
        self._named: dict[int, set[int]] = {}
        self.chosen = np.zeros(sum(counts), dtype=np.int64)
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
        named = self._named.pop(first, set())
        self.num_hit += len(named & set(units))

    def ahead_of(self, first: int) -> list[int]:
        """Return the units that are worth reading ahead while a module computes: of the next module, in order."""
        following = self._next[first]
        if following == first:
            return []
        before = self._last.get(following)
        last = self._last.get(first) if before is None else before
        if last is None:
            return []
        share = len(last) / self._size[first if before is None else following]
        if share < NEARLY_ALL:
            return []
        numbers = range(self._size[following]) if before is None else before
        units = [following + number for number in numbers]
        self.num_ahead += len(units)
        self._named[following] = set(units)
        return units
