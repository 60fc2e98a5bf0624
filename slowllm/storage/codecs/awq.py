"""Integers of 4 bits of which a word has eight outputs of a layer, as AWQ publishes them ("gemm").

The arrays are those of the transposed matrix, (inputs, outputs); it is decoded the right way round. A weight is (code - zero) *
scale, rounded to the dtype of the scales, most often float16, and then to what is computed with: so do AutoAWQ and GPTQModel
where they dequantise.
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

# Where in a word the codes of its eight outputs begin: the word has outputs 0, 2, 4, 6, 1, 3, 5, 7.
_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)
_TILE_WEIGHTS = 1 << 22
_SCALES = ("F16", "BF16")


class Awq(Codec):
    """Codes of 4 bits; `Coding.group` has 1 and the columns that share a scale."""

    name: ClassVar[str] = "awq"
    decodes_to_any: ClassVar[bool] = True

    def has_parts(self, parts: PartShapes, num_rows: int, width: int, group: tuple[int, ...] = ()) -> bool:
        if len(group) != 2 or group[1] < 1 or set(parts) != {"codes", "zeros", "scales"} or num_rows % 8:
            return False
        groups = ceil_div(width, group[1])
        return (
            parts["codes"] == ("I32", (width, num_rows // 8))
            and parts["zeros"] == ("I32", (groups, num_rows // 8))
            and parts["scales"][0] in _SCALES
            and parts["scales"][1] == (groups, num_rows)
        )

    def decode(self, parts: Parts, out: Tensor, first: int, last: int, team: Team) -> None:
        if not IS_COMPILED or out.dtype not in (torch.bfloat16, torch.float32):
            rows = max(8, _TILE_WEIGHTS // parts.width)
            for begin in range(first, last, rows):
                end = min(begin + rows, last)
                out[begin - first : end - first] = decode_rows(parts, begin, end, out.dtype)
            return
        from slowllm.storage.codecs import packed_kernels

        words, zeros = (parts.arrays[name].numpy().view(np.uint32) for name in ("codes", "zeros"))
        scales, is_half = (
            parts.arrays["scales"][:, first:last].float().contiguous().numpy(),
            parts.arrays["scales"].dtype == torch.float16,
        )
        shifts = np.array(_SHIFTS, np.int64)
        target = bits_of(out) if out.dtype == torch.bfloat16 else out.numpy()
        team.share(
            lambda low, high: packed_kernels.across(
                words, zeros, scales, shifts, parts.group[1], is_half, target, first, low, high
            ),
            first,
            last,
        )

    def example(self) -> Parts:
        arrays = {
            "codes": torch.zeros(64, 4, dtype=torch.int32),
            "zeros": torch.zeros(2, 4, dtype=torch.int32),
            "scales": torch.ones(2, 32, dtype=torch.float16),
        }
        return Parts(arrays, 32, 64, (1, 32))


def _unpacked(words: Tensor, first: int, last: int) -> Tensor:
    """Return the codes (H, last - first) of words (H, W) for a range of outputs."""
    begin, places = first // 8, torch.arange(8, dtype=torch.int32, device=words.device)
    shifts = places % 2 * 16 + places // 2 * 4  # `_SHIFTS`, made without waiting for the device
    some = words[:, begin : ceil_div(last, 8), None] >> shifts & 15
    return some.flatten(1)[:, first - 8 * begin : last - 8 * begin]


def decode_rows(parts: Parts, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Return the rows `first` to `last` in a dtype, by operations of torch, on any device."""
    arrays = parts.arrays
    codes = _unpacked(arrays["codes"], first, last)
    zeros = _unpacked(arrays["zeros"], first, last)
    scales = arrays["scales"][:, first:last]
    groups = torch.arange(parts.width, device=codes.device) // parts.group[1]
    weights = (codes - zeros[groups]).float() * scales.float()[groups]
    return weights.to(scales.dtype).to(dtype).T
