"""Whole numbers, rounded up."""

from __future__ import annotations


def ceil_div(number: int, divisor: int) -> int:
    """Return the quotient of two whole numbers, rounded up."""
    return -(-number // divisor)


def round_up(number: int, multiple: int) -> int:
    """Return the least multiple of `multiple` that is not below `number`."""
    return ceil_div(number, multiple) * multiple
