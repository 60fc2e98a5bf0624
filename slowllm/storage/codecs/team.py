"""Threads that share loops over the rows of a matrix."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


class Team:
    """A thread pool for loops over rows; each thread computes alone. Whoever makes it closes it."""

    def __init__(self, num_threads: int) -> None:
        self.num_threads = max(1, num_threads)
        self._pool = ThreadPoolExecutor(self.num_threads, thread_name_prefix="slowllm-decode")
        # A product in one of these threads must not wait for torch's own threads, which spin on the same processors.
        # set_num_threads() sets the number of the calling thread, and that of threads yet to start: so reset the latter.
        before = torch.get_num_threads()
        barrier = threading.Barrier(self.num_threads)
        for ready in [self._pool.submit(_compute_alone, barrier) for _ in range(self.num_threads)]:
            ready.result()
        torch.set_num_threads(before)

    def share(self, work: Callable[[int, int], object], first: int, last: int) -> None:
        """Divide a range among the threads, and call `work` for each part."""
        num_parts = min(self.num_threads, max(1, last - first))
        cuts = [first + (last - first) * number // num_parts for number in range(num_parts + 1)]
        for future in [self._pool.submit(work, *pair) for pair in itertools.pairwise(cuts)]:
            future.result()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True)


class OneThread(Team):
    """A team of the calling thread, for a few rows; it owns nothing."""

    def __init__(self) -> None:
        self.num_threads = 1

    def share(self, work: Callable[[int, int], object], first: int, last: int) -> None:
        """Call `work` for the range."""
        work(first, last)

    def close(self) -> None:
        """Do nothing."""


def _compute_alone(barrier: threading.Barrier) -> None:
    torch.get_num_threads()  # a thread's first product would set the number again
    torch.set_num_threads(1)
    barrier.wait()
