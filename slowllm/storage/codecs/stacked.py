"""A matrix that is put together of several coded ones, rows behind rows: the fused experts of a mixture."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from slowllm.storage.codecs.base import Codec, Parts, PartShapes
from slowllm.storage.codecs.team import Team


class Stacked(Codec):
    """Rows that are coded by themselves.

    Args:
        codec_of: returns the codec of a name.
    """

    name: ClassVar[str] = "stacked"
    decodes_to_any: ClassVar[bool] = True

    def __init__(self, codec_of: Callable[[str], Codec]) -> None:
        self._codec_of = codec_of

    def has_parts(self, parts: PartShapes, num_rows: int, width: int, group: tuple[int, ...] = ()) -> bool:
        return not parts and not group  # what its rows have is checked by themselves

    def decode(self, parts: Parts, out: Tensor, first: int, last: int, team: Team) -> None:
        # Rows are in order, and there may be hundreds of parts.
        number = max(0, bisect.bisect_right(parts.rows, first, key=lambda row: row[1]) - 1)
        for name, begin, own in parts.rows[number:]:
            if begin >= last:
                break
            low, high = max(first, begin), min(last, begin + own.num_rows)
            if low < high:
                self._codec_of(name).decode(
                    own, out[low - first : high - first], low - begin, high - begin, team
                )

    def example(self) -> Parts:
        return Parts({}, 0, 1)
