"""The inner loops that decode e2m1 numbers of transposed matrices; see `cpu_kernels` for what they are compiled by.

A word of 32 bits holds eight codes of one row as stored, which are eight numbers of one column as decoded. Words of many
rows are decoded side by side, a place after the other, so that nothing is transposed number by number.
"""

from __future__ import annotations

import numpy as np

from slowllm.storage.codecs.cpu_kernels import compiled

# Twice the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6, four bits each.
_DOUBLED = np.uint32(0xC8643210)
_2, _7, _8, _12, _15, _16, _24, _28 = (np.uint32(number) for number in (2, 7, 8, 12, 15, 16, 24, 28))
# Rows that are decoded side by side: their words and scales stay in the first cache, and each column is written in long runs.
_TILE = 256
_CODES_OF_WORD, _CODES_OF_SCALE = 8, 32


def _half_scales(exponents: np.ndarray, halves: np.ndarray) -> None:
    """Write the bits of 2^(e - 128): half of each scale, because magnitudes come doubled."""
    for i in range(len(halves)):
        exponent = np.uint32(exponents[i])
        small = np.uint32(0x200000) << exponent  # the two that are subnormal
        halves[i] = small if exponent < 2 else (exponent - np.uint32(1)) << np.uint32(23)


_half_scales_of = compiled(_half_scales)


def _magnitudes(words: np.ndarray, shift: np.uint32, halves: np.ndarray, values: np.ndarray) -> None:
    for i in range(len(values)):
        place = ((words[i] >> shift) & _7) << _2
        values[i] = np.float32(np.int32((_DOUBLED >> place) & _15)) * halves[i]


_magnitudes_of = compiled(_magnitudes)


def _cut(words: np.ndarray, shift: np.uint32, bits: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(out)):
        # Exact: a product has two bits of mantissa, and is no smaller than 2^-128.
        out[i] = np.uint16((bits[i] >> _16) | (((words[i] >> shift) & _8) << _12))


_cut_row = compiled(_cut)


def _sign(words: np.ndarray, shift: np.uint32, bits: np.ndarray) -> None:
    for i in range(len(bits)):
        bits[i] |= ((words[i] >> shift) & _8) << _28


_sign_row = compiled(_sign)


def _to_bfloat16(
    codes: np.ndarray, scales: np.ndarray, out: np.ndarray, origin: int, first: int, last: int
) -> None:
    num_rows, width = codes.shape[1], 2 * codes.shape[2]
    words, values = np.empty(_TILE, np.uint32), np.empty(_TILE, np.float32)
    halves, bits = np.empty(_TILE, np.float32), values.view(np.uint32)
    half_bits, exponents = halves.view(np.uint32), np.empty(_TILE, np.uint8)
    for matrix in range(first // width, (last - 1) // width + 1):
        low, high = max(first - matrix * width, 0), min(last - matrix * width, width)
        for begin in range(0, num_rows, _TILE):
            size = min(_TILE, num_rows - begin)
            block = -1
            for word in range(low // _CODES_OF_WORD, (high - 1) // _CODES_OF_WORD + 1):
                for i in range(size):
                    words[i] = (
                        np.uint32(codes[matrix, begin + i, 4 * word])
                        | np.uint32(codes[matrix, begin + i, 4 * word + 1]) << _8
                        | np.uint32(codes[matrix, begin + i, 4 * word + 2]) << _16
                        | np.uint32(codes[matrix, begin + i, 4 * word + 3]) << _24
                    )
                if block != word * _CODES_OF_WORD // _CODES_OF_SCALE:
                    block = word * _CODES_OF_WORD // _CODES_OF_SCALE
                    for i in range(size):
                        exponents[i] = scales[matrix, begin + i, block]
                    _half_scales_of(exponents, half_bits[:size])
                for place in range(_CODES_OF_WORD):
                    column = word * _CODES_OF_WORD + place
                    if low <= column < high:
                        shift = np.uint32(4 * place)
                        target = out[matrix * width + column - origin, begin : begin + size]
                        _magnitudes_of(words, shift, halves, values[:size])
                        _cut_row(words, shift, bits, target)


def _to_float32(
    codes: np.ndarray, scales: np.ndarray, out: np.ndarray, origin: int, first: int, last: int
) -> None:
    num_rows, width = codes.shape[1], 2 * codes.shape[2]
    words, halves = np.empty(_TILE, np.uint32), np.empty(_TILE, np.float32)
    half_bits, exponents = halves.view(np.uint32), np.empty(_TILE, np.uint8)
    for matrix in range(first // width, (last - 1) // width + 1):
        low, high = max(first - matrix * width, 0), min(last - matrix * width, width)
        for begin in range(0, num_rows, _TILE):
            size = min(_TILE, num_rows - begin)
            block = -1
            for word in range(low // _CODES_OF_WORD, (high - 1) // _CODES_OF_WORD + 1):
                for i in range(size):
                    words[i] = (
                        np.uint32(codes[matrix, begin + i, 4 * word])
                        | np.uint32(codes[matrix, begin + i, 4 * word + 1]) << _8
                        | np.uint32(codes[matrix, begin + i, 4 * word + 2]) << _16
                        | np.uint32(codes[matrix, begin + i, 4 * word + 3]) << _24
                    )
                if block != word * _CODES_OF_WORD // _CODES_OF_SCALE:
                    block = word * _CODES_OF_WORD // _CODES_OF_SCALE
                    for i in range(size):
                        exponents[i] = scales[matrix, begin + i, block]
                    _half_scales_of(exponents, half_bits[:size])
                for place in range(_CODES_OF_WORD):
                    column = word * _CODES_OF_WORD + place
                    if low <= column < high:
                        shift = np.uint32(4 * place)
                        target = out[matrix * width + column - origin, begin : begin + size]
                        _magnitudes_of(words, shift, halves, target)
                        _sign_row(words, shift, target.view(np.uint32))


to_bfloat16 = compiled(_to_bfloat16)
"""Decode the rows `first` to `last` of the transposed matrices; only where `IS_COMPILED`, as it would be slow otherwise.

Args:
    codes: (E, R, K / 2) uint8, two codes in each, the first in the low bits. They may begin anywhere.
    scales: (E, R, K / 32) uint8, exponents of powers of two, from -127 on.
    out: (.., R) uint16, bits of bf16 numbers; begins with row `origin`.
    first, last: of E x K rows.
"""

to_float32 = compiled(_to_float32)
"""Decode the rows `first` to `last` to float32; see `to_bfloat16`."""
