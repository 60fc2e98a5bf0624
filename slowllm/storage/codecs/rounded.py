"""Numbers that a format rounds to a dtype of its own before they are of another, as compressed-tensors does it.

Its weights are dequantised in the dtype of their scales, and then taken for whatever the model computes in. NVIDIA's modelopt
rounds the scales themselves to the dtype that is computed with, before it multiplies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from slowllm.storage.codecs import fp8
from slowllm.storage.codecs.base import Parts, tiles_of
from slowllm.storage.codecs.fp8 import Fp8, scales_of
from slowllm.storage.codecs.team import Team


def decode_by_way_of(
    dtype: torch.dtype, out: Tensor, decode: Callable[[Tensor, int, int], object], team: Team
) -> None:
    """Decode to `out` (N, K) what is rounded to `dtype` first.

    Args:
        dtype: that numbers are rounded to.
        out: of any floating dtype, contiguous, on the processor.
        decode: writes the rows from a first to a last one to a tensor, rounded once, to its dtype.
        team: threads that share the work.
    """
    from slowllm.storage.codecs import cpu_kernels

    # A product in float32 is rounded once on its way to bfloat16, whoever does it.
    if out.dtype == dtype or (dtype == torch.float32 and out.dtype == torch.bfloat16):
        decode(out, 0, len(out))
    elif out.dtype == torch.float32 and dtype == torch.bfloat16:
        decode(out, 0, len(out))
        bits = out.view(torch.int32).numpy().view(np.uint32)
        team.share(lambda low, high: cpu_kernels.settle_rows(bits, low, high), 0, len(out))
    else:
        for rows, tile in tiles_of(0, len(out), out.shape[1], dtype):
            decode(tile, rows.start, rows.stop)
            out[rows] = tile


def dtype_of(scales: Tensor) -> torch.dtype:
    """Return the dtype that products with scales are rounded to: theirs, bfloat16 where they are exponents."""
    return scales.dtype if scales.is_floating_point() else torch.bfloat16


class Fp8Rounded(Fp8):
    """Float8 e4m3fn in blocks, whose products with the scales are rounded to the dtype of the scales."""

    name: ClassVar[str] = "fp8_rounded"

    def decode(self, parts: Parts, out: Tensor, first: int, last: int, team: Team) -> None:
        decode = super().decode
        rounded = dtype_of(parts.arrays["scales"])
        decode_by_way_of(
            rounded, out, lambda tile, low, high: decode(parts, tile, first + low, first + high, team), team
        )


def decode_fp8_rows(parts: Parts, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Return the rows `first` to `last` in a dtype, by operations of torch, on any device."""
    return fp8.decode_rows(parts, first, last, dtype_of(parts.arrays["scales"])).to(dtype)


class Fp8CastScales(Fp8):
    """Float8 e4m3fn in blocks, whose scales are rounded to the dtype that is decoded to before they are multiplied with."""

    name: ClassVar[str] = "fp8_cast_scales"

    def decode(self, parts: Parts, out: Tensor, first: int, last: int, team: Team) -> None:
        super().decode(_with_cast_scales(parts, out.dtype), out, first, last, team)


def _with_cast_scales(parts: Parts, dtype: torch.dtype) -> Parts:
    scales = scales_of(parts.arrays["scales"]).to(dtype)
    return replace(parts, arrays={**parts.arrays, "scales": scales})


def decode_cast_rows(parts: Parts, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Return the rows `first` to `last`, with scales in `dtype`, by operations of torch, on any device."""
    return fp8.decode_rows(_with_cast_scales(parts, dtype), first, last, dtype)
