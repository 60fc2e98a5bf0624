"""The inner loops that decode e4m3 numbers with a scale a block; see `cpu_kernels` for what they are compiled by.

The bits of an e4m3 number, moved to where float32 has them, are those of the number less a factor of 2^120, subnormal numbers
included; so one exact product makes the number of them.
"""

from __future__ import annotations

import numpy as np
import torch

from slowllm.storage.codecs.cpu_kernels import compiled, round_row, rounded_bits

_MAGNITUDE, _SIGN, _NAN = np.uint32(0x7F), np.uint32(0x80), np.uint32(0x7FC00000)
_8, _16, _20, _24 = (np.uint32(number) for number in (8, 16, 20, 24))
# Added to the exponent of a normal number, and what a subnormal one is a multiple of.
_EXPONENT, _SMALLEST = np.uint32(120 << 23), np.float32(2.0**-9)
_FACTOR = np.float32(2.0**120)
_ZERO = np.uint32(0)
# Columns that are decoded at a time: their float32 numbers stay in the innermost cache, which made it 1.4 times as fast.
_PIECE = 2048


def _widen(codes: np.ndarray, bits: np.ndarray) -> None:
    for i in range(len(bits)):
        code = np.uint32(codes[i])
        low = code & _MAGNITUDE
        nan = _NAN if low == _MAGNITUDE else _ZERO
        bits[i] = (low << _20) | ((code & _SIGN) << _24) | nan


widen_row = compiled(_widen)
"""Write e4m3 numbers, given as bits (N,) uint8, as the bits (N,) uint32 of float32 numbers that are 2^120 times too small."""


def _scale_blocks(row: np.ndarray, scales: np.ndarray, columns: int) -> None:
    if columns == 1:  # a loop over blocks of one number would take ten times as long
        for i in range(len(row)):
            row[i] = row[i] * _FACTOR * scales[i]
        return
    for block in range(len(scales)):
        scale = scales[block]
        part = row[block * columns : min((block + 1) * columns, len(row))]
        for i in range(len(part)):
            part[i] = part[i] * _FACTOR * scale


_scale_row = compiled(_scale_blocks)


def _blocks_to_bfloat16(
    codes: np.ndarray,
    scales: np.ndarray,
    rows: int,
    columns: int,
    out: np.ndarray,
    origin: int,
    first: int,
    last: int,
) -> None:
    width = codes.shape[1]
    for number in range(first, last):
        for block in range(scales.shape[1]):
            scale = scales[number // rows, block]
            part = codes[number, block * columns : min((block + 1) * columns, width)]
            target = out[number - origin, block * columns : min((block + 1) * columns, width)]
            for i in range(len(target)):
                code = np.uint32(part[i])
                low = np.uint32(code & _MAGNITUDE)
                # A subnormal number is a multiple of 2^-9; as bits of a subnormal float32 it would take ten times as long.
                small = np.float32(np.float32(np.int32(low)) * _SMALLEST).view(np.uint32)
                bits = small if low < _8 else np.uint32(np.uint32(low << _20) + _EXPONENT)
                bits = _NAN if low == _MAGNITUDE else bits
                signed = np.uint32(bits | np.uint32(np.uint32(code & _SIGN) << _24))
                product = np.float32(signed.view(np.float32) * scale)
                target[i] = np.uint16(rounded_bits(product.view(np.uint32)) >> _16)


blocks_to_bfloat16 = compiled(_blocks_to_bfloat16)
"""Decode the rows `first` to `last`, half as fast again as `to_bfloat16`; only where `IS_COMPILED`, and blocks are not narrow."""


def _to_bfloat16(
    codes: np.ndarray,
    scales: np.ndarray,
    rows: int,
    columns: int,
    out: np.ndarray,
    origin: int,
    first: int,
    last: int,
) -> None:
    width = codes.shape[1]
    # Whole blocks that fit, or a piece of a larger one.
    step = _PIECE if columns > _PIECE else _PIECE // columns * columns
    row = np.empty(step, np.float32)
    bits = row.view(np.uint32)
    for number in range(first, last):
        of_row, low = scales[number // rows], 0
        while low < width:
            block = low // columns
            high = min(low + step, width)
            if columns > _PIECE:
                high = min(high, (block + 1) * columns)
            size = high - low
            widen_row(codes[number, low:high], bits[:size])
            _scale_row(row[:size], of_row[block : (high + columns - 1) // columns], columns)
            round_row(bits[:size], out[number - origin, low:high])
            low = high


def _to_float32(
    codes: np.ndarray,
    scales: np.ndarray,
    rows: int,
    columns: int,
    out: np.ndarray,
    origin: int,
    first: int,
    last: int,
) -> None:
    for number in range(first, last):
        row = out[number - origin]
        widen_row(codes[number], row.view(np.uint32))
        _scale_row(row, scales[number // rows], columns)


def _plain(codes: np.ndarray, scales: np.ndarray, rows: int, columns: int, number: int) -> np.ndarray:
    values = torch.from_numpy(codes[number]).view(torch.float8_e4m3fn).float().numpy()
    product: np.ndarray = values * np.repeat(scales[number // rows], columns)[: len(values)]
    return product


def _to_bfloat16_plain(
    codes: np.ndarray,
    scales: np.ndarray,
    rows: int,
    columns: int,
    out: np.ndarray,
    origin: int,
    first: int,
    last: int,
) -> None:
    for number in range(first, last):
        round_row(_plain(codes, scales, rows, columns, number).view(np.uint32), out[number - origin])


def _to_float32_plain(
    codes: np.ndarray,
    scales: np.ndarray,
    rows: int,
    columns: int,
    out: np.ndarray,
    origin: int,
    first: int,
    last: int,
) -> None:
    for number in range(first, last):
        out[number - origin] = _plain(codes, scales, rows, columns, number)


to_bfloat16 = compiled(_to_bfloat16, _to_bfloat16_plain)
"""Decode the rows `first` to `last`.

Args:
    codes: (R, K) uint8, bits of e4m3 numbers.
    scales: (ceil(R / rows), ceil(K / columns)) float32.
    rows, columns: of a block.
    out: uint16, bits of bf16 numbers; begins with row `origin`.
"""

to_float32 = compiled(_to_float32, _to_float32_plain)
"""Decode the rows `first` to `last` to float32; see `to_bfloat16`."""
