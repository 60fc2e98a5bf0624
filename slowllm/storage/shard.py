"""Read and validate the header of one safetensors file before any size in it is trusted."""

from __future__ import annotations

import json
import math
import os
import reprlib
from pathlib import Path
from typing import Any, NoReturn

from slowllm.errors import CheckpointError
from slowllm.files import system_errors
from slowllm.storage.spans import DTYPE_BITS, Span, Stamp

# The safetensors library's own limits.
MAX_HEADER_BYTES = 100_000_000
MAX_HEADER_DEPTH = 127
# `git clone` leaves a file that begins so in place of a large one where git-LFS is not installed.
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def read_header(path: Path) -> dict[str, Span]:
    """Return the spans of one safetensors file, after checking every statement of its header against the file.

    Stricter than the safetensors library: a name that occurs twice in any table, blanks before the object, and entries
    or dtypes written in the other ways that serde reads (lists, one-entry tables) are errors.

    Raises:
        CheckpointError: the file or its header is damaged; the message names the file and the tensor, if any.
    """

    def refuse(problem: str) -> NoReturn:
        _refuse(path, problem)

    with system_errors(CheckpointError, path), open(path, "rb") as file:
        state = os.fstat(file.fileno())
        stamp, file_bytes = stamp_of(state), state.st_size
        prefix = file.read(8)
        if len(prefix) < 8:
            refuse(f"has {file_bytes} bytes, too few for a safetensors header; fetch this shard again")
        header_bytes = int.from_bytes(prefix, "little")
        if header_bytes > MAX_HEADER_BYTES:
            if (prefix + file.read(len(LFS_POINTER))).startswith(LFS_POINTER):
                refuse(
                    "is a git-LFS pointer, not the file itself; fetch the file with `git lfs pull`, "
                    "or the model with `slowllm download`"
                )
            refuse(f"claims a header of {header_bytes:,} bytes; this is not a safetensors file")
        if 8 + header_bytes > file_bytes:
            refuse(
                f"claims a header of {header_bytes:,} bytes but the file has {file_bytes:,}. "
                "The download is incomplete; fetch this shard again."
            )
        text = file.read(header_bytes)

    header = _parse_json(path, text)
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        refuse("its __metadata__ is not a table of strings")

    data_start = 8 + header_bytes
    spans = [_span(path, stamp, name, entry, data_start) for name, entry in header.items()]
    # Tensors with equal offsets are empty, but for one; sorting by the end puts that one last.
    spans.sort(key=lambda span: (span.offset, span.offset + span.num_bytes))
    position, previous = data_start, "the header"
    for span in spans:
        if span.offset < position:
            refuse(f"{span.name} starts at byte {span.offset:,}, inside {previous}; the header is damaged")
        if span.offset > position:
            refuse(f"{span.offset - position:,} bytes before {span.name} belong to no tensor")
        position, previous = span.offset + span.num_bytes, span.name
    if position > file_bytes:
        refuse(
            f"{previous} ends at byte {position:,} but the file has {file_bytes:,}. "
            "The download is incomplete; fetch this shard again."
        )
    if position < file_bytes:
        refuse(f"the last tensor ends at byte {position:,} but the file has {file_bytes:,}; it is too long")
    return {span.name: span for span in spans}


def open_shard(span: Span, flags: int = os.O_RDONLY) -> int:
    """Return a new descriptor of the shard that holds a span.

    Raises:
        CheckpointError: it is not the file whose header was read, or was changed since.
        OSError: it cannot be opened.
    """
    fd = os.open(span.path, flags)
    try:
        if span.stamp not in (None, stamp_of(os.fstat(fd))):
            _refuse(span.path, "was replaced or changed since its header was read; load the model again")
    except BaseException:
        os.close(fd)
        raise
    return fd


def refuse_short(span: Span, file_bytes: int) -> NoReturn:
    """Raise the error for a shard that was truncated while it was open."""
    _refuse(
        span.path,
        f"{span.name} ends at byte {span.offset + span.num_bytes:,} but the file has {file_bytes:,} by now; "
        "it was cut short while it was open",
    )


def stamp_of(state: os.stat_result) -> Stamp:
    """Return what tells a file from another of its name, and from itself after a change."""
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


def _refuse(path: Path, problem: str) -> NoReturn:
    raise CheckpointError(f"{path.name}: {problem}")


def _parse_json(path: Path, text: bytes) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for name, value in pairs:
            for text in (name, value):
                if isinstance(text, str):
                    text.encode()  # raises on lone surrogates, which Python's json accepts
            if name in table:
                _refuse(path, f"{name} stands twice in the header")
            table[name] = value
        return table

    def no_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    if not text.startswith(b"{"):
        _refuse(path, "its header is not a JSON object; this is not a safetensors file")
    try:
        # Not json.loads(bytes), which guesses UTF-16 and UTF-32.
        header = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=no_duplicates,
            parse_constant=no_constant,
            parse_float=_finite,
            parse_int=_integer,
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: its header is not valid JSON ({error})") from error
    assert isinstance(header, dict)
    return header


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError("number out of range")
    return number


def _integer(digits: str) -> int | float:
    # "-0" is not an unsigned integer to serde_json, and huge numbers must not become Python's big integers.
    return int(digits) if digits != "-0" and len(digits) <= 20 else _finite(digits)


def _check_ignored(value: Any, depth: int) -> None:
    """Refuse, in a field that is ignored here, what Python's json reads but the safetensors library does not.

    The keys of tables have been checked already.

    Raises:
        ValueError: a lone surrogate, or lists nested too deeply.
    """
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, dict | list):
        if depth > MAX_HEADER_DEPTH:
            raise ValueError("nested too deeply")
        for part in value.values() if isinstance(value, dict) else value:
            _check_ignored(part, depth + 1)


def _span(path: Path, stamp: Stamp, name: str, entry: Any, data_start: int) -> Span:
    def refuse(problem: str) -> NoReturn:
        _refuse(path, problem)

    def is_size(value: Any) -> bool:
        return type(value) is int and 0 <= value < 1 << 64

    fields = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or not fields <= entry.keys():
        refuse(f"{name} has no dtype, shape and data_offsets in the header")
    for ignored in entry.keys() - fields:
        try:
            _check_ignored(entry[ignored], depth=3)
        except ValueError as error:
            raise CheckpointError(f"{path.name}: its header is not valid JSON ({error})") from error
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        refuse(f"{name} has the unknown dtype {reprlib.repr(dtype)}")
    if not isinstance(shape, list) or not all(map(is_size, shape)):
        refuse(f"{name} has the impossible shape {reprlib.repr(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_size, offsets)):
        refuse(f"{name} has the impossible data_offsets {reprlib.repr(offsets)}")
    begin, end = offsets
    if end < begin:
        refuse(f"{name} ends at byte {end:,} before it begins at {begin:,}")
    size = 1
    for length in shape:
        size *= length
        # The safetensors library multiplies in 64 bits and refuses overflow even where a later zero would save it.
        if size >= 1 << 64:
            refuse(f"{name} has the impossible shape {reprlib.repr(shape)}")
    bits = size * DTYPE_BITS[dtype]
    if bits >= 1 << 64 or bits % 8:
        refuse(f"{name} of shape {reprlib.repr(shape)} and dtype {dtype} does not fill whole bytes")
    if bits // 8 != end - begin:
        refuse(
            f"{name} of shape {reprlib.repr(shape)} and dtype {dtype} needs {bits // 8:,} bytes but has {end - begin:,}"
        )
    return Span(name, path, dtype, tuple(shape), data_start + begin, end - begin, stamp)
