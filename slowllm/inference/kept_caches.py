"""Keys and values of conversations that have ended for now, found again by the tokens with which the next one begins.

In memory, and in a folder on disk where there is one. Whoever was used longest ago goes first. Knows tokens and caches; knows
no model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from slowllm.inference.cache_folder import CacheFolder
from slowllm.inference.live_cache import RowCache
from slowllm.inference.prefix_sharing import common

# Fewer tokens than this are computed again, because each prompt that continues kept ones makes its first pass alone.
LEAST_TOKENS = 16


@dataclass(frozen=True)
class FoundCache:
    """A cache that has a beginning of a prompt.

    Attributes:
        num_tokens: of the beginning.
        load: returns a copy of it, which may take as long as reading it from disk; None where it has gone since.
    """

    num_tokens: int
    load: Callable[[], RowCache | None]


class KeptCaches:
    """Caches of single rows, of so many tokens in all. Thread-safe.

    Args:
        max_tokens: that are kept in memory; 0 to keep nothing there.
        folder: where they are kept as well; closed by who made it.
    """

    def __init__(self, max_tokens: int, folder: CacheFolder | None = None) -> None:
        self.max_tokens, self._folder = max_tokens, folder
        self._lock = threading.Lock()
        self._kept: dict[tuple[int, ...], RowCache] = {}  # those used last are last
        self.num_tokens = self.num_found_tokens = 0

    @property
    def keeps_any(self) -> bool:
        """Whether anything is kept."""
        return self.max_tokens > 0 or self._folder is not None

    def find(self, ids: Sequence[int]) -> FoundCache | None:
        """Return the longest beginning of a prompt that is kept, but for its last token; None where it is short."""
        ids = tuple(ids)
        with self._lock:
            best, length = _best(self._kept, ids)
            held = self._kept.pop(best, None)
            if held is not None:
                self._kept[best] = held
        stored, longer = _best([] if self._folder is None else self._folder.conversations, ids)
        if max(length, longer) < LEAST_TOKENS:
            return None
        with self._lock:
            self.num_found_tokens += max(length, longer)
        if held is not None and length >= longer:
            return FoundCache(length, lambda: held.beginning(length))
        assert self._folder is not None, "it has the longer one"
        folder = self._folder

        def load() -> RowCache | None:
            cache = folder.load(stored)
            return None if cache is None else cache.beginning(longer)

        return FoundCache(longer, load)

    def keep(self, ids: Sequence[int], cache: RowCache) -> None:
        """Keep the cache of one row, which belongs to the caller no more.

        Args:
            ids: of the tokens whose keys and values it has.
            cache: without padding.
        """
        ids = tuple(ids)
        assert cache.mask.shape == (1, len(ids)), "the cache of these tokens"
        if len(ids) < LEAST_TOKENS:
            return
        if self._folder is not None:
            self._folder.save(ids, cache)
        if len(ids) > self.max_tokens:
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


def _best(kept: Iterable[tuple[int, ...]], ids: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """Return what begins most like a prompt, and how many tokens of it may be taken from there."""
    best = max(kept, key=lambda other: common(other, ids), default=())
    return best, min(common(best, ids), len(ids) - 1)
