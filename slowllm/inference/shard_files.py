"""Write rows of tensors into a folder of shards, safetensors or Parquet, from which a killed run goes on.

A shard gets its name when it is whole. Where shards end depends on the rows alone, and a shard's bytes on its rows: a
run that was killed leaves the bytes of one that was not. Knows no model and no verb.

In Parquet a row has its file, line, text and tensors; the first dimension of a tensor may differ from row to row. In
safetensors the tensors of all rows lie one after the other, and ``NAME.offsets`` says where each row begins.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from slowllm.errors import InputError
from slowllm.files import STATE_NAME, replacing, system_errors

log = logging.getLogger(__name__)

Format = Literal["parquet", "safetensors"]
FORMATS: tuple[Format, ...] = ("parquet", "safetensors")
# Bytes of the rows of one shard.
SHARD_BYTES = 64 << 20
# Copies of a shard's rows while it is written, the rows themselves included.
COPIES = 3
_NAME = re.compile(r"part-(\d{5,})\.(parquet|safetensors)(\.part)?")


@dataclass(frozen=True)
class ShardRow:
    """One row.

    Attributes:
        file: that its text is from.
        line: of that file, from 1.
        text: the text.
        tensors: by name; the names, dtypes and all dimensions but the first of a tensor of `grows` are those of every row.
    """

    file: str
    line: int
    text: str
    tensors: Mapping[str, Tensor]

    @property
    def num_bytes(self) -> int:
        """Of its tensors and its text."""
        return sum(tensor.nbytes for tensor in self.tensors.values()) + len(self.text.encode()) + 16


class ShardWriter:
    """The shards of a folder that are there, and those to come.

    Args:
        folder: exists.
        format: of the shards.
        grows: names of the tensors whose first dimension differs from row to row.
        about: written into every shard.
        shard_bytes: of the rows of a shard; it ends with the row that reaches them.
    Attributes:
        num_done: rows in whole shards.
    """

    def __init__(
        self,
        folder: Path,
        format: Format,
        grows: Sequence[str],
        about: Mapping[str, Any],
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self._folder, self._format, self._grows = folder, format, frozenset(grows)
        self._about, self._shard_bytes = json.dumps(about, sort_keys=True), shard_bytes
        self._rows: list[ShardRow] = []
        self._num_bytes = self._number = self.num_done = 0
        while (path := self._path(self._number)).exists():
            try:
                num_rows = _num_rows(path)
            except Exception as error:  # whatever pyarrow and safetensors raise on a damaged file
                log.warning("%s: cannot be read (%s); it and those after it are made again", path, error)
                break
            self.num_done += num_rows
            self._number += 1

    def _path(self, number: int) -> Path:
        return self._folder / f"part-{number:05d}.{self._format}"

    def add(self, row: ShardRow) -> bool:
        """Add a row; return whether it ended a shard, so that all rows so far are on disk.

        Raises:
            InputError: the shard cannot be written.
        """
        self._rows.append(row)
        self._num_bytes += row.num_bytes
        if self._num_bytes < self._shard_bytes:
            return False
        self._write()
        return True

    def finish(self) -> int:
        """Write the rows that are left, and return how many shards there are.

        Raises:
            InputError: the shard cannot be written.
        """
        if self._rows:
            self._write()
        return self._number

    def _write(self) -> None:
        path = self._path(self._number)
        write = _write_parquet if self._format == "parquet" else _write_safetensors
        try:
            with system_errors(InputError, path), replacing(path) as partial:
                write(partial, self._rows, self._grows, self._about)
        except safetensors.SafetensorError as error:
            raise InputError(f"{path}: cannot be written ({error})") from error
        self.num_done += len(self._rows)
        self._number += 1
        self._rows, self._num_bytes = [], 0


def check_folder(folder: Path) -> None:
    """Refuse a folder for shards that has something else in it, or cannot be made.

    Raises:
        InputError: it has; or it is a file, or its own folder is missing.
    """
    with system_errors(InputError, folder):
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: is a file; --out takes a folder")
        if not folder.exists() and not folder.absolute().parent.is_dir():
            raise InputError(f"{folder.parent}: no such folder to make {folder.name} in")
        if not os.access(folder if folder.exists() else folder.absolute().parent, os.W_OK | os.X_OK):
            raise InputError(f"{folder}: may not be written; name another folder")
        names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    stranger = next((name for name in names if name != STATE_NAME and not _NAME.fullmatch(name)), None)
    if stranger is not None:
        raise InputError(
            f"{folder}: holds {stranger}, which no such run wrote; name a new or an empty folder"
        )
    if names and STATE_NAME not in names:
        raise InputError(
            f"{folder}: holds shards of a run that is not known; name another folder, or delete it"
        )


def _num_rows(path: Path) -> int:
    """Return how many rows a shard has."""
    if path.suffix == ".parquet":
        from pyarrow import parquet  # type: ignore[import-untyped]

        return int(parquet.read_metadata(path).num_rows)
    with safetensors.safe_open(path, framework="pt") as file:
        return int(file.get_slice("line").get_shape()[0])


def _write_safetensors(path: Path, rows: Sequence[ShardRow], grows: frozenset[str], about: str) -> None:
    files = list(dict.fromkeys(row.file for row in rows))
    numbers = {file: number for number, file in enumerate(files)}
    tensors = {
        "file": torch.tensor([numbers[row.file] for row in rows]),
        "line": torch.tensor([row.line for row in rows]),
    }
    for name in rows[0].tensors:
        parts = [row.tensors[name] for row in rows]
        if name in grows:
            lengths = torch.tensor([0, *(len(part) for part in parts)])
            tensors[f"{name}.offsets"] = lengths.cumsum(0)
        tensors[name] = torch.cat(parts) if name in grows else torch.stack(parts)
    # One entry: safetensors writes several in an order that differs from process to process.
    save_file(tensors, path, {"slowllm": json.dumps({"files": files, "job": json.loads(about)})})


def _write_parquet(path: Path, rows: Sequence[ShardRow], grows: frozenset[str], about: str) -> None:
    import pyarrow
    from pyarrow import parquet

    columns: dict[str, Any] = {
        "file": pyarrow.array([row.file for row in rows], pyarrow.string()),
        "line": pyarrow.array([row.line for row in rows], pyarrow.int64()),
        "text": pyarrow.array([row.text for row in rows], pyarrow.string()),
    }
    for name in rows[0].tensors:
        parts = [row.tensors[name] for row in rows]
        values = torch.cat(parts) if name in grows else torch.stack(parts)
        if values.dtype == torch.bfloat16:  # Parquet has none; float32 holds the same numbers
            values = values.float()
        array = pyarrow.array(values.contiguous().flatten().numpy())
        for size in reversed(values.shape[1:]):
            array = pyarrow.FixedSizeListArray.from_arrays(array, size)
        if name in grows:
            lengths = torch.tensor([0, *(len(part) for part in parts)])
            offsets = pyarrow.array(lengths.cumsum(0).to(torch.int32).numpy())
            array = pyarrow.ListArray.from_arrays(offsets, array)
        columns[name] = array
    table = pyarrow.table(columns).replace_schema_metadata({"slowllm": about})
    parquet.write_table(table, path, compression="zstd")
