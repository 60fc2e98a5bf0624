"""The inner loops that decode integers with a scale and a zero a block; see `cpu_kernels` for what they are compiled by."""

from __future__ import annotations

import numpy as np

from slowllm.storage.codecs.cpu_kernels import compiled, round_row, rounded_bits
from slowllm.storage.codecs.packed_kernels import HIGH_SCALE, LOW_SCALE, finish_row

_4, _15 = np.uint8(4), np.uint8(15)
_FOUR, _LOW, _16, _UPPER = (np.uint32(number) for number in (4, 15, 16, 0xFFFF0000))
# Numbers that are decoded at a time, so that they stay in the first cache.
_PIECE = 4096


def _widen_pairs(codes: np.ndarray, row: np.ndarray) -> None:
    for i in range(len(codes)):
        pair = codes[i]
        row[2 * i] = np.float32(np.int32(pair & _15))
        row[2 * i + 1] = np.float32(np.int32(pair >> _4))


def _widen_pairs_plain(codes: np.ndarray, row: np.ndarray) -> None:
    row[:] = np.stack([codes & 15, codes >> 4], 1).ravel()


_widen_pairs_row = compiled(_widen_pairs, _widen_pairs_plain)


def _widen_bytes(codes: np.ndarray, row: np.ndarray) -> None:
    for i in range(len(row)):
        row[i] = np.float32(np.int32(codes[i]))


def _widen_bytes_plain(codes: np.ndarray, row: np.ndarray) -> None:
    row[:] = codes


_widen_bytes_row = compiled(_widen_bytes, _widen_bytes_plain)


def _scale_blocks(row: np.ndarray, scales: np.ndarray, zeros: np.ndarray, columns: int) -> None:
    for block in range(len(scales)):
        scale, zero = scales[block], zeros[block]
        part = row[block * columns : min((block + 1) * columns, len(row))]
        for i in range(len(part)):
            part[i] = (part[i] - zero) * scale


def _scale_plain(row: np.ndarray, scales: np.ndarray, zeros: np.ndarray, columns: int) -> None:
    row -= np.repeat(zeros, columns)[: len(row)]
    row *= np.repeat(scales, columns)[: len(row)]


_scale_row = compiled(_scale_blocks, _scale_plain)


def _decode(
    codes: np.ndarray,
    are_pairs: bool,
    scales: np.ndarray,
    zeros: np.ndarray,
    columns: int,
    begin: int,
    end: int,
    row: np.ndarray,
) -> None:
    """Write the weights `begin` to `end` of a row to `row`; `begin` is even, and the first column of a block."""
    if are_pairs:
        pairs = codes[begin // 2 : (end + 1) // 2]
        _widen_pairs_row(pairs, row[: 2 * len(pairs)])
    else:
        _widen_bytes_row(codes[begin:end], row[: end - begin])
    blocks = slice(begin // columns, (end - 1) // columns + 1)
    _scale_row(row[: end - begin], scales[blocks], zeros[blocks], columns)


_decode_piece = compiled(_decode)


def _piece(columns: int) -> int:
    """Return how many columns are decoded at a time: an even number of blocks."""
    return 2 * max(1, _PIECE // (2 * columns)) * columns


_piece_of = compiled(_piece)


def _pairs_to_bfloat16(
    codes: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray,
    columns: int,
    out: np.ndarray,
    first: int,
    last: int,
) -> None:
    half, width = columns // 2, out.shape[1]
    for number in range(first, last):
        for block in range(scales.shape[1]):
            scale, zero = scales[number, block], zeros[number, block]
            part = codes[number, block * half : min((block + 1) * half, width)]
            target = out[number, block * half : min((block + 1) * half, width)]
            for i in range(len(target)):
                pair = np.uint32(part[i])
                low = np.float32((np.float32(np.int32(pair & _LOW)) - zero) * scale)
                high = np.float32((np.float32(np.int32(pair >> _FOUR)) - zero) * scale)
                low_bits = np.uint32(rounded_bits(low.view(np.uint32)) >> _16)
                target[i] = low_bits | np.uint32(rounded_bits(high.view(np.uint32)) & _UPPER)


pairs_to_bfloat16 = compiled(_pairs_to_bfloat16)
"""Decode the rows `first` to `last` of pairs of integers, ten times as fast as `to_bfloat16`; only where `IS_COMPILED`.

Args:
    codes: (R, at least K / 2) uint8.
    scales, zeros: see `to_bfloat16`.
    columns: that share a scale and a zero; even, as K is.
    out: (R, K / 2) uint32, bits of pairs of bf16 numbers, the first in the low bits.
"""


def _to_bfloat16(
    codes: np.ndarray,
    are_pairs: bool,
    scales: np.ndarray,
    zeros: np.ndarray,
    columns: int,
    out: np.ndarray,
    first: int,
    last: int,
) -> None:
    width, step = out.shape[1], _piece_of(columns)
    row = np.empty(min(width + 1, step), np.float32)
    for number in range(first, last):
        stored, own_scales, own_zeros = codes[number], scales[number], zeros[number]
        for begin in range(0, width, step):
            end = min(begin + step, width)
            _decode_piece(stored, are_pairs, own_scales, own_zeros, columns, begin, end, row)
            round_row(row[: end - begin].view(np.uint32), out[number, begin:end])


def _to_float32(
    codes: np.ndarray,
    are_pairs: bool,
    scales: np.ndarray,
    zeros: np.ndarray,
    columns: int,
    out: np.ndarray,
    first: int,
    last: int,
) -> None:
    width, step = out.shape[1], _piece_of(columns)
    row = np.empty(min(width + 1, step), np.float32)
    for number in range(first, last):
        stored, own_scales, own_zeros = codes[number], scales[number], zeros[number]
        for begin in range(0, width, step):
            end = min(begin + step, width)
            _decode_piece(stored, are_pairs, own_scales, own_zeros, columns, begin, end, row)
            out[number, begin:end] = row[: end - begin]


def _to_half(
    codes: np.ndarray,
    are_pairs: bool,
    scales: np.ndarray,
    zeros: np.ndarray,
    columns: int,
    out: np.ndarray,
    first: int,
    last: int,
) -> None:
    width, step = out.shape[1], _piece_of(columns)
    row, small = np.empty(min(width + 1, step), np.float32), np.empty(min(width + 1, step), np.float32)
    for number in range(first, last):
        stored, own_scales, own_zeros = codes[number], scales[number], zeros[number]
        for begin in range(0, width, step):
            end = min(begin + step, width)
            _decode_piece(stored, are_pairs, own_scales, own_zeros, columns, begin, end, row)
            own = own_scales[begin // columns : (end - 1) // columns + 1]
            is_normal = True
            for i in range(len(own)):
                is_normal &= LOW_SCALE <= abs(own[i]) <= HIGH_SCALE
            finish_row(row[: end - begin], True, is_normal, small, out[number, begin:end])


# Uncompiled, these loops are fast enough: numpy does a piece at a time.
to_bfloat16 = compiled(_to_bfloat16)
"""Decode the rows `first` to `last`.

Args:
    codes: (R, ..) uint8 or int8; two integers of 4 bits in each, the first in the low bits, or one of 8.
    are_pairs: whether there are two in each.
    scales, zeros: (R, ceil(K / columns)) float32; a weight is its integer less the zero, times the scale.
    columns: that share a scale and a zero.
    out: (R, K) uint16, bits of bf16 numbers.
"""

to_float32 = compiled(_to_float32)
"""Decode the rows `first` to `last` to float32; see `to_bfloat16`."""

to_half = compiled(_to_half)
"""Decode the rows `first` to `last`, rounded to float16 and then to the dtype of `out`; only where `IS_COMPILED`.

Args:
    out: (R, K) float32 or uint16, the bits of bf16 numbers.
    codes, are_pairs, scales, zeros, columns: see `to_bfloat16`.
"""
