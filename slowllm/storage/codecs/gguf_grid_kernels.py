"""The inner loops that decode super-blocks of GGUF files whose codes name rows of a table; see `gguf_kernels`.

Before what those take, each takes the table (code words, 8 or 4) float32 and the signs (codes, 8) float32 of its type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from slowllm.storage.codecs.cpu_kernels import compiled
from slowllm.storage.codecs.gguf_kernels import half_bits, read_halves, round_into

GridLoop = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]

_HALF, _QUARTER, _DELTA = np.float32(0.5), np.float32(0.25), np.float32(0.125)
_FACTOR = np.float32(2.0**112)


def _put(target: np.ndarray, at: int, scale: np.float32, word: np.ndarray, signs: np.ndarray) -> None:
    for i in range(len(word)):
        target[at + i] = scale * word[i] * signs[i]


def _put_shifted(target: np.ndarray, at: int, scale: np.float32, word: np.ndarray, delta: np.float32) -> None:
    for i in range(len(word)):
        target[at + i] = scale * (word[i] + delta)


def _word_at(stored: np.ndarray, place: int) -> int:
    """Return the number of four bytes."""
    low = int(stored[place]) | (int(stored[place + 1]) << 8)
    return low | (int(stored[place + 2]) << 16) | (int(stored[place + 3]) << 24)


def _nibble_at(stored: np.ndarray, place: int, number: int) -> int:
    """Return one of the halves of the bytes from a place on, the low half of each first."""
    return (int(stored[place + number // 2]) >> (4 * (number % 2))) & 15


put, put_shifted = compiled(_put), compiled(_put_shifted)
word_at, nibble_at = compiled(_word_at), compiled(_nibble_at)


def _iq2_xxs(
    grid: np.ndarray,
    signs: np.ndarray,
    blocks: np.ndarray,
    rows: np.ndarray,
    out: np.ndarray,
    bits: np.ndarray,
) -> None:
    d = np.empty(blocks.shape[1], np.float32)
    for number in range(len(rows)):
        stored, target = blocks[rows[number]], out[number % len(out)]
        read_halves(stored, 0, d)
        for b in range(len(d)):
            for part in range(8):  # 32 weights each
                place = 2 + 8 * part
                word = word_at(stored[b], place + 4)
                scale = d[b] * (_HALF + np.float32(word >> 28)) * _QUARTER
                for j in range(4):
                    sign = signs[(word >> (7 * j)) & 127]
                    put(target[b], 32 * part + 8 * j, scale, grid[stored[b, place + j]], sign)
        round_into(target, bits, number)


def _iq2_xs(
    grid: np.ndarray,
    signs: np.ndarray,
    blocks: np.ndarray,
    rows: np.ndarray,
    out: np.ndarray,
    bits: np.ndarray,
) -> None:
    d = np.empty(blocks.shape[1], np.float32)
    for number in range(len(rows)):
        stored, target = blocks[rows[number]], out[number % len(out)]
        read_halves(stored, 0, d)
        for b in range(len(d)):
            for j in range(32):  # 8 weights each
                code = int(stored[b, 2 + 2 * j]) | (int(stored[b, 3 + 2 * j]) << 8)
                scale = d[b] * (_HALF + np.float32(nibble_at(stored[b], 66, j // 2))) * _QUARTER
                put(target[b], 8 * j, scale, grid[code & 511], signs[code >> 9])
        round_into(target, bits, number)


def _iq2_s(
    grid: np.ndarray,
    signs: np.ndarray,
    blocks: np.ndarray,
    rows: np.ndarray,
    out: np.ndarray,
    bits: np.ndarray,
) -> None:
    d = np.empty(blocks.shape[1], np.float32)
    for number in range(len(rows)):
        stored, target = blocks[rows[number]], out[number % len(out)]
        read_halves(stored, 0, d)
        for b in range(len(d)):
            for j in range(32):
                high = (int(stored[b, 66 + j // 4]) >> (2 * (j % 4))) & 3
                code = int(stored[b, 2 + j]) | (high << 8)
                scale = d[b] * (_HALF + np.float32(nibble_at(stored[b], 74, j // 2))) * _QUARTER
                put(target[b], 8 * j, scale, grid[code], signs[stored[b, 34 + j]])
        round_into(target, bits, number)


def _iq3_xxs(
    grid: np.ndarray,
    signs: np.ndarray,
    blocks: np.ndarray,
    rows: np.ndarray,
    out: np.ndarray,
    bits: np.ndarray,
) -> None:
    d = np.empty(blocks.shape[1], np.float32)
    for number in range(len(rows)):
        stored, target = blocks[rows[number]], out[number % len(out)]
        read_halves(stored, 0, d)
        for b in range(len(d)):
            for part in range(8):
                word = word_at(stored[b], 66 + 4 * part)
                scale = d[b] * (_HALF + np.float32(word >> 28)) * _HALF
                for j in range(4):  # 8 weights each, two rows of the table
                    sign, at = signs[(word >> (7 * j)) & 127], 8 * part + 2 * j
                    put(target[b], 4 * at, scale, grid[stored[b, 2 + at]], sign[:4])
                    put(target[b], 4 * at + 4, scale, grid[stored[b, 3 + at]], sign[4:])
        round_into(target, bits, number)


def _iq3_s(
    grid: np.ndarray,
    signs: np.ndarray,
    blocks: np.ndarray,
    rows: np.ndarray,
    out: np.ndarray,
    bits: np.ndarray,
) -> None:
    d = np.empty(blocks.shape[1], np.float32)
    for number in range(len(rows)):
        stored, target = blocks[rows[number]], out[number % len(out)]
        read_halves(stored, 0, d)
        for b in range(len(d)):
            for j in range(64):  # 4 weights each
                code = int(stored[b, 2 + j]) | (((int(stored[b, 66 + j // 8]) >> (j % 8)) & 1) << 8)
                scale = d[b] * np.float32(1 + 2 * nibble_at(stored[b], 106, j // 8))
                side = 4 * (j % 2)
                put(target[b], 4 * j, scale, grid[code], signs[stored[b, 74 + j // 2], side : side + 4])
        round_into(target, bits, number)


def _iq1_s(
    grid: np.ndarray,
    signs: np.ndarray,
    blocks: np.ndarray,
    rows: np.ndarray,
    out: np.ndarray,
    bits: np.ndarray,
) -> None:
    d = np.empty(blocks.shape[1], np.float32)
    for number in range(len(rows)):
        stored, target = blocks[rows[number]], out[number % len(out)]
        read_halves(stored, 0, d)
        for b in range(len(d)):
            for part in range(8):
                word = int(stored[b, 34 + 2 * part]) | (int(stored[b, 35 + 2 * part]) << 8)
                scale = d[b] * np.float32(2 * ((word >> 12) & 7) + 1)
                delta = -_DELTA if word >> 15 else _DELTA
                for j in range(4):
                    code = int(stored[b, 2 + 4 * part + j]) | (((word >> (3 * j)) & 7) << 8)
                    put_shifted(target[b], 32 * part + 8 * j, scale, grid[code], delta)
        round_into(target, bits, number)


def _iq1_m(
    grid: np.ndarray,
    signs: np.ndarray,
    blocks: np.ndarray,
    rows: np.ndarray,
    out: np.ndarray,
    bits: np.ndarray,
) -> None:
    d = np.empty(blocks.shape[1], np.float32)
    halves = d.view(np.uint32)
    for number in range(len(rows)):
        stored, target = blocks[rows[number]], out[number % len(out)]
        for b in range(len(d)):  # the scale's four digits stand in four places
            low = (stored[b, 49] >> 4) | (stored[b, 51] & 240)
            halves[b] = half_bits(low, (stored[b, 53] >> 4) | (stored[b, 55] & 240))
        for b in range(len(d)):
            d[b] = d[b] * _FACTOR
        for b in range(len(d)):
            for j in range(32):
                pair = 48 + 2 * (j // 8)  # four scales of 3 bits, each for 16 weights
                word = int(stored[b, pair]) | (int(stored[b, pair + 1]) << 8)
                scale = d[b] * np.float32(2 * ((word >> (3 * (j // 2 % 4))) & 7) + 1)
                high = nibble_at(stored[b], 32, j)
                delta = -_DELTA if high & 8 else _DELTA
                put_shifted(target[b], 8 * j, scale, grid[int(stored[b, j]) | ((high & 7) << 8)], delta)
        round_into(target, bits, number)


GRID_LOOPS: Mapping[str, GridLoop] = {
    "iq1_s": compiled(_iq1_s),
    "iq1_m": compiled(_iq1_m),
    "iq2_xxs": compiled(_iq2_xxs),
    "iq2_xs": compiled(_iq2_xs),
    "iq2_s": compiled(_iq2_s),
    "iq3_xxs": compiled(_iq3_xxs),
    "iq3_s": compiled(_iq3_s),
}
"""By type, what decodes super-blocks of it; see the module."""
