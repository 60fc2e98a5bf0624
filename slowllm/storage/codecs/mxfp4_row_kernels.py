"""The inner loop that decodes e2m1 numbers as they are stored, row by row; see `cpu_kernels` for what it is compiled by.

From 1 on, exponent and mantissa of an e2m1 number are those of bfloat16 but for what the exponents count from, so a number is
moved into place and the scale, a power of two, is added to its exponent. Two numbers are made at a time, one in each half of
32 bits, by the same operations: nothing carries from the low half into the high one.
"""

from __future__ import annotations

import numpy as np

from slowllm.storage.codecs.cpu_kernels import compiled

_1, _3, _6, _7, _12, _16 = (np.uint32(number) for number in (1, 3, 6, 7, 12, 16))
# In both halves.
_ONES, _SIXES, _SEVENS, _SIGNS = (np.uint32(number * 0x10001) for number in (1, 6, 7, 8))
# Codes and bytes of a block.
_BLOCK, _BYTES = 32, 16


def _to_bfloat16(codes: np.ndarray, scales: np.ndarray, out: np.ndarray, first: int, last: int) -> None:
    for row in range(first, last):
        for block in range(scales.shape[1]):
            base = (np.uint32(scales[row, block]) - _1) << _7
            base |= base << _16
            part = codes[row, block * _BYTES : (block + 1) * _BYTES]
            target = out[row - first, block * _BYTES : (block + 1) * _BYTES]
            for i in range(_BYTES):
                pair = np.uint32(part[i])
                pair |= pair << _12
                number = pair & _SEVENS
                # 0.5 has no bit of mantissa, and 0 no exponent.
                is_some = ((number + _SEVENS) >> _3) & _ONES
                is_half = is_some ^ (((number + _SIXES) >> _3) & _ONES)
                exponents = base & ((is_some << _16) - is_some)
                target[i] = (((number - is_half) << _6) + exponents) | ((pair & _SIGNS) << _12)


rows_to_bfloat16 = compiled(_to_bfloat16)
"""Decode the rows `first` to `last`; only where `IS_COMPILED`, and all exponents are in the range of `mxfp4`.

Args:
    codes: (R, K / 2) uint8, two codes in each, the first in the low bits.
    scales: (R, K / 32) uint8, exponents of powers of two, from -127 on.
    out: (last - first, K / 2) uint32, bits of pairs of bf16 numbers, the first in the low bits.
"""
