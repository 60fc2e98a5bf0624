"""Matrices as GGUF files store them: rows of blocks, of which each has the scales and codes of its weights.

A weight is what ggml's reference computes in float32, rounded once to the compute dtype. `Coding.group` says that rows lie
in another order than the model has them: rows of (-1, a, b, c) whose second and third dimension change places; or, of four
numbers (n, a, b, c), the a rows of each of n groups, then the b rows of each, then the c rows. Numbers
that are stored plain, and have to be put in order or are stored plus one (norms of Gemma), are blocks of one weight.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from slowllm.storage.codecs import layout_constants
from slowllm.storage.codecs.base import Codec, Parts, PartShapes, bits_of, tiles_of
from slowllm.storage.codecs.gguf_grid_torch import GRID_DECODERS
from slowllm.storage.codecs.gguf_grids import ROW_LENGTHS, grid_of, signs_of
from slowllm.storage.codecs.gguf_torch import DECODERS
from slowllm.storage.codecs.team import Team
from slowllm.storage.gguf import BLOCKS, codec_name

# Numbers that are stored plain.
_PLAIN: Mapping[str, torch.dtype] = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
PLUS_ONE = "-plus-one"
# How many numbers say an order of groups; see the module.
_GROUPS = 4
# The codecs of numbers that are not rounded, and have only to be put in order.
PLAIN_NAMES = frozenset(codec_name(kind) for kind in _PLAIN)


class Gguf(Codec):
    """One type of block.

    Args:
        kind: such as ``q4_k``, or ``f32``.
        offset: that was added to the numbers before they were stored.
    """

    decodes_to_any: ClassVar[bool] = True

    def __init__(self, kind: str, offset: int = 0) -> None:
        # Of each object, where other codecs have one of their class.
        self.name = codec_name(kind) + (PLUS_ONE if offset else "")  # type: ignore[misc]
        self.kind, self.offset = kind, offset
        self.weights, self.block_bytes = BLOCKS.get(kind) or (1, _PLAIN[kind].itemsize)

    def has_parts(self, parts: PartShapes, num_rows: int, width: int, group: tuple[int, ...] = ()) -> bool:
        row_bytes = width // self.weights * self.block_bytes
        is_ordered = not group or (
            len(group) in (3, _GROUPS) and min(group) > 0 and num_rows % _rows_of(group) == 0
        )
        return (
            is_ordered
            and not width % self.weights
            and dict(parts) == {"blocks": ("U8", (num_rows, row_bytes))}
        )

    def decode(self, parts: Parts, out: Tensor, first: int, last: int, team: Team) -> None:
        if self.kind in _PLAIN or not layout_constants.IS_COMPILED or out.dtype == torch.float16:
            team.share(lambda low, high: self._by_torch(parts, out, first, low, high), first, last)
        else:
            team.share(lambda low, high: self._by_loop(parts, out, first, low, high), first, last)

    def _by_torch(self, parts: Parts, out: Tensor, origin: int, first: int, last: int) -> None:
        for rows, tile in tiles_of(first, last, parts.width, torch.float32):
            tile.copy_(self.decode_rows(parts, rows.start, rows.stop, torch.float32))
            out[rows.start - origin : rows.stop - origin] = tile

    def _by_loop(self, parts: Parts, out: Tensor, origin: int, first: int, last: int) -> None:
        from slowllm.storage.codecs.gguf_grid_kernels import GRID_LOOPS
        from slowllm.storage.codecs.gguf_kernels import LOOPS, Loop
        from slowllm.storage.codecs.gguf_pair_kernels import PAIR_LOOPS
        from slowllm.storage.codecs.gguf_super_kernels import SUPER_LOOPS

        if self.kind in ROW_LENGTHS:
            loop: Loop = functools.partial(GRID_LOOPS[self.kind], grid_of(self.kind), signs_of(self.kind))
        else:
            loop = LOOPS[self.kind] if self.kind in LOOPS else SUPER_LOOPS[self.kind]
        num_blocks = parts.width // self.weights
        blocks = parts.arrays["blocks"].view(parts.num_rows, num_blocks, self.block_bytes).numpy()
        stored = rows_in_file(torch.arange(first, last), parts.group).numpy()
        wanted = out[first - origin : last - origin]
        if out.dtype == torch.bfloat16 and self.kind in PAIR_LOOPS:
            pairs = wanted.view(torch.int32).numpy().view(np.uint32).reshape(len(stored), num_blocks, -1)
            PAIR_LOOPS[self.kind](blocks, blocks.view(np.uint16), stored, pairs)
        elif out.dtype == torch.float32:
            loop(
                blocks, stored, wanted.view(-1, num_blocks, self.weights).numpy(), np.empty((0, 0), np.uint16)
            )
        else:
            row = np.empty((1, num_blocks, self.weights), np.float32)
            loop(blocks, stored, row, bits_of(wanted))

    def decode_rows(self, parts: Parts, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Return the rows `first` to `last` in a dtype, by operations of torch, on any device."""
        blocks = parts.arrays["blocks"]
        if parts.group:
            blocks = blocks[rows_in_file(torch.arange(first, last, device=blocks.device), parts.group)]
        else:
            blocks = blocks[first:last]
        if self.kind in _PLAIN:
            values = _numbers(blocks, _PLAIN[self.kind])
            return (values.float() - self.offset).to(dtype) if self.offset else values.to(dtype)
        decode = GRID_DECODERS[self.kind] if self.kind in ROW_LENGTHS else DECODERS[self.kind]
        return decode(blocks.reshape(-1, self.block_bytes)).view(last - first, -1).to(dtype)

    def pick(self, parts: Parts, rows: Tensor) -> Parts:
        blocks = parts.arrays["blocks"][rows_in_file(rows, parts.group)]
        return Parts({"blocks": blocks}, len(rows), parts.width)

    def example(self) -> Parts:
        blocks = torch.zeros(2, self.block_bytes, dtype=torch.uint8)
        return Parts({"blocks": blocks}, 2, self.weights)


def _numbers(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """Return bytes (R, K) as numbers, where they lie at an odd address after a copy."""
    if blocks.data_ptr() % dtype.itemsize:
        blocks = blocks.clone()
    return blocks.contiguous().view(dtype)


def _rows_of(group: tuple[int, ...]) -> int:
    """Return how many rows are put in order together."""
    return group[0] * sum(group[1:]) if len(group) == _GROUPS else math.prod(group)


def rows_in_file(rows: Tensor, group: tuple[int, ...]) -> Tensor:
    """Return where rows of the matrix lie in the file; see the module."""
    if not group:
        return rows
    if len(group) == _GROUPS:
        num_groups, first, second, third = group
        inside = rows % _rows_of(group)
        number, place = inside // (first + second + third), inside % (first + second + third)
        in_first = number * first + place
        in_second = num_groups * first + number * second + place - first
        in_third = num_groups * (first + second) + number * third + place - first - second
        in_others = torch.where(place < first + second, in_second, in_third)
        return rows - inside + torch.where(place < first, in_first, in_others)
    outer, inner, length = group
    size = math.prod(group)
    place = rows % size
    major, minor, rest = place // (outer * length), place // length % outer, place % length
    return rows - place + (minor * inner + major) * length + rest


GGUF_CODECS: tuple[Gguf, ...] = (
    *(Gguf(kind) for kind in (*BLOCKS, *_PLAIN)),
    *(Gguf(kind, 1) for kind in _PLAIN),
)
