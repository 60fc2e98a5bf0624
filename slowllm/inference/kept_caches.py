"""Keys and values of conversations that have ended for now, found again by the tokens with which the next one begins.

In memory, and in a folder on disk where there is one. What conversations have in common is kept once; what was used longest ago
goes first. Knows tokens and caches; knows no model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from slowllm.inference.cache_folder import CacheFolder
from slowllm.inference.live_cache import LEAST_TOKENS, RowCache, behind_one_another
from slowllm.inference.stored_layers import DamagedCacheError
from slowllm.inference.token_tree import TokenTree, length_of


@dataclass(frozen=True)
class FoundCache:
    """A cache that has a beginning of a prompt.

    Attributes:
        num_tokens: of the beginning.
        load: returns a copy of it, which may need the disk; None where it has gone since.
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
        self._kept: TokenTree[RowCache] = TokenTree()
        self.num_tokens = self.num_found_tokens = 0

    @property
    def keeps_any(self) -> bool:
        """Whether anything is kept."""
        return self.max_tokens > 0 or self._folder is not None

    def find(self, ids: Sequence[int]) -> FoundCache | None:
        """Return the longest beginning of a prompt that is kept, but for its last token; None where it is short."""
        with self._lock:
            held = self._kept.find(ids)
            self._kept.touch(held)
        stored = [] if self._folder is None else self._folder.find(ids)
        num_held, num_stored = (min(length, len(ids) - 1) for length in (length_of(held), length_of(stored)))
        num_tokens = max(num_held, num_stored)
        if num_tokens < LEAST_TOKENS:
            return None
        with self._lock:
            self.num_found_tokens += num_tokens
        if num_held == num_tokens:
            # The contents now: a piece may be cut before they are needed.
            contents = [(piece.content, num_own) for piece, num_own in held]
            return FoundCache(num_tokens, lambda: _beginning(contents, num_tokens))
        assert self._folder is not None, "it has the longer one"
        folder = self._folder
        return FoundCache(num_tokens, lambda: folder.load(stored, num_tokens))

    def forget(self, error: DamagedCacheError) -> None:
        """Leave a file aside that has turned out to be damaged."""
        if self._folder is not None:
            self._folder.forget(error.path)

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
            path = self._kept.find(ids)
            self._kept.touch(path)
            if num_new := len(ids) - length_of(path):
                new = cache if not path else cache.columns(len(ids) - num_new, len(ids))
                self._kept.add(path, ids[-num_new:], new)
                self.num_tokens += num_new
            self._make_room()

    def _make_room(self) -> None:
        while self.num_tokens > self.max_tokens:
            # The first that need not be there as a whole; there is one, because the last of a branch need not.
            piece = next(piece for piece in self._kept if piece.num_needed < len(piece.ids))
            if not piece.num_needed:
                self._kept.remove(piece)
            else:
                piece.content = piece.content.columns(0, piece.num_needed)
            self.num_tokens -= len(piece.ids) - piece.num_needed
            piece.ids = piece.ids[: piece.num_needed]


def _beginning(contents: Sequence[tuple[RowCache, int]], num_tokens: int) -> RowCache:
    """Return a copy of the first tokens of caches that go on from one another."""
    parts, left = list[RowCache](), num_tokens
    for content, num_own in contents:
        if left:
            parts.append(content.columns(0, min(num_own, left)))
            left -= parts[-1].mask.shape[1]
    return behind_one_another(parts)
