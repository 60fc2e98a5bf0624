"""Read a store's manifest, and open a store as a checkpoint.

Knows the files of a store and their headers; decodes nothing. A store is a Hugging Face folder that has a file for the
weights of each stop, under the names of the model's own parameters, each matrix as its codec stores it. The manifest
is written last, so a store without one is not finished.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from slowllm.errors import CheckpointError, StoreError
from slowllm.storage.checkpoint import Checkpoint, read_json
from slowllm.storage.codecs.registry import check_coding, check_kept
from slowllm.storage.shard import read_header
from slowllm.storage.spans import CodedArray, CodedRows, Coding, Span

MANIFEST, UNFINISHED = "slowllm_store.json", "slowllm_store.unfinished.json"
# Incremented when an older slowllm would misread what a newer one writes.
FORMAT = 1
# Prefix of the entries for the unused bytes before a tensor that begins on a page.
PADDING = "__padding__."

# Name of the only part of a tensor that is kept as the source has it.
KEPT = "kept"

StoreName = Literal["bf16", "lossless", "int8", "int4"]
STORES: tuple[StoreName, ...] = get_args(StoreName)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a store.

    Attributes:
        shape: of the parameter.
        dtype: safetensors' name of the dtype as stored, or as decoded.
        codec: its name; None where the tensor is not coded.
        parts: names of the codec's arrays, in order; each is in the file as ``tensor.codec.part``.
        source_sha256: of the source's bytes.
        coding: of a tensor that the source has in its maker's format and that is kept so: its arrays are one part, in which
            this says where each lies.
    """

    shape: tuple[int, ...]
    dtype: str
    codec: str | None
    parts: tuple[str, ...]
    source_sha256: str
    coding: Coding | None = None


@dataclass(frozen=True)
class StoredFile:
    """A file of a store.

    Attributes:
        num_bytes: its size.
        sha256: of all its bytes.
        header_sha256: of its header, which is checked whenever the store is opened.
        tensors: of the file, by name.
    """

    num_bytes: int
    sha256: str
    header_sha256: str
    tensors: Mapping[str, StoredTensor]


@dataclass(frozen=True)
class Manifest:
    """The description of a store.

    Attributes:
        store: its kind.
        slowllm: the version that wrote it.
        source_name: of the checkpoint that it was made from.
        source_hash: that checkpoint's `Checkpoint.weights_hash`.
        is_exact: whether every tensor decodes to the bits of the source.
        files: by name.
        small_files: the hash of each config and tokenizer file, by name.
        requantised: whether matrices that were quantised already were rounded again.
    """

    store: str
    slowllm: str
    source_name: str
    source_hash: str
    is_exact: bool
    files: Mapping[str, StoredFile]
    small_files: Mapping[str, str]
    requantised: bool = False

    def to_json(self) -> str:
        """Return the text of the manifest's file."""
        # Not indented: of a mixture of many experts that are kept as they are, it tells of a hundred thousand arrays.
        return json.dumps({"format": FORMAT, **asdict(self)}) + "\n"


def is_store(folder: Path) -> bool:
    """Whether a folder is a store, finished or not."""
    return (folder / MANIFEST).is_file() or (folder / UNFINISHED).is_file()


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a store.

    Raises:
        StoreError: it is missing, of a newer version, or damaged.
    """
    if not (folder / MANIFEST).is_file():
        if (folder / UNFINISHED).is_file():
            raise StoreError(
                f"{folder}: this store is not finished; run the same `slowllm convert` again, it goes on where it stopped"
            )
        raise StoreError(f"{folder}: has no {MANIFEST}, so it is no store")
    try:
        table = read_json(folder / MANIFEST)
    except CheckpointError as error:
        raise StoreError(
            f"{folder}: its manifest is damaged ({error}); delete the store and convert the model again"
        ) from error
    if table.get("format") != FORMAT:
        raise StoreError(
            f"{folder}: was written by slowllm {table.get('slowllm', '?')} in format {table.get('format')!r}, "
            f"but this version reads format {FORMAT}; update slowllm, or delete the store and convert the model again"
        )
    try:
        files = {name: file_from_json(entry) for name, entry in table["files"].items()}
        if not files:
            raise ValueError("it names no files")
        return Manifest(
            str(table["store"]), str(table["slowllm"]), str(table["source_name"]), str(table["source_hash"]),
            table["is_exact"] is True, files, {str(k): str(v) for k, v in table["small_files"].items()},
            table.get("requantised") is True,
        )  # fmt: skip
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise StoreError(
            f"{folder}: its manifest is damaged ({error!r}); delete the store and convert the model again"
        ) from error


def file_from_json(entry: Mapping[str, Any]) -> StoredFile:
    """Return a file's entry in a manifest, or its record.

    Raises:
        KeyError, TypeError, AttributeError, ValueError, OverflowError: the entry is damaged.
    """
    tensors = {
        name: StoredTensor(
            tuple(map(int, tensor["shape"])), str(tensor["dtype"]), tensor["codec"], tuple(tensor["parts"]),
            str(tensor["source_sha256"]), coding_from_json(tensor.get("coding")),
        )
        for name, tensor in entry["tensors"].items()
    }  # fmt: skip
    return StoredFile(int(entry["num_bytes"]), str(entry["sha256"]), str(entry["header_sha256"]), tensors)


def coding_from_json(entry: Mapping[str, Any] | None) -> Coding | None:
    """Return the coding of a tensor that is kept in its maker's format; None where there is none.

    Raises:
        KeyError, TypeError, AttributeError, ValueError, OverflowError: the entry is damaged.
    """
    if entry is None:
        return None
    parts = tuple(
        CodedArray(str(part["name"]), str(part["dtype"]), tuple(map(int, part["shape"])), int(part["offset"]))
        for part in entry["parts"]
    )
    rows = []
    for one in entry["rows"]:
        own = coding_from_json(one["coding"])
        if own is None:
            raise ValueError("rows without a coding")
        rows.append(CodedRows(int(one["first"]), int(one["num_rows"]), own))
    return Coding(
        str(entry["codec"]), parts, tuple(map(int, entry["group"])), tuple(rows), entry["is_transposed"] is True,
        float(entry["offset"]),
    )  # fmt: skip


def open_checkpoint(folder: str | os.PathLike[str], *, may_lack_shards: bool = False) -> Checkpoint:
    """Open a Hugging Face folder or a store; the spans of a store's coded tensors say how they are coded.

    Args:
        folder: to open.
        may_lack_shards: whether files may be absent: the folder has a part of a model.
    Raises:
        CheckpointError: a file is missing, damaged, or of a kind that is not read.
        StoreError: a store is not finished, newer, or has a file of another store.
    """
    folder = Path(folder)
    if not is_store(folder):
        return Checkpoint.open(folder, may_lack_shards=may_lack_shards)
    manifest = read_manifest(folder)
    spans: dict[str, Span] = {}
    absent: dict[str, str] = {}
    for name, file in manifest.files.items():
        path = folder / name
        if may_lack_shards and Path(name).name == name and not os.path.isfile(path):
            absent |= dict.fromkeys(file.tensors, name)
            continue
        if Path(name).name != name or not os.path.isfile(path):
            raise StoreError(
                f"{name}: is missing from the store {folder}; delete the store and convert the model again"
            )
        header = read_header(path)
        if header_sha256(path) != file.header_sha256:
            raise StoreError(
                f"{name}: is not the file that the manifest of {folder} tells of; it belongs to another store"
            )
        for tensor, entry in file.tensors.items():
            spans[tensor] = _span_of(path, tensor, entry, header)
    if not spans:
        raise StoreError(f"{folder}: has none of the store's files; fetch those of the part")
    # An exact store is the same model: soft prompts and states of its source work with it.
    return Checkpoint(folder, spans, manifest.source_hash, manifest.is_exact, absent)


def _span_of(path: Path, name: str, entry: StoredTensor, header: Mapping[str, Span]) -> Span:
    """Join the parts of a tensor, which lie in the file one after the other."""
    names = [name] if entry.codec is None else [f"{name}.{entry.codec}.{part}" for part in entry.parts]
    missing = [part for part in names if part not in header]
    if missing or not names:
        raise StoreError(f"{path.name}: has no tensor {(missing or [name])[0]}, though the manifest names it")
    spans = [header[part] for part in names]
    first, last = spans[0], spans[-1]
    if entry.codec is None:
        return replace(first, in_store=True)
    if entry.coding is not None:
        if len(spans) != 1 or entry.coding.codec != entry.codec or entry.dtype != "BF16":
            raise StoreError(
                f"{path.name}: {name} is told of in two ways; delete the store and convert the model again"
            )
        check_kept(f"{path.name}: {name}", entry.coding, entry.shape, first.num_bytes)
        return replace(
            first, name=name, dtype=entry.dtype, shape=entry.shape, coding=entry.coding, in_store=True
        )
    parts = tuple(
        CodedArray(part, span.dtype, span.shape, span.offset - first.offset)
        for part, span in zip(entry.parts, spans, strict=True)
    )
    coding = Coding(entry.codec, parts)
    check_coding(f"{path.name}: {name}", coding, entry.shape)
    if entry.dtype != "BF16":
        raise StoreError(f"{path.name}: {name} is said to decode to {entry.dtype}, but codecs give BF16")
    num_bytes = last.offset + last.num_bytes - first.offset
    return Span(
        name, path, entry.dtype, entry.shape, first.offset, num_bytes, first.stamp, coding, in_store=True
    )


def header_sha256(path: Path) -> str:
    """Return the hash of a safetensors file's header, its length included."""
    with open(path, "rb") as file:
        prefix = file.read(8)
        return hashlib.sha256(prefix + file.read(int.from_bytes(prefix, "little"))).hexdigest()
