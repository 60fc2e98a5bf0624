"""The inner loops that decode e2m1 numbers with a scale a block; see `cpu_kernels` for what they are compiled by.

From 1 on, the exponent and the bit of mantissa of an e2m1 number are those of float32 but for what the exponents count from;
below are 0 and 0.5.
"""

from __future__ import annotations

import numpy as np

from slowllm.storage.codecs.cpu_kernels import compiled, round_row

_1, _4, _7, _8 = (np.uint32(number) for number in (1, 4, 7, 8))
_22, _28 = np.uint32(22), np.uint32(28)
_HALF = np.uint32(0x3F000000)  # bits of 0.5
# Numbers that are decoded at a time, so that they stay in the first cache.
PIECE = 4096


def _widen(codes: np.ndarray, bits: np.ndarray) -> None:
    for i in range(len(codes)):
        pair = np.uint32(codes[i])
        low, high = pair & _7, (pair >> _4) & _7
        first = (low << _22) + _HALF if low > _1 else low * _HALF
        second = (high << _22) + _HALF if high > _1 else high * _HALF
        bits[2 * i] = first | ((pair & _8) << _28)
        bits[2 * i + 1] = second | (((pair >> _4) & _8) << _28)


def _widen_plain(codes: np.ndarray, bits: np.ndarray) -> None:
    pairs = np.stack([codes & 15, codes >> 4], 1).ravel().astype(np.uint32)
    low = pairs & _7
    bits[:] = np.where(low > _1, (low << _22) + _HALF, low * _HALF) | ((pairs & _8) << _28)


widen_row = compiled(_widen, _widen_plain)
"""Write pairs of e2m1 numbers (N,) uint8 as the bits (2 N,) uint32 of float32 numbers."""


def _scale_blocks(row: np.ndarray, scales: np.ndarray, columns: int) -> None:
    for block in range(len(scales)):
        scale = scales[block]
        part = row[block * columns : min((block + 1) * columns, len(row))]
        for i in range(len(part)):
            part[i] = part[i] * scale


def _scale_plain(row: np.ndarray, scales: np.ndarray, columns: int) -> None:
    row *= np.repeat(scales, columns)[: len(row)]


scale_row = compiled(_scale_blocks, _scale_plain)
"""Multiply float32 numbers (N,) by the scale (ceil(N / columns),) of their block, in place."""


def _to_bfloat16(
    codes: np.ndarray,
    scales: np.ndarray,
    columns: int,
    out: np.ndarray,
    first: int,
    last: int,
) -> None:
    width = 2 * codes.shape[1]
    blocks = 2 * max(1, PIECE // (2 * columns))
    row = np.empty(min(width, blocks * columns), np.float32)
    for number in range(first, last):
        for begin in range(0, width, blocks * columns):
            end = min(begin + blocks * columns, width)
            piece, block = row[: end - begin], begin // columns
            widen_row(codes[number, begin // 2 : end // 2], piece.view(np.uint32))
            scale_row(piece, scales[number, block : block + blocks], columns)
            round_row(piece.view(np.uint32), out[number, begin:end])


def _to_float32(
    codes: np.ndarray,
    scales: np.ndarray,
    columns: int,
    out: np.ndarray,
    first: int,
    last: int,
) -> None:
    width = 2 * codes.shape[1]
    blocks = 2 * max(1, PIECE // (2 * columns))
    for number in range(first, last):
        for begin in range(0, width, blocks * columns):
            end = min(begin + blocks * columns, width)
            piece, block = out[number, begin:end], begin // columns
            widen_row(codes[number, begin // 2 : end // 2], piece.view(np.uint32))
            scale_row(piece, scales[number, block : block + blocks], columns)


# Uncompiled, these loops are fast enough: numpy does a piece at a time.
to_bfloat16 = compiled(_to_bfloat16)
"""Decode the rows `first` to `last`.

Args:
    codes: (R, K / 2) uint8, two e2m1 numbers in each, the first in the low bits.
    scales: (R, ceil(K / columns)) float32.
    columns: that share a scale.
    out: (R, K) uint16, bits of bf16 numbers.
"""

to_float32 = compiled(_to_float32)
"""Decode the rows `first` to `last` to float32; see `to_bfloat16`."""
