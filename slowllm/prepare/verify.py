"""Compare every byte of a store, or of a checkpoint from the hub, with its hash.

A store has its hashes in the manifest. The hub's cache has them in its names: a file kept with LFS lies there under
its SHA-256, any other under its git id.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from slowllm.errors import CheckpointError, StoreError
from slowllm.prepare.encode import read_pieces
from slowllm.storage.manifest import MANIFEST, is_store, open_checkpoint, read_manifest

NUM_READERS = 2


@dataclass(frozen=True)
class _Known:
    """A file and the hash that it should have."""

    path: Path
    num_bytes: int | None
    expected: str
    is_git: bool = False


@dataclass(frozen=True)
class Verified:
    """What was compared.

    Attributes:
        num_files: whose bytes have the hashes expected.
        num_bytes: of them.
    """

    num_files: int
    num_bytes: int


def verify(folder: Path, on_bytes: Callable[[int, int], None] | None = None) -> Verified:
    """Read every byte of a store, or of a snapshot in the hub's cache, and compare it with its hash.

    Args:
        folder: of the store or snapshot.
        on_bytes: told the bytes done and the bytes in all, from several threads.
    Raises:
        StoreError: a file of a store has other bytes.
        CheckpointError: a file of a checkpoint has other bytes, or no hashes are known.
    """
    known = list(_of_store(folder) if is_store(folder) else _of_cache(folder))
    total = sum(file.path.stat().st_size for file in known)
    done = [0] * len(known)

    def check(number: int) -> None:
        def add(count: int) -> None:
            done[number] += count
            if on_bytes is not None:
                on_bytes(sum(done), total)

        _check(known[number], add, StoreError if is_store(folder) else CheckpointError)

    with ThreadPoolExecutor(NUM_READERS, thread_name_prefix="slowllm-verify") as pool:
        for result in [pool.submit(check, number) for number in range(len(known))]:
            result.result()
    with open_checkpoint(folder):  # headers, names and the index as well
        pass
    return Verified(len(known), total)


def _of_store(folder: Path) -> Iterator[_Known]:
    manifest = read_manifest(folder)
    known = {name: (file.num_bytes, file.sha256) for name, file in manifest.files.items()}
    for name, (num_bytes, digest) in {
        **known,
        **{n: (None, h) for n, h in manifest.small_files.items()},
    }.items():
        if ".." in name or name.startswith("/") or not os.path.isfile(folder / name):
            raise StoreError(
                f"{name}: is missing from the store {folder}; delete the store and convert the model again"
            )
        yield _Known(folder / name, num_bytes, digest)


def _of_cache(folder: Path) -> Iterator[_Known]:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: has no config.json, so it is not a Hugging Face model folder")
    for path in sorted(folder.iterdir()):
        etag = path.resolve().name
        if path.is_file() and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", etag):
            yield _Known(path, None, etag, is_git=len(etag) == 40)
        elif path.suffix == ".safetensors":
            raise CheckpointError(
                f"{path}: nothing says which hash it should have; the hub's cache does (`slowllm download`), and so "
                f"does the {MANIFEST} of a store (`slowllm convert`)"
            )


def _check(known: _Known, add: Callable[[int], None], kind: type[CheckpointError]) -> None:
    size = known.path.stat().st_size
    if known.num_bytes not in (None, size):
        raise kind(f"{known.path.name}: has {size:,} bytes, but {known.num_bytes:,} were written")
    found = hashlib.sha1(f"blob {size}\0".encode()) if known.is_git else hashlib.sha256()
    with open(known.path, "rb") as file:
        if hasattr(os, "posix_fadvise"):  # what the disk has, not what memory remembers
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for data in read_pieces(file.fileno(), 0, size):
            found.update(data)
            add(len(data))
    if found.hexdigest() != known.expected:
        raise kind(
            f"{known.path.name}: its {size:,} bytes have the hash {found.hexdigest()[:16]}... where "
            f"{known.expected[:16]}... was expected; the file is damaged: fetch it again, or delete the store and convert the model again"
        )
