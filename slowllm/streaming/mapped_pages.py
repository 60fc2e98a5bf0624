"""Bring the pages of mapped stops into memory before they are computed with, in large reads instead of page by page.

A page fault reads a few pages at a time, and the processor waits for them. A thread asks the kernel for whole stops. It
advises only: where the kernel does not know the advice, the pages come when they are used, as ever.
"""

from __future__ import annotations

import ctypes
import functools
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from slowllm.rounding import round_up
from slowllm.streaming.buffers import PAGE

# Linux: read these pages from their file in the background; and map them, waiting for those that are under way (5.14).
_WILL_NEED, _POPULATE_READ = 3, 22
# Asked for at a time, so that whoever closes the pages waits no longer than for one piece.
_PIECE_BYTES = 16 << 20
# Fewer are not worth a thread.
LEAST_BYTES = 1 << 20
# Stops after the one that computes: that the disk does not wait when one of them is small.
STOPS_AHEAD = 2


class MappedPages:
    """The pages of each stop's maps, each stop fetched once by a thread of its own; close it.

    Args:
        stops: the mapped tensors of each.
    """

    def __init__(self, stops: Sequence[Iterable[Tensor]]) -> None:
        self._stops = [list(stop) for stop in stops]
        self._asked: set[int] = set()
        self._queue: queue.Queue[int | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        num_bytes = sum(tensor.nbytes for stop in self._stops for tensor in stop)
        self._is_over = num_bytes < LEAST_BYTES or not hasattr(_libc(), "madvise")

    def fetch(self, stops: Iterable[int]) -> None:
        """Ask for stops, the soonest first, and return at once; those that were asked for before are left alone."""
        for stop in stops:
            if self._is_over:
                return
            if stop in self._asked:
                continue
            self._asked.add(stop)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="slowllm-pages", daemon=True)
                self._thread.start()
            self._queue.put(stop)

    def wait(self) -> None:
        """Wait until all that was asked for has come."""
        self._queue.join()

    def close(self) -> None:
        """End the thread, which stops after the piece that it is waiting for, and let go of the maps."""
        self._is_over = True
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join()
        self._stops = []

    def _run(self) -> None:
        while (stop := self._queue.get()) is not None:
            for advice in (_WILL_NEED, _POPULATE_READ):
                for tensor in self._stops[stop]:
                    self._advise(tensor, advice)
            self._queue.task_done()

    def _advise(self, tensor: Tensor, advice: int) -> None:
        end = tensor.data_ptr() + tensor.nbytes
        for begin in range(tensor.data_ptr() // PAGE * PAGE, end, _PIECE_BYTES):
            if self._is_over:
                return
            length = min(_PIECE_BYTES, end - begin)
            # What goes wrong here shows where the bytes are used, or does no harm.
            _libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), advice)


def fetch_rows(matrix: Tensor, row_bytes: int, rows: Sequence[int]) -> None:
    """Ask for the pages of single rows of a mapped matrix, all at once, and return without waiting.

    A page fault reads 128 kB around the page, one fault after the other.

    Args:
        matrix: on a memory map, its rows one after the other.
        row_bytes: of each.
        rows: in ascending order, each once.
    """
    if hasattr(_libc(), "madvise"):
        for begin, end in _ranges_of(matrix.data_ptr(), row_bytes, rows):
            _libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _WILL_NEED)


def _ranges_of(address: int, row_bytes: int, rows: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield the ranges of addresses, from the start of a page each, in which rows lie; those in neighbouring pages as one."""
    begin = end = -1
    for row in rows:
        first = (address + row * row_bytes) // PAGE * PAGE
        if end < 0 or first > round_up(end, PAGE):
            if end >= 0:
                yield begin, end
            begin = first
        end = address + (row + 1) * row_bytes
    if end >= 0:
        yield begin, end


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
