"""Compare every byte of a store, or of a checkpoint from the hub, with its hash.

A store has its hashes in the manifest. The hub's cache has them in its file names: the SHA-256 of a file stored with
LFS, the git id of any other.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from slowllm.errors import CheckpointError, StoreError
from slowllm.prepare.encode import read_pieces
from slowllm.storage.gguf_files import SUFFIX, gguf_files
from slowllm.storage.manifest import MANIFEST, is_store, open_checkpoint, read_manifest

NUM_READERS = 2


@dataclass(frozen=True)
class _HashedFile:
    """A file and its expected hash."""

    path: Path
    num_bytes: int | None
    expected: str
    is_git: bool = False


@dataclass(frozen=True)
class Verified:
    """The result of a comparison without errors.

    Attributes:
        num_files: number of files compared.
        num_bytes: their size.
    """

    num_files: int
    num_bytes: int


def verify(folder: Path, on_bytes: Callable[[int, int], None] | None = None) -> Verified:
    """Read every byte of a store, or of a snapshot in the hub's cache, and compare it with its hash.

    Args:
        folder: of the store or snapshot.
        on_bytes: called by several threads with the bytes compared and the bytes in all.
    Raises:
        StoreError: a file of a store is damaged.
        CheckpointError: a file of a checkpoint is damaged, or no hashes are known.
    """
    files = list(_of_store(folder) if is_store(folder) else _of_cache(folder))
    total = sum(file.path.stat().st_size for file in files)
    done = [0] * len(files)

    def check(number: int) -> None:
        def add(count: int) -> None:
            done[number] += count
            if on_bytes is not None:
                on_bytes(sum(done), total)

        _check(files[number], add, StoreError if is_store(folder) else CheckpointError)

    with ThreadPoolExecutor(NUM_READERS, thread_name_prefix="slowllm-verify") as pool:
        for future in [pool.submit(check, number) for number in range(len(files))]:
            future.result()
    open_checkpoint(folder).close()  # checks headers, names and the index
    return Verified(len(files), total)


def _of_store(folder: Path) -> Iterator[_HashedFile]:
    manifest = read_manifest(folder)
    hashes: dict[str, tuple[int | None, str]] = {
        n: (f.num_bytes, f.sha256) for n, f in manifest.files.items()
    }
    hashes |= {name: (None, digest) for name, digest in manifest.small_files.items()}
    for name, (num_bytes, digest) in hashes.items():
        if ".." in name or name.startswith("/") or not os.path.isfile(folder / name):
            raise StoreError(
                f"{name}: is missing from the store {folder}; delete the store and convert the model again"
            )
        yield _HashedFile(folder / name, num_bytes, digest)


def _of_cache(folder: Path) -> Iterator[_HashedFile]:
    if files := gguf_files(folder):
        yield from _named_by_hash(files)
        return
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: has no config.json, so it is not a Hugging Face model folder")
    yield from _named_by_hash(sorted(folder.iterdir()))


def _named_by_hash(paths: Iterable[Path]) -> Iterator[_HashedFile]:
    for path in paths:
        etag = path.resolve().name
        if path.is_file() and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", etag):
            yield _HashedFile(path, None, etag, is_git=len(etag) == 40)
        elif path.suffix in (".safetensors", SUFFIX):
            raise CheckpointError(
                f"{path}: nothing says which hash it should have; the hub's cache does (`slowllm download`), and so "
                f"does the {MANIFEST} of a store (`slowllm convert`)"
            )


def _check(file: _HashedFile, add: Callable[[int], None], kind: type[CheckpointError]) -> None:
    size = file.path.stat().st_size
    if file.num_bytes not in (None, size):
        raise kind(f"{file.path.name}: has {size:,} bytes, but {file.num_bytes:,} were written")
    digest = hashlib.sha1(f"blob {size}\0".encode()) if file.is_git else hashlib.sha256()
    with open(file.path, "rb") as content:
        if hasattr(os, "posix_fadvise"):  # read the disk, not the page cache
            os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for data in read_pieces(content.fileno(), 0, size):
            digest.update(data)
            add(len(data))
    if digest.hexdigest() != file.expected:
        raise kind(
            f"{file.path.name}: its {size:,} bytes have the hash {digest.hexdigest()[:16]}... where "
            f"{file.expected[:16]}... was expected; the file is damaged: fetch it again, or delete the store and convert the model again"
        )
