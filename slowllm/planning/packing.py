"""Pack rows of similar length into micro-batches. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def pack(
    lengths: Sequence[int],
    rider_tokens: int,
    padding_tokens: int | None = None,
    extra: float = 0.0,
    classes: Sequence[Hashable] | None = None,
) -> list[list[int]]:
    """Divide rows into micro-batches of at most `rider_tokens` tokens, padding included.

    Longest first, so that rows of similar length share a micro-batch. A row that is longer rides alone.

    Args:
        lengths: tokens of each row.
        rider_tokens: capacity of a micro-batch.
        padding_tokens: the most padding in a micro-batch, because more would cost more than another micro-batch; None
            for any.
        extra: further tokens that are counted for each row.
        classes: of the rows; those of different classes do not share a micro-batch. None where all are of one class.
    Returns:
        the rows' indices, each exactly once.
    """
    longest: dict[Hashable, int] = {}
    classes = [None] * len(lengths) if classes is None else classes
    for length, kind in zip(lengths, classes, strict=True):
        longest[kind] = max(longest.get(kind, 0), length)
    places = {kind: place for place, kind in enumerate(sorted(longest, key=lambda kind: -longest[kind]))}
    order = sorted(range(len(lengths)), key=lambda i: (places[classes[i]], -lengths[i], i))
    batches: list[list[int]] = []
    padding = 0
    for index in order:
        widest = lengths[batches[-1][0]] if batches else 0
        padding += widest - lengths[index]
        has_room = bool(batches) and classes[index] == classes[batches[-1][0]]
        has_room = has_room and (len(batches[-1]) + 1) * (widest + extra) <= rider_tokens
        if has_room and (padding_tokens is None or padding <= padding_tokens):
            batches[-1].append(index)
        else:
            batches.append([index])
            padding = 0
    return batches
