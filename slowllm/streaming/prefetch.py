"""One visitor of stops, and the threads that fetch them ahead of it: their lock, their order and their errors.

Knows nothing of what is fetched, or from where: a subclass does.
"""

from __future__ import annotations

import os
import threading
import time
from abc import abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

from slowllm.errors import RideError
from slowllm.streaming.stops import Stops

Fetched = TypeVar("Fetched")
Work = TypeVar("Work")


class PrefetchedStops(Stops, Generic[Fetched, Work]):
    """Stops that threads fetch ahead of one visitor.

    A stop that fails ahead of need is tried once more for the visitor who comes for it. An error that ends a thread
    reaches every visitor.

    Args:
        num_stops: that can be visited.
        thread_names: one for each thread.
    """

    def __init__(self, num_stops: int, thread_names: Sequence[str]) -> None:
        self.num_stops = num_stops
        self._wanted: list[int] = []
        self._errors: dict[int, BaseException] = {}
        self._failure: BaseException | None = None
        self._is_closing = False
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._run, name=name, daemon=True) for name in thread_names]

    @abstractmethod
    def _find(self, stop: int) -> Fetched | None:
        """Return a stop that has been fetched; called with the lock held."""

    @abstractmethod
    def _next_work(self) -> Work | None:
        """Return what a thread is to do next for the wanted stops; called with the lock held."""

    @abstractmethod
    def _work(self) -> None:
        """Do what `_wait_for_work` returns until that is None; called in each thread."""

    def _start_threads(self) -> None:
        for thread in self._threads:
            thread.start()

    def _want(self, stops: Sequence[int]) -> None:
        """Have stops fetched, in this order; with the lock held."""
        self._wanted = list(dict.fromkeys(stops))
        self._changed.notify_all()

    def _wait_for(self, stop: int, upcoming: Sequence[int]) -> Fetched:
        """Wait until a stop has been fetched, while those expected next are fetched behind it; with the lock held.

        Raises:
            RideError: the stops were closed.
            BaseException: what kept the stop from being fetched.
        """
        self._want((stop, *upcoming))
        # What failed ahead of need may succeed by now.
        self._errors = {s: error for s, error in self._errors.items() if s in self._wanted and s != stop}
        while True:
            if self._is_closing:
                raise RideError("the model was closed")
            if self._failure is not None:
                raise self._failure
            if (fetched := self._find(stop)) is not None:
                return fetched
            if (error := self._errors.pop(stop, None)) is not None:
                self._want(())  # else it would be tried again at once, and fail again before anybody came
                raise error
            self._changed.wait()

    def _wait_for_work(self) -> Work | None:
        """Wait for something to do; return None once the stops are being closed."""
        with self._changed:
            while not self._is_closing:
                if (work := self._next_work()) is not None:
                    return work
                self._changed.wait()
        return None

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as caught:  # handed to every visitor
            with self._changed:
                self._failure = caught
                self._changed.notify_all()

    def _is_forked(self) -> bool:
        """Whether this is a forked child: it has no threads to end, and its lock may be held for ever."""
        return os.getpid() != self._process

    def _end_threads(self, patience_seconds: float | None = None) -> int:
        """End the threads; return how many have not ended after the patience, without which all do."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        # A forgotten object may be collected, and closed, on one of its own threads.
        others = [thread for thread in self._threads if thread is not threading.current_thread()]
        started = time.monotonic()
        for thread in others:
            spent_seconds = time.monotonic() - started
            thread.join(None if patience_seconds is None else max(patience_seconds - spent_seconds, 0))
        return sum(thread.is_alive() for thread in others)
