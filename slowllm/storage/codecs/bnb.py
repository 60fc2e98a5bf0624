"""Numbers of 4 bits with scales for blocks, and whole numbers of 8 bits with a scale for a row, as bitsandbytes stores them.

A weight of 4 bits is a number of a table (nf4 or fp4) times the scale of its block, multiplied in float32 and rounded once, as
bitsandbytes' products do since version 0.46; blocks run on from row to row. The scales may be coded in 8 bits themselves, by a
table, with a scale for 256 of them and a mean for all. A weight of 8 bits is code * scale * (1 / 127), each product rounded to
float32, as `int8_vectorwise_dequant` has it.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from slowllm.rounding import ceil_div
from slowllm.storage.codecs.base import Codec, Parts, PartShapes, bits_of
from slowllm.storage.codecs.layout_constants import IS_COMPILED
from slowllm.storage.codecs.team import Team

# Scales that share a scale.
NESTED = 256
_TILE_WEIGHTS = 1 << 22
_INVERSE = 1 / 127


class BnbNibbles(Codec):
    """Numbers of 4 bits; `Coding.group` has the length of a block, and `Coding.offset` the mean of coded scales."""

    name: ClassVar[str] = "bnb_4bit"
    decodes_to_any: ClassVar[bool] = True

    def has_parts(self, parts: PartShapes, num_rows: int, width: int, group: tuple[int, ...] = ()) -> bool:
        if len(group) != 1 or group[0] < 1:
            return False
        size = num_rows * width
        blocks = ceil_div(size, group[0])
        wanted: dict[str, tuple[str, tuple[int, ...]]] = {
            "codes": ("U8", (ceil_div(size, 2),)),
            "table": ("F32", (16,)),
        }
        plain = {**wanted, "scales": ("F32", (blocks,))}
        nested = {
            **wanted,
            "scales": ("U8", (blocks,)),
            "scale_table": ("F32", (256,)),
            "scale_scales": ("F32", (ceil_div(blocks, NESTED),)),
        }
        return dict(parts) in (plain, nested)

    def decode(self, parts: Parts, out: Tensor, first: int, last: int, team: Team) -> None:
        if not IS_COMPILED or out.dtype not in (torch.bfloat16, torch.float32):
            rows = max(1, _TILE_WEIGHTS // parts.width)
            for begin in range(first, last, rows):
                end = min(begin + rows, last)
                out[begin - first : end - first] = decode_nibbles(parts, begin, end, out.dtype)
            return
        from slowllm.storage.codecs import bnb_kernels

        codes, table = parts.arrays["codes"].numpy(), parts.arrays["table"].numpy()
        pairs = np.stack([np.repeat(table, 16), np.tile(table, 16)], 1).view(np.uint64)[:, 0]
        block, width = parts.group[0], parts.width
        low_block, high_block = first * width // block, ceil_div(last * width, block)
        scales = parts.arrays["scales"].numpy()
        if scales.dtype == np.uint8:
            short, scales = (
                scales,
                np.empty(high_block, np.float32),
            )  # those before the first row are not made
            numbers = parts.arrays["scale_table"].numpy(), parts.arrays["scale_scales"].numpy()
            mean = np.float32(parts.offset)
            team.share(
                lambda low, high: bnb_kernels.nested(short, *numbers, mean, NESTED, scales, low, high),
                low_block,
                high_block,
            )
        target = (bits_of(out) if out.dtype == torch.bfloat16 else out.numpy()).reshape(-1)
        origin = first * width
        team.share(
            lambda low, high: bnb_kernels.nibbles(
                codes, pairs, scales, block, target, origin, low * width, high * width
            ),
            first,
            last,
        )

    def example(self) -> Parts:
        arrays = {
            "codes": torch.zeros(64, dtype=torch.uint8),
            "table": torch.zeros(16),
            "scales": torch.zeros(2, dtype=torch.uint8),
            "scale_table": torch.zeros(256),
            "scale_scales": torch.zeros(1),
        }
        return Parts(arrays, 2, 64, (64,))


class BnbIntegers(Codec):
    """Whole numbers of 8 bits."""

    name: ClassVar[str] = "bnb_8bit"
    decodes_to_any: ClassVar[bool] = True

    def has_parts(self, parts: PartShapes, num_rows: int, width: int, group: tuple[int, ...] = ()) -> bool:
        wanted = {"codes": ("U8", (num_rows, width)), "scales": ("F32", (num_rows,))}
        return not group and dict(parts) == wanted

    def decode(self, parts: Parts, out: Tensor, first: int, last: int, team: Team) -> None:
        if not IS_COMPILED or out.dtype not in (torch.bfloat16, torch.float32):
            rows = max(1, _TILE_WEIGHTS // parts.width)
            for begin in range(first, last, rows):
                end = min(begin + rows, last)
                out[begin - first : end - first] = decode_integers(parts, begin, end, out.dtype)
            return
        from slowllm.storage.codecs import bnb_kernels

        codes, scales = parts.arrays["codes"].numpy().view(np.int8), parts.arrays["scales"].numpy()
        target = bits_of(out) if out.dtype == torch.bfloat16 else out.numpy()
        team.share(
            lambda low, high: bnb_kernels.integers(codes, scales, target, first, low, high), first, last
        )

    def example(self) -> Parts:
        return Parts({"codes": torch.zeros(2, 64, dtype=torch.uint8), "scales": torch.ones(2)}, 2, 64)


def scales_of(parts: Parts, first: int, last: int) -> Tensor:
    """Return the scales of the blocks `first` to `last` as float32."""
    scales = parts.arrays["scales"][first:last]
    if scales.dtype == torch.float32:
        return scales
    numbers = parts.arrays["scale_table"][scales.long()]
    of_block = torch.arange(first, last, device=scales.device) // NESTED
    return numbers * parts.arrays["scale_scales"][of_block] + parts.offset


def decode_nibbles(parts: Parts, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Return the rows `first` to `last` of numbers of 4 bits in a dtype, by operations of torch, on any device."""
    begin, end, block = first * parts.width, last * parts.width, parts.group[0]
    some = parts.arrays["codes"][begin // 2 : ceil_div(end, 2)]
    codes = torch.stack([some >> 4, some & 15], 1).view(-1)[begin % 2 : begin % 2 + end - begin]
    low = begin // block
    scales = scales_of(parts, low, ceil_div(end, block))
    of_number = torch.arange(begin, end, device=codes.device) // block - low
    weights = parts.arrays["table"][codes.int()] * scales[of_number]
    return weights.to(dtype).view(-1, parts.width)


def decode_integers(parts: Parts, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Return the rows `first` to `last` of whole numbers in a dtype, by operations of torch, on any device."""
    codes = parts.arrays["codes"][first:last].view(torch.int8).float()
    return (codes * parts.arrays["scales"][first:last, None] * _INVERSE).to(dtype)
