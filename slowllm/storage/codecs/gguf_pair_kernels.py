"""Inner loops that decode super-blocks of GGUF files to bfloat16, two neighbours at a time; see `gguf_super_kernels`.

A vector register holds sixteen pairs, 32 weights, as many as have one scale, and a number is rounded where it was made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from slowllm.storage.codecs.cpu_kernels import compiled, rounded_bits
from slowllm.storage.codecs.gguf_kernels import read_halves
from slowllm.storage.codecs.gguf_super_kernels import low_of, scale_of

PairLoop = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]

_0, _4, _8, _12, _15, _16 = (np.uint32(number) for number in (0, 4, 8, 12, 15, 16))
_UPPER = np.uint32(0xFFFF0000)


def _code(word: np.uint32, places: np.uint32) -> np.float32:
    return np.float32(np.int32(np.uint32(word >> places) & _15))


_code_at = compiled(_code)


def _join(low: np.float32, high: np.float32) -> np.uint32:
    upper = np.uint32(rounded_bits(np.float32(high).view(np.uint32)) & _UPPER)
    return np.uint32(rounded_bits(np.float32(low).view(np.uint32)) >> _16) | upper


_joined = compiled(_join)


def _q4_k(blocks: np.ndarray, words: np.ndarray, rows: np.ndarray, out: np.ndarray) -> None:
    d, dmin = np.empty(blocks.shape[1], np.float32), np.empty(blocks.shape[1], np.float32)
    for number in range(len(rows)):
        stored, pairs, target = blocks[rows[number]], words[rows[number]], out[number]
        read_halves(stored, 0, d)
        read_halves(stored, 2, dmin)
        for b in range(len(d)):
            for j in range(4):  # 64 weights each, two scales
                scale, low = d[b] * scale_of(stored, b, 2 * j), dmin[b] * low_of(stored, b, 2 * j)
                next_scale = d[b] * scale_of(stored, b, 2 * j + 1)
                next_low = dmin[b] * low_of(stored, b, 2 * j + 1)
                source = pairs[b, 8 + 16 * j : 24 + 16 * j]
                first, second = target[b, 32 * j : 32 * j + 16], target[b, 32 * j + 16 : 32 * j + 32]
                for i in range(16):
                    word = np.uint32(source[i])
                    left = np.float32(np.float32(_code_at(word, _0) * scale) - low)
                    right = np.float32(np.float32(_code_at(word, _8) * scale) - low)
                    first[i] = _joined(left, right)
                for i in range(16):
                    word = np.uint32(source[i])
                    left = np.float32(np.float32(_code_at(word, _4) * next_scale) - next_low)
                    right = np.float32(np.float32(_code_at(word, _12) * next_scale) - next_low)
                    second[i] = _joined(left, right)


PAIR_LOOPS: Mapping[str, PairLoop] = {"q4_k": compiled(_q4_k)}
"""By kind; only where `IS_COMPILED`.

Args:
    blocks: (R, B, bytes of a block) uint8.
    words: the same as uint16.
    rows: the stored row of each row that is wanted.
    out: (rows, B, weights of a block / 2) uint32, bits of pairs of bf16 numbers, the first in the low bits.
"""
