"""Threads for jobs that are boarded one by one: the last that has become free is kept, and runs the next job.

A server gets one job for each token that a client generates. A thread of its own for each would cost a start, and a team
of OpenMP threads where it computes; a kept thread has both already. Knows riders only as what is away or not.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Protocol

Work = Callable[[], None]


class MayBeAway(Protocol):
    """A rider; see `riders.Rider`."""

    is_away: bool


class RiderThreads:
    """Threads that nobody joins but the owner, when all is over; at most one of them waits for work."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._busy: dict[threading.Thread, MayBeAway] = {}
        # Of the one that waits: itself, and where it is given work.
        self._kept: tuple[threading.Thread, queue.SimpleQueue[Work | None]] | None = None
        self._is_over = False
        # A thread ends after the one that ended before it, so that the last one stands for all.
        self._last: threading.Thread | None = None

    def run(self, rider: MayBeAway, work: Callable[[bool], None]) -> None:
        """Run the work of a rider in a thread, and return at once.

        Args:
            rider: whose work it is.
            work: must not raise; called with whether the thread has run other work before.
        Raises:
            RuntimeError: the system has no more threads.
        """
        with self._lock:
            if self._kept is not None and not self._is_over:
                (thread, given), self._kept = self._kept, None
                self._busy[thread] = rider
                given.put(lambda: work(True))
                return
            thread = threading.Thread(
                target=self._run, args=(lambda: work(False),), name="slowllm-rider", daemon=True
            )
            self._busy[thread] = rider
            try:
                thread.start()
            except RuntimeError:
                del self._busy[thread]
                raise

    def _run(self, work: Work | None) -> None:
        given: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        this = threading.current_thread()
        while work is not None:
            work()
            work = None  # it holds its rider
            with self._lock:
                self._busy.pop(this, None)
                if self._is_over or self._kept is not None:
                    before, self._last = self._last, this
                    break
                self._kept = this, given
            work = given.get()
        else:
            return
        if before is not None:
            before.join()

    def join(self) -> None:
        """Start no thread any more, and wait for those of riders that are not away, but for the one that calls this."""
        with self._lock:
            self._is_over = True
            # Of two threads that close, one waits for the other, and not each for each.
            self._busy.pop(threading.current_thread(), None)
            threads = [thread for thread, rider in self._busy.items() if not rider.is_away]
            threads += [] if self._last is None else [self._last]
            if self._kept is not None:
                thread, given = self._kept
                threads.append(thread)
                given.put(None)
            # `_kept` stays set, so that whoever comes later waits for it, too.
        for thread in threads:
            thread.join()
