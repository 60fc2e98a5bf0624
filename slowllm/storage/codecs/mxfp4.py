"""Numbers of 4 bits, e2m1, in blocks of 32 that share a power of two, as the experts of gpt-oss are published.

The matrices are stored transposed: 32 numbers of a column lie together. They are decoded to the layout that the model has,
because a product with a transposed view may be summed in another order. A weight is its number times 2^(exponent - 127), as
transformers dequantises it (`convert_moe_packed_tensors`), for the exponent 255 too.
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
from slowllm.storage.codecs.tiles import DecodeRows

BLOCK = 32
# From the first exponent on, every number of a block is normal in bfloat16; up to the second, none overflows.
LEAST_EXPONENT, MOST_EXPONENT = 3, 251
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Mxfp4(Codec):
    """Transposed matrices (E, R, K) of e2m1 numbers; a row of the decoded matrix (E x K, R) is a column of these."""

    name: ClassVar[str] = "mxfp4"
    decodes_to_any: ClassVar[bool] = True

    def has_parts(self, parts: PartShapes, num_rows: int, width: int, group: tuple[int, ...] = ()) -> bool:
        if group or set(parts) != {"scales", "codes"} or width < 1:
            return False
        (codes_dtype, codes), (scales_dtype, scales) = parts["codes"], parts["scales"]
        return (
            codes_dtype == scales_dtype == "U8"
            and len(scales) == 3
            and codes == (*scales, BLOCK // 2)
            and scales[1] == width
            and scales[0] * scales[2] * BLOCK == num_rows
        )

    def decode(self, parts: Parts, out: Tensor, first: int, last: int, team: Team) -> None:
        if first >= last:
            return
        if out.dtype not in (torch.bfloat16, torch.float32) or not IS_COMPILED:
            rows = max(1, (1 << 22) // parts.width)
            for begin in range(first, last, rows):
                end = min(begin + rows, last)
                out[begin - first : end - first] = decode_rows(parts, begin, end, out.dtype)
            return
        from slowllm.storage.codecs import mxfp4_kernels

        scales = parts.arrays["scales"].numpy()
        codes = parts.arrays["codes"].flatten(2).numpy()
        is_short = out.dtype == torch.bfloat16
        loop = mxfp4_kernels.to_bfloat16 if is_short else mxfp4_kernels.to_float32
        numbers = bits_of(out) if is_short else out.numpy()
        team.share(lambda low, high: loop(codes, scales, numbers, first, low, high), first, last)

    def tiles(self, parts: Parts, first: int, last: int, *, is_plain: bool) -> DecodeRows | None:
        # Rows of the decoded matrix are columns of the stored one.
        length = parts.arrays["scales"].shape[2] * BLOCK
        on_host = parts.arrays["scales"].device.type == "cpu"
        if not (is_plain and IS_COMPILED and on_host) or first % length or last - first != length:
            return None
        from slowllm.storage.codecs import mxfp4_row_kernels

        exponents = parts.arrays["scales"][first // length]
        if not keep_normal(exponents):
            return None
        scales = exponents.numpy()
        codes = parts.arrays["codes"][first // length].flatten(1).numpy()

        def decode(out: Tensor, begin: int, end: int) -> None:
            pairs = out.view(torch.int32).numpy().view(np.uint32)
            mxfp4_row_kernels.rows_to_bfloat16(codes, scales, pairs, begin, end)

        return decode

    def example(self) -> Parts:
        codes, scales = torch.zeros(1, 2, 2, 16, dtype=torch.uint8), torch.zeros(1, 2, 2, dtype=torch.uint8)
        return Parts({"codes": codes, "scales": scales}, 64, 2)

    def warm_up(self, team: Team) -> None:
        super().warm_up(team)
        if IS_COMPILED:
            from slowllm.storage.codecs.mxfp4_row_kernels import rows_to_bfloat16

            codes, scales = np.zeros((2, 32), np.uint8), np.full((2, 2), 127, np.uint8)
            rows_to_bfloat16(codes, scales, np.empty((2, 32), np.uint32), 0, 2)


def keep_normal(exponents: Tensor) -> bool:
    """Whether all numbers of blocks with these exponents, uint8 on the processor, are normal in bfloat16, or zero."""
    # Not by torch, whose threads wait for each other where others compute.
    values = exponents.numpy()
    return bool(values.size) and int(values.min()) >= LEAST_EXPONENT and int(values.max()) <= MOST_EXPONENT


def e2m1_numbers(packed: Tensor) -> Tensor:
    """Return the float32 numbers (.., 2 N) of pairs of codes (.., N) uint8, that in the low bits first."""
    table = torch.tensor((*_MAGNITUDES, *(-number for number in _MAGNITUDES)), device=packed.device)
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    return table[codes.int()]


def _half_scales(exponents: Tensor) -> Tensor:
    """Return 2^(exponent - 128), which is finite for every exponent, from its bits."""
    whole = exponents.int()
    bits = torch.where(whole < 2, 0x200000 << whole.clamp(max=1), (whole - 1) << 23)
    return bits.view(torch.float32)


def decode_rows(parts: Parts, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Return the rows `first` to `last` in a dtype, by operations of torch, on any device."""
    codes, exponents = parts.arrays["codes"], parts.arrays["scales"]
    length = exponents.shape[2] * BLOCK
    found = []
    for matrix in range(first // length, ceil_div(last, length)):
        low, high = max(first - matrix * length, 0), min(last - matrix * length, length)
        blocks = slice(low // BLOCK, ceil_div(high, BLOCK))
        numbers = e2m1_numbers(codes[matrix, :, blocks]) * 2  # (R, blocks, 32)
        values = numbers * _half_scales(exponents[matrix, :, blocks])[..., None]
        start = blocks.start * BLOCK
        found.append(values.flatten(1)[:, low - start : high - start].T)
    return torch.cat(found).to(dtype)
