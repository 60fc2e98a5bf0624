"""The inner loop that puts e4m3 numbers together again from 7 bits and escapes; see `cpu_kernels` for what it is compiled by."""

from __future__ import annotations

import numpy as np

from slowllm.storage.codecs.cpu_kernels import compiled
from slowllm.storage.codecs.layout_constants import CHUNK

# Of each byte of a word.
_LANES = np.uint64(0x0101010101010101)
_SEVENS, _EIGHTS, _THREES = np.uint64(7) * _LANES, np.uint64(8) * _LANES, np.uint64(3) * _LANES
_2, _3, _4 = np.uint64(2), np.uint64(3), np.uint64(4)
# Words of output that one word of the lowest array is for.
_EIGHTHS = 8


def _unpack(
    nibbles: np.ndarray, twos: np.ndarray, ones: np.ndarray, base: np.uint64, out: np.ndarray
) -> None:
    n = len(ones)
    bases = base * _LANES
    for eighth in range(_EIGHTHS):
        at, into = eighth % 4 * n, eighth * n
        pair = eighth % 2 * n
        nibble_shift = np.uint64(eighth // 4 * 4)
        two_shift, one_shift = np.uint64(eighth // 2 * 2), np.uint64(eighth)
        for i in range(n):
            ends = nibbles[at + i] >> nibble_shift
            codes = (twos[pair + i] >> two_shift & _THREES) | ((ones[i] >> one_shift & _LANES) << _2)
            out[into + i] = (ends & _EIGHTS) << _4 | (codes + bases) << _3 | (ends & _SEVENS)


_unpack_words = compiled(_unpack)


def _unpack_chunks(
    nibbles: np.ndarray,
    twos: np.ndarray,
    ones: np.ndarray,
    bases: np.ndarray,
    starts: np.ndarray,
    escapes: np.ndarray,
    out: np.ndarray,
    origin: int,
    first: int,
    last: int,
) -> None:
    size = CHUNK // 64
    words = out.view(np.uint64)
    for chunk in range(first, last):
        low, high = chunk * size, min((chunk + 1) * size, len(ones))
        at = (chunk - origin) * CHUNK
        _unpack_words(
            nibbles[4 * low : 4 * high],
            twos[2 * low : 2 * high],
            ones[low:high],
            np.uint64(bases[chunk] & 15),
            words[at // 8 : at // 8 + 8 * (high - low)],
        )
        # A damaged store must not write out of bounds.
        begin = min(max(0, starts[chunk]), len(escapes))
        end = min(max(0, starts[chunk + 1]), len(escapes))
        place = 0
        for number in range(begin, end):
            place += int(escapes[number]) & 255
            if place < 64 * (high - low):
                out[at + place] = np.uint8(int(escapes[number]) >> 8)


unpack_chunks = compiled(_unpack_chunks)
"""Decode the chunks `first` to `last` to bits of e4m3 numbers.

Args:
    nibbles: (4 x N,) uint64, sign and mantissa of the numbers; the low halves of bytes are for the first half of a chunk.
    twos: (2 x N,) uint64, the two low bits of a number's exponent, less the base; a quarter of a chunk after the other.
    ones: (N,) uint64, the third bit.
    bases: (C,) uint8, of each chunk.
    starts: (C + 1,) int64, index of each chunk's first escape.
    escapes: (E,) uint16: how far it is from the last one in the chunk, and in the high byte the bits of the number.
    out: uint8; begins with chunk `origin`, and has room for whole chunks.
    first, last: the chunks.
"""
