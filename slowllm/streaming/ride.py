"""What whoever boards a job holds of it: wait for its result, cancel it, or be called when it has ended.

Knows neither threads nor stops. `boarding.Boarding` makes a ride, and ends it once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

from slowllm.errors import RideError

log = logging.getLogger(__name__)

T = TypeVar("T")

# Callers wait in pieces of this length: a signal that arrives just before a thread blocks on a lock is not handled
# until the wait ends.
SIGNAL_SECONDS = 1.0


class Ride(Generic[T]):
    """A job that was boarded; made by `Carousel.board`. All methods may be called by any thread.

    Args:
        refuse_to_wait: called before `result` waits; raises where waiting would never end.
    """

    def __init__(self, refuse_to_wait: Callable[[], None]) -> None:
        self._refuse_to_wait = refuse_to_wait
        self._lock, self._done = threading.Lock(), threading.Event()
        self._callbacks: list[Callable[[Ride[T]], object]] = []
        # The result, and the error in its place; empty before the end, and when it was taken.
        self._outcome: list[tuple[Any, BaseException | None]] = []
        self.on_cancel: Callable[[], None] | None = None

    def done(self) -> bool:
        """Return whether the ride has ended: its job has returned or raised, or never runs."""
        return self._done.is_set()

    def result(self, timeout: float | None = None) -> T:
        """Wait until the ride has ended, and return what its job returned.

        The result, or the error, is handed over once, so that the ride keeps no memory.

        Args:
            timeout: in seconds; None to wait for as long as it takes.
        Raises:
            BaseException: what the job raised.
            RideError: the ride was cancelled or the carousel closed; or the result was taken before; or a rider of the
                same carousel would wait while it keeps the others from running (it may wait in `Carousel.away`).
            TimeoutError: the ride has not ended in time.
        """
        if not self._done.is_set():
            self._refuse_to_wait()
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._done.wait(_piece(deadline)):
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"the ride has not ended within {timeout} s")
        with self._lock:
            if not self._outcome:
                raise RideError("the result of this ride was taken before; it is handed over once")
            value, error = self._outcome.pop()
        if error is None:
            return cast(T, value)
        try:
            raise error
        finally:
            error = None  # its traceback holds this frame

    def cancel(self) -> None:
        """Let the job go no further. Without effect on a ride that has ended or was cancelled before.

        A job that has not begun never runs. One that waits at a stop raises a `RideError` there, and one that runs, or
        is away, raises it when it comes to its next stop, or comes back. The ride has ended when its job has.
        """
        on_cancel = self.on_cancel
        if on_cancel is not None:
            on_cancel()

    def add_done_callback(self, callback: Callable[[Ride[T]], object]) -> None:
        """Call `callback(ride)` when the ride has ended; at once, if it has.

        It is called on the thread that ends the ride (the rider's own, or one that cancels or closes), when the result
        is there and the seat is free. It may board and cancel, and must not block. An error that it raises is logged.
        """
        with self._lock:
            if not self._done.is_set():
                self._callbacks.append(callback)
                return
        self._call(callback)

    def end(self, value: Any, error: BaseException | None) -> None:
        """Set the result, or the error in its place, and call back. For the boarding, once, without its lock."""
        with self._lock:
            self._outcome.append((value, error))
            del value, error  # a callback may take them, and let them go
            callbacks, self._callbacks = self._callbacks, []
            self.on_cancel = None
            self._done.set()
        for callback in callbacks:
            self._call(callback)

    def _call(self, callback: Callable[[Ride[T]], object]) -> None:
        try:
            callback(self)
        except Exception:  # there is no caller to hear of it, and other callbacks wait
            log.exception("a callback of a ride failed")


def _piece(deadline: float | None) -> float:
    return SIGNAL_SECONDS if deadline is None else max(0.0, min(SIGNAL_SECONDS, deadline - time.monotonic()))
