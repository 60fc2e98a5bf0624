"""Keep the holes in the heap from growing beyond what is planned.

glibc aligns a large tensor by cutting a few bytes off before it, and keeps them for the next small object (tcache), so the hole that
the tensor leaves is too small for the next one of its size: without this, 40 texts of 700 tokens took 1.3 GB more than they used.
(With `GLIBC_TUNABLES=glibc.malloc.tcache_count=0` in the environment no such holes come to be; a running process cannot ask for it.)
Knows a budget and the process's memory; knows nothing of models.
"""

from __future__ import annotations

import time

import psutil

from slowllm.malloc import free_heap_bytes, give_back
from slowllm.planning.budget import Budget

# Looking takes 0.05 ms; giving memory back and having it anew take about 0.2 s for each GB.
LOOK_SECONDS = 0.02
# Where little comes of it, others hold the memory, or a moment does: not tried again at once.
IN_VAIN_SECONDS = 2.0
# Fewer bytes are not worth it.
LEAST_BYTES = 64 << 20
# Below what is planned by as much, there is room for what the next stop takes in holes of its own.
MARGIN_BYTES = 256 << 20


class HeapWatch:
    """Gives free memory of the heap back to the system when the process holds more than is planned, or nearly so.

    Args:
        budget: of the process; what is used of it is what the process may hold.
    """

    def __init__(self, budget: Budget) -> None:
        self.num_given_back = 0
        self._budget, self._process, self._next_look = budget, psutil.Process(), 0.0

    def look(self) -> None:
        """Compare what the process holds with what is planned, where the last time is long enough ago."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + LOOK_SECONDS
        try:
            self._give_back_what_is_too_much(now)
        except (OSError, psutil.Error):  # as where no further file can be opened; no reason to end a job
            self._next_look = now + IN_VAIN_SECONDS

    def _give_back_what_is_too_much(self, now: float) -> None:
        held_bytes = self._held_bytes()
        if held_bytes <= self._budget.used_bytes - MARGIN_BYTES or free_heap_bytes() < LEAST_BYTES:
            return
        give_back()
        self.num_given_back += 1
        if held_bytes - self._held_bytes() < LEAST_BYTES:
            self._next_look = now + IN_VAIN_SECONDS

    def _held_bytes(self) -> int:
        """Return the process's resident bytes, without pages of files, which the system takes back by itself."""
        memory = self._process.memory_info()
        return int(memory.rss - getattr(memory, "shared", 0))
