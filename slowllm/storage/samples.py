"""Hash a few KiB of a tensor, at places that depend on its name and shape alone, to know it again in another file.

The hash is the same wherever the tensor's bytes lie, and for a coding that loses nothing the same as before coding. It
finds out mistakes (another revision, a mix-up of files), not a forger who knows the places. Knows files and codecs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from slowllm.storage.checkpoint import Checkpoint
from slowllm.storage.codecs.base import Codec, Parts
from slowllm.storage.codecs.registry import codec_of
from slowllm.storage.codecs.team import Team
from slowllm.storage.shard import open_shard, refuse_short
from slowllm.storage.spans import DTYPE_NAMES, TORCH_DTYPES, Placement, Run

# Of a tensor; each of its experts gets one at least, up to the limit.
NUM_SAMPLES, MAX_SAMPLES = 8, 256
SAMPLE_ELEMENTS = 256


def hash_tensors(checkpoint: Checkpoint, placements: dict[str, Placement]) -> str:
    """Return a hash of tensors: their names, shapes, dtypes, and samples of their values.

    A coded tensor whose codec is exact counts as decoded; of any other, the coding and its arrays count.

    Args:
        checkpoint: that has the tensors.
        placements: by the name that is hashed.
    Raises:
        CheckpointError: a shard is gone, too short, or has changed since its header was read.
    """
    digest = hashlib.sha256()
    with _Files() as files, contextlib.ExitStack() as closing:
        # Maps of its own: pages of a map count as this process's memory until it is closed.
        maps = closing.enter_context(Checkpoint(checkpoint.folder, {}))
        team = Team(1) if any(p.coding is not None for p in placements.values()) else None
        if team is not None:
            closing.callback(team.close)
        for name, placement in sorted(placements.items()):
            codec = None if placement.coding is None else codec_of(placement.coding)
            if codec is None:
                pieces = _plain(files, placement, name)
            elif codec.is_exact:
                assert team is not None, "something is coded"
                pieces = _decoded(maps, codec, placement, name, team)
            else:
                pieces = _coded(files, placement, name)
            about = [name, list(placement.shape), DTYPE_NAMES[placement.dtype]]
            if codec is not None and not codec.is_exact:
                about.append(codec.name)
            digest.update(json.dumps(about).encode())
            for piece in pieces:
                digest.update(piece)
    return digest.hexdigest()


def sampled_places(name: str, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return the elements that are sampled of a tensor: the first of each run, and their number.

    One run lies in each of equal shares of the tensor, somewhere.
    """
    count = math.prod(shape)
    num_samples = min(MAX_SAMPLES, max(NUM_SAMPLES, shape[0] if len(shape) == 3 else 0))
    share = count // num_samples
    if share <= SAMPLE_ELEMENTS:
        return [(0, count)] if count else []
    seed = f"{name} {list(shape)}"
    places = []
    for sample in range(num_samples):
        number = int.from_bytes(hashlib.sha256(f"{seed} {sample}".encode()).digest()[:8], "little")
        places.append((sample * share + number % (share - SAMPLE_ELEMENTS + 1), SAMPLE_ELEMENTS))
    return places


class _Files:
    """Shards that are open to be read here and there; closes them at the end of its context."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}

    def read(self, run: Run, offset: int, num_bytes: int) -> bytes:
        """Return bytes of a run, `offset` counted from its first."""
        span = run.span
        if span.path not in self._open:
            fd = self._open[span.path] = open_shard(span)
            if hasattr(os, "posix_fadvise"):  # else the system reads on behind each sample
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        fd = self._open[span.path]
        data = os.pread(fd, num_bytes, span.offset + run.source + offset)
        if len(data) < num_bytes:
            refuse_short(span, os.fstat(fd).st_size)
        return data

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._open.values():
            os.close(fd)


def _plain(files: _Files, placement: Placement, name: str) -> Iterator[bytes]:
    itemsize = placement.dtype.itemsize
    for first, count in sampled_places(name, placement.shape):
        yield from _bytes_at(files, placement, first * itemsize, count * itemsize)


def _bytes_at(files: _Files, placement: Placement, low: int, num_bytes: int) -> Iterator[bytes]:
    """Yield bytes of a tensor as stored, from byte `low` on; they may lie in several runs."""
    for run in placement.runs:
        begin, end = max(run.target, low), min(run.target + run.num_bytes, low + num_bytes)
        if begin < end:
            yield files.read(run, begin - run.target, end - begin)


def _coded(files: _Files, placement: Placement, name: str) -> Iterator[bytes]:
    assert placement.coding is not None, "it is coded"
    for part in placement.coding.arrays:
        itemsize = TORCH_DTYPES[part.dtype].itemsize
        for first, count in sampled_places(f"{name} {part.name}", part.shape):
            yield from _bytes_at(files, placement, part.offset + first * itemsize, count * itemsize)


def _decoded(maps: Checkpoint, codec: Codec, placement: Placement, name: str, team: Team) -> Iterator[bytes]:
    stored = maps.mapped(placement)
    assert stored is not None, "stores lay coded tensors out for a map"
    assert placement.coding is not None, "it is coded"
    whole = Parts.of(stored, placement.coding, placement.shape)
    # As one column: a row is then one weight, and what is decoded begins and ends anywhere.
    column = Parts(whole.arrays, math.prod(placement.shape), 1)
    for first, count in sampled_places(name, placement.shape):
        out = torch.empty(count, 1, dtype=torch.bfloat16)
        codec.decode(column, out, first, first + count, team)
        yield out.view(torch.int16).numpy().tobytes()
