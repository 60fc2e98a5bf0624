"""The inner loops of decoding, compiled by numba where it is installed, otherwise done by numpy's operations.

Knows arrays of numbers; knows nothing of tensors or files. Each loop does the range that it is given and releases the
GIL, so that threads can share the work. numba compiles for the processor that it runs on, and caches the result for
the next start. Both ways give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np

from slowllm.storage.codecs.layout_constants import CHUNK, IS_COMPILED, STEP

F = TypeVar("F", bound=Callable[..., Any])

_SIGNS = np.uint64(0x0080008000800080)
_MANTISSAS = np.uint64(0x007F007F007F007F)
_CODES = np.uint64(0x000F000F000F000F)
_LANES = np.uint64(0x0001000100010001)
_4, _7, _8 = np.uint64(4), np.uint64(7), np.uint64(8)
_HALF, _ONE, _16 = np.uint32(0x7FFF), np.uint32(1), np.uint32(16)
_TINY = np.float32(np.finfo(np.float32).tiny)


def compiled(loop: F, plain: Callable[..., Any] | None = None, *, reorders_sums: bool = False) -> F:
    """Return a loop compiled, or where there is no compiler what stands for it: `plain`, or the loop itself."""
    if not IS_COMPILED:
        return cast(F, loop if plain is None else plain)
    import numba

    # Sums and extremes are vectorised only if they may be reordered.
    fast = {"reassoc", "nnan", "nsz"} if reorders_sums else False
    return cast(F, numba.njit(nogil=True, cache=True, fastmath=fast)(loop))


def _join(signs: np.ndarray, exponents: np.ndarray, base: int, out: np.ndarray) -> None:
    """Assemble bf16 numbers, four 16-bit lanes in a word.

    In each lane, a word of `exponents` has the 4-bit codes of four words of output, one in each quarter; a word of
    `signs` has the sign and mantissa of two. No sum carries into the next lane: a base and a code are at most 255.

    Args:
        signs: (2 x N,) uint64; the first half is for the first two quarters of the output.
        exponents: (N,) uint64.
        base: the exponent of code 0.
        out: (4 x N,) uint64.
    """
    n = len(exponents)
    bases = np.uint64(base) * _LANES
    first, second = signs[:n], signs[n : 2 * n]
    quarter0, quarter1, quarter2, quarter3 = out[:n], out[n : 2 * n], out[2 * n : 3 * n], out[3 * n : 4 * n]
    for i in range(n):
        codes, pair = exponents[i], first[i]
        quarter0[i] = ((pair & _SIGNS) << _8) | (pair & _MANTISSAS) | (((codes & _CODES) + bases) << _7)
        codes, pair = codes >> _4, pair >> _8
        quarter1[i] = ((pair & _SIGNS) << _8) | (pair & _MANTISSAS) | (((codes & _CODES) + bases) << _7)
        codes, pair = codes >> _4, second[i]
        quarter2[i] = ((pair & _SIGNS) << _8) | (pair & _MANTISSAS) | (((codes & _CODES) + bases) << _7)
        codes, pair = codes >> _4, pair >> _8
        quarter3[i] = ((pair & _SIGNS) << _8) | (pair & _MANTISSAS) | (((codes & _CODES) + bases) << _7)


def _join_plain(signs: np.ndarray, exponents: np.ndarray, base: int, out: np.ndarray) -> None:
    n = len(exponents)
    scratch = np.empty(n, np.uint64)
    for quarter in range(4):
        into, pair = out[quarter * n : (quarter + 1) * n], signs[quarter // 2 * n : (quarter // 2 + 1) * n]
        np.right_shift(exponents, np.uint64(4 * quarter), out=into)
        np.bitwise_and(into, _CODES, out=into)
        np.add(into, np.uint64(base) * _LANES, out=into)
        np.left_shift(into, _7, out=into)
        pair = pair >> np.uint64(8 * (quarter % 2))
        np.bitwise_and(pair, _MANTISSAS, out=scratch)
        np.bitwise_or(into, scratch, out=into)
        np.bitwise_and(pair, _SIGNS, out=scratch)
        np.left_shift(scratch, _8, out=scratch)
        np.bitwise_or(into, scratch, out=into)


_join_words = compiled(_join, _join_plain)


def _join_chunks(
    signs: np.ndarray,
    exponents: np.ndarray,
    bases: np.ndarray,
    starts: np.ndarray,
    places: np.ndarray,
    values: np.ndarray,
    out: np.ndarray,
    origin: int,
    first: int,
    last: int,
) -> None:
    words = CHUNK // STEP
    whole = out.view(np.uint64)
    for chunk in range(first, last):
        begin, end = chunk * words, min((chunk + 1) * words, len(exponents))
        at = begin - origin * words
        _join_words(
            signs[2 * begin : 2 * end],
            exponents[begin:end],
            bases[chunk],
            whole[4 * at : 4 * (at + end - begin)],
        )
        # A damaged store must not write out of bounds: numba checks none, and lets sums overflow.
        low = min(max(0, starts[chunk]), len(places))
        high = min(max(0, starts[chunk + 1]), len(places))
        for escape in range(low, high):
            if places[escape] < STEP * (end - begin):
                out[STEP * at + places[escape]] = values[escape]


# Uncompiled, this loop is fast enough too: few numbers escape, and numpy joins the words.
join_chunks = compiled(_join_chunks)
"""Decode the chunks `first` to `last` of losslessly coded bf16 numbers.

Args:
    signs: (2 x N,) uint64, sign and mantissa.
    exponents: (N,) uint64, codes of 4 bits.
    bases: (C,) uint8, the exponent of code 0 in each chunk.
    starts: (C + 1,) int64, index of each chunk's first escape.
    places: (E,) uint16, positions of the escapes in their chunks.
    values: (E,) uint16, bits of the numbers whose exponents have no code.
    out: uint16, bits of the numbers; begins with chunk `origin`.
    first, last: the chunks.
"""


def _round(values: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(out)):
        out[i] = np.uint16((values[i] + _HALF + ((values[i] >> _16) & _ONE)) >> _16)


round_row = compiled(_round, lambda values, out: _round_plain(values.view(np.float32), out))
"""Round fp32 numbers, given as bits (N,) uint32, to the nearest bf16, ties to even.

Args:
    values: bits of the numbers.
    out: (N,) uint16, bits of bf16 numbers.
"""


def _rounded(bits: np.uint32) -> np.uint32:
    # Each step in 32 bits: in the 64 that numba takes by itself, half as many numbers fit in a register.
    return np.uint32(bits + _HALF + np.uint32(np.uint32(bits >> _16) & _ONE))


rounded_bits = compiled(_rounded)
"""Return the bits of a float32 of which the upper 16 are those of the nearest bf16, ties to even; only where `IS_COMPILED`."""


def _settle(bits: np.ndarray) -> None:
    for i in range(len(bits)):
        bits[i] = ((bits[i] + _HALF + ((bits[i] >> _16) & _ONE)) >> _16) << _16


def _settle_plain(bits: np.ndarray) -> None:
    bits[:] = ((bits + _HALF + ((bits >> _16) & _ONE)) >> _16) << _16


settle_row = compiled(_settle, _settle_plain)
"""Round fp32 numbers, given as bits (N,) uint32, to the nearest bf16 in place; see `round_row`."""


def _spread(packed: np.ndarray, scales: np.ndarray, lows: np.ndarray, half: int, row: np.ndarray) -> None:
    for group in range(len(scales)):
        scale, low = scales[group], lows[group]
        pairs, at = packed[group * half : (group + 1) * half], 2 * half * group
        left, right = row[at : at + half], row[at + half : at + 2 * half]
        for i in range(half):
            left[i] = np.float32(pairs[i] & 15) * scale + low
            right[i] = np.float32(pairs[i] >> 4) * scale + low


_spread_row = compiled(_spread)


def _int4_rows(
    packed: np.ndarray, scales: np.ndarray, lows: np.ndarray, out: np.ndarray, first: int, last: int
) -> None:
    half = packed.shape[1] // scales.shape[1]
    row = np.empty(2 * packed.shape[1], np.float32)
    bits = row.view(np.uint32)
    for number in range(first, last):
        _spread_row(packed[number], scales[number], lows[number], half, row)
        round_row(bits[: out.shape[1]], out[number])


def _int4_rows_plain(
    packed: np.ndarray, scales: np.ndarray, lows: np.ndarray, out: np.ndarray, first: int, last: int
) -> None:
    for number in range(first, last):
        pairs = packed[number].reshape(scales.shape[1], -1)
        codes = np.concatenate([pairs & 15, pairs >> 4], 1).astype(np.float32)
        _round_plain((codes * scales[number][:, None] + lows[number][:, None]).ravel(), out[number])


def _round_plain(values: np.ndarray, out: np.ndarray) -> None:
    bits = values[: len(out)].view(np.uint32)
    out[:] = (bits + _HALF + ((bits >> _16) & _ONE)) >> _16


int4_rows = compiled(_int4_rows, _int4_rows_plain)
"""Decode the rows `first` to `last` of 4-bit codes.

Args:
    packed: (R, G x group / 2) uint8; a group's first half is in the low nibbles, its second in the high ones.
    scales, lows: (R, G) float32; a weight is its code times the scale, plus the low.
    out: (R, K) uint16, bits of bf16 numbers; K is at most G x group.
"""


def _scale(codes: np.ndarray, scale: float, row: np.ndarray) -> None:
    for i in range(len(row)):
        row[i] = np.float32(codes[i]) * scale


_scale_row = compiled(_scale)


def _int8_rows(codes: np.ndarray, scales: np.ndarray, out: np.ndarray, first: int, last: int) -> None:
    row = np.empty(out.shape[1], np.float32)
    bits = row.view(np.uint32)
    for number in range(first, last):
        _scale_row(codes[number], scales[number], row)
        round_row(bits, out[number])


def _int8_rows_plain(codes: np.ndarray, scales: np.ndarray, out: np.ndarray, first: int, last: int) -> None:
    for number in range(first, last):
        _round_plain(codes[number].astype(np.float32) * scales[number], out[number])


int8_rows = compiled(_int8_rows, _int8_rows_plain)
"""Decode the rows `first` to `last` of 8-bit codes.

Args:
    codes: (R, K) int8.
    scales: (R,) float32, of each row.
    out: (R, K) uint16, bits of bf16 numbers.
"""


def _to_float(codes: np.ndarray, row: np.ndarray) -> None:
    for i in range(len(row)):
        row[i] = np.float32(codes[i])


_to_float_row = compiled(_to_float)


def _cut(values: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(out)):
        out[i] = np.uint16(values[i] >> _16)


_cut_row = compiled(_cut)


def _int8_codes(codes: np.ndarray, out: np.ndarray) -> None:
    row = np.empty(out.shape[1], np.float32)
    bits = row.view(np.uint32)
    for number in range(len(codes)):
        _to_float_row(codes[number], row)
        _cut_row(bits, out[number])


def _int8_codes_plain(codes: np.ndarray, out: np.ndarray) -> None:
    for number in range(len(codes)):
        out[number] = codes[number].astype(np.float32).view(np.uint32) >> _16


int8_codes = compiled(_int8_codes, _int8_codes_plain)
"""Write 8-bit integers as bf16, which represents them exactly, so the lower half of the fp32 bits is cut off.

Args:
    codes: (R, K) int8.
    out: (R, K) uint16, bits of bf16 numbers.
"""


def _settle_rows(bits: np.ndarray, first: int, last: int) -> None:
    for number in range(first, last):
        settle_row(bits[number])


settle_rows = compiled(_settle_rows)
"""Round the rows `first` to `last` of fp32 numbers to bf16 in place; see `settle_row`."""


def _extremes(values: np.ndarray) -> tuple[float, float]:
    low = high = values[0]
    for i in range(len(values)):
        low, high = min(low, values[i]), max(high, values[i])
    return low, high


_extremes_of = compiled(_extremes, reorders_sums=True)


def _error(values: np.ndarray, scale: np.float32, low: np.float32) -> np.float32:
    inverse, total = np.float32(1) / max(scale, _TINY), np.float32(0)
    for i in range(len(values)):
        code = min(max(np.rint((values[i] - low) * inverse), np.float32(0)), np.float32(15))
        difference = code * scale + low - values[i]
        total += difference * difference
    return total


_error_of = compiled(_error, reorders_sums=True)


def _pack(values: np.ndarray, scale: np.float32, low: np.float32, packed: np.ndarray) -> None:
    inverse, half = np.float32(1) / max(scale, _TINY), len(packed)
    for i in range(half):
        left = min(max(np.rint((values[i] - low) * inverse), np.float32(0)), np.float32(15))
        right = min(max(np.rint((values[half + i] - low) * inverse), np.float32(0)), np.float32(15))
        packed[i] = np.uint8(left) | (np.uint8(right) << np.uint8(4))


_pack_group = compiled(_pack)


def _int4_encode(
    values: np.ndarray,
    shrinks: np.ndarray,
    packed: np.ndarray,
    scales: np.ndarray,
    lows: np.ndarray,
    first: int,
    last: int,
) -> None:
    half = packed.shape[1] // scales.shape[1]
    pair = np.empty(2, np.float32)
    bits, rounded = pair.view(np.uint32), np.empty(2, np.uint16)
    for row in range(first, last):
        for group in range(scales.shape[1]):
            weights = values[row, 2 * half * group : 2 * half * (group + 1)]
            low, high = _extremes_of(weights)
            middle, reach = (low + high) * np.float32(0.5), (high - low) * np.float32(0.5)
            best = np.float32(np.inf)
            for shrink in shrinks:
                pair[0], pair[1] = np.float32(2 / 15) * shrink * reach, middle - shrink * reach
                round_row(bits, rounded)
                bits[0], bits[1] = np.uint32(rounded[0]) << _16, np.uint32(rounded[1]) << _16
                error = _error_of(weights, pair[0], pair[1])
                if error < best:
                    best, scales[row, group], lows[row, group] = error, pair[0], pair[1]
            here = packed[row, half * group : half * (group + 1)]
            _pack_group(weights, scales[row, group], lows[row, group], here)


int4_encode = compiled(_int4_encode)
"""Encode the rows `first` to `last` in 4 bits; only where `IS_COMPILED`.

Args:
    values: (R, G x group) float32.
    shrinks: (S,) float32, the shares of a group's range to try; the one with the least squared error is used.
    packed: (R, G x group / 2) uint8, output; see `int4_rows`.
    scales, lows: (R, G) float32, output; representable in bf16.
"""
