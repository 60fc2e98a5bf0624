"""Keys and values of conversations that have ended for now, found again by the tokens with which the next one begins.

Whoever was used longest ago goes first. Knows tokens and caches; knows no model.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from slowllm.inference.live_cache import RowCache
from slowllm.inference.prefix_sharing import common

# Fewer tokens than this are computed again, because each prompt that continues kept ones makes its first pass alone.
LEAST_TOKENS = 16


class KeptCaches:
    """Caches of single rows, of so many tokens in all. Thread-safe.

    Args:
        max_tokens: that are kept; 0 to keep nothing.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._lock = threading.Lock()
        self._kept: dict[tuple[int, ...], RowCache] = {}  # those used last are last
        self.num_tokens = self.num_found_tokens = 0

    def take(self, ids: Sequence[int]) -> RowCache | None:
        """Return a copy of what is kept of the longest beginning of a prompt, but for its last token; None where it is short."""
        ids = tuple(ids)
        with self._lock:
            best = max(self._kept, key=lambda other: common(other, ids), default=())
            length = min(common(best, ids), len(ids) - 1)
            if length < LEAST_TOKENS:
                return None
            cache = self._kept.pop(best)
            self._kept[best] = cache
            self.num_found_tokens += length
        return cache.beginning(length)

    def keep(self, ids: Sequence[int], cache: RowCache) -> None:
        """Keep the cache of one row, which belongs to the caller no more.

        Args:
            ids: of the tokens whose keys and values it has.
            cache: without padding.
        """
        ids = tuple(ids)
        assert cache.mask.shape == (1, len(ids)), "the cache of these tokens"
        if not LEAST_TOKENS <= len(ids) <= self.max_tokens:
            return
        with self._lock:
            for other in [other for other in self._kept if common(other, ids) == min(len(other), len(ids))]:
                if len(other) > len(ids):  # it has these, too
                    return
                del self._kept[other]
                self.num_tokens -= len(other)
            self._kept[ids] = cache
            self.num_tokens += len(ids)
            while self.num_tokens > self.max_tokens:
                oldest = next(iter(self._kept))
                del self._kept[oldest]
                self.num_tokens -= len(oldest)
