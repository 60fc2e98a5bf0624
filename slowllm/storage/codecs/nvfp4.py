"""Numbers of 4 bits, e2m1, in blocks of 16 with an e4m3 scale, and a float32 number for the matrix, as NVIDIA's formats have it.

In modelopt's, the scales are multiplied with the number of the matrix, and a weight is rounded once. In compressed-tensors', they
are divided by it, and a weight is rounded to bfloat16 before it is of another dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from slowllm.storage.codecs.base import Codec, Parts, PartShapes, bits_of, tiles_of
from slowllm.storage.codecs.fp8 import scales_of
from slowllm.storage.codecs.mxfp4 import e2m1_numbers
from slowllm.storage.codecs.team import Team

BLOCK = 16


class Nvfp4(Codec):
    """Blocks of 16 numbers; the part `factor` or `divisor` is of the matrix."""

    name: ClassVar[str] = "nvfp4"
    decodes_to_any: ClassVar[bool] = True
    nan_bytes: ClassVar[Mapping[str, tuple[int, ...]]] = {"scales": (0x7F, 0xFF)}
    divisors: ClassVar[frozenset[str]] = frozenset({"divisor"})

    def has_parts(self, parts: PartShapes, num_rows: int, width: int, group: tuple[int, ...] = ()) -> bool:
        return (
            not group
            and set(parts) in ({"scales", "codes", "factor"}, {"scales", "codes", "divisor"})
            and width % BLOCK == 0
            and parts["scales"] == ("U8", (num_rows, width // BLOCK))
            and parts["codes"] == ("U8", (num_rows, width // 2))
            and parts.get("factor", parts.get("divisor")) == ("F32", (1,))
        )

    def decode(self, parts: Parts, out: Tensor, first: int, last: int, team: Team) -> None:
        from slowllm.storage.codecs import nvfp4_kernels

        if out.dtype not in (torch.bfloat16, torch.float32):
            for rows, tile in tiles_of(first, last, out.shape[1], torch.float32):
                self.decode(parts, tile, rows.start, rows.stop, team)
                out[rows.start - first : rows.stop - first] = tile
            return
        arrays, divides = parts.arrays, "divisor" in parts.arrays
        codes, scales = arrays["codes"].numpy(), arrays["scales"].numpy()
        number = scales_of(arrays["divisor" if divides else "factor"]).numpy()
        is_short = out.dtype == torch.bfloat16
        loop = nvfp4_kernels.to_bfloat16 if is_short else nvfp4_kernels.to_float32
        numbers = bits_of(out) if is_short else out.numpy()
        team.share(
            lambda low, high: loop(codes, scales, number, divides, numbers, first, low, high), first, last
        )

    def example(self) -> Parts:
        codes, scales = torch.zeros(2, 8, dtype=torch.uint8), torch.zeros(2, 1, dtype=torch.uint8)
        return Parts({"codes": codes, "scales": scales, "factor": torch.ones(1)}, 2, BLOCK)


def _scales_of(parts: Parts, first: int, last: int) -> Tensor:
    scales = parts.arrays["scales"][first:last].view(torch.float8_e4m3fn).float()
    if "divisor" in parts.arrays:
        return scales.div_(scales_of(parts.arrays["divisor"]))
    return scales.mul_(scales_of(parts.arrays["factor"]))


def decode_rows(parts: Parts, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Return the rows `first` to `last` in a dtype, by operations of torch, on any device."""
    scales = _scales_of(parts, first, last).repeat_interleave(BLOCK, 1)
    values = e2m1_numbers(parts.arrays["codes"][first:last]) * scales
    return (values.bfloat16() if "divisor" in parts.arrays else values).to(dtype)
