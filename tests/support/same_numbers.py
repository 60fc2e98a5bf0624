"""Compare numbers of which some may be no numbers."""

from __future__ import annotations

from torch import Tensor


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Return whether numbers are equal, signs of zeros included, and NaN where NaN is."""
    nan = a.isnan() & b.isnan()
    return a.dtype == b.dtype and bool((nan | ((a == b) & (a.signbit() == b.signbit()))).all())
