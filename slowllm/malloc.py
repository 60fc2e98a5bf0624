"""Configure glibc's allocator.

Knows nothing of slowllm. Called by `load`, and by the command line before anything large is imported, because arenas
that exist already remain.
"""

from __future__ import annotations

import ctypes
import logging

log = logging.getLogger(__name__)


def keep_together() -> None:
    """Make glibc serve all threads and all sizes from one heap.

    By default each thread gets an arena of its own, which never returns freed memory to the system, and a large tensor
    gets a map of its own, whose pages fault in anew each time: a tenth of the time of BLOOM's blocks.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        log.info("this C library has no mallopt; forty riders may hold more memory than planned")
        return
    for option, value in ((-8, 1), (-4, 0), (-1, (1 << 31) - 1)):  # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD
        mallopt(option, value)


def give_back() -> None:
    """Return the heap's free memory to the system."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        log.info("this C library has no malloc_trim")
