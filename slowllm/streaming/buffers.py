"""Memory that is allocated once, and all there from the beginning."""

from __future__ import annotations

import contextlib
import mmap

import numpy as np

from slowllm.errors import PlanError
from slowllm.rounding import round_up

# Offset, length and address of a direct read must be multiples of the logical block size, at most a page.
PAGE = 4096
# What Python's mmap does not name: fault every page in now, with one call (Linux 5.14).
MADV_POPULATE_WRITE = 23


class Buffer:
    """Anonymous memory, aligned to a page, in huge pages where the kernel has them, and all there at once.

    Attributes:
        bytes: (N,) uint8, at least as many as were asked for.
    Raises:
        PlanError: this machine has not that much.
    """

    def __init__(self, num_bytes: int) -> None:
        size = max(round_up(num_bytes, PAGE), PAGE)
        try:
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise PlanError(f"this machine has no {num_bytes:,} bytes left ({error.strerror})") from error
        with contextlib.suppress(OSError, AttributeError):  # not every kernel has huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        # One call costs half of what the faults of the first reads would (0.1 and 0.2 core-seconds a GB).
        with contextlib.suppress(OSError):
            memory.madvise(MADV_POPULATE_WRITE)
        self.bytes = np.frombuffer(memory, dtype=np.uint8)

    def release(self) -> None:
        """Give the memory back, once nobody has a view of it."""
        self.bytes = np.empty(0, dtype=np.uint8)


def page_up(num_bytes: int) -> int:
    """Return the least whole number of pages, in bytes, that holds `num_bytes`."""
    return round_up(num_bytes, PAGE)
