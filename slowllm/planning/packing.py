"""Pack rows of similar length into micro-batches. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence


def pack(
    lengths: Sequence[int], rider_tokens: int, padding_tokens: int | None = None, extra: float = 0.0
) -> list[list[int]]:
    """Divide rows into micro-batches of at most `rider_tokens` tokens, padding included.

    Longest first, so that rows of similar length share a micro-batch. A row that is longer rides alone.

    Args:
        lengths: tokens of each row.
        rider_tokens: capacity of a micro-batch.
        padding_tokens: the most padding in a micro-batch, because more would cost more than another micro-batch; None
            for any.
        extra: further tokens that are counted for each row.
    Returns:
        the rows' indices, each exactly once.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches: list[list[int]] = []
    padding = 0
    for index in order:
        widest = lengths[batches[-1][0]] if batches else 0
        padding += widest - lengths[index]
        has_room = bool(batches) and (len(batches[-1]) + 1) * (widest + extra) <= rider_tokens
        if has_room and (padding_tokens is None or padding <= padding_tokens):
            batches[-1].append(index)
        else:
            batches.append([index])
            padding = 0
    return batches
