"""Read examples that have named parts: JSON Lines, CSV and Parquet, by the name of the file.

Knows no model and no verb: callers name the columns that they look for.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from slowllm.errors import InputError, counted
from slowllm.files import read_text_bytes, system_errors

Kind = Literal["json", "csv", "parquet", "text"]
_KINDS: dict[str, Kind] = {
    ".jsonl": "json", ".json": "json", ".ndjson": "json", ".jsonlines": "json",
    ".csv": "csv", ".parquet": "parquet",
}  # fmt: skip
# Of a Parquet file whose rows are streamed.
ROWS_AT_ONCE = 1024
KIND_NAMES = {"json": "JSON Lines", "csv": "CSV", "parquet": "Parquet"}


def kind_of(file: str | Path) -> Kind:
    """Return what a file holds by the end of its name; ``text`` where that says nothing."""
    return _KINDS.get(Path(file).suffix.lower(), "text")


def read_table(
    file: str | Path, columns: Sequence[str], *, lists: Collection[str] = ()
) -> list[tuple[int, dict[str, Any]]]:
    """Return the rows of a CSV or Parquet file with their numbers: lines from 1 of CSV, rows from 1 of Parquet.

    Args:
        file: whose name ends in .csv or .parquet.
        columns: of which at least one must be there; where their cells are empty, the row has no such key. Other columns
            are kept as they are.
        lists: columns whose cells in CSV are lists in JSON, such as ``["a", "b"]``.
    Raises:
        InputError: the file cannot be read, has no rows, none of the columns, or a value that JSON cannot hold; or it is
            Parquet, and pyarrow is not installed.
    """
    found = list(_csv_rows(file, lists) if kind_of(file) == "csv" else _parquet_rows(file))
    if not found:
        raise InputError(f"{file}: has no rows")
    names = found[0][1]
    if not any(name in names for name in columns):
        wanted = (
            f"no column {columns[0]}" if len(columns) == 1 else f"none of the columns {', '.join(columns)}"
        )
        raise InputError(f"{file}: has {wanted}; there are {', '.join(names)}")
    rows = []
    for number, row in found:
        kept = {name: value for name, value in row.items() if name not in columns or value not in (None, "")}
        try:
            json.dumps(kept, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise InputError(f"{file}: line {number} has a value that JSON cannot hold ({error})") from error
        rows.append((number, kept))
    return rows


def stream_column(file: str | Path, column: str) -> Iterator[tuple[int, Any]]:
    """Yield the numbers of rows, as in `read_table`, and their cells of one column; of Parquet few rows are in memory.

    Raises:
        InputError: as for `read_table`.
    """
    missing = f"{file}: has no column {column}; there are "
    if kind_of(file) == "csv":
        for number, row in _csv_rows(file, ()):
            if column not in row:
                raise InputError(missing + ", ".join(row))
            yield number, row[column]
        return
    with _parquet_file(file) as (opened, errors):
        if column not in opened.schema_arrow.names:
            raise InputError(missing + ", ".join(opened.schema_arrow.names))
        batches, number = opened.iter_batches(ROWS_AT_ONCE, columns=[column]), 0
        while True:
            with errors:
                batch = next(batches, None)
            if batch is None:
                return
            for cell in batch.column(0).to_pylist():
                number += 1
                yield number, cell


def _csv_rows(file: str | Path, lists: Collection[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    data = read_text_bytes(file).removeprefix(b"\xef\xbb\xbf")
    try:
        reader = csv.reader(io.StringIO(data.decode("utf-8"), newline=""), strict=True)
        header, last = next(reader, []), reader.line_num
        if len(set(header)) < len(header):
            twice = next(name for name in header if header.count(name) > 1)
            raise InputError(f"{file}: has the column {twice!r} twice")
        for cells in reader:
            number, last = last + 1, reader.line_num  # a cell in quotes may have several lines
            if not cells:
                continue
            if len(cells) != len(header):
                raise InputError(
                    f"{file}: line {number} has {counted(len(cells), 'cell')}, but the header has {len(header)}"
                )
            row: dict[str, Any] = dict(zip(header, cells, strict=True))
            for name in lists:
                if row.get(name):
                    row[name] = _list(f"{file}: line {number}: {name}", row[name])
            yield number, row
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file}: is not UTF-8 (byte {error.start + 1:,} is 0x{data[error.start]:02x}); convert it first"
        ) from error
    except csv.Error as error:
        raise InputError(f"{file}: is not CSV at line {reader.line_num} ({error})") from error


def _list(where: str, cell: str) -> list[Any]:
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, list):
        raise InputError(f'{where} must be a list in JSON, such as ["a", "b"], not {cell[:60]!r}')
    return value


def _parquet_rows(file: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with _parquet_file(file) as (opened, errors):
        with errors:
            rows = opened.read().to_pylist()
        yield from enumerate(rows, 1)


@contextlib.contextmanager
def _parquet_file(file: str | Path) -> Iterator[tuple[Any, contextlib.AbstractContextManager[None]]]:
    """Yield an open Parquet file, and a context, for any number of uses, that names the file in errors of pyarrow."""
    with system_errors(InputError, file), open(file, "rb"):
        pass
    try:
        from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise InputError(f"{file}: reading Parquet needs pyarrow ({error}); pip install pyarrow") from error
    errors = _ReadErrors(file, (ArrowException, OSError))
    with errors:
        opened = parquet.ParquetFile(file)
    with opened:
        yield opened, errors


class _ReadErrors(contextlib.AbstractContextManager[None]):
    def __init__(self, file: str | Path, kinds: tuple[type[BaseException], ...]) -> None:
        self._file, self._kinds = file, kinds

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, self._kinds):
            raise InputError(f"{self._file}: is no Parquet file that can be read ({error})") from error
