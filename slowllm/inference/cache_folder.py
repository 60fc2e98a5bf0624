"""Keys and values of conversations in a folder on disk, where a later process finds them again.

Of conversations that begin alike, each file has what is new behind another's; a subfolder for each model. Files that were used
longest ago are deleted first. A file that is damaged or cannot be written costs a computation, never an answer. Knows tensors and
files; knows no model.
"""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path as FilePath

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from slowllm.errors import InputError
from slowllm.files import replace_file
from slowllm.inference.live_cache import LEAST_TOKENS, RowCache
from slowllm.inference.stored_layers import StoredColumns, StoredLayers, checksum_of
from slowllm.inference.token_tree import Path, Piece, TokenTree, length_of

log = logging.getLogger(__name__)

_SUFFIX = ".safetensors"
# An unfinished file that is older belongs to no process that still writes it.
_STALE_SECONDS = 60.0
# Conversations that wait to be written; more are not kept.
_MAX_PENDING = 4


@dataclass
class _File:
    path: FilePath
    num_bytes: int


@dataclass(frozen=True)
class _Header:
    """What a file says of itself: the file that it goes on from, behind how many tokens of that, and its own tokens."""

    parent: str
    start: int
    ids: tuple[int, ...]


class CacheFolder:
    """A folder of caches. Owns threads that read and write; close it.

    Args:
        folder: made where it is missing.
        fingerprint: of the model and the dtype, whose caches no other model may take.
        max_bytes: of all files of this model.
    Raises:
        InputError: the folder cannot be made or listed.
    """

    def __init__(self, folder: FilePath, fingerprint: str, max_bytes: int) -> None:
        self._folder = folder / hashlib.sha256(fingerprint.encode()).hexdigest()[:32]
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._tree: TokenTree[_File] = TokenTree()
        self._pending: queue.Queue[tuple[tuple[int, ...], RowCache] | None] = queue.Queue(_MAX_PENDING)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            found = {path: path.stat() for path in self._folder.glob(f"*{_SUFFIX}")}
            for partial in self._folder.glob(f"*{_SUFFIX}.part"):  # of a process that was killed
                if partial.stat().st_mtime < time.time() - _STALE_SECONDS:
                    partial.unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"{folder}: cannot be used as a folder of caches ({error.strerror})") from error
        self._adopt(
            {
                path: _File(path, found[path].st_size)
                for path in sorted(found, key=lambda path: found[path].st_mtime)
            }
        )
        self._make_room()
        self._pool = ThreadPoolExecutor(1, "slowllm-cache-reader")
        self._thread = threading.Thread(target=self._write_all, name="slowllm-cache-writer", daemon=True)
        self._thread.start()

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys and values are there."""
        with self._lock:
            return sum(len(piece.ids) for piece in self._tree)

    def find(self, ids: Sequence[int]) -> Path[_File]:
        """Return the files with which a conversation begins, and how many tokens of each."""
        with self._lock:
            return self._tree.find(ids)

    def load(self, path: Path[_File], num_tokens: int) -> RowCache | None:
        """Return the cache of the first tokens of a path, read as blocks need it; None where a file is gone or damaged."""
        columns, left = list[StoredColumns](), num_tokens
        piece = path[0][0]
        try:
            for piece, num_own in path:
                if left:
                    os.utime(piece.content.path)
                    file = safe_open(piece.content.path, framework="pt")
                    columns.append(StoredColumns(piece.content.path, file, min(num_own, left)))
                    left -= columns[-1].num_columns
            stored = StoredLayers(columns, self._pool)
        except (OSError, SafetensorError) as error:
            log.warning("%s: is left aside (%s)", piece.content.path, error)
            self._forget(piece)
            return None
        with self._lock:
            self._tree.touch(path)
        return RowCache(stored.cache(), torch.ones(1, num_tokens, dtype=torch.int64))

    def forget(self, path: FilePath) -> None:
        """Take out a damaged file, and those that go on from it."""
        with self._lock:
            pieces = [piece for piece in self._tree if piece.content.path == path]
        for piece in pieces:
            log.warning("%s: is left aside, because it is damaged", path)
            self._forget(piece)

    def save(self, ids: tuple[int, ...], cache: RowCache) -> None:
        """Write a cache soon, on a thread of its own; not at all where that is behind. The cache must not be changed any more."""
        try:
            self._pending.put_nowait((ids, cache))
        except queue.Full:
            log.info("a conversation of %d tokens is not written: the disk is behind", len(ids))

    def close(self) -> None:
        """Write what waits, and end the threads."""
        self._pending.put(None)
        self._thread.join()
        self._pool.shutdown(cancel_futures=True)

    def _write_all(self) -> None:
        while (given := self._pending.get()) is not None:
            try:
                self._write(*given)
            except OSError as error:
                log.warning("%s: the conversation is not kept on disk (%s)", self._folder, error.strerror)
            del given

    def _write(self, ids: tuple[int, ...], cache: RowCache) -> None:
        """Write what is not in other files; a few tokens are not worth one."""
        path = self.find(ids)
        num_known = length_of(path)
        if len(ids) - num_known < LEAST_TOKENS:
            return
        new = ids[num_known:]
        tensors = {"ids": torch.tensor(new)}
        for number, layer in enumerate(cache.columns(num_known, len(ids)).layers()):
            if isinstance(layer.keys, Tensor) and isinstance(layer.values, Tensor):
                tensors[f"{number}.keys"] = layer.keys.cpu().contiguous()
                tensors[f"{number}.values"] = layer.values.cpu().contiguous()
        parent, start = (path[-1][0].content.path.name, path[-1][1]) if path else ("", 0)
        sums = {name: checksum_of(tensor) for name, tensor in tensors.items()}
        data = save(tensors, {"parent": parent, "start": str(start), **sums})
        file = _File(
            self._folder / f"{hashlib.sha256(repr(ids).encode()).hexdigest()[:40]}{_SUFFIX}", len(data)
        )
        replace_file(file.path, data)
        with self._lock:
            # Only this thread adds files, but a damaged one may have been forgotten meanwhile.
            if [piece for piece, _ in self._tree.find(ids)] == [piece for piece, _ in path]:
                self._tree.add(path, new, file)
        self._make_room()

    def _make_room(self) -> None:
        with self._lock:
            num_bytes = sum(piece.content.num_bytes for piece in self._tree)
            while num_bytes > self._max_bytes:
                oldest = next(piece for piece in self._tree if not piece.children)
                oldest.content.path.unlink(missing_ok=True)
                self._tree.remove(oldest)
                num_bytes -= oldest.content.num_bytes

    def _forget(self, piece: Piece[_File]) -> None:
        """Take out a file and those that go on from it, and delete them: nobody would find them any more."""
        with self._lock:
            gone = self._tree.remove(piece)
        for file in gone:
            file.path.unlink(missing_ok=True)

    def _adopt(self, files: dict[FilePath, _File]) -> None:
        """Take the files of earlier processes, those used longest ago first; a file without its parent is deleted."""
        waiting = {path: header for path in files if (header := _header(path)) is not None}
        orphans = set(waiting)
        # What comes before the own tokens of a file, and these.
        adopted: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {"": ((), ())}
        while ready := [path for path, header in waiting.items() if header.parent in adopted]:
            for path in ready:
                header = waiting.pop(path)
                earlier, of_parent = adopted[header.parent]
                before = earlier + of_parent[: header.start]
                found = self._tree.find(before + header.ids)
                if length_of(found) == len(before):
                    self._tree.add(found, header.ids, files[path])
                    adopted[path.name] = before, header.ids
                    orphans.discard(path)
        pieces = {piece.content.path: piece for piece in self._tree}
        self._tree.touch([(pieces[path], 0) for path in files if path in pieces])
        for path in orphans:
            path.unlink(missing_ok=True)


def _header(path: FilePath) -> _Header | None:
    try:
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
            tokens = file.get_tensor("ids")
            ids: list[int] = tokens.tolist()
            if not ids or checksum_of(tokens) != said["ids"]:
                raise ValueError("it has no tokens, or others than were written")
            return _Header(said["parent"], int(said["start"]), tuple(ids))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        log.warning("%s: is left aside (%s)", path, error)
        return None
