"""Frozen activations: the output of the blocks below the tuned ones for each example, computed once and kept.

They are kept in memory, or in a file of the state folder. Knows hidden states and blocks; knows nothing of training.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slowllm.errors import StateError
from slowllm.files import replace_file
from slowllm.modeling.recompute import hidden_of
from slowllm.streaming.way import SkipBlocks


class FrozenActivations:
    """The output of the last frozen block for rows of tokens.

    Args:
        num_blocks: how many blocks are frozen.
        lengths: positions of each row.
        width: of a hidden state.
        dtype: of a hidden state.
        path: of the file that keeps them; None for memory.
        key: what they depend on; a file with another key is overwritten.
    Attributes:
        is_filled: whether the file has them already.
    Raises:
        StateError: the file cannot be made.
    """

    def __init__(
        self,
        num_blocks: int,
        lengths: Sequence[int],
        width: int,
        dtype: torch.dtype,
        path: Path | None,
        key: str,
    ) -> None:
        self.num_blocks, self._width, self._dtype = num_blocks, width, dtype
        self._lengths = list(lengths)
        self._starts = np.cumsum([0, *lengths]) * width
        self._num_others = -1  # tensors of a block's output beside the hidden states; -1 if it is no tuple
        self._path, self._key = path, key
        self.is_filled = False
        size = int(self._starts[-1])
        if path is None:
            self._data = torch.empty(size, dtype=dtype)
            return
        num_bytes = size * dtype.itemsize
        try:
            about: dict[str, Any] = json.loads(self._about.read_bytes()) if self._about.is_file() else {}
            self.is_filled = about.get("key") == key
            if self.is_filled:
                self._num_others = about["num_others"]
            with open(path, "r+b" if self.is_filled else "w+b") as file:
                if os.fstat(file.fileno()).st_size != num_bytes:
                    self.is_filled = False
                os.posix_fallocate(file.fileno(), 0, max(num_bytes, 1))
                mapped = np.memmap(file, dtype=np.uint8, mode="r+")
            self._data = torch.from_numpy(mapped)[:num_bytes].view(dtype)
        except (OSError, ValueError, KeyError) as error:
            raise StateError(
                f"{path}: the frozen blocks' output of {num_bytes:,} bytes cannot be kept "
                f"({getattr(error, 'strerror', None) or error})"
            ) from error

    @property
    def _about(self) -> Path:
        assert self._path is not None, "kept in a file"
        return self._path.with_suffix(".json")

    def _row(self, row: int) -> Tensor:
        return self._data[self._starts[row] : self._starts[row + 1]].view(self._lengths[row], self._width)

    def put(self, rows: Sequence[int], output: Any) -> None:
        """Keep the hidden states of some rows, from the last frozen block's output, padded on the right.

        What it returns beside hidden states (BLOOM's attentions) is for callers that ask for it, and is not kept.
        """
        hidden = hidden_of(output)
        if hidden is not output:
            self._num_others = len(output) - 1
        for place, row in enumerate(rows):
            self._row(row).copy_(hidden[place, : self._lengths[row]])

    def finish(self) -> None:
        """Note in the file's description that all rows are there."""
        self.is_filled = True
        if self._path is not None:
            replace_file(self._about, json.dumps({"key": self._key, "num_others": self._num_others}))

    def way_of(self, rows: Sequence[int]) -> SkipBlocks:
        """Return the way of a rider with some rows, padded on the right, which skips the frozen blocks."""
        width = max(self._lengths[row] for row in rows)
        hidden = torch.zeros(len(rows), width, self._width, dtype=self._dtype)
        for place, row in enumerate(rows):
            hidden[place, : self._lengths[row]] = self._row(row)
        output = hidden if self._num_others < 0 else (hidden, *[None] * self._num_others)
        return SkipBlocks(self.num_blocks, output)
