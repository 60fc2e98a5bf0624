"""Cut the bytes of a tensor into aligned read requests."""

from __future__ import annotations

from collections.abc import Sequence

from slowllm.storage.spans import Placement


def in_file_order(stop: Sequence[Placement]) -> list[Placement]:
    """Return the tensors of a stop in the order of their bytes on disk."""
    return sorted(
        stop, key=lambda p: (str(p.runs[0].span.path), p.runs[0].span.offset) if p.runs else ("", 0)
    )
