"""The inner loops that decode super-blocks of GGUF files, 256 weights whose scales have a scale; see `gguf_kernels`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from slowllm.storage.codecs.cpu_kernels import compiled
from slowllm.storage.codecs.gguf_kernels import Loop, nonlinear, read_halves, round_into

_i1, _i2, _i3, _i4, _i15 = np.int32(1), np.int32(2), np.int32(3), np.int32(4), np.int32(15)
_i32, _i48 = np.int32(32), np.int32(48)


def _scale_of(stored: np.ndarray, b: int, j: int) -> np.float32:
    """Return scale `j` of 8 of Q4_K and Q5_K: 6 bits, of the last four in two places."""
    if j < 4:
        return np.float32(stored[b, 4 + j] & 63)
    return np.float32((stored[b, 8 + j] & 15) | ((stored[b, j] >> 2) & 48))


def _low_of(stored: np.ndarray, b: int, j: int) -> np.float32:
    """Return the scale of the offset `j` of 8 of Q4_K and Q5_K."""
    if j < 4:
        return np.float32(stored[b, 8 + j] & 63)
    return np.float32((stored[b, 8 + j] >> 4) | ((stored[b, 4 + j] >> 2) & 48))


scale_of, low_of = compiled(_scale_of), compiled(_low_of)


def _q2_k(blocks: np.ndarray, rows: np.ndarray, out: np.ndarray, bits: np.ndarray) -> None:
    d, dmin = np.empty(blocks.shape[1], np.float32), np.empty(blocks.shape[1], np.float32)
    for number in range(len(rows)):
        stored, target = blocks[rows[number]], out[number % len(out)]
        length = target.shape[1] // 16
        read_halves(stored, 80, d)
        read_halves(stored, 82, dmin)
        for b in range(len(d)):
            for part in range(16):  # 16 weights each
                scale = d[b] * np.float32(stored[b, part] & 15)
                low = dmin[b] * np.float32(stored[b, part] >> 4)
                half, shift, side = part // 8, np.int32(part % 8 // 2 * 2), part % 2
                for i in range(length):
                    code = (np.int32(stored[b, 16 + 32 * half + 16 * side + i]) >> shift) & _i3
                    target[b, length * part + i] = np.float32(code) * scale - low
        round_into(target, bits, number)


def _q3_k(blocks: np.ndarray, rows: np.ndarray, out: np.ndarray, bits: np.ndarray) -> None:
    d = np.empty(blocks.shape[1], np.float32)
    for number in range(len(rows)):
        stored, target = blocks[rows[number]], out[number % len(out)]
        length = target.shape[1] // 16
        read_halves(stored, 108, d)
        for b in range(len(d)):
            for part in range(16):
                low = (np.int32(stored[b, 96 + part % 8]) >> np.int32(part // 8 * 4)) & _i15
                high = (np.int32(stored[b, 104 + part % 4]) >> np.int32(part // 4 * 2)) & _i3
                scale = d[b] * np.float32((low | (high << _i4)) - _i32)
                half, shift, side = part // 8, np.int32(part % 8 // 2 * 2), part % 2
                bit = np.int32(part // 2)
                for i in range(length):
                    code = (np.int32(stored[b, 32 + 32 * half + 16 * side + i]) >> shift) & _i3
                    # Where the bit is missing, the number is four less.
                    missing = _i1 - ((np.int32(stored[b, 16 * side + i]) >> bit) & _i1)
                    target[b, length * part + i] = np.float32(code - (missing << _i2)) * scale
        round_into(target, bits, number)


def _q4_k(blocks: np.ndarray, rows: np.ndarray, out: np.ndarray, bits: np.ndarray) -> None:
    d, dmin = np.empty(blocks.shape[1], np.float32), np.empty(blocks.shape[1], np.float32)
    for number in range(len(rows)):
        stored, target = blocks[rows[number]], out[number % len(out)]
        read_halves(stored, 0, d)
        read_halves(stored, 2, dmin)
        for b in range(len(d)):
            for j in range(4):  # 64 weights each, two scales
                scale, low = d[b] * scale_of(stored, b, 2 * j), dmin[b] * low_of(stored, b, 2 * j)
                next_scale = d[b] * scale_of(stored, b, 2 * j + 1)
                next_low = dmin[b] * low_of(stored, b, 2 * j + 1)
                for i in range(32):
                    pair = np.int32(stored[b, 16 + 32 * j + i])
                    target[b, 64 * j + i] = np.float32(pair & _i15) * scale - low
                    target[b, 64 * j + 32 + i] = np.float32(pair >> _i4) * next_scale - next_low
        round_into(target, bits, number)


def _q5_k(blocks: np.ndarray, rows: np.ndarray, out: np.ndarray, bits: np.ndarray) -> None:
    d, dmin = np.empty(blocks.shape[1], np.float32), np.empty(blocks.shape[1], np.float32)
    for number in range(len(rows)):
        stored, target = blocks[rows[number]], out[number % len(out)]
        read_halves(stored, 0, d)
        read_halves(stored, 2, dmin)
        for b in range(len(d)):
            for j in range(4):
                scale, low = d[b] * scale_of(stored, b, 2 * j), dmin[b] * low_of(stored, b, 2 * j)
                next_scale = d[b] * scale_of(stored, b, 2 * j + 1)
                next_low = dmin[b] * low_of(stored, b, 2 * j + 1)
                bit, next_bit = np.int32(2 * j), np.int32(2 * j + 1)
                for i in range(32):
                    pair, high = np.int32(stored[b, 48 + 32 * j + i]), np.int32(stored[b, 16 + i])
                    q = (pair & _i15) | (((high >> bit) & _i1) << _i4)
                    next_q = (pair >> _i4) | (((high >> next_bit) & _i1) << _i4)
                    target[b, 64 * j + i] = np.float32(q) * scale - low
                    target[b, 64 * j + 32 + i] = np.float32(next_q) * next_scale - next_low
        round_into(target, bits, number)


def _q6_k(blocks: np.ndarray, rows: np.ndarray, out: np.ndarray, bits: np.ndarray) -> None:
    d = np.empty(blocks.shape[1], np.float32)
    for number in range(len(rows)):
        stored, target = blocks[rows[number]], out[number % len(out)]
        read_halves(stored, 208, d)
        for b in range(len(d)):
            for quarter in range(4):  # 16 weights in each of four groups of 32
                half, side = quarter // 2, quarter % 2
                at, low_at = 192 + 8 * half + side, 64 * half + 16 * side
                high_at, to = 128 + 32 * half + 16 * side, 128 * half + 16 * side
                scale0 = d[b] * np.float32(np.int8(stored[b, at]))
                scale1 = d[b] * np.float32(np.int8(stored[b, at + 2]))
                scale2 = d[b] * np.float32(np.int8(stored[b, at + 4]))
                scale3 = d[b] * np.float32(np.int8(stored[b, at + 6]))
                for i in range(16):
                    low, next_low = np.int32(stored[b, low_at + i]), np.int32(stored[b, low_at + 32 + i])
                    high = np.int32(stored[b, high_at + i])
                    q0 = (low & _i15) | ((high & _i3) << _i4)
                    q1 = (next_low & _i15) | ((high & np.int32(12)) << _i2)
                    q2 = (low >> _i4) | (high & _i48)
                    q3 = (next_low >> _i4) | ((high >> _i2) & _i48)
                    target[b, to + i] = np.float32(q0 - _i32) * scale0
                    target[b, to + 32 + i] = np.float32(q1 - _i32) * scale1
                    target[b, to + 64 + i] = np.float32(q2 - _i32) * scale2
                    target[b, to + 96 + i] = np.float32(q3 - _i32) * scale3
        round_into(target, bits, number)


def _iq4_xs(blocks: np.ndarray, rows: np.ndarray, out: np.ndarray, bits: np.ndarray) -> None:
    d = np.empty(blocks.shape[1], np.float32)
    for number in range(len(rows)):
        stored, target = blocks[rows[number]], out[number % len(out)]
        read_halves(stored, 0, d)
        for b in range(len(d)):
            for j in range(8):  # 32 weights each
                low = (np.int32(stored[b, 4 + j // 2]) >> np.int32(j % 2 * 4)) & _i15
                high = (np.int32(stored[b, 2 + j // 4]) >> np.int32(j % 4 * 2)) & _i3
                scale = d[b] * np.float32((low | (high << _i4)) - _i32)
                for i in range(16):
                    pair = np.int32(stored[b, 8 + 16 * j + i])
                    target[b, 32 * j + i] = nonlinear(pair & _i15) * scale
                    target[b, 32 * j + 16 + i] = nonlinear(pair >> _i4) * scale
        round_into(target, bits, number)


SUPER_LOOPS: Mapping[str, Loop] = {
    "q2_k": compiled(_q2_k),
    "q3_k": compiled(_q3_k),
    "q4_k": compiled(_q4_k),
    "q5_k": compiled(_q5_k),
    "q6_k": compiled(_q6_k),
    "iq4_xs": compiled(_iq4_xs),
}
"""By type, what decodes super-blocks of it; see `gguf_kernels`."""
