"""How far a job is, and the functions of the Python API's callers that are told so."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from slowllm.errors import InputError, RideError

if TYPE_CHECKING:
    from slowllm.runtime.streamed_lm import StreamedLM
    from slowllm.streaming.stops import Passage


@dataclass(frozen=True)
class JobProgress:
    """How far a job is.

    Attributes:
        sweep: the sweep that is under way, from 1; of tuning, the step.
        num_sweeps: that the job takes, at most where continuations may end early.
        stop: the stop that was served last, from 1; 0 before the first.
        num_stops: of the carousel.
        done: stops that were served since the job began.
        total: stops that the job takes; a forecast until the job has ended, when it is `done`.
        read_bytes: from disk since the job began.
        seconds: since the job began.
    """

    sweep: int
    num_sweeps: int
    stop: int
    num_stops: int
    done: int
    total: int
    read_bytes: int
    seconds: float


# What the calls of the Python API take: whether to show a bar, or a function that is told instead.
ShowProgress = bool | Callable[[JobProgress], object]


def check_show(show: Any) -> None:
    """Refuse what is neither a yes or no nor a function.

    Raises:
        InputError: says what it is.
    """
    if not isinstance(show, bool) and not callable(show):
        raise InputError(f"progress must be True, False or a function, not {show!r}")


class Gauge:
    """Says how far a job is, from the moment that this was made.

    Args:
        lm: whose stops are counted, those of other jobs of this time included.
        num_sweeps: of the job.
        stops_a_sweep: that the job visits in a sweep; by default all.
    """

    def __init__(self, lm: StreamedLM, num_sweeps: int, stops_a_sweep: int | None = None) -> None:
        self._lm, self.num_sweeps = lm, num_sweeps
        self._stops_a_sweep = stops_a_sweep or lm.num_stops
        self._before, self._started = lm.report, time.perf_counter()

    def at(self, stop: int) -> JobProgress:
        """Return how far the job is when a stop, counted from 1, was the last one served."""
        report = self._lm.report
        done = report.num_passages - self._before.num_passages
        sweep = max(0, done - 1) // self._stops_a_sweep + 1
        return JobProgress(
            sweep=sweep, num_sweeps=max(self.num_sweeps, sweep), stop=stop, num_stops=self._lm.num_stops, done=done,
            total=max(self.num_sweeps * self._stops_a_sweep, done),
            read_bytes=report.read_bytes - self._before.read_bytes, seconds=time.perf_counter() - self._started,
        )  # fmt: skip


@contextlib.contextmanager
def telling(lm: StreamedLM, gauge: Gauge, tell: Callable[[JobProgress], object]) -> Iterator[None]:
    """Tell a function how far a job is: before the first stop, after each, and when the job has ended.

    Between the first and the last call it is called on the thread that computes, so it must not call the model. When it
    raises, the rides of this thread are cancelled, and its error is raised here.
    """
    last = gauge.at(0)
    tell(last)
    lock, errors = threading.Lock(), list[BaseException]()
    has_ended = False
    with lm.cancelling() as cancel:

        def on_passage(passage: Passage) -> None:
            nonlocal last
            with lock:
                if errors or has_ended:  # the carousel may report one more stop
                    return
                at = gauge.at(passage.stop + 1)
                if at.done <= last.done:  # the last stop of an earlier job
                    return
                last = at
                try:
                    tell(at)
                except BaseException as error:  # raised by the thread that waits for the job
                    errors.append(error)
            if errors:
                cancel()

        try:
            with lm.watching(on_passage):
                yield
        except RideError:
            if not errors:
                raise
        finally:
            with lock:
                has_ended = True
    if errors:
        raise errors.pop() from None
    ended = gauge.at(last.stop)
    tell(replace(ended, total=ended.done, num_sweeps=ended.sweep))
