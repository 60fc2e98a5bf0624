"""The inner loops that decode small integers which are packed in words of 32 bits; see `cpu_kernels` for what compiles them.

The words lie in the files with the rows of the decoded matrix side by side, so a tile of them is turned around first: a
copy of a few bits a weight. A weight is (code - zero) * scale, which is exact in float32, rounded to the dtype of the scales
(`_to_half`), and rounded again where the weight is wanted in bfloat16.
"""

from __future__ import annotations

import numpy as np

from slowllm.storage.codecs.cpu_kernels import compiled, round_row

# Rows that are turned around at a time: a cache line of words.
_TILE = 16
# Weights of a row that are unpacked at a time where a word holds several rows.
_CHUNK = 4096
# Between rows of the turned tile, so that they do not fall on the same places of the cache.
_PAD = 16

_SPREAD_2 = (np.uint64(0x000000FF000000FF), np.uint64(0x000F000F000F000F), np.uint64(0x0303030303030303))
_SPREAD_4 = (np.uint64(0x0000FFFF0000FFFF), np.uint64(0x00FF00FF00FF00FF), np.uint64(0x0F0F0F0F0F0F0F0F))
_SPREAD_3 = (np.uint64(0x00000FFF00000FFF), np.uint64(0x003F003F003F003F), np.uint64(0x0707070707070707))
_4, _5, _6, _8, _10 = (np.uint64(number) for number in (4, 5, 6, 8, 10))
_12, _16, _20, _24 = (np.uint64(number) for number in (12, 16, 20, 24))

_ABOVE, _CUT, _ONE, _13 = np.uint32(0xFFF), np.uint32(0xFFFFE000), np.uint32(1), np.uint32(13)
_SIGN, _MAGNITUDE, _INFINITY = np.uint32(0x80000000), np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
_TOO_LARGE, _SMALLEST, _NAN = np.uint32(0x477FF000), np.uint32(0x38800000), np.uint32(0x7FC00000)
_HALF, _HIGH, _UPPER = np.uint32(0x7FFF), np.uint32(16), np.uint32(0xFFFF0000)
_MAGIC = np.float32(0.5)
# A float32 with these bits is 2^23; a small integer in its lowest bits is added to it.
_WIDE, _TWO_23 = np.uint32(0x4B000000), np.float32(2.0**23)
# Scales between these make no float16 that is subnormal or infinite.
LOW_SCALE, HIGH_SCALE = np.float32(2.0**-14), np.float32(255.0)


def _turn(words: np.ndarray, base: int, count: int, low: int, high: int, tile: np.ndarray) -> None:
    if count == _TILE:
        for i in range(high - low):
            line = words[low + i, base : base + _TILE]
            for c in range(_TILE):
                tile[c, i] = line[c]
        return
    for i in range(high - low):
        for c in range(count):
            tile[c, i] = words[low + i, base + c]


_turn_words = compiled(_turn)


def _spread_4(words: np.ndarray, eights: np.ndarray) -> None:
    for i in range(len(words)):
        bits = np.uint64(words[i])
        bits = (bits | (bits << _16)) & _SPREAD_4[0]
        bits = (bits | (bits << _8)) & _SPREAD_4[1]
        eights[i] = (bits | (bits << _4)) & _SPREAD_4[2]


_spread_words_4 = compiled(_spread_4)


def _spread_2(halves: np.ndarray, eights: np.ndarray) -> None:
    for i in range(len(halves)):
        bits = np.uint64(halves[i])
        bits = (bits | (bits << _24)) & _SPREAD_2[0]
        bits = (bits | (bits << _12)) & _SPREAD_2[1]
        eights[i] = (bits | (bits << _6)) & _SPREAD_2[2]


_spread_words_2 = compiled(_spread_2)


def _spread_3(triples: np.ndarray, eights: np.ndarray) -> None:
    for i in range(len(eights)):
        bits = np.uint64(triples[3 * i])
        bits |= np.uint64(triples[3 * i + 1]) << _8
        bits |= np.uint64(triples[3 * i + 2]) << _16
        bits = (bits | (bits << _20)) & _SPREAD_3[0]
        bits = (bits | (bits << _10)) & _SPREAD_3[1]
        eights[i] = (bits | (bits << _5)) & _SPREAD_3[2]


_spread_words_3 = compiled(_spread_3)


def _spread(words: np.ndarray, bits: int, codes: np.ndarray) -> None:
    eights = codes.view(np.uint64)
    if bits == 4:
        _spread_words_4(words, eights)
    elif bits == 2:
        _spread_words_2(words.view(np.uint16), eights)
    elif bits == 3:
        _spread_words_3(words.view(np.uint8), eights)
    else:
        codes[:] = words.view(np.uint8)


_spread_row = compiled(_spread)


def _pick(words: np.ndarray, shift: int, bits: np.ndarray) -> None:
    places, mask = np.uint32(shift), np.uint32(15)
    for i in range(len(words)):
        bits[i] = _WIDE | ((words[i] >> places) & mask)


_pick_row = compiled(_pick)


def _widen(codes: np.ndarray, bits: np.ndarray) -> None:
    for i in range(len(bits)):
        bits[i] = _WIDE | np.uint32(codes[i])


_widen_row = compiled(_widen)


def _multiply(values: np.ndarray, scale: np.float32, zero: np.float32) -> None:
    for i in range(len(values)):
        values[i] = (values[i] - zero) * scale


_multiply_group = compiled(_multiply)


def _gather(values: np.ndarray, order: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> None:
    for i in range(len(values)):
        group = order[i]
        values[i] = (values[i] - zeros[group]) * scales[group]


_gather_groups = compiled(_gather)


def _to_half_fast(bits: np.ndarray) -> None:
    for i in range(len(bits)):
        bits[i] = (bits[i] + _ABOVE + ((bits[i] >> _13) & _ONE)) & _CUT


_round_normal_half = compiled(_to_half_fast)


def _to_half_any(bits: np.ndarray, values: np.ndarray, small: np.ndarray) -> None:
    # Below the smallest normal number, float16 has steps of 2^-24, as float32 has between 0.5 and 1.
    for i in range(len(values)):
        small[i] = (abs(values[i]) + _MAGIC) - _MAGIC
    steps = small.view(np.uint32)
    for i in range(len(bits)):
        sign, magnitude = bits[i] & _SIGN, bits[i] & _MAGNITUDE
        rounded = (magnitude + _ABOVE + ((magnitude >> _13) & _ONE)) & _CUT
        rounded = steps[i] if magnitude < _SMALLEST else rounded
        rounded = _INFINITY if magnitude >= _TOO_LARGE else rounded
        bits[i] = _NAN if magnitude > _INFINITY else sign | rounded


_round_any_half = compiled(_to_half_any)


def _to_bfloat16(bits: np.ndarray) -> None:
    for i in range(len(bits)):
        near = (bits[i] + _HALF + ((bits[i] >> _HIGH) & _ONE)) & _UPPER
        bits[i] = _NAN if (bits[i] & _MAGNITUDE) > _INFINITY else near


_round_bfloat16 = compiled(_to_bfloat16)


def _to_half_and_bfloat16(bits: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(out)):
        half = (bits[i] + _ABOVE + ((bits[i] >> _13) & _ONE)) & _CUT
        out[i] = np.uint16((half + _HALF + ((half >> _HIGH) & _ONE)) >> _HIGH)


_round_normal_half_and_bfloat16 = compiled(_to_half_and_bfloat16)


def _scale(values: np.ndarray, scales: np.ndarray, zeros: np.ndarray, group: int, order: np.ndarray) -> bool:
    """Turn the codes of a row into weights, and return whether they are normal numbers, or zeros, in float16.

    Args:
        values: (K,) float32, codes plus 2^23.
        scales, zeros: (G,) float32, of the row's groups; zeros plus 2^23.
        group: weights that share a scale.
        order: (K,) int32, the groups of the weights where `group` does not tell them; otherwise empty.
    """
    if len(order):
        _gather_groups(values, order, scales, zeros)
    else:
        for number in range((len(values) + group - 1) // group):
            part = values[number * group : min((number + 1) * group, len(values))]
            _multiply_group(part, scales[number], zeros[number])
    is_normal = True
    for number in range(len(scales)):
        is_normal &= LOW_SCALE <= abs(scales[number]) <= HIGH_SCALE
    return is_normal


_scale_row = compiled(_scale)


def _finish(values: np.ndarray, is_half: bool, is_normal: bool, small: np.ndarray, out: np.ndarray) -> None:
    """Round the weights of a row to the dtype of the scales, and then to that of `out`.

    Args:
        values: (K,) float32; overwritten.
        is_half: whether the scales are float16; otherwise they are bfloat16.
        is_normal: see `_scale`.
        small: (K,) float32, scratch.
        out: (K,) float32 or uint16, the bits of bf16 numbers.
    """
    bits, is_short = values.view(np.uint32), out.itemsize == 2
    if not is_half:
        _round_bfloat16(bits)
    elif is_normal and is_short:
        _round_normal_half_and_bfloat16(bits, out.view(np.uint16))
        return
    elif is_normal:
        _round_normal_half(bits)
    else:
        _round_any_half(bits, values, small)
    if is_short:
        round_row(bits, out.view(np.uint16))
    else:
        out.view(np.float32)[:] = values


finish_row = compiled(_finish)


def _turn_floats(scales: np.ndarray, base: int, count: int, low: int, tile: np.ndarray) -> None:
    # Line by line: rows of a wide matrix lie at the same place of the cache.
    for group in range(tile.shape[1]):
        for c in range(count):
            tile[c, group] = scales[low + group, base + c]


_turn_scales = compiled(_turn_floats)


def _zeros_along(words: np.ndarray, bits: int, base: int, count: int, more: int, zeros: np.ndarray) -> None:
    """Write the zeros of some rows, plus 2^23: numbers of each line of packed words, plus `more`."""
    mask = np.uint32((1 << bits) - 1)
    # Of words that were shortened by one a number, the whole word is put right, as the package that wrote them does.
    ones = np.uint32(0)
    if bits != 3 and more:
        for low in range(0, 32, bits):
            ones |= np.uint32(1) << np.uint32(low)
    for group in range(zeros.shape[1]):
        for c in range(count):
            place = (base + c) * bits
            word, shift = place // 32, place % 32
            number = np.uint32(words[group, word] + ones) >> np.uint32(shift)
            if shift + bits > 32:
                number |= words[group, word + 1] << np.uint32(32 - shift)
            if bits == 3:
                number += np.uint32(more)
            zeros[c, group] = _TWO_23 + np.float32(number & mask)


_zeros_of_rows = compiled(_zeros_along)


def _along(
    words: np.ndarray,
    zeros: np.ndarray,
    scales: np.ndarray,
    order: np.ndarray,
    bits: int,
    group: int,
    more: int,
    is_half: bool,
    out: np.ndarray,
    origin: int,
    first: int,
    last: int,
) -> None:
    height, width = words.shape[0], out.shape[1]
    tile = np.empty((_TILE, height + _PAD), np.uint32)
    codes, values, small = np.empty(width, np.uint8), np.empty(width, np.float32), np.empty(width, np.float32)
    tile_scales, tile_zeros = (
        np.empty((_TILE, len(scales)), np.float32),
        np.empty((_TILE, len(scales)), np.float32),
    )
    for base in range(first, last, _TILE):
        count = min(_TILE, last - base)
        _turn_words(words, base, count, 0, height, tile)
        _turn_scales(scales, base - origin, count, 0, tile_scales)
        _zeros_of_rows(zeros, bits, base, count, more, tile_zeros)
        for c in range(count):
            _spread_row(tile[c, :height], bits, codes)
            _widen_row(codes, values.view(np.uint32))
            is_normal = _scale_row(values, tile_scales[c], tile_zeros[c], group, order)
            finish_row(values, is_half, is_normal, small, out[base + c - origin])


along = compiled(_along)
"""Decode the rows `first` to `last` of codes that are packed along the rows of the decoded matrix.

Args:
    words: (K x bits / 32, R) uint32.
    zeros: (G, R x bits / 32) uint32.
    scales: (G, ..) float32; begins with row `origin`.
    order: (K,) int32, of each column its group; empty where `group` columns share one, from the first on.
    bits: of a code: 2, 3, 4 or 8.
    group: columns that share a scale.
    more: what is to be added to zeros, 0 or 1.
    is_half: whether the scales are float16; otherwise they are bfloat16.
    out: (.., K), float32 or uint16 (the bits of bf16 numbers); begins with row `origin`.
"""


def _across(
    words: np.ndarray,
    zeros: np.ndarray,
    scales: np.ndarray,
    shifts: np.ndarray,
    group: int,
    is_half: bool,
    out: np.ndarray,
    origin: int,
    first: int,
    last: int,
) -> None:
    width, none = out.shape[1], np.empty(0, np.int32)
    chunk = min(width, max(1, _CHUNK // group) * group)
    tile = np.empty((_TILE, chunk + _PAD), np.uint32)
    values, small = np.empty(chunk, np.float32), np.empty(chunk, np.float32)
    groups = (chunk + group - 1) // group
    row_scales, row_zeros = np.empty(groups, np.float32), np.empty(groups, np.float32)
    begin, end = first // 8, (last + 7) // 8
    for base in range(begin, end, _TILE):
        count = min(_TILE, end - base)
        for low in range(0, width, chunk):
            size, at = min(chunk, width - low), low // group
            num = (size + group - 1) // group
            _turn_words(words, base, count, low, low + size, tile)
            for number in range(max(first, 8 * base), min(last, 8 * (base + count))):
                column, shift = number // 8, shifts[number % 8]
                for g in range(num):
                    row_scales[g] = scales[at + g, number - origin]
                    zero = (zeros[at + g, column] >> np.uint32(shift)) & np.uint32(15)
                    row_zeros[g] = _TWO_23 + np.float32(zero)
                row = values[:size]
                _pick_row(tile[column - base, :size], shift, row.view(np.uint32))
                is_normal = _scale_row(row, row_scales[:num], row_zeros, group, none)
                finish_row(row, is_half, is_normal, small, out[number - origin, low : low + size])


across = compiled(_across)
"""Decode the rows `first` to `last` of codes of 4 bits of which a word has eight rows.

Args:
    words: (K, R / 8) uint32.
    zeros: (G, R / 8) uint32.
    scales: (G, ..) float32; begins with row `origin`.
    shifts: (8,) int64, where in a word the code of each of its rows begins.
    group, is_half, out, origin: see `along`.
"""
