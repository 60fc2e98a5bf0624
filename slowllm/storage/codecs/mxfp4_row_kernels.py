"""The inner loop that decodes e2m1 numbers as they are stored, row by row; see `cpu_kernels` for what it is compiled by.

From 1 on, exponent and mantissa of an e2m1 number are those of bfloat16 but for what the exponents count from, so a number is
moved into place and the scale, a power of two, is added to its exponent. Two numbers are made at a time, in 32 bits.
"""

from __future__ import annotations

import numpy as np

from slowllm.storage.codecs.cpu_kernels import compiled

_1, _4, _6, _7, _16, _22, _24 = (np.uint32(number) for number in (1, 4, 6, 7, 16, 22, 24))
_8, _12, _128 = np.uint32(8), np.uint32(12), np.uint32(128)
_HALF_LOW, _HALF_HIGH = np.uint32(1 << 6), np.uint32(1 << 22)
# Codes and bytes of a block.
_BLOCK, _BYTES = 32, 16
# From the first exponent on, every number of a block is normal; up to the second, none overflows.
LEAST_EXPONENT, MOST_EXPONENT = 3, 251


def _to_bfloat16(codes: np.ndarray, scales: np.ndarray, out: np.ndarray, first: int, last: int) -> None:
    for row in range(first, last):
        for block in range(scales.shape[1]):
            low_base = (np.uint32(scales[row, block]) - _1) << _7
            high_base = low_base << _16
            part = codes[row, block * _BYTES : (block + 1) * _BYTES]
            target = out[row - first, block * _BYTES : (block + 1) * _BYTES]
            for i in range(_BYTES):
                pair = np.uint32(part[i])
                low, high = pair & _7, (pair >> _4) & _7
                # 0.5 has no bit of mantissa, and 0 no exponent.
                small = (low << _6) + low_base - (_HALF_LOW if low == _1 else np.uint32(0))
                large = (high << _22) + high_base - (_HALF_HIGH if high == _1 else np.uint32(0))
                small = small if low else np.uint32(0)
                large = large if high else np.uint32(0)
                target[i] = small | large | ((pair & _8) << _12) | ((pair & _128) << _24)


rows_to_bfloat16 = compiled(_to_bfloat16)
"""Decode the rows `first` to `last`; only where `IS_COMPILED`, and all exponents are in the range above.

Args:
    codes: (R, K / 2) uint8, two codes in each, the first in the low bits.
    scales: (R, K / 32) uint8, exponents of powers of two, from -127 on.
    out: (last - first, K / 2) uint32, bits of pairs of bf16 numbers, the first in the low bits.
"""
