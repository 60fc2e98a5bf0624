"""What is a codec, and what do codecs share? Parts of a coded matrix, tiles."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from slowllm.storage.codecs.layout_constants import CHUNK, IS_COMPILED
from slowllm.storage.codecs.team import OneThread, Team
from slowllm.storage.codecs.tiles import DecodeRows, multiply_tiles
from slowllm.storage.spans import TORCH_DTYPES, Coding

# A codec that decodes before it multiplies does so in tiles that stay in the processor's cache.
TILE_BYTES = 4 << 20
# From this number of rows on, integer products are faster than bf16 products of the same numbers.
MIN_INTEGER_ROWS = 48

# The dtype (safetensors' name) and the shape of each part, by name and in order.
PartShapes = Mapping[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Parts:
    """The stored arrays of one matrix, in memory.

    Attributes:
        arrays: by the name of the part.
        num_rows, width: of the matrix.
        group: see `Coding`.
        rows: of a matrix that is put together of several, each with the name of its codec, its first row and its parts, in order.
        offset: see `Coding`.
    """

    arrays: Mapping[str, Tensor]
    num_rows: int
    width: int
    group: tuple[int, ...] = ()
    rows: tuple[tuple[str, int, Parts], ...] = ()
    offset: float = 0.0

    @classmethod
    def of(cls, stored: Tensor, coding: Coding, shape: tuple[int, ...]) -> Parts:
        """Return views of the parts in `stored` (num_bytes,) uint8, which holds a matrix of this shape."""
        arrays = {}
        for part in coding.parts:
            dtype = TORCH_DTYPES[part.dtype]
            num_bytes = math.prod(part.shape) * dtype.itemsize
            arrays[part.name] = (
                stored[part.offset : part.offset + num_bytes].view(dtype).view(part.shape)
                if num_bytes
                else torch.empty(part.shape, dtype=dtype, device=stored.device)
            )
        rows = tuple(
            (own.coding.codec, own.first, cls.of(stored, own.coding, (own.num_rows, shape[-1])))
            for own in sorted(coding.rows, key=lambda own: own.first)
        )
        return cls(arrays, math.prod(shape[:-1]), shape[-1], coding.group, rows, coding.offset)


class Codec(ABC):
    """One way in which a matrix is stored."""

    name: ClassVar[str]
    # Whether the decoded numbers are those that were encoded, whatever they were.
    is_exact: ClassVar[bool] = False
    # Whether it decodes to any floating dtype by itself; otherwise to bfloat16 only.
    decodes_to_any: ClassVar[bool] = False
    # Arrays of int32 that say which scale a column has: the dimension of the scales that they count along, and their least number.
    picks: ClassVar[Mapping[str, tuple[int, int]]] = {}
    # Arrays of bytes that are scales: the bytes that are NaN.
    nan_bytes: ClassVar[Mapping[str, tuple[int, ...]]] = {}
    # Arrays whose numbers are divided by.
    divisors: ClassVar[frozenset[str]] = frozenset()
    # How often the bytes of the decoded matrix go through memory in a product of a few rows, not counting those of
    # the stored matrix. Plans use it: compiled decoding is as fast as memory.
    passes: ClassVar[float] = 2.0
    # Whether products of many rows are made of the decoded matrix.
    is_decoded: ClassVar[bool] = True

    @abstractmethod
    def has_parts(self, parts: PartShapes, num_rows: int, width: int, group: tuple[int, ...] = ()) -> bool:
        """Whether these are the parts of such a matrix; `decode` relies on it."""

    @abstractmethod
    def decode(self, parts: Parts, out: Tensor, first: int, last: int, team: Team) -> None:
        """Write the rows `first` to `last` to `out` (last - first, K), bfloat16 or see `decodes_to_any`, contiguous."""

    def multiply(
        self, x: Tensor, parts: Parts, first: int, last: int, team: Team, bias: Tensor | None = None
    ) -> Tensor | None:
        """Return `x` (M, K) times the rows `first` to `last`, transposed, plus `bias` (last - first,); None to have them decoded.

        By default they are decoded tile by tile, where few rows are multiplied, with the bits of the whole product.
        """
        found = self.multiply_each([x], parts, first, last, team, bias)
        return None if found is None else found[0]

    def multiply_plain(self, x: Tensor, parts: Parts, first: int, last: int, team: Team) -> Tensor | None:
        """Return `x` (M, last - first) times the rows `first` to `last`, not transposed; None to have them decoded."""
        found = self.multiply_each([x], parts, first, last, team, is_plain=True)
        return None if found is None else found[0]

    def multiply_each(
        self,
        xs: Sequence[Tensor],
        parts: Parts,
        first: int,
        last: int,
        team: Team,
        bias: Tensor | None = None,
        *,
        is_plain: bool = False,
    ) -> list[Tensor] | None:
        """Multiply several inputs (M, K), or (M, last - first) if plain, each as if alone, while each tile is decoded once.

        None to have the rows decoded, which gives the same bits.
        """
        decode = self.tiles(parts, first, last, is_plain=is_plain)
        if decode is None:
            return None
        return multiply_tiles(xs, parts.width if is_plain else last - first, decode, team, bias)

    def tiles(self, parts: Parts, first: int, last: int, *, is_plain: bool) -> DecodeRows | None:
        """Return what decodes rows between `first` and `last` on one thread, or if plain, columns as rows; None if nothing does."""
        if is_plain or not IS_COMPILED:
            return None
        alone = OneThread()

        def decode(out: Tensor, begin: int, end: int) -> None:
            self.decode(parts, out, first + begin, first + end, alone)

        return decode

    def pick(self, parts: Parts, rows: Tensor) -> Parts | None:
        """Return the parts of some rows (N,) int64, in their order; None where a row does not lie by itself."""
        return None

    @abstractmethod
    def example(self) -> Parts:
        """Return the parts of a small matrix."""

    def warm_up(self, team: Team) -> None:
        """Load the loops that decode, or compile them, before memory and time are measured."""
        self._decode_all(self.example(), team)

    def _decode_all(self, parts: Parts, team: Team) -> None:
        for dtype in (torch.bfloat16, torch.float32) if self.decodes_to_any else (torch.bfloat16,):
            out = torch.empty(parts.num_rows, parts.width, dtype=dtype)
            self.decode(parts, out, 0, parts.num_rows, team)


class StoreCodec(Codec):
    """A codec that encodes as well. By default its parts have sizes that depend on the matrix's shape alone."""

    def unit(self, width: int) -> int:
        """Return the number of weights that the size of each piece, but the last, must be a multiple of."""
        return width

    @abstractmethod
    def layout(self, num_rows: int, width: int) -> PartShapes:
        """Return the parts of a matrix whose sizes are known before it is encoded."""

    @abstractmethod
    def encode(self, piece: Tensor, width: int) -> dict[str, Tensor]:
        """Encode a flat piece of a matrix; the arrays of successive pieces are joined along their first axis."""

    def finish(self, loose: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
        """Return the further parts, in order, from those arrays of all pieces that `layout` does not name."""
        return {}

    def join(self, pieces: Sequence[Mapping[str, Tensor]], num_rows: int, width: int) -> Parts:
        """Return the parts of a matrix from what `encode` returned for each of its pieces."""
        arrays = {name: [piece[name] for piece in pieces] for name in pieces[0]}
        parts = {
            name: torch.cat(arrays.pop(name)).view(shape)
            for name, (_, shape) in self.layout(num_rows, width).items()
        }
        return Parts({**parts, **self.finish(arrays)}, num_rows, width)

    def has_parts(self, parts: PartShapes, num_rows: int, width: int, group: tuple[int, ...] = ()) -> bool:
        return dict(parts) == self.layout(num_rows, width)

    def example(self) -> Parts:
        matrix = torch.ones(2, CHUNK // 2, dtype=torch.bfloat16)
        return self.join([self.encode(matrix.view(-1), CHUNK // 2)], 2, CHUNK // 2)


def tiles_of(low: int, high: int, width: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield ranges of rows, each with a buffer that is small enough to stay in the cache."""
    num_rows = max(1, TILE_BYTES // (dtype.itemsize * width))
    buffer = torch.empty(min(num_rows, high - low), width, dtype=dtype)
    for begin in range(low, high, num_rows):
        end = min(begin + num_rows, high)
        yield slice(begin, end), buffer[: end - begin]


def bits_of(out: Tensor) -> np.ndarray:
    """Return the bits of a bf16 tensor as uint16, on the same memory."""
    bits: np.ndarray = out.view(torch.int16).numpy().view(np.uint16)
    return bits
