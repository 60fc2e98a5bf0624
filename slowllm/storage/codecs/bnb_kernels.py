"""The inner loops that decode bitsandbytes' numbers; see `cpu_kernels` for what they are compiled by.

Two codes of 4 bits are looked up at once, in a table of the 256 pairs of numbers that a byte can mean.
"""

from __future__ import annotations

import numpy as np

from slowllm.storage.codecs.cpu_kernels import compiled, round_row

# Weights that are decoded at a time; their 16 KB stay in the processor's first cache.
_CHUNK = 4096
_INVERSE = np.float32(1 / 127)


def _look_up(codes: np.ndarray, pairs: np.ndarray, found: np.ndarray) -> None:
    for i in range(len(codes)):
        found[i] = pairs[codes[i]]


_look_up_pairs = compiled(_look_up)


def _multiply(values: np.ndarray, scale: np.float32) -> None:
    for i in range(len(values)):
        values[i] *= scale


_multiply_block = compiled(_multiply)


def _double(values: np.ndarray, scale: np.float32) -> None:
    for i in range(len(values)):
        values[i] = values[i] * scale * _INVERSE


_double_row = compiled(_double)


def _widen(codes: np.ndarray, values: np.ndarray) -> None:
    for i in range(len(values)):
        values[i] = np.float32(codes[i])


_widen_row = compiled(_widen)


def _finish(values: np.ndarray, out: np.ndarray) -> None:
    if out.itemsize == 2:
        round_row(values.view(np.uint32), out.view(np.uint16))
    else:
        out.view(np.float32)[:] = values


_finish_part = compiled(_finish)


def _nibbles(
    codes: np.ndarray,
    pairs: np.ndarray,
    scales: np.ndarray,
    block: int,
    out: np.ndarray,
    origin: int,
    first: int,
    last: int,
) -> None:
    memory = np.empty(_CHUNK // 2 + 1, np.uint64)
    for begin in range(first, last, _CHUNK):
        end = min(begin + _CHUNK, last)
        low, high = begin // 2, (end + 1) // 2
        _look_up_pairs(codes[low:high], pairs, memory)
        values = memory.view(np.float32)[begin - 2 * low : end - 2 * low]
        for number in range(begin // block, (end + block - 1) // block):
            left, right = max(begin, number * block) - begin, min(end, (number + 1) * block) - begin
            _multiply_block(values[left:right], scales[number])
        _finish_part(values, out[begin - origin : end - origin])


nibbles = compiled(_nibbles)
"""Decode the numbers `first` to `last` of a matrix, row behind row.

Args:
    codes: (N / 2,) uint8, the first of two codes in the high bits.
    pairs: (256,) uint64, the two float32 that a byte means.
    scales: (N / block,) float32.
    block: numbers that share a scale.
    out: float32 or uint16, the bits of bf16 numbers; begins with the number `origin`.
"""


def _nested(
    codes: np.ndarray,
    table: np.ndarray,
    scales: np.ndarray,
    offset: np.float32,
    shared: int,
    out: np.ndarray,
    first: int,
    last: int,
) -> None:
    for number in range(first // shared, (last + shared - 1) // shared):
        scale = scales[number]
        for i in range(max(first, number * shared), min(last, (number + 1) * shared)):
            out[i] = table[codes[i]] * scale + offset


nested = compiled(_nested)
"""Decode the scales `first` to `last`.

Args:
    codes: (B,) uint8.
    table: (256,) float32, what a code means.
    scales: (B / shared,) float32.
    offset: that is added.
    shared: scales that share one.
    out: (B,) float32.
"""


def _bytes(
    codes: np.ndarray, scales: np.ndarray, out: np.ndarray, origin: int, first: int, last: int
) -> None:
    values = np.empty(codes.shape[1], np.float32)
    for number in range(first, last):
        _widen_row(codes[number], values)
        _double_row(values, scales[number])
        _finish_part(values, out[number - origin])


integers = compiled(_bytes)
"""Decode the rows `first` to `last` of whole numbers of 8 bits.

Args:
    codes: (R, K) int8.
    scales: (R,) float32, 127 times the step of each row.
    out: (.., K) float32 or uint16, the bits of bf16 numbers; begins with row `origin`.
"""
