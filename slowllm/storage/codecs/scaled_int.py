"""Integers of 4 or 8 bits with a scale, and perhaps a zero, for blocks of rows and columns, as compressed-tensors packs them.

A weight is its integer less the zero, times the scale, rounded to the dtype of the scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from slowllm.rounding import ceil_div
from slowllm.storage.codecs.base import Codec, Parts, PartShapes, bits_of
from slowllm.storage.codecs.fp8 import scales_of
from slowllm.storage.codecs.layout_constants import IS_COMPILED
from slowllm.storage.codecs.rounded import decode_by_way_of, dtype_of
from slowllm.storage.codecs.team import Team

# Names of the codes, with how many lie in a byte: packed ones count from the middle of their range, others are signed.
_PER_BYTE = {"pairs": 2, "bytes": 1, "signed": 1}
_MIDDLES = {"pairs": 8.0, "bytes": 128.0, "signed": 0.0}
# Decoded at a time where columns have an order of their own.
TILE_WEIGHTS = 1 << 20
# In a word of 32 bits, which holds zeros of rows that follow one another.
_PER_WORD = {"pairs": 8, "bytes": 4}


class ScaledInt(Codec):
    """Integers in blocks; `Coding.group` has the rows and columns of a block.

    Parts are the codes, called `pairs` (R, words x 4), `bytes` or `signed`; `scales`; perhaps `zeros`, packed as the codes are but
    along the rows; and perhaps `blocks` (K,), the block of each column where they do not follow one another.
    """

    name: ClassVar[str] = "scaled_int"
    decodes_to_any: ClassVar[bool] = True
    # -1 says that the order was not written.
    picks: ClassVar[Mapping[str, tuple[int, int]]] = {"blocks": (1, -1)}

    def has_parts(self, parts: PartShapes, num_rows: int, width: int, group: tuple[int, ...] = ()) -> bool:
        names = set(parts) & set(_PER_BYTE)
        if len(group) != 2 or min(group) < 1 or len(names) != 1 or "scales" not in parts:
            return False
        (name,) = names
        if set(parts) - {name, "scales", "zeros", "blocks"}:
            return False
        grid = (ceil_div(num_rows, group[0]), ceil_div(width, group[1]))
        codes_dtype, codes = parts[name]
        if codes_dtype != "U8" or len(codes) != 2 or codes[0] != num_rows:
            return False
        if codes[1] * _PER_BYTE[name] < width or (name == "signed" and codes[1] != width):
            return False
        if "zeros" in parts:
            per_word = _PER_WORD.get(name)
            wanted = ("U8", grid) if per_word is None else ("I32", (ceil_div(grid[0], per_word), grid[1]))
            if parts["zeros"] != wanted:
                return False
        if "blocks" in parts and (parts["blocks"] != ("I32", (width,)) or group[0] != 1):
            return False
        dtype, shape = parts["scales"]
        return dtype in ("F32", "BF16", "F16") and shape == grid

    def decode(self, parts: Parts, out: Tensor, first: int, last: int, team: Team) -> None:
        # Where each column has scales of its own, those of all rows would take more memory than the matrix.
        step = max(1, TILE_WEIGHTS // parts.width) if "blocks" in parts.arrays else max(1, len(out))

        def rows_of(tile: Tensor, low: int, high: int) -> None:
            for begin in range(low, high, step):
                end = min(begin + step, high)
                _decode(parts, tile[begin - low : end - low], first + begin, first + end, team)

        rounded = dtype_of(parts.arrays["scales"])
        if _has_half_loop(rounded, out.dtype):
            rows_of(out, 0, len(out))
        else:
            decode_by_way_of(rounded, out, rows_of, team)

    def example(self) -> Parts:
        codes, scales = torch.zeros(2, 64, dtype=torch.uint8), torch.ones(2, 1)
        return Parts({"pairs": codes, "scales": scales}, 2, 128, (1, 128))

    def warm_up(self, team: Team) -> None:
        super().warm_up(team)
        # Those of a byte each have another loop.
        self._decode_all(
            Parts({"bytes": torch.zeros(2, 8, dtype=torch.uint8), "scales": torch.ones(2, 1)}, 2, 8, (1, 8)),
            team,
        )


def _decode(parts: Parts, out: Tensor, first: int, last: int, team: Team) -> None:
    from slowllm.storage.codecs import scaled_int_kernels

    name = _name_of(parts)
    codes = parts.arrays[name][first:last]
    own = (codes.view(torch.int8) if name == "signed" else codes).numpy()
    if out.dtype not in (torch.bfloat16, torch.float32):
        out.copy_(decode_rows(parts, first, last, out.dtype))
        return
    scales, zeros, columns = _factors(parts, first, last)
    factors, offsets, are_pairs = scales.numpy(), zeros.numpy(), name == "pairs"
    is_short = out.dtype == torch.bfloat16
    loop = scaled_int_kernels.to_bfloat16 if is_short else scaled_int_kernels.to_float32
    if _has_half_loop(parts.arrays["scales"].dtype, out.dtype):
        loop = scaled_int_kernels.to_half
    elif IS_COMPILED and is_short and are_pairs and not columns % 2 and not parts.width % 2:
        both = out.view(torch.int32).numpy().view(np.uint32)
        fast = scaled_int_kernels.pairs_to_bfloat16
        team.share(lambda low, high: fast(own, factors, offsets, columns, both, low, high), 0, len(out))
        return
    numbers = bits_of(out) if is_short else out.numpy()
    team.share(
        lambda low, high: loop(own, are_pairs, factors, offsets, columns, numbers, low, high), 0, len(out)
    )


def _has_half_loop(rounded: torch.dtype, wanted: torch.dtype) -> bool:
    """Return whether a loop rounds to float16 on the way to a dtype; torch's operations take fifty times as long."""
    return IS_COMPILED and rounded == torch.float16 and wanted in (torch.bfloat16, torch.float32)


def _name_of(parts: Parts) -> str:
    return next(name for name in _PER_BYTE if name in parts.arrays)


def _factors(parts: Parts, first: int, last: int) -> tuple[Tensor, Tensor, int]:
    """Return the scales and zeros of rows as float32, and how many columns share them."""
    name, arrays, (rows, columns) = _name_of(parts), parts.arrays, parts.group
    numbers = torch.arange(first, last, device=arrays["scales"].device) // rows
    scales = scales_of(arrays["scales"][first:last] if rows == 1 else arrays["scales"][numbers])
    if "zeros" not in arrays:
        zeros = torch.full_like(scales, _MIDDLES[name])
    elif name == "signed":
        zeros = arrays["zeros"].view(torch.int8)[numbers].float()
    else:
        per_word, bits = _PER_WORD[name], 32 // _PER_WORD[name]
        words = arrays["zeros"][numbers // per_word]
        shifts = (numbers % per_word * bits)[:, None].int()
        zeros = (words >> shifts & (1 << bits) - 1).float()
    if (blocks := arrays.get("blocks")) is None:
        return scales, zeros, columns
    natural = torch.arange(parts.width, device=blocks.device) // columns
    # Where the order was not written, they follow one another. What is out of range would be read from other memory.
    at = torch.where((blocks < 0).any(), natural, blocks).clamp_(0, scales.shape[1] - 1)
    return scales[:, at], zeros[:, at], 1


def decode_rows(parts: Parts, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Return the rows `first` to `last` in a dtype, by operations of torch, on any device."""
    name, width = _name_of(parts), parts.width
    codes = parts.arrays[name][first:last]
    if name == "pairs":
        values = torch.stack([codes & 15, codes >> 4], -1).flatten(1)[:, :width].float()
    else:
        values = (codes.view(torch.int8) if name == "signed" else codes)[:, :width].float()
    scales, zeros, columns = _factors(parts, first, last)
    if columns > 1:
        scales, zeros = (one.repeat_interleave(columns, 1)[:, :width] for one in (scales, zeros))
    return ((values - zeros) * scales).to(dtype_of(parts.arrays["scales"])).to(dtype)
