"""The frozen trunk: what the blocks below the tuned ones make of each example, computed once and kept.

In memory, or in a file of the state folder. Knows hidden states and blocks; knows nothing of training.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slowllm.errors import StateError
from slowllm.files import replace_file
from slowllm.streaming.journal import SkipBlocks


class FrozenActivations:
    """The output of a trunk for rows of tokens.

    Args:
        num_blocks: of the trunk.
        lengths: positions of each row.
        width: of a hidden state.
        dtype: of it.
        path: of the file that keeps it; None for memory.
        key: what it depends on; a file with another is filled anew.
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
        self._num_others = -1  # tensors of a block's output beside the hidden states; -1 for no tuple
        self._path, self._key = path, key
        self.is_filled = False
        size = int(self._starts[-1])
        if path is None:
            self._data = torch.empty(size, dtype=dtype)
            return
        try:
            done: dict[str, Any] = json.loads(self._about.read_bytes()) if self._about.is_file() else {}
            self.is_filled = done.get("key") == key
            if self.is_filled:
                self._num_others = done["num_others"]
            num_bytes = size * dtype.itemsize
            with open(path, "r+b" if self.is_filled else "w+b") as file:
                if os.fstat(file.fileno()).st_size != num_bytes:
                    self.is_filled = False
                os.posix_fallocate(file.fileno(), 0, max(num_bytes, 1))
                mapped = np.memmap(file, dtype=np.uint8, mode="r+")
            self._data = torch.from_numpy(mapped)[:num_bytes].view(dtype)
        except (OSError, ValueError, KeyError) as error:
            raise StateError(
                f"{path}: the trunk's output of {size * dtype.itemsize:,} bytes cannot be kept "
                f"({getattr(error, 'strerror', None) or error})"
            ) from error

    @property
    def _about(self) -> Path:
        assert self._path is not None, "kept in a file"
        return self._path.with_suffix(".json")

    def put(self, rows: Sequence[int], output: Any) -> None:
        """Keep what the trunk's last block returned for some rows, padded on the right.

        What it returned beside hidden states (BLOOM's attentions) is for those who ask for it, and not kept.
        """
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(output, tuple):
            self._num_others = len(output) - 1
        for place, row in enumerate(rows):
            length = self._lengths[row]
            target = self._data[self._starts[row] : self._starts[row + 1]].view(length, self._width)
            target.copy_(hidden[place, :length])

    def finish(self) -> None:
        """Note that all rows are there."""
        self.is_filled = True
        if self._path is not None:
            replace_file(self._about, json.dumps({"key": self._key, "num_others": self._num_others}))

    def journal_of(self, rows: Sequence[int]) -> SkipBlocks:
        """Return the journal of a rider with some rows, padded on the right."""
        width = max(self._lengths[row] for row in rows)
        hidden = torch.zeros(len(rows), width, self._width, dtype=self._dtype)
        for place, row in enumerate(rows):
            length = self._lengths[row]
            part = self._data[self._starts[row] : self._starts[row + 1]]
            hidden[place, :length] = part.view(length, self._width)
        output = hidden if self._num_others < 0 else (hidden, *[None] * self._num_others)
        return SkipBlocks(self.num_blocks, output)
