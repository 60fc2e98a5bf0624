"""Read and validate the header of one GGUF file before any size in it is trusted.

Knows the file format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) and how many bytes a block of each type
takes; knows nothing of models. Reads no weight.
"""

from __future__ import annotations

import math
import os
import reprlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from slowllm.errors import CheckpointError
from slowllm.files import system_errors
from slowllm.storage.shard import LFS_POINTER, stamp_of
from slowllm.storage.spans import CodedArray, Coding, Span

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# A vocabulary of a quarter of a million tokens with its merges takes 15 MB.
MAX_HEADER_BYTES = 1 << 28
# ggml's own limit.
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32
_READ_AT_A_TIME = 1 << 20

# Numbers as they are, by the number of their type.
_PLAIN = {0: "F32", 1: "F16", 30: "BF16"}
_PLAIN_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
# Blocks of weights that share a scale: weights and bytes of a block.
BLOCKS: Mapping[str, tuple[int, int]] = {
    "q4_0": (32, 18), "q4_1": (32, 20), "q5_0": (32, 22), "q5_1": (32, 24), "q8_0": (32, 34),
    "q2_k": (256, 84), "q3_k": (256, 110), "q4_k": (256, 144), "q5_k": (256, 176), "q6_k": (256, 210),
    "iq4_nl": (32, 18), "iq4_xs": (256, 136), "mxfp4": (32, 17),
    "iq1_s": (256, 50), "iq1_m": (256, 56), "iq2_xxs": (256, 66), "iq2_xs": (256, 74), "iq2_s": (256, 82),
    "iq3_xxs": (256, 98), "iq3_s": (256, 110),
}  # fmt: skip
_CODED = {
    2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0", 10: "q2_k", 11: "q3_k", 12: "q4_k", 13: "q5_k", 14: "q6_k",
    20: "iq4_nl", 23: "iq4_xs", 39: "mxfp4", 16: "iq2_xxs", 17: "iq2_xs", 18: "iq3_xxs", 19: "iq1_s", 21: "iq3_s",
    22: "iq2_s", 29: "iq1_m",
}  # fmt: skip
# Types that a file may have and that are not read, for messages.
_NOT_READ = {
    9: "Q8_1", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4",
    41: "Q1_0",
}  # fmt: skip
# Of the values of the metadata that have a fixed size.
_VALUES = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_UINT32, _BOOL, _STRING, _ARRAY = 4, 7, 8, 9
_BLOCKS_PART = "blocks"


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself.

    Attributes:
        metadata: by key; arrays are lists.
        spans: of its tensors, by name, shapes in torch's order; those of blocks say how they are coded.
    """

    metadata: Mapping[str, Any]
    spans: Mapping[str, Span]


def codec_name(kind: str) -> str:
    """Return the name of the codec of a type, such as ``gguf-q4_k`` of ``q4_k``."""
    return f"gguf-{kind}"


def blocks_coding(kind: str, num_rows: int, row_bytes: int) -> Coding:
    """Return the coding of a matrix that is stored as blocks, rows behind rows."""
    return Coding(codec_name(kind), (CodedArray(_BLOCKS_PART, "U8", (num_rows, row_bytes), 0),))


def read_gguf(path: Path) -> GgufHeader:
    """Return the header of a GGUF file, after checking every statement of it against the file.

    Raises:
        CheckpointError: the file or its header is damaged, or of a kind that is not read; the message names the file and
            the tensor, if any.
    """
    with system_errors(CheckpointError, path), open(path, "rb") as file:
        state = os.fstat(file.fileno())
        cursor = _Cursor(path, file, state.st_size)
        num_tensors, num_keys = _read_start(cursor)
        metadata: dict[str, Any] = {}
        alignment_kind = _UINT32
        for _ in range(num_keys):
            key = cursor.string("the name of a key")
            if key in metadata:
                cursor.refuse(f"{reprlib.repr(key)} stands twice in its metadata")
            kind = cursor.number("<I", key)
            if key == "general.alignment":
                alignment_kind = kind
            metadata[key] = _read_value(cursor, key, kind)
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if alignment_kind != _UINT32 or alignment < 1 or alignment & (alignment - 1):
            cursor.refuse(f"its general.alignment is {reprlib.repr(alignment)}, which is no power of two")
        entries = [_read_entry(cursor) for _ in range(num_tensors)]
        start = cursor.position + -cursor.position % alignment
    spans: dict[str, Span] = {}
    for name, shape, type_number, offset in entries:
        if name in spans:
            cursor.refuse(f"{name} stands twice in its list of tensors")
        if offset % alignment:
            cursor.refuse(
                f"{name} begins at byte {offset:,} of the data, which is no multiple of {alignment}"
            )
        spans[name] = _span_of(cursor, name, shape, type_number, start + offset, stamp_of(state))
    _check_extents(cursor, spans)
    return GgufHeader(metadata, spans)


class _Cursor:
    """Reads a header piece by piece; each length is checked before anything is read."""

    def __init__(self, path: Path, file: BinaryIO, file_bytes: int) -> None:
        self.path, self.file_bytes = path, file_bytes
        self.position = 0
        self._file, self._buffer, self._begin = file, b"", 0

    def refuse(self, problem: str) -> NoReturn:
        raise CheckpointError(f"{self.path.name}: {problem}")

    def take(self, num_bytes: int, what: str) -> bytes:
        """Return the next bytes."""
        end = self.position + num_bytes
        if end > self.file_bytes:
            self.refuse(
                f"{what} ends at byte {end:,} but the file has {self.file_bytes:,}; the download is incomplete or the "
                "header is damaged: fetch this file again"
            )
        if end > MAX_HEADER_BYTES:
            self.refuse(f"{what} ends at byte {end:,} of a header that may have {MAX_HEADER_BYTES:,}")
        offset = self.position - self._begin
        if offset + num_bytes > len(self._buffer):
            more = self._file.read(max(num_bytes, _READ_AT_A_TIME))
            self._buffer = self._buffer[offset:] + more
            self._begin, offset = self.position, 0
            if len(self._buffer) < num_bytes:
                self.refuse("was cut short while its header was read")
        self.position = end
        return self._buffer[offset : offset + num_bytes]

    def number(self, layout: str, what: str) -> Any:
        """Return the next number."""
        return struct.unpack(layout, self.take(struct.calcsize(layout), what))[0]

    def string(self, what: str) -> str:
        """Return the next string: its length, and so many bytes of UTF-8."""
        text = self.take(self.number("<Q", what), what)
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path.name}: {what} is not UTF-8 ({error})") from error


def _read_start(cursor: _Cursor) -> tuple[int, int]:
    """Return the numbers of tensors and of keys."""
    if cursor.file_bytes < 24:
        cursor.refuse(f"has {cursor.file_bytes} bytes, too few for a GGUF header; fetch this file again")
    if (magic := cursor.take(4, "its first word")) != MAGIC:
        if LFS_POINTER.startswith(magic):
            cursor.refuse("is a git-LFS pointer, not the file itself; fetch the file with `git lfs pull`")
        cursor.refuse("does not begin with GGUF, so it is not a GGUF file")
    version = cursor.number("<I", "its version")
    if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, *VERSIONS):
        cursor.refuse("is a big-endian GGUF file, which is not read; fetch the little-endian one")
    if version not in VERSIONS:
        cursor.refuse(
            f"is of version {version} of GGUF, which is not read; there are {' and '.join(map(str, VERSIONS))}"
        )
    counts = cursor.number("<Q", "its number of tensors"), cursor.number("<Q", "its number of keys")
    # Each takes some bytes at least, so that a larger number is a lie.
    for count, what, least in zip(counts, ("tensors", "keys"), (24, 13), strict=True):
        if count * least > cursor.file_bytes:
            cursor.refuse(f"claims {count:,} {what}, more than its {cursor.file_bytes:,} bytes can name")
    return counts


def _read_value(cursor: _Cursor, key: str, kind: int) -> Any:
    if kind == _STRING:
        return cursor.string(key)
    if kind in _VALUES:
        return _checked(cursor, key, kind, [cursor.number(_VALUES[kind], key)])[0]
    if kind != _ARRAY:
        cursor.refuse(f"{reprlib.repr(key)} has a value of the unknown type {kind}")
    inner, count = cursor.number("<I", key), cursor.number("<Q", key)
    if inner == _STRING:
        if count * 8 > cursor.file_bytes:
            cursor.refuse(f"{key} claims {count:,} strings, more than the file can hold")
        return [cursor.string(key) for _ in range(count)]
    if inner not in _VALUES:
        cursor.refuse(f"{reprlib.repr(key)} is a list of the type {inner}, which is not read")
    layout = _VALUES[inner]
    data = cursor.take(count * struct.calcsize(layout), key)
    return _checked(cursor, key, inner, list(struct.unpack(f"<{count}{layout[1]}", data)))


def _checked(cursor: _Cursor, key: str, kind: int, values: list[Any]) -> list[Any]:
    if kind != _BOOL:
        return values
    if any(value > 1 for value in values):
        cursor.refuse(f"{key} is said to be true or false but is {reprlib.repr(values)}")
    return [bool(value) for value in values]


def _read_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Return the name, the shape in torch's order, the type and the offset of one tensor."""
    name = cursor.string("the name of a tensor")
    num_dimensions = cursor.number("<I", name)
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        cursor.refuse(f"{name} has {num_dimensions:,} dimensions; there are 1 to {MAX_DIMENSIONS}")
    shape = tuple(cursor.number("<Q", name) for _ in range(num_dimensions))[::-1]
    if not 0 < math.prod(shape) < 1 << 63 or 0 in shape:
        cursor.refuse(f"{name} has the impossible shape {reprlib.repr(list(shape))}")
    return name, shape, cursor.number("<I", name), cursor.number("<Q", name)


def _span_of(
    cursor: _Cursor, name: str, shape: tuple[int, ...], type_number: int, offset: int, stamp: Any
) -> Span:
    if type_number in _PLAIN:
        dtype = _PLAIN[type_number]
        return Span(name, cursor.path, dtype, shape, offset, math.prod(shape) * _PLAIN_BYTES[dtype], stamp)
    if type_number not in _CODED:
        known = _NOT_READ.get(type_number)
        said = f"the unknown type {type_number}" if known is None else f"the type {known}, which is not read"
        kinds = ", ".join(kind.upper() for kind in (*_PLAIN.values(), *BLOCKS))
        cursor.refuse(f"{name} has {said}; there are {kinds}")
    kind = _CODED[type_number]
    weights, block_bytes = BLOCKS[kind]
    if shape[-1] % weights:
        cursor.refuse(
            f"{name} has rows of {shape[-1]:,} weights, which are no blocks of {weights} ({kind.upper()})"
        )
    num_rows, row_bytes = math.prod(shape[:-1]), shape[-1] // weights * block_bytes
    coding = blocks_coding(kind, num_rows, row_bytes)
    return Span(name, cursor.path, "BF16", shape, offset, num_rows * row_bytes, stamp, coding)


def _check_extents(cursor: _Cursor, spans: Mapping[str, Span]) -> None:
    """Refuse tensors that overlap, or that reach beyond the end of the file."""
    position, previous = 0, ""
    for span in sorted(spans.values(), key=lambda span: (span.offset, span.num_bytes)):
        end = span.offset + span.num_bytes
        if span.offset < position:
            cursor.refuse(
                f"{span.name} begins at byte {span.offset:,}, inside {previous}; the header is damaged"
            )
        if end > cursor.file_bytes:
            cursor.refuse(
                f"{span.name} ends at byte {end:,} but the file has {cursor.file_bytes:,}; the download is incomplete: "
                "fetch this file again"
            )
        position, previous = end, span.name


def read_set(files: Sequence[Path]) -> GgufHeader:
    """Return the headers of a set of GGUF files as one; the first has the metadata.

    Raises:
        CheckpointError: a file is damaged, or is not of this set.
    """
    headers = [read_gguf(file) for file in files]
    first = headers[0]
    spans: dict[str, Span] = {}
    for number, (file, header) in enumerate(zip(files, headers, strict=True)):
        said = header.metadata.get("split.no", 0), header.metadata.get("split.count", 1)
        if len(files) > 1 and said != (number, len(files)):
            raise CheckpointError(
                f"{file.name}: says that it is file {said[0]} of {said[1]}, counted from 0, which its name does not"
            )
        for name, span in header.spans.items():
            if name in spans:
                raise CheckpointError(f"{name} stands in {spans[name].path.name} and again in {file.name}")
            spans[name] = span
    total = first.metadata.get("split.tensors.count", len(spans))
    if (len(files) == 1 and first.metadata.get("split.count", 1) not in (0, 1)) or total != len(spans):
        raise CheckpointError(
            f"{files[0].name}: belongs to a set of {first.metadata.get('split.count')} files with {total} tensors, but "
            f"{len(files)} with {len(spans)} are there; fetch the others and give them their published names"
        )
    if not spans:
        raise CheckpointError(f"{files[0].name}: holds no tensors")
    return GgufHeader(first.metadata, spans)
