"""Numbers of 8 bits, e4m3, with a scale for each block of rows and columns, as DeepSeek-V3 and Qwen3-FP8 are published.

A weight is its number times its block's scale, multiplied in float32 and rounded once, as transformers dequantises it
(`Fp8Dequantize`). One block may be the whole matrix, or a row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from slowllm.rounding import ceil_div
from slowllm.storage.codecs.base import Codec, Parts, PartShapes, bits_of
from slowllm.storage.codecs.layout_constants import IS_COMPILED
from slowllm.storage.codecs.team import Team

# A loop over fewer columns that share a scale costs more than what it saves.
_WIDE = 32
# Dtypes of scales: numbers, or the exponents of powers of two (ue8m0), which some files call bytes.
SCALE_DTYPES = ("F32", "BF16", "F16", "U8")
# The exponent that is NaN.
NAN_EXPONENT = 0xFF


class Fp8(Codec):
    """Float8 e4m3fn in blocks; `Coding.group` has the rows and columns of a block."""

    name: ClassVar[str] = "fp8"
    decodes_to_any: ClassVar[bool] = True
    nan_bytes: ClassVar[Mapping[str, tuple[int, ...]]] = {"scales": (NAN_EXPONENT,)}

    def has_parts(self, parts: PartShapes, num_rows: int, width: int, group: tuple[int, ...] = ()) -> bool:
        if len(group) != 2 or min(group) < 1 or set(parts) != {"scales", "codes"}:
            return False
        dtype, shape = parts["scales"]
        grid = (ceil_div(num_rows, group[0]), ceil_div(width, group[1]))
        return dtype in SCALE_DTYPES and shape == grid and parts["codes"] == ("U8", (num_rows, width))

    def decode(self, parts: Parts, out: Tensor, first: int, last: int, team: Team) -> None:
        from slowllm.storage.codecs import fp8_kernels

        rows, columns = parts.group
        # From the first block of rows on, so that a few rows do not take as long as all scales do.
        base = first // rows * rows
        codes = parts.arrays["codes"][base:last].numpy()
        scales = scales_of(parts.arrays["scales"][base // rows : ceil_div(last, rows)]).numpy()
        if out.dtype == torch.bfloat16:
            bits = bits_of(out)
            is_wide = IS_COMPILED and columns >= _WIDE
            loop = fp8_kernels.blocks_to_bfloat16 if is_wide else fp8_kernels.to_bfloat16
            team.share(
                lambda low, high: loop(codes, scales, rows, columns, bits, first - base, low, high),
                first - base,
                last - base,
            )
        elif out.dtype == torch.float32:
            values = out.numpy()
            team.share(
                lambda low, high: fp8_kernels.to_float32(
                    codes, scales, rows, columns, values, first - base, low, high
                ),
                first - base,
                last - base,
            )
        else:
            out.copy_(decode_rows(parts, first, last, out.dtype))

    def example(self) -> Parts:
        codes, scales = torch.zeros(2, 256, dtype=torch.uint8), torch.ones(1, 2)
        return Parts({"scales": scales, "codes": codes}, 2, 256, (128, 128))


def scales_of(scales: Tensor) -> Tensor:
    """Return the scales of blocks as float32."""
    if scales.dtype == torch.uint8:  # exponents
        return scales.view(torch.float8_e8m0fnu).float()
    # A NaN whose bits are all set would be rounded up to a zero.
    return torch.nan_to_num(scales.float(), math.nan, math.inf, -math.inf)


def decode_rows(parts: Parts, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Return the rows `first` to `last` in a dtype, by operations of torch, on any device."""
    rows, columns = parts.group
    codes = parts.arrays["codes"][first:last].view(torch.float8_e4m3fn).float()
    of_row = torch.arange(first, last, device=codes.device) // rows
    scales = scales_of(parts.arrays["scales"])[of_row].repeat_interleave(columns, 1)[:, : parts.width]
    return (codes * scales).to(dtype)
