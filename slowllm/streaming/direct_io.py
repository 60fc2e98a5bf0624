"""Read bytes of files past the page cache, where the file system allows it.

Knows files and spans; knows nothing of buffers or order. Where direct reads (O_DIRECT) are refused, reads go through
the page cache and its pages are dropped behind them.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from pathlib import Path

import numpy as np

from slowllm.storage.shard import open_shard, refuse_short
from slowllm.storage.spans import Span
from slowllm.streaming.buffers import PAGE

log = logging.getLogger(__name__)


class Files:
    """Open files, for direct reads where they work."""

    def __init__(self) -> None:
        self._direct: dict[Path, int | None] = {}
        self._buffered: dict[Path, int] = {}
        self._refused: set[Path] = set()
        self._lock = threading.Lock()

    def read(self, span: Span, offset: int, view: np.ndarray, needed: int) -> None:
        """Read `view.nbytes` at `offset` of the span's file, or to its end; at least `needed` bytes.

        Raises:
            CheckpointError: the file ends before, or is not the one whose header was read.
            OSError: the disk failed.
        """
        num_read = 0
        while num_read < needed:
            try:
                count = self._read_once(span, offset + num_read, view[num_read:])
            except OSError as error:
                where = f"reading {span.name} at byte {offset + num_read:,}"
                raise OSError(error.errno, f"{error.strerror} ({where})", str(span.path)) from error
            if count == 0:
                refuse_short(span, os.fstat(self._buffered[span.path]).st_size)
            num_read += count

    def _read_once(self, span: Span, offset: int, view: np.ndarray) -> int:
        direct, buffered = self._open(span)
        # What a short read left over is no longer aligned; the page cache takes the rest.
        if direct is not None and offset % PAGE == 0:
            try:
                return os.preadv(direct, [view.data], offset)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                log.info("%s: direct reads are refused here; reading through the page cache", span.path.name)
                self._refused.add(span.path)
        count = os.preadv(buffered, [view.data], offset)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(buffered, offset, count, os.POSIX_FADV_DONTNEED)
        return count

    def _open(self, span: Span) -> tuple[int | None, int]:
        path = span.path
        with self._lock:
            if path not in self._buffered:
                self._buffered[path] = open_shard(span)
            if path not in self._direct:
                try:
                    self._direct[path] = open_shard(span, os.O_RDONLY | os.O_DIRECT)
                except (OSError, AttributeError):  # tmpfs and other systems
                    self._direct[path] = None
            return None if path in self._refused else self._direct[path], self._buffered[path]

    def close(self) -> None:
        """Close them all. Idempotent."""
        for number in (*self._buffered.values(), *self._direct.values()):
            if number is not None:
                os.close(number)
        self._buffered.clear()
        self._direct.clear()
