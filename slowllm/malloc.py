"""Bound the memory that libraries hold beside what is asked of them: glibc's allocator, and oneDNN's kernels.

Knows nothing of slowllm. Called by `load`, and by the command line before anything large is imported, because arenas
that exist already remain.
"""

from __future__ import annotations

import ctypes
import logging
import os

log = logging.getLogger(__name__)

# A block has about ten shapes of products for each number of rows.
MOST_KERNELS = 32


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


def keep_few_kernels() -> None:
    """Let oneDNN, which multiplies in bfloat16, keep the kernels of the products used last, and not of a thousand.

    A kernel is made for each shape of a product and takes 1 to 6 MB. Micro-batches and experts have as many shapes as numbers of
    rows, so the thousand that torch and oneDNN keep by default took gigabytes. Making one anew takes 0.1 to 0.5 ms. What the
    environment says already stays; both read it before their first product.
    """
    # torch's own cache holds kernels that oneDNN's has let go of, and saves nothing beside it.
    for name, most in (("LRU_CACHE_CAPACITY", 1), ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", MOST_KERNELS)):
        os.environ.setdefault(name, str(most))


class _Mallinfo(ctypes.Structure):
    """glibc's `struct mallinfo2`, all of it in bytes or in numbers of pieces."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def free_heap_bytes() -> int:
    """Return the bytes that the heap holds and nobody uses; 0 where the C library does not say."""
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):
        return 0
    mallinfo.restype = _Mallinfo
    return int(mallinfo().fordblks)


def give_back() -> None:
    """Return the heap's free memory to the system."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        log.info("this C library has no malloc_trim")
