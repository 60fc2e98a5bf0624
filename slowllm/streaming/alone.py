"""The right to compute at a stop on one's own thread, while the carousel waits.

Knows neither stops nor riders; `boarding.Boarding` says who may have it.
"""

from __future__ import annotations

import threading


class Alone:
    """Which thread computes by itself, if one does.

    Args:
        changed: the carousel's lock and condition.

    Attributes:
        thread: its identifier, None where the carousel may serve.
    """

    def __init__(self, changed: threading.Condition) -> None:
        self.thread: int | None = None
        self._changed, self._is_waited_for = changed, False

    def take(self) -> None:
        """Keep the carousel from serving until `give_back`; called with the lock held."""
        self.thread = threading.get_ident()

    def give_back(self) -> bool:
        """Let the carousel go on, if this thread has computed by itself; return whether it has."""
        if self.thread != threading.get_ident():
            return False
        with self._changed:
            self.thread = None
            # Not always: that would wake the carousel's thread at every stop, only to find that nobody wants it.
            if self._is_waited_for:
                self._is_waited_for = False
                self._changed.notify_all()
        return True

    def wait_until_over(self) -> None:
        """Wait until no thread computes by itself; called without the lock, when none can begin any more."""
        with self._changed:
            while self.thread is not None:
                self.wait()

    def wait(self) -> None:
        """Wait until the thread has given back, or anything else has changed; called with the lock held."""
        self._is_waited_for = True
        self._changed.wait()
