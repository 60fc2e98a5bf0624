"""Decode on a device, with the bits of `cpu_kernels`, by torch's operations.

Knows tensors on any device; knows nothing of files or models. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from slowllm.storage.codecs import (
    awq,
    bnb,
    fp4,
    fp8,
    fp8_packed,
    gguf,
    gptq,
    mxfp4,
    nvfp4,
    rounded,
    scaled_int,
)
from slowllm.storage.codecs.base import Parts
from slowllm.storage.codecs.layout_constants import CHUNK

# Weights decoded at a time; the temporary tensors (about 10 bytes a weight) stay small compared with the matrix.
TILE_WEIGHTS = 1 << 24


def decode(codec: str, matrix: Parts, out: Tensor, first: int, last: int) -> None:
    """Write the rows `first` to `last` of a coded matrix to `out`.

    Args:
        codec: its name.
        matrix: with its arrays on the device.
        out: (last - first, width), contiguous, on the device, of any floating dtype.
    """
    parts, width = matrix.arrays, matrix.width
    if codec == "stacked":
        for name, begin, own in matrix.rows:
            low, high = max(first, begin), min(last, begin + own.num_rows)
            if low < high:
                decode(name, own, out[low - first : high - first], low - begin, high - begin)
        return
    if codec == "lossless":
        _lossless(parts, matrix.num_rows * width, out.view(-1), first * width, last * width)
        return
    rows = max(1, TILE_WEIGHTS // width)
    if codec in _WHOLE:
        for begin in range(first, last, rows):
            end = min(begin + rows, last)
            out[begin - first : end - first] = _WHOLE[codec](matrix, begin, end, out.dtype)
        return
    for begin in range(first, last, rows):
        end = min(begin + rows, last)
        tile = {name: part[begin:end] for name, part in parts.items()}
        out[begin - first : end - first] = _int8(tile) if codec == "int8" else _int4(tile, width)


# Decoders of rows to any dtype, for whom rows are no rows of each array.
_WHOLE = {
    "fp4": fp4.decode_rows,
    "fp8": fp8.decode_rows,
    "mxfp4": mxfp4.decode_rows,
    "nvfp4": nvfp4.decode_rows,
    "fp8_rounded": rounded.decode_fp8_rows,
    "fp8_cast_scales": rounded.decode_cast_rows,
    "scaled_int": scaled_int.decode_rows,
    "gptq": gptq.decode_rows,
    "gptq_v2": gptq.decode_rows_v2,
    "awq": awq.decode_rows,
    "bnb_4bit": bnb.decode_nibbles,
    "bnb_8bit": bnb.decode_integers,
    **{codec.name: codec.decode_rows for codec in gguf.GGUF_CODECS},
    **{codec.name: codec.decode_rows for codec in fp8_packed.FP8_PACKED},
}


def _int8(parts: Mapping[str, Tensor]) -> Tensor:
    return (parts["codes"].float() * parts["scales"][:, None]).bfloat16()


def _int4(parts: Mapping[str, Tensor], width: int) -> Tensor:
    scales, lows = parts["scales"].float()[..., None], parts["lows"].float()[..., None]
    packed = parts["codes"].view(*parts["scales"].shape, -1)
    codes = torch.cat([packed & 15, packed >> 4], -1).float()
    # Two operations, each of which rounds, as in the CPU's loop: a fused one would round once.
    return codes.mul_(scales).add_(lows).flatten(1)[:, :width].bfloat16()


def _lossless(parts: Mapping[str, Tensor], num_weights: int, out: Tensor, begin: int, end: int) -> None:
    """Write the numbers `begin` to `end` of a flat matrix to `out`."""
    padded = len(parts["signs"])
    tile = max(1, TILE_WEIGHTS // CHUNK) * CHUNK
    for low in range(begin // CHUNK * CHUNK, end, tile):
        high = min(low + tile, padded)
        bits = _joined(parts, low, high)
        _put_escapes(parts, bits, low)
        inner, outer = max(begin, low), min(end, high)
        out[inner - begin : outer - begin] = bits[inner - low : outer - low].view(torch.bfloat16)


def _joined(parts: Mapping[str, Tensor], low: int, high: int) -> Tensor:
    """Return the bits (high - low + 1,) int16 of numbers from the start of a chunk, and an unused last place."""
    signs, exponents = parts["signs"][low:high], parts["exponents"][low // 2 : high // 2]
    bits = torch.empty(high - low + 1, dtype=torch.int16, device=signs.device)
    whole = (high - low) // CHUNK
    first = low // CHUNK
    if whole:
        size = whole * CHUNK
        bases = parts["bases"][first : first + whole]
        bits[:size] = _join(signs[:size].view(whole, -1), exponents[: size // 2].view(whole, -1), bases)
    if rest := high - low - whole * CHUNK:  # the last chunk of a matrix may be short
        base = parts["bases"][first + whole : first + whole + 1]
        bits[whole * CHUNK : -1] = _join(signs[-rest:][None], exponents[-(rest // 2) :][None], base)
    return bits


def _join(signs: Tensor, exponents: Tensor, bases: Tensor) -> Tensor:
    """Assemble numbers, chunk by chunk.

    A chunk's output has four quarters. The bytes of `exponents` alternate between the codes of the first two quarters
    and those of the last two; the bytes of `signs` alternate between two quarters, first 0 and 1, then 2 and 3.

    Args:
        signs: (C, N) uint8.
        exponents: (C, N / 2) uint8.
        bases: (C,) uint8.
    Returns:
        (C x N,) int16.
    """
    chunks = len(signs)
    ends = signs.view(chunks, 2, -1, 2).transpose(2, 3).reshape(chunks, 4, -1).to(torch.int16)
    pairs = exponents.view(chunks, -1, 2).transpose(1, 2)
    codes = torch.stack([pairs & 15, pairs >> 4], 2).reshape(chunks, 4, -1).to(torch.int16)
    codes += bases.to(torch.int16)[:, None, None]
    return ((ends & 0x80) << 8 | codes << 7 | ends & 0x7F).view(-1)


def _put_escapes(parts: Mapping[str, Tensor], bits: Tensor, low: int) -> None:
    """Write the numbers whose exponents have no code.

    All escapes of the matrix are scattered, because only the device knows which of them are in this range. The others
    go to the last place, which is unused.
    """
    places = parts["places"]
    if not len(places):
        return
    numbers = torch.arange(len(places), device=places.device)
    chunks = torch.bucketize(numbers, parts["starts"], right=True) - 1
    at = chunks * CHUNK + (places.to(torch.int64) & 0xFFFF) - low
    unused = len(bits) - 1
    at = torch.where((at >= 0) & (at < unused), at, unused)
    bits[at] = parts["values"]


def int8_product(x: Tensor, codes: Tensor) -> Tensor:
    """Return the float32 product (M, R) of int8 matrices (M, K) and (R, K).

    The device's integer product needs more than 16 rows, and widths that are multiples of 8; zeros pad them.
    """
    rows, outputs = len(x), len(codes)
    more = -x.shape[1] % 8
    x = F.pad(x, (0, more, 0, max(0, 17 - rows)))
    codes = F.pad(codes, (0, more, 0, -outputs % 8)) if more or outputs % 8 else codes
    return torch._int_mm(x, codes.T)[:rows, :outputs].float()
