"""The tables of code words that GGUF's types IQ1 to IQ3 pick their weights from, as the package gguf has them.

A code names a row of 8 or 4 numbers of one sign; a byte has the signs of 8. The tables are the package's own, so that nobody has
to trust a copy; it is imported when the first of them is asked for.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

# Types that have a table, with how many numbers a row of it has.
ROW_LENGTHS = {"iq1_s": 8, "iq1_m": 8, "iq2_xxs": 8, "iq2_xs": 8, "iq2_s": 8, "iq3_xxs": 4, "iq3_s": 4}
# Of these types a code of 7 bits names the byte with the signs.
_NAMED_SIGNS = ("iq2_xxs", "iq2_xs", "iq3_xxs")


@functools.cache
def grid_of(kind: str) -> np.ndarray:
    """Return the table of a type, (code words, numbers of a word) float32. It is shared: nobody may write to it."""
    import gguf.quants

    quant = getattr(gguf.quants, kind.upper())
    quant.init_grid()
    return np.array(quant.grid, np.float32).reshape(-1, ROW_LENGTHS[kind])


@functools.cache
def signs_of(kind: str) -> np.ndarray:
    """Return the signs of a type, (codes, 8) float32: 1 or -1. They are shared: nobody may write to them."""
    import gguf.quants

    codes = np.arange(256, dtype=np.uint8)
    if kind in _NAMED_SIGNS:
        codes = np.frombuffer(gguf.quants.IQ2_XXS.ksigns, np.uint8)
    return np.where(codes[:, None] >> np.arange(8, dtype=np.uint8) & 1, np.float32(-1), np.float32(1))


@functools.cache
def tables_on(kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the table and the signs of a type on a device."""
    return torch.from_numpy(grid_of(kind)).to(device), torch.from_numpy(signs_of(kind)).to(device)
