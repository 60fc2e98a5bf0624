"""Keys and values of a conversation on disk, read block by block while a pass goes through the model.

Those of a block are read while the block before it computes, so that neither the disk's time nor the memory of a long conversation
is spent before the first stop.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from slowllm.errors import SlowLLMError


class DamagedCacheError(SlowLLMError):
    """Keys and values on disk are not those that were written.

    Attributes:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path}: its keys and values are damaged")
        self.path = path


@dataclass(frozen=True)
class StoredColumns:
    """The first keys and values of a file.

    Attributes:
        path: of the file.
        file: opened by safetensors; its tensors are called ``0.keys``, ``0.values`` and so on, (1, heads, L, D) each. Its metadata
            has the checksum of each.
        num_columns: of them.
    """

    path: Path
    file: Any
    num_columns: int

    def read(self, name: str) -> Tensor:
        """Return the columns of a tensor.

        Raises:
            DamagedCacheError: the tensor is not the one that was written.
        """
        whole: Tensor = self.file.get_tensor(name)
        if checksum_of(whole) != (self.file.metadata() or {}).get(name):
            raise DamagedCacheError(self.path)
        return whole[:, :, : self.num_columns]


def checksum_of(tensor: Tensor) -> str:
    """Return the checksum of a tensor's bytes, as text."""
    return f"{zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data):08x}"


class StoredLayers:
    """Reads the keys and values of a conversation, one block ahead of the one that asks.

    Args:
        columns: the files, whose columns stand behind one another.
        pool: whose thread reads.
    Raises:
        SafetensorError: a file does not go with the others.
    """

    def __init__(self, columns: Sequence[StoredColumns], pool: ThreadPoolExecutor) -> None:
        self._columns, self._pool = columns, pool
        self.num_columns = sum(part.num_columns for part in columns)
        self._names: list[int] = sorted(
            {int(name.split(".")[0]) for name in columns[0].file.keys() if "." in name}  # noqa: SIM118
        )
        self._check()
        self._ahead: dict[int, Future[tuple[Tensor, Tensor]]] = {}
        if self._names:
            self._read_ahead(0)

    def cache(self) -> DynamicCache:
        """Return a cache whose blocks take their keys and values from here when they are computed."""
        cache = DynamicCache()
        for number in range(max(self._names, default=-1) + 1):
            cache.layers.append(_StoredLayer(self, number) if number in self._names else DynamicLayer())
        return cache

    def take(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values (1, heads, L, D) of a block, and read those of the next.

        Raises:
            DamagedCacheError: they are not those that were written.
        """
        place = self._names.index(number)
        self._read_ahead(place)
        self._read_ahead(place + 1)
        return self._ahead.pop(place).result()

    def _read_ahead(self, place: int) -> None:
        if place < len(self._names) and place not in self._ahead:
            self._ahead[place] = self._pool.submit(self._read, self._names[place])

    def _read(self, number: int) -> tuple[Tensor, Tensor]:
        keys, values = (
            torch.cat([part.read(f"{number}.{kind}") for part in self._columns], dim=2)
            for kind in ("keys", "values")
        )
        return keys, values

    def _check(self) -> None:
        """Refuse files that do not go together before a pass begins, which would fail in the middle."""
        for number in self._names:
            for kind in ("keys", "values"):
                shapes = [part.file.get_slice(f"{number}.{kind}").get_shape() for part in self._columns]
                for (batch, heads, length, size), part in zip(shapes, self._columns, strict=True):
                    if (batch, heads, size) != (1, shapes[0][1], shapes[0][3]) or length < part.num_columns:
                        raise SafetensorError(f"{number}.{kind} has the shape {shapes}")


class _StoredLayer(DynamicLayer):
    """The keys and values of one block, on disk until the block is computed."""

    def __init__(self, stored: StoredLayers, number: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._stored: StoredLayers | None = stored
        self._number, self._num_columns = number, stored.num_columns

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Put keys and values behind those on disk; see transformers."""
        if self._stored is not None:
            self.lazy_initialization(key_states, value_states)
            keys, values = self._stored.take(self._number)
            self.keys, self.values = keys.to(key_states), values.to(value_states)
            self._stored = None
        grown: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
        return grown

    def get_seq_length(self) -> int:
        """Return the number of tokens, also of those on disk."""
        return self._num_columns if self._stored is not None else int(super().get_seq_length())
