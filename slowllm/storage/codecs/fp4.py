"""Numbers of 4 bits, e2m1, with a scale for each block, two numbers in a byte, as DeepSeek-V4's experts are published.

A weight is its number times its block's scale, multiplied in float32 and rounded once, as transformers dequantises it
(`Fp8Dequantize`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from slowllm.rounding import ceil_div
from slowllm.storage.codecs.base import Codec, Parts, PartShapes, bits_of, tiles_of
from slowllm.storage.codecs.fp8 import NAN_EXPONENT, SCALE_DTYPES, scales_of
from slowllm.storage.codecs.layout_constants import IS_COMPILED
from slowllm.storage.codecs.mxfp4 import BLOCK, e2m1_numbers, keep_normal
from slowllm.storage.codecs.team import Team


class Fp4(Codec):
    """Float4 e2m1 in blocks; `Coding.group` has the rows and columns of a block."""

    name: ClassVar[str] = "fp4"
    decodes_to_any: ClassVar[bool] = True
    nan_bytes: ClassVar[Mapping[str, tuple[int, ...]]] = {"scales": (NAN_EXPONENT,)}

    def has_parts(self, parts: PartShapes, num_rows: int, width: int, group: tuple[int, ...] = ()) -> bool:
        if len(group) != 2 or min(group) < 1 or set(parts) != {"scales", "codes"} or width % 2:
            return False
        dtype, shape = parts["scales"]
        grid = (ceil_div(num_rows, group[0]), ceil_div(width, group[1]))
        return dtype in SCALE_DTYPES and shape == grid and parts["codes"] == ("U8", (num_rows, width // 2))

    def decode(self, parts: Parts, out: Tensor, first: int, last: int, team: Team) -> None:
        if (exponents := _small_exponents(parts, first, last)) is not None and out.dtype == torch.bfloat16:
            from slowllm.storage.codecs.mxfp4_row_kernels import rows_to_bfloat16

            codes, scales = parts.arrays["codes"][first:last].numpy(), exponents.numpy()
            pairs = out.view(torch.int32).numpy().view(np.uint32)
            team.share(
                lambda low, high: rows_to_bfloat16(codes, scales, pairs[low:high], low, high), 0, last - first
            )
            return
        decode_scaled(parts.arrays["codes"], row_scales(parts, first, last), parts.group[1], out, first, team)

    def example(self) -> Parts:
        codes, scales = torch.zeros(2, 64, dtype=torch.uint8), torch.ones(2, 4)
        return Parts({"scales": scales, "codes": codes}, 2, 128, (1, 32))

    def warm_up(self, team: Team) -> None:
        super().warm_up(team)
        # Scales that are exponents have another loop.
        example = self.example()
        exponents = torch.full((2, 4), 127, dtype=torch.uint8)
        self._decode_all(replace(example, arrays={**example.arrays, "scales": exponents}), team)


def _small_exponents(parts: Parts, first: int, last: int) -> Tensor | None:
    """Return the exponents (last - first, ..) uint8 of rows whose scales are powers of two by which every number stays normal.

    None where they are others, or blocks are not those of `mxfp4_row_kernels`, which decodes such rows twice as fast.
    """
    scales = parts.arrays["scales"]
    if scales.dtype != torch.uint8 or parts.group != (1, BLOCK) or parts.width % BLOCK or not IS_COMPILED:
        return None
    own = scales[first:last]
    return own if keep_normal(own) else None


def row_scales(parts: Parts, first: int, last: int) -> Tensor:
    """Return the scales (last - first, ..) float32 of the rows `first` to `last`, on their device."""
    rows = parts.group[0]
    low = first // rows
    scales = scales_of(parts.arrays["scales"][low : ceil_div(last, rows)])
    if rows == 1:
        return scales
    return scales[torch.arange(first, last, device=scales.device) // rows - low]


def decode_scaled(codes: Tensor, scales: Tensor, columns: int, out: Tensor, first: int, team: Team) -> None:
    """Decode rows, from `first` on, to `out` (N, K).

    Args:
        codes: (R, K / 2) uint8, of all rows.
        scales: (N, ..) float32, of the rows to decode.
        columns: that share a scale.
        out: contiguous, on the processor.
        first: number of the first row.
        team: threads that share the work.
    """
    from slowllm.storage.codecs import fp4_kernels

    own, factors = codes[first : first + len(out)].numpy(), scales.numpy()
    if out.dtype == torch.bfloat16:
        bits = bits_of(out)
        team.share(
            lambda low, high: fp4_kernels.to_bfloat16(own, factors, columns, bits, low, high), 0, len(out)
        )
        return
    if out.dtype == torch.float32:
        values = out.numpy()
        team.share(
            lambda low, high: fp4_kernels.to_float32(own, factors, columns, values, low, high), 0, len(out)
        )
        return
    for rows, tile in tiles_of(0, len(out), out.shape[1], torch.float32):
        decode_scaled(codes, scales[rows], columns, tile, first + rows.start, team)
        out[rows] = tile


def decode_rows(parts: Parts, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Return the rows `first` to `last` in a dtype, by operations of torch, on any device."""
    scales = row_scales(parts, first, last).repeat_interleave(parts.group[1], 1)[:, : parts.width]
    return (e2m1_numbers(parts.arrays["codes"][first:last]) * scales).to(dtype)
