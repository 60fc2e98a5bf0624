"""The inner loops that decode blocks of GGUF files to float32; see `cpu_kernels` for what they are compiled by.

Each takes `blocks` (R, B, bytes of a block) uint8, the stored row of each row that is wanted, `out` (rows, B, weights of a
block) float32, and `bits` (0, 0) uint16; or, where bf16 is wanted, one row of float32 to work on, and `bits` (rows, weights of
a row). Blocks of 32 weights are here, those of 256 in `gguf_super_kernels`. The operations and their order are
those of ggml's own reference, so that the bits are, too: one product, or one product and one difference, each of which
rounds. LLVM vectorises the innermost loops; where it would unroll one of a constant length instead, which takes three times
as long, the length is read from the array.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from slowllm.storage.codecs.cpu_kernels import compiled, round_row

Loop = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]

_SIGN, _MAGNITUDE, _INFINITE = np.uint32(0x8000), np.uint32(0x7FFF), np.uint32(0x7C00)
_8, _13, _16, _23 = np.uint32(8), np.uint32(13), np.uint32(16), np.uint32(23)
_QUIET, _EXPONENTS = np.uint32(0x7FC00000), np.uint32(0x7F800000)
_ONE, _2, _SUBNORMAL = np.uint32(1), np.uint32(2), np.uint32(0x00200000)
_FACTOR = np.float32(2.0**112)
_i1, _i2, _i4, _i8, _i16 = np.int32(1), np.int32(2), np.int32(4), np.int32(8), np.int32(16)
_LOW = np.int32(15)
# The 16 values of IQ4_NL, as bytes, eight in a word; a shift picks one, which vectorises where a look-up does not.
_VALUES_LOW = np.uint64(0xF6EADDCFBFAD9881)
_VALUES_HIGH = np.uint64(0x7159453526190D01)
_u3, _u7, _u8 = np.uint64(3), np.uint64(7), np.uint64(8)


def _half_bits(low: int, high: int) -> np.uint32:
    """Return the bits of a float32 that is the float16 of these bytes, less a factor of 2^112 unless it is infinite."""
    half = np.uint32(low) | (np.uint32(high) << _8)
    magnitude = half & _MAGNITUDE
    bits = magnitude << _13
    if magnitude > _INFINITE:
        bits = _QUIET
    elif magnitude == _INFINITE:
        bits = _EXPONENTS
    return bits | ((half & _SIGN) << _16)


half_bits = compiled(_half_bits)


def _halves(stored: np.ndarray, place: int, out: np.ndarray) -> None:
    bits = out.view(np.uint32)
    for b in range(len(out)):
        bits[b] = half_bits(stored[b, place], stored[b, place + 1])
    for b in range(len(out)):
        out[b] = out[b] * _FACTOR


read_halves = compiled(_halves)
"""Write the float16 numbers at `place` of each block of a row (B, bytes) to `out` (B,) float32."""


def _q8_0(blocks: np.ndarray, rows: np.ndarray, out: np.ndarray, bits: np.ndarray) -> None:
    d = np.empty(blocks.shape[1], np.float32)
    for number in range(len(rows)):
        stored, target = blocks[rows[number]], out[number % len(out)]
        read_halves(stored, 0, d)
        for b in range(len(d)):
            scale = d[b]
            for i in range(target.shape[1]):
                target[b, i] = np.float32(np.int8(stored[b, 2 + i])) * scale
        round_into(target, bits, number)


def _round_into(target: np.ndarray, bits: np.ndarray, number: int) -> None:
    if len(bits):
        round_row(target.reshape(-1).view(np.uint32), bits[number])


round_into = compiled(_round_into)


def _q4_0(blocks: np.ndarray, rows: np.ndarray, out: np.ndarray, bits: np.ndarray) -> None:
    d = np.empty(blocks.shape[1], np.float32)
    for number in range(len(rows)):
        stored, target = blocks[rows[number]], out[number % len(out)]
        half = target.shape[1] // 2
        read_halves(stored, 0, d)
        for b in range(len(d)):
            scale = d[b]
            for i in range(half):
                pair = np.int32(stored[b, 2 + i])
                target[b, i] = np.float32((pair & _LOW) - _i8) * scale
                target[b, half + i] = np.float32((pair >> _i4) - _i8) * scale
        round_into(target, bits, number)


def _q4_1(blocks: np.ndarray, rows: np.ndarray, out: np.ndarray, bits: np.ndarray) -> None:
    d, m = np.empty(blocks.shape[1], np.float32), np.empty(blocks.shape[1], np.float32)
    for number in range(len(rows)):
        stored, target = blocks[rows[number]], out[number % len(out)]
        half = target.shape[1] // 2
        read_halves(stored, 0, d)
        read_halves(stored, 2, m)
        for b in range(len(d)):
            scale, low = d[b], m[b]
            for i in range(half):
                pair = np.int32(stored[b, 4 + i])
                target[b, i] = np.float32(pair & _LOW) * scale + low
                target[b, half + i] = np.float32(pair >> _i4) * scale + low
        round_into(target, bits, number)


def _q5_0(blocks: np.ndarray, rows: np.ndarray, out: np.ndarray, bits: np.ndarray) -> None:
    d = np.empty(blocks.shape[1], np.float32)
    for number in range(len(rows)):
        stored, target = blocks[rows[number]], out[number % len(out)]
        read_halves(stored, 0, d)
        for b in range(len(d)):
            scale = d[b]
            high = np.int32(stored[b, 2]) | (np.int32(stored[b, 3]) << np.int32(8))
            next_high = np.int32(stored[b, 4]) | (np.int32(stored[b, 5]) << np.int32(8))
            for i in range(16):
                pair, shift = np.int32(stored[b, 6 + i]), np.int32(i)
                q = (pair & _LOW) | (((high >> shift) & _i1) << _i4)
                next_q = (pair >> _i4) | (((next_high >> shift) & _i1) << _i4)
                target[b, i] = np.float32(q - _i16) * scale
                target[b, 16 + i] = np.float32(next_q - _i16) * scale
        round_into(target, bits, number)


def _q5_1(blocks: np.ndarray, rows: np.ndarray, out: np.ndarray, bits: np.ndarray) -> None:
    d, m = np.empty(blocks.shape[1], np.float32), np.empty(blocks.shape[1], np.float32)
    for number in range(len(rows)):
        stored, target = blocks[rows[number]], out[number % len(out)]
        read_halves(stored, 0, d)
        read_halves(stored, 2, m)
        for b in range(len(d)):
            scale, low = d[b], m[b]
            high = np.int32(stored[b, 4]) | (np.int32(stored[b, 5]) << np.int32(8))
            next_high = np.int32(stored[b, 6]) | (np.int32(stored[b, 7]) << np.int32(8))
            for i in range(16):
                pair, shift = np.int32(stored[b, 8 + i]), np.int32(i)
                q = (pair & _LOW) | (((high >> shift) & _i1) << _i4)
                next_q = (pair >> _i4) | (((next_high >> shift) & _i1) << _i4)
                target[b, i] = np.float32(q) * scale + low
                target[b, 16 + i] = np.float32(next_q) * scale + low
        round_into(target, bits, number)


def _nonlinear(code: np.int32) -> np.float32:
    """Return one of IQ4_NL's values."""
    wide = np.uint64(code)
    word = _VALUES_LOW if wide < _u8 else _VALUES_HIGH
    return np.float32(np.int8(word >> ((wide & _u7) << _u3)))


nonlinear = compiled(_nonlinear)


def _iq4_nl(blocks: np.ndarray, rows: np.ndarray, out: np.ndarray, bits: np.ndarray) -> None:
    d = np.empty(blocks.shape[1], np.float32)
    for number in range(len(rows)):
        stored, target = blocks[rows[number]], out[number % len(out)]
        read_halves(stored, 0, d)
        for b in range(len(d)):
            scale = d[b]
            for i in range(16):
                pair = np.int32(stored[b, 2 + i])
                target[b, i] = nonlinear(pair & _LOW) * scale
                target[b, 16 + i] = nonlinear(pair >> _i4) * scale
        round_into(target, bits, number)


def _e2m1(code: np.int32) -> np.float32:
    """Return twice an e2m1 number: of the magnitudes 0 to 7, which grow ever faster, the largest of three lines."""
    magnitude = code & np.int32(7)
    value = max(magnitude, _i2 * magnitude - _i4, _i4 * magnitude - _i16)
    return np.float32(-value if code & _i8 else value)


e2m1 = compiled(_e2m1)


def _mxfp4(blocks: np.ndarray, rows: np.ndarray, out: np.ndarray, bits: np.ndarray) -> None:
    d = np.empty(blocks.shape[1], np.float32)
    powers = d.view(np.uint32)
    for number in range(len(rows)):
        stored, target = blocks[rows[number]], out[number % len(out)]
        for b in range(len(d)):  # half of the power of two, of which the smallest two are subnormal
            e = np.uint32(stored[b, 0])
            powers[b] = _SUBNORMAL << e if e < _2 else (e - _ONE) << _23
        for b in range(len(d)):
            scale = d[b]
            for i in range(16):
                pair = np.int32(stored[b, 1 + i])
                target[b, i] = e2m1(pair & _LOW) * scale
                target[b, 16 + i] = e2m1(pair >> _i4) * scale
        round_into(target, bits, number)


LOOPS: Mapping[str, Loop] = {
    "q4_0": compiled(_q4_0),
    "q4_1": compiled(_q4_1),
    "q5_0": compiled(_q5_0),
    "q5_1": compiled(_q5_1),
    "q8_0": compiled(_q8_0),
    "iq4_nl": compiled(_iq4_nl),
    "mxfp4": compiled(_mxfp4),
}
"""By type, what decodes blocks of it; see the module."""
