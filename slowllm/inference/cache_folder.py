"""Keys and values of conversations in a folder on disk, where a later process finds them again.

One file for each conversation, in a subfolder for each model; those used longest ago are deleted first. A file that is damaged or
cannot be written costs a computation, never an answer. Knows tensors and files; knows no model.
"""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import threading
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from slowllm.errors import InputError
from slowllm.files import replace_file
from slowllm.inference.live_cache import RowCache

log = logging.getLogger(__name__)

_SUFFIX = ".safetensors"
# Conversations that wait to be written; more are not kept.
_MAX_PENDING = 4


class CacheFolder:
    """A folder of caches. Owns a thread that writes; close it.

    Args:
        folder: made where it is missing.
        fingerprint: of the model and the dtype, whose caches no other model may take.
        max_bytes: of all files of this model.
    Raises:
        InputError: the folder cannot be made or listed.
    """

    def __init__(self, folder: Path, fingerprint: str, max_bytes: int) -> None:
        self._folder = folder / hashlib.sha256(fingerprint.encode()).hexdigest()[:32]
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._files: dict[tuple[int, ...], Path] = {}  # those used last are last
        self._pending: queue.Queue[tuple[tuple[int, ...], RowCache] | None] = queue.Queue(_MAX_PENDING)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            found = sorted(self._folder.glob(f"*{_SUFFIX}"), key=lambda path: path.stat().st_mtime)
        except OSError as error:
            raise InputError(f"{folder}: cannot be used as a folder of caches ({error.strerror})") from error
        for path in found:
            if (ids := _ids_in(path)) is not None:
                self._files[ids] = path
        self._thread = threading.Thread(target=self._write_all, name="slowllm-cache-writer", daemon=True)
        self._thread.start()

    @property
    def conversations(self) -> list[tuple[int, ...]]:
        """The token ids of those that are there."""
        with self._lock:
            return list(self._files)

    def load(self, ids: tuple[int, ...]) -> RowCache | None:
        """Return the cache of a conversation; None where its file is gone or damaged."""
        with self._lock:
            path = self._files.pop(ids, None)
            if path is None:
                return None
            self._files[ids] = path
        try:
            os.utime(path)
            with safe_open(path, framework="pt") as file:
                layers = {name: file.get_tensor(name) for name in file.keys() if name != "ids"}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            log.warning("%s: is left aside (%s)", path, error)
            with self._lock:
                self._files.pop(ids, None)
            return None
        cache = DynamicCache()
        for number in range(max((int(name.split(".")[0]) for name in layers), default=-1) + 1):
            layer = DynamicLayer()
            cache.layers.append(layer)
            keys, values = layers.get(f"{number}.keys"), layers.get(f"{number}.values")
            if keys is not None and values is not None:
                layer.lazy_initialization(keys, values)
                layer.keys, layer.values = keys, values
        return RowCache(cache, torch.ones(1, len(ids), dtype=torch.int64))

    def save(self, ids: tuple[int, ...], cache: RowCache) -> None:
        """Write a cache soon, on a thread of its own; not at all where that is behind. The cache must not be changed any more."""
        try:
            self._pending.put_nowait((ids, cache))
        except queue.Full:
            log.info("a conversation of %d tokens is not written: the disk is behind", len(ids))

    def close(self) -> None:
        """Write what waits, and end the thread."""
        self._pending.put(None)
        self._thread.join()

    def _write_all(self) -> None:
        while (given := self._pending.get()) is not None:
            ids, cache = given
            path = self._folder / f"{hashlib.sha256(repr(ids).encode()).hexdigest()[:40]}{_SUFFIX}"
            tensors = {"ids": torch.tensor(ids)}
            for number, layer in enumerate(cache.layers()):
                if isinstance(layer.keys, Tensor) and isinstance(layer.values, Tensor):
                    tensors[f"{number}.keys"] = layer.keys.cpu().contiguous()
                    tensors[f"{number}.values"] = layer.values.cpu().contiguous()
            try:
                replace_file(path, save(tensors))
                with self._lock:
                    self._files[ids] = path
                self._make_room()
            except OSError as error:
                log.warning("%s: the conversation is not kept on disk (%s)", self._folder, error.strerror)
            del given, cache, tensors

    def _make_room(self) -> None:
        with self._lock:
            sizes = {ids: path.stat().st_size for ids, path in self._files.items() if path.exists()}
            for ids in list(sizes):
                if sum(sizes.values()) <= self._max_bytes:
                    break
                self._files.pop(ids).unlink(missing_ok=True)
                del sizes[ids]


def _ids_in(path: Path) -> tuple[int, ...] | None:
    try:
        with safe_open(path, framework="pt") as file:
            ids: list[int] = file.get_tensor("ids").tolist()
    except (OSError, SafetensorError) as error:
        log.warning("%s: is left aside (%s)", path, error)
        return None
    return tuple(ids)
