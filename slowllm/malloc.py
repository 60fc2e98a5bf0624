"""How glibc serves memory to this process.

Knows nothing of slowllm. Called by `load`, and by the command line before anything large is imported: arenas that
exist already are not given up.
"""

from __future__ import annotations

import ctypes
import logging

log = logging.getLogger(__name__)


def keep_together() -> None:
    """Have glibc serve all threads and all sizes from one heap.

    By default each thread gets an arena of its own, whose freed memory never comes back, and a large tensor is a
    map of its own, whose pages are faulted in anew every time: a tenth of the time of BLOOM's blocks.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        log.info("this C library has no mallopt; forty riders may hold more memory than planned")
        return
    for option, value in ((-8, 1), (-4, 0), (-1, (1 << 31) - 1)):  # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD
        mallopt(option, value)


def give_back() -> None:
    """Return what is free in the heap to the system."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        log.info("this C library has no malloc_trim")
