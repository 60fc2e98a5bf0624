"""Pieces of token sequences that begin alike: what several have in common is there once.

A piece hangs at the place of another where it goes on otherwise, or goes on at all; pieces are never divided, so that a piece may
be a file. The idea is that of a radix tree, as SGLang keeps its caches by (Zheng et al., 2024). Knows tokens only. Not thread-safe.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from slowllm.inference.prefix_sharing import common

T = TypeVar("T")


@dataclass(eq=False)
class Piece(Generic[T]):
    """Some tokens behind those of another piece.

    Attributes:
        ids: its own tokens.
        content: that belongs to them.
        parent: that it hangs at; None where it is a beginning.
        start: how many tokens of the parent come before it.
        children: that hang at it, by their `start` and first token.
    """

    ids: tuple[int, ...]
    content: T
    parent: Piece[T] | None = None
    start: int = 0
    children: dict[tuple[int, int], Piece[T]] = field(default_factory=dict)

    @property
    def num_needed(self) -> int:
        """How many of its tokens come before others'."""
        return max((start for start, _ in self.children), default=0)


# Pieces of one sequence, each with the number of its tokens that belong to it.
Path = list[tuple[Piece[T], int]]


def length_of(path: Path[T]) -> int:
    """Return the number of tokens of a path."""
    return sum(num_own for _, num_own in path)


class TokenTree(Generic[T]):
    """Pieces, those first that were used longest ago."""

    def __init__(self) -> None:
        self._beginnings: dict[int, Piece[T]] = {}
        self._used: dict[Piece[T], None] = {}

    def __iter__(self) -> Iterator[Piece[T]]:
        return iter(list(self._used))

    def __len__(self) -> int:
        return len(self._used)

    def find(self, ids: Sequence[int]) -> Path[T]:
        """Return the pieces with which a sequence begins."""
        path: Path[T] = []
        rest = tuple(ids)
        piece = self._beginnings.get(rest[0]) if rest else None
        while piece is not None:
            num_own = common(piece.ids, rest)
            path.append((piece, num_own))
            rest = rest[num_own:]
            piece = piece.children.get((num_own, rest[0])) if rest else None
        return path

    def touch(self, path: Path[T]) -> None:
        """Note that pieces are used now."""
        for piece, _ in path:
            if piece in self._used:  # it may have been removed since it was found
                del self._used[piece]
                self._used[piece] = None

    def add(self, path: Path[T], ids: tuple[int, ...], content: T) -> Piece[T]:
        """Hang a piece behind a path.

        Args:
            path: from `find`, of the whole sequence.
            ids: that are behind it, at least one.
            content: of these.
        """
        if not path:
            piece = Piece(ids, content)
            assert ids[0] not in self._beginnings, "find() would have found it"
            self._beginnings[ids[0]] = piece
        else:
            parent, start = path[-1]
            piece = Piece(ids, content, parent, start)
            assert (start, ids[0]) not in parent.children, "find() would have found it"
            parent.children[start, ids[0]] = piece
        self._used[piece] = None
        return piece

    def remove(self, piece: Piece[T]) -> list[T]:
        """Take out a piece and all that hang at it; return their contents. One that is out already has none."""
        if piece not in self._used:
            return []
        contents = [content for child in list(piece.children.values()) for content in self.remove(child)]
        if piece.parent is None:
            del self._beginnings[piece.ids[0]]
        else:
            del piece.parent.children[piece.start, piece.ids[0]]
        del self._used[piece]
        return [piece.content, *contents]
