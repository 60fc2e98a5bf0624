"""Integers of 2, 3, 4 or 8 bits that are packed along the inputs of a layer, as GPTQ publishes them.

The arrays are those of the transposed matrix, (inputs, outputs); it is decoded the right way round. A weight is (code - zero) *
scale, rounded to the dtype of the scales, most often float16, and then to what is computed with: so do GPTQModel and AutoGPTQ
where they dequantise. The zeros of the first version of the format are stored less one, and put right word by word as
GPTQModel does, so that a zero that wrapped around is found again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from slowllm.errors import CheckpointError
from slowllm.rounding import ceil_div
from slowllm.storage.codecs.base import Codec, Parts, PartShapes, bits_of
from slowllm.storage.codecs.layout_constants import IS_COMPILED
from slowllm.storage.codecs.team import Team

# The sum of ones in each place of a word.
_ONES = {bits: sum(1 << shift for shift in range(0, 32, bits)) for bits in (2, 4, 8)}
# Weights that torch decodes at a time.
_TILE_WEIGHTS = 1 << 22
_SCALES = ("F16", "BF16")


class Gptq(Codec):
    """The first version; `Coding.group` has 1 and the columns that share a scale, unless the array "order" has them."""

    name: ClassVar[str] = "gptq"
    decodes_to_any: ClassVar[bool] = True
    picks: ClassVar[Mapping[str, tuple[int, int]]] = {"order": (0, 0)}
    more: ClassVar[int] = 1

    def has_parts(self, parts: PartShapes, num_rows: int, width: int, group: tuple[int, ...] = ()) -> bool:
        if len(group) != 2 or group[1] < 1 or set(parts) - {"order"} != {"codes", "zeros", "scales"}:
            return False
        dtype, grid = parts["scales"]
        height = parts["codes"][1][0] if parts["codes"][1] else 0
        bits = 32 * height // width if width else 0
        if bits not in (2, 3, 4, 8) or width * bits % 32 or num_rows * bits % 32 or len(grid) != 2:
            return False
        has_order = "order" in parts
        return (
            parts["codes"] == ("I32", (width * bits // 32, num_rows))
            and parts["zeros"] == ("I32", (grid[0], num_rows * bits // 32))
            and dtype in _SCALES
            and grid == (grid[0] if has_order and grid[0] else ceil_div(width, group[1]), num_rows)
            and (not has_order or parts["order"] == ("I32", (width,)))
        )

    def decode(self, parts: Parts, out: Tensor, first: int, last: int, team: Team) -> None:
        order = _order_of(parts)
        if not IS_COMPILED or out.dtype not in (torch.bfloat16, torch.float32):
            rows = max(1, _TILE_WEIGHTS // parts.width)
            for begin in range(first, last, rows):
                end = min(begin + rows, last)
                out[begin - first : end - first] = _decoded(parts, self.more, begin, end, out.dtype)
            return
        from slowllm.storage.codecs import packed_kernels

        words, zeros = (parts.arrays[name].numpy().view(np.uint32) for name in ("codes", "zeros"))
        scales, is_half = (
            parts.arrays["scales"][:, first:last].float().contiguous().numpy(),
            parts.arrays["scales"].dtype == torch.float16,
        )
        bits, more = bits_of_code(parts), self.more
        target = bits_of(out) if out.dtype == torch.bfloat16 else out.numpy()
        team.share(
            lambda low, high: packed_kernels.along(
                words, zeros, scales, order, bits, parts.group[1], more, is_half, target, first, low, high
            ),
            first,
            last,
        )

    def example(self) -> Parts:
        arrays = {
            "codes": torch.zeros(8, 32, dtype=torch.int32),
            "zeros": torch.zeros(2, 4, dtype=torch.int32),
            "scales": torch.ones(2, 32, dtype=torch.float16),
        }
        return Parts(arrays, 32, 64, (1, 32))


class GptqV2(Gptq):
    """The second version, whose zeros are stored as they are."""

    name: ClassVar[str] = "gptq_v2"
    more: ClassVar[int] = 0


def bits_of_code(parts: Parts) -> int:
    """Return how many bits a weight has."""
    return 32 * len(parts.arrays["codes"]) // parts.width


def _order_of(parts: Parts) -> np.ndarray:
    """Return the group of each column; nothing where they follow one another.

    Raises:
        CheckpointError: there is no such group.
    """
    if "order" not in parts.arrays:
        return np.empty(0, np.int32)
    order: np.ndarray = parts.arrays["order"].numpy()
    groups = len(parts.arrays["scales"])
    if order.min() < 0 or order.max() >= groups:
        wrong = order.min() if order.min() < 0 else order.max()
        raise CheckpointError(
            f"a g_idx of the checkpoint names group {wrong} of a matrix that has {groups}; fetch its shards again"
        )
    if np.array_equal(order, np.arange(parts.width) // parts.group[1]):
        return np.empty(0, np.int32)
    return order


def unpacked(words: Tensor, bits: int) -> Tensor:
    """Return the codes (32 / bits x H, W) of words (H, W) that are packed along the first axis, on any device."""
    if bits != 3:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
        return (words[:, None] >> shifts[:, None] & ((1 << bits) - 1)).flatten(0, 1)
    # 32 codes in three words, some of them across two.
    wide = (words.to(torch.int64) & 0xFFFFFFFF).view(-1, 3, words.shape[1])
    places = torch.arange(0, 96, 3, device=words.device)
    low, high = places // 32, (places // 32 + 1).clamp(max=2)
    shifts = (places % 32)[:, None]
    codes = wide[:, low] >> shifts | wide[:, high] << (32 - shifts)
    return (codes & 7).flatten(0, 1).to(torch.int32)


def _decoded(parts: Parts, more: int, first: int, last: int, dtype: torch.dtype) -> Tensor:
    arrays, bits = parts.arrays, bits_of_code(parts)
    codes = unpacked(arrays["codes"][:, first:last], bits)
    packed = arrays["zeros"]
    if bits != 3 and more:
        packed = packed + (_ONES[bits] if _ONES[bits] < 1 << 31 else _ONES[bits] - (1 << 32))
    zeros = unpacked(packed.T, bits)[first:last].T
    if bits == 3:
        zeros = zeros + more & 7
    if "order" in arrays:
        # Wrong numbers are found on the CPU; a device that is asked for them would not stop at an error.
        groups = arrays["order"].clamp(0, len(zeros) - 1).to(torch.int64)
    else:
        groups = torch.arange(parts.width, device=codes.device) // parts.group[1]
    scales = arrays["scales"][:, first:last]
    weights = (codes - zeros[groups]).float() * scales.float()[groups]
    return weights.to(scales.dtype).to(dtype).T


def decode_rows(parts: Parts, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Return the rows `first` to `last` of the first version in a dtype, by operations of torch, on any device."""
    return _decoded(parts, Gptq.more, first, last, dtype)


def decode_rows_v2(parts: Parts, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Return the rows `first` to `last` of the second version in a dtype, by operations of torch, on any device."""
    return _decoded(parts, GptqV2.more, first, last, dtype)
