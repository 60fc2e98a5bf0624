"""The inner loops that decode e2m1 numbers in blocks of 16 with e4m3 scales; see `cpu_kernels` for what they are compiled by."""

from __future__ import annotations

import numpy as np

from slowllm.storage.codecs.cpu_kernels import compiled, round_row, settle_row
from slowllm.storage.codecs.fp4_kernels import PIECE, scale_row, widen_row
from slowllm.storage.codecs.fp8_kernels import widen_row as widen_scales

_BLOCK = 16
_FACTOR = np.float32(2.0**120)


def _multiply(scales: np.ndarray, number: np.ndarray) -> None:
    factor = number[0]
    for i in range(len(scales)):
        scales[i] = scales[i] * _FACTOR * factor


def _divide(scales: np.ndarray, number: np.ndarray) -> None:
    divisor = number[0]
    for i in range(len(scales)):
        scales[i] = scales[i] * _FACTOR / divisor


def _multiply_plain(scales: np.ndarray, number: np.ndarray) -> None:
    scales *= _FACTOR
    scales *= number[0]


def _divide_plain(scales: np.ndarray, number: np.ndarray) -> None:
    scales *= _FACTOR
    scales /= number[0]


_multiply_row = compiled(_multiply, _multiply_plain)
_divide_row = compiled(_divide, _divide_plain)


def _to_bfloat16(
    codes: np.ndarray,
    scales: np.ndarray,
    number: np.ndarray,
    divides: bool,
    out: np.ndarray,
    origin: int,
    first: int,
    last: int,
) -> None:
    width = out.shape[1]
    row, factors = np.empty(min(width, PIECE), np.float32), np.empty(scales.shape[1], np.float32)
    for at in range(first, last):
        widen_scales(scales[at], factors.view(np.uint32))
        if divides:
            _divide_row(factors, number)
        else:
            _multiply_row(factors, number)
        for begin in range(0, width, PIECE):
            end = min(begin + PIECE, width)
            piece = row[: end - begin]
            widen_row(codes[at, begin // 2 : end // 2], piece.view(np.uint32))
            scale_row(piece, factors[begin // _BLOCK : end // _BLOCK], _BLOCK)
            round_row(piece.view(np.uint32), out[at - origin, begin:end])


def _to_float32(
    codes: np.ndarray,
    scales: np.ndarray,
    number: np.ndarray,
    divides: bool,
    out: np.ndarray,
    origin: int,
    first: int,
    last: int,
) -> None:
    width = out.shape[1]
    factors = np.empty(scales.shape[1], np.float32)
    for at in range(first, last):
        widen_scales(scales[at], factors.view(np.uint32))
        if divides:
            _divide_row(factors, number)
        else:
            _multiply_row(factors, number)
        for begin in range(0, width, PIECE):
            end = min(begin + PIECE, width)
            piece = out[at - origin, begin:end]
            widen_row(codes[at, begin // 2 : end // 2], piece.view(np.uint32))
            scale_row(piece, factors[begin // _BLOCK : end // _BLOCK], _BLOCK)
            if divides:
                settle_row(piece.view(np.uint32))


# Uncompiled, these loops are fast enough: numpy does a piece at a time.
to_bfloat16 = compiled(_to_bfloat16)
"""Decode the rows `first` to `last`.

Args:
    codes: (R, K / 2) uint8, two e2m1 numbers in each, the first in the low bits.
    scales: (R, K / 16) uint8, bits of e4m3 numbers.
    number: (1,) float32, of the matrix.
    divides: whether scales are divided by it, and weights rounded to bfloat16, or multiplied with it.
    out: (.., K) uint16, bits of bf16 numbers; begins with row `origin`.
"""

to_float32 = compiled(_to_float32)
"""Decode the rows `first` to `last` to float32; see `to_bfloat16`."""
