"""Where every tensor's bytes are: a folder of safetensors shards, validated before any size is trusted.

Knows the file format (https://github.com/huggingface/safetensors#format) and the Hugging Face index file;
knows nothing about models. Headers are read once; the bytes of a few rows can be taken through a memory map.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from slowllm.errors import CheckpointError
from slowllm.storage.spans import DTYPE_BITS, Placement, Span, Stamp

# As the safetensors library has them.
MAX_HEADER_BYTES = 100_000_000
MAX_HEADER_DEPTH = 127
# By these a shard is known again; two fine-tunings of one model differ everywhere.
NUM_SAMPLES, SAMPLE_BYTES = 64, 4096

# What `git clone` leaves in place of a large file where git-LFS is not installed.
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def read_header(path: Path) -> dict[str, Span]:
    """Return the spans of one safetensors file, every promise of its header checked against the file.

    Stricter than the safetensors library where it is lax: a name that stands twice in any table, blanks before
    the object, and entries or dtypes written in the other ways that serde reads (lists, one-entry tables) are errors.

    Raises:
        CheckpointError: naming the file and, where there is one, the tensor.
    """

    def refuse(problem: str) -> NoReturn:
        _refuse(path, problem)

    try:
        with open(path, "rb") as file:
            stamp = _stamp(file.fileno())
            file_bytes = os.fstat(file.fileno()).st_size
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
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error

    header = _parse_json(path, text)
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        refuse("its __metadata__ is not a table of strings")

    data_start = 8 + header_bytes
    spans = [_span(path, stamp, name, entry, data_start) for name, entry in header.items()]
    # Names with equal offsets are empty tensors; the end decides which lies before which.
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
        CheckpointError: it is not the file whose header was read, or was written to since.
        OSError: it cannot be opened.
    """
    number = os.open(span.path, flags)
    try:
        if span.stamp not in (None, _stamp(number)):
            _refuse(span.path, "was replaced or changed since its header was read; load the model again")
    except BaseException:
        os.close(number)
        raise
    return number


def refuse_short(span: Span, file_bytes: int) -> NoReturn:
    """Raise the error of a shard that has lost its end."""
    _refuse(
        span.path,
        f"{span.name} ends at byte {span.offset + span.num_bytes:,} but the file has {file_bytes:,} by now; "
        "it was cut short while it was open",
    )


def _stamp(number: int) -> Stamp:
    state = os.fstat(number)
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


def _refuse(path: Path, problem: str) -> NoReturn:
    raise CheckpointError(f"{path.name}: {problem}")


def _parse_json(path: Path, text: bytes) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for name, value in pairs:
            for text in (name, value):
                if isinstance(text, str):
                    text.encode(
                        "utf-8"
                    )  # Python's json lets lone surrogates pass; a name with one is no name
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
    """Refuse, in a field that has no meaning here, what Python's json reads but the safetensors library does not.

    Names of tables have been seen to already.

    Raises:
        ValueError: a lone surrogate, or lists in lists without end.
    """
    if isinstance(value, str):
        value.encode("utf-8")
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


class Checkpoint:
    """A Hugging Face folder: its config files and the spans of all its shards.

    Owns the memory maps that `mapped` hands out; closing it ends them once the last view is gone.
    """

    def __init__(
        self, folder: Path, spans: Mapping[str, Span], source_hash: str | None = None, is_exact: bool = True
    ) -> None:
        self.folder = folder
        self.spans = dict(spans)
        self._source_hash, self._is_exact = source_hash, is_exact
        self._maps: dict[Path, mmap.mmap] = {}

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Checkpoint:
        """Read and validate the headers of every shard in `folder`.

        Raises:
            CheckpointError: a file is missing, damaged, or of a kind that is not read.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder")
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder}: has no config.json, so it is not a Hugging Face model folder")
        spans: dict[str, Span] = {}
        for path in _shards(folder):
            for name, span in read_header(path).items():
                if name in spans:
                    raise CheckpointError(
                        f"{name} stands in {spans[name].path.name} and again in {path.name}; "
                        "fetch both shards and the index again"
                    )
                spans[name] = span
        _check_index(folder, spans)
        if not spans:
            raise CheckpointError(f"{folder}: its shards hold no tensors")
        return cls(folder, spans)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(span.num_bytes for span in self.spans.values())

    def fingerprint(self, config: str, *, of_source: bool = False) -> str:
        """Return a hash of the config and of the weights.

        Args:
            config: as text.
            of_source: of the weights that a store was made from, even where it has lost bits of them.
        """
        known = self._source_hash if of_source or self._is_exact else None
        weights = known or self.weights_hash()
        return hashlib.sha256(f"{config}\n{weights}".encode()).hexdigest()

    def weights_hash(self) -> str:
        """Return a hash of every span and of samples of every shard; reads a few hundred KB of each."""
        found = hashlib.sha256()
        for name, span in sorted(self.spans.items()):
            found.update(repr((name, span.dtype, span.shape, span.offset, span.path.name)).encode())
        for path in sorted({span.path for span in self.spans.values()}):
            with open(path, "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                for sample in range(NUM_SAMPLES):
                    found.update(os.pread(file.fileno(), SAMPLE_BYTES, size * sample // NUM_SAMPLES))
        return found.hexdigest()

    def mapped(self, placement: Placement) -> Tensor | None:
        """Return a parameter that lies on a memory map of its shard: no bytes are read until touched.

        The tensor must not be written to; a coded one is as stored. None where the parameter's bytes do not lie together, or at an offset
        that torch cannot view as its dtype.

        Raises:
            CheckpointError: the shard is gone, or is not as it was when its header was read.
        """
        if not placement.runs:
            return torch.empty(placement.shape, dtype=placement.dtype)
        if len(placement.runs) > 1:
            return None
        span, dtype = placement.runs[0].span, placement.stored_dtype
        offset = span.offset + placement.runs[0].source
        if offset % dtype.itemsize:
            return None
        whole = self._map(span)
        self.check_length(placement)
        shape = placement.stored_shape
        return torch.frombuffer(whole, dtype=dtype, count=math.prod(shape), offset=offset).view(shape)

    def check_length(self, placement: Placement) -> None:
        """See that the mapped shards of a parameter still reach to its end.

        To touch a page beyond the end of its file kills the process, and no handler can mend that.

        Raises:
            CheckpointError: one was cut short.
        """
        for run in placement.runs:
            whole = self._maps.get(run.span.path)
            # A map knows the length of its own file, whatever has taken the file's name.
            if whole is not None and (size := whole.size()) < run.span.offset + run.source + run.num_bytes:
                refuse_short(run.span, size)

    def _map(self, span: Span) -> mmap.mmap:
        path = span.path
        if path not in self._maps:
            try:
                number = open_shard(span)
                try:
                    # A private map is writable in name, so torch takes it without a warning; a write would only
                    # copy the page, never reach the file.
                    self._maps[path] = mmap.mmap(number, 0, access=mmap.ACCESS_COPY)
                finally:
                    os.close(number)
            except (OSError, ValueError) as error:  # ValueError: the file is empty by now
                raise CheckpointError(f"{path}: cannot be mapped ({error})") from error
        return self._maps[path]

    def close(self) -> None:
        """Drop the memory maps; tensors that still lie on one keep it alive."""
        self._maps.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        CheckpointError: it cannot be read, or is not an object.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: is not valid JSON ({error})") from error
    if not isinstance(table, dict):
        raise CheckpointError(f"{path.name}: is not a JSON object")
    return table


def _weight_map(folder: Path) -> dict[str, str] | None:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return None
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index.name}: has no weight_map of tensor names to file names")
    return weight_map


def _shards(folder: Path) -> list[Path]:
    weight_map = _weight_map(folder)
    if weight_map is None:
        single = folder / "model.safetensors"
        if single.is_file():
            return [single]
        _refuse_other_formats(folder)
        found = sorted(folder.glob("*.safetensors"))
        if not found:
            raise CheckpointError(f"{folder}: has no model.safetensors and no model.safetensors.index.json")
        if len(found) > 1:
            raise CheckpointError(
                f"{folder}: has {len(found)} safetensors files but no model.safetensors.index.json; "
                "fetch the index file too"
            )
        return found
    paths = []
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise CheckpointError(
                f"model.safetensors.index.json: names {file!r}, which is not a file beside it"
            )
        if not os.path.isfile(folder / file):  # Path.is_file would raise on a name that is too long
            raise CheckpointError(
                f"{file}: named by model.safetensors.index.json but missing; fetch this shard"
            )
        paths.append(folder / file)
    return paths


def _check_index(folder: Path, spans: Mapping[str, Span]) -> None:
    for name, file in (_weight_map(folder) or {}).items():
        if name not in spans:
            raise CheckpointError(
                f"{file}: {name} is missing, though model.safetensors.index.json names it there"
            )
        if spans[name].path.name != file:
            raise CheckpointError(
                f"{name}: model.safetensors.index.json names {file} but it lies in {spans[name].path.name}"
            )


def _refuse_other_formats(folder: Path) -> None:
    if list(folder.glob("pytorch_model*.bin")) or list(folder.glob("*.pt")) or list(folder.glob("*.pth")):
        raise CheckpointError(
            f"{folder}: has only pickled weights (pytorch_model*.bin), which are never loaded here because a "
            "pickle can run code. Make a store of it with `slowllm convert`, which reads only tensors from it, "
            "or fetch the safetensors revision."
        )
    if list(folder.glob("*.gguf")):
        raise CheckpointError(
            f"{folder}: has only GGUF files. Fetch the original safetensors checkpoint, "
            "or load it in transformers with gguf_file= and save_pretrained()."
        )
