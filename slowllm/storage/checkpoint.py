"""Find every tensor's bytes in a folder of safetensors shards, or in GGUF files, which are validated before any size is trusted.

Knows the file format (https://github.com/huggingface/safetensors#format) and the Hugging Face index file;
knows nothing about models. Headers are read once; a few rows of a tensor can be read through a memory map.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Self

import torch
from torch import Tensor

from slowllm.errors import CheckpointError
from slowllm.files import read_description
from slowllm.storage.gguf import read_set
from slowllm.storage.gguf_files import gguf_files
from slowllm.storage.shard import open_shard, read_header, refuse_short
from slowllm.storage.spans import Placement, Run, Span

# Samples that identify a shard: the weights of two fine-tunings of one model differ everywhere.
NUM_SAMPLES, SAMPLE_BYTES = 64, 4096
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class Checkpoint:
    """A Hugging Face folder: its config files and the spans of all its shards.

    Owns the memory maps behind `mapped`; after closing, each ends with its last view.

    Attributes:
        folder: of the files.
        spans: of the tensors that are there, by name.
        absent: the tensors whose shard is not there, each with the name of the shard.
    """

    def __init__(
        self,
        folder: Path,
        spans: Mapping[str, Span],
        source_hash: str | None = None,
        is_exact: bool = True,
        absent: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.spans, self.absent = dict(spans), dict(absent or {})
        self._source_hash, self._is_exact = source_hash, is_exact
        self._maps: dict[Path, mmap.mmap] = {}

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, may_lack_shards: bool = False) -> Checkpoint:
        """Read and validate the headers of every shard in `folder`.

        Args:
            folder: to read, or a GGUF file.
            may_lack_shards: whether shards that the index names may be absent: the folder has a part of a model.
        Raises:
            CheckpointError: a file is missing, damaged, or of a kind that is not read.
        """
        folder = Path(folder)
        if files := gguf_files(folder):
            return cls(folder, read_set(files).spans)
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder")
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder}: has no config.json, so it is not a Hugging Face model folder")
        spans: dict[str, Span] = {}
        elsewhere: dict[str, str] = {}
        # transformers, too, prefers a single file to an index that an earlier save may have left beside it.
        weight_map = None if (folder / SINGLE).is_file() else read_weight_map(folder / INDEX)
        paths = _shards(folder, weight_map, may_lack_shards=may_lack_shards)
        absent = {} if weight_map is None else _tensors_elsewhere(folder, weight_map, paths)
        for path in paths:
            file = path.relative_to(folder).as_posix()
            for name, span in read_header(path).items():
                if weight_map is not None and weight_map.get(name, file) != file:
                    elsewhere[name] = file  # the index says which of two shards counts
                    continue
                if name in spans:
                    raise CheckpointError(
                        f"{name} stands in {spans[name].path.name} and again in {path.name}; "
                        "fetch both shards and the index again"
                    )
                spans[name] = span
        for name, file in (weight_map or {}).items():
            if name in absent:
                continue
            if name not in spans and name in elsewhere:
                raise CheckpointError(f"{name}: {INDEX} names {file} but it lies in {elsewhere[name]}")
            if name not in spans:
                raise CheckpointError(f"{file}: {name} is missing, though {INDEX} names it there")
        if not spans:
            raise CheckpointError(f"{folder}: its shards hold no tensors")
        return cls(folder, spans, absent=absent)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(span.num_bytes for span in self.spans.values())

    def fingerprint(self, config: str, *, of_source: bool = False) -> str:
        """Return a hash of the config and of the weights.

        Args:
            config: as text.
            of_source: use the weights that a store was made from, even where the store is not exact.
        """
        source_hash = self._source_hash if of_source or self._is_exact else None
        return hashlib.sha256(f"{config}\n{source_hash or self.weights_hash()}".encode()).hexdigest()

    def weights_hash(self) -> str:
        """Return a hash of every span and of samples of every shard; reads a few hundred KB of each."""
        digest = hashlib.sha256()
        for name, span in sorted(self.spans.items()):
            digest.update(repr((name, span.dtype, span.shape, span.offset, span.path.name)).encode())
        for path in sorted({span.path for span in self.spans.values()}):
            with open(path, "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                for sample in range(NUM_SAMPLES):
                    digest.update(os.pread(file.fileno(), SAMPLE_BYTES, size * sample // NUM_SAMPLES))
        return digest.hexdigest()

    def mapped(self, placement: Placement) -> Tensor | None:
        """Return a parameter on a memory map of its shard; its bytes are read when they are used.

        The tensor must not be written to; a coded one is as stored. None where the parameter's bytes do not lie
        together, or at an offset at which torch cannot view its dtype.

        Raises:
            CheckpointError: the shard is gone, or has changed since its header was read.
        """
        if not placement.runs:
            return torch.empty(placement.shape, dtype=placement.dtype)
        if len(placement.runs) > 1:
            return None
        span, dtype = placement.runs[0].span, placement.stored_dtype
        offset = span.offset + placement.runs[0].source
        if offset % placement.unit:
            return None
        whole = self._map(span)
        self.check_length(placement)
        shape = placement.stored_shape
        return torch.frombuffer(whole, dtype=dtype, count=math.prod(shape), offset=offset).view(shape)

    def check_length(self, placement: Placement) -> None:
        """Check that the mapped shards of a parameter still reach to its end.

        Reading a mapped page beyond the end of its file kills the process, and no handler can prevent that.

        Raises:
            CheckpointError: one was truncated.
        """
        self.check_runs(placement.runs)

    def check_runs(self, runs: Iterable[Run]) -> None:
        """Check that the mapped shards of some runs still reach to their ends; see `check_length`."""
        for run in runs:
            whole = self._maps.get(run.span.path)
            # The size of the mapped file itself, even if another file has its name now.
            if whole is not None and (size := whole.size()) < run.end:
                refuse_short(run.span, size)

    def _map(self, span: Span) -> mmap.mmap:
        path = span.path
        if path not in self._maps:
            try:
                fd = open_shard(span)
                try:
                    # A private map counts as writable, so torch accepts it without a warning; a write would only
                    # copy the page, never reach the file.
                    self._maps[path] = mmap.mmap(fd, 0, access=mmap.ACCESS_COPY)
                finally:
                    os.close(fd)
            except (OSError, ValueError) as error:  # ValueError: the file is empty by now
                raise CheckpointError(f"{path}: cannot be mapped ({error})") from error
        return self._maps[path]

    def close(self) -> None:
        """Drop the memory maps; tensors on a map keep it alive."""
        self._maps.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        CheckpointError: it cannot be read, or is not an object.
    """
    try:
        content = read_description(path, CheckpointError)
        if content.startswith(LFS_POINTER):
            raise CheckpointError(
                f"{path.name}: is a Git LFS pointer and not the file itself; fetch it with `git lfs pull` or "
                "`slowllm download`"
            )
        table = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: is not valid JSON ({error})") from error
    if not isinstance(table, dict):
        raise CheckpointError(f"{path.name}: is not a JSON object")
    return table


def read_weight_map(index: Path) -> dict[str, str] | None:
    """Return the file name of each tensor from an index file; None where there is no such file.

    Raises:
        CheckpointError: the index cannot be read, or has no weight_map.
    """
    if not index.is_file():
        return None
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index.name}: has no weight_map of tensor names to file names")
    return weight_map


def _tensors_elsewhere(folder: Path, weight_map: Mapping[str, str], paths: Sequence[Path]) -> dict[str, str]:
    """Return the tensors that an index says are in none of these shards, each with its shard."""
    here = {path.relative_to(folder).as_posix() for path in paths}
    return {name: file for name, file in weight_map.items() if PurePosixPath(file).as_posix() not in here}


def _shards(
    folder: Path, weight_map: Mapping[str, str] | None, *, may_lack_shards: bool = False
) -> list[Path]:
    if weight_map is None:
        single = folder / SINGLE
        if single.is_file():
            return [single]
        _refuse_other_formats(folder)
        shards = sorted(folder.glob("*.safetensors"))
        if not shards:
            raise CheckpointError(f"{folder}: has no model.safetensors and no {INDEX}")
        if len(shards) > 1:
            raise CheckpointError(
                f"{folder}: has {len(shards)} safetensors files but no {INDEX}; fetch the index file too"
            )
        return shards
    paths = []
    for file in sorted(set(weight_map.values())):
        # In a folder below, as transformers allows, but nowhere else.
        if not file or PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            raise CheckpointError(f"{INDEX}: names {file!r}, which is not a file beside it")
        if not os.path.isfile(folder / file):  # Path.is_file would raise on a name that is too long
            if may_lack_shards:
                continue
            raise CheckpointError(f"{file}: named by {INDEX} but missing; fetch this shard")
        paths.append(folder / file)
    if weight_map and not paths:
        raise CheckpointError(f"{folder}: has none of the shards that {INDEX} names; fetch those of the part")
    return paths


def _refuse_other_formats(folder: Path) -> None:
    if list(folder.glob("pytorch_model*.bin")) or list(folder.glob("*.pt")) or list(folder.glob("*.pth")):
        raise CheckpointError(
            f"{folder}: has only pickled weights (pytorch_model*.bin), which are never loaded here because a "
            "pickle can run code. Make a store of it with `slowllm convert`, which reads only tensors from it, "
            "or fetch the safetensors revision."
        )
