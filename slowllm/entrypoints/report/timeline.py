"""Where the time of a run went: the last stops in detail, and sums of all for each stop and each sweep.

Hears of stops on the carousel's thread and on those that read, in bounded memory. Knows no plots.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slowllm.entrypoints.report.series import Series

if TYPE_CHECKING:
    from slowllm.streaming.stops import Passage, StopRead

# The stops that are drawn one by one. A 70-block model has about 75, so these are a few sweeps.
NUM_DETAILED = 240


@dataclass
class StopSums:
    """The sums of one stop over all sweeps."""

    num_passages: int = 0
    wait_seconds: float = 0.0
    compute_seconds: float = 0.0
    num_reads: int = 0
    read_seconds: float = 0.0
    read_bytes: int = 0


class Timeline:
    """Collects what `StreamedLM.watching` and `StreamedLM.watching_reads` tell.

    Args:
        num_stops: of a sweep.
        num_detailed: the last stops that are kept one by one.
    Attributes:
        stops: the sums of each.
        passages: the last ones, in order.
        reads: the last ones, in the order in which they ended.
        num_passages: of all.
        num_sweeps: begun.
        sweep_seconds: of each sweep, by its number.
        sweep_tokens: new tokens of each sweep, by its number.
    """

    def __init__(self, num_stops: int, num_detailed: int = NUM_DETAILED) -> None:
        self.stops = [StopSums() for _ in range(num_stops)]
        self.passages: deque[Passage] = deque(maxlen=num_detailed)
        self.reads: deque[StopRead] = deque(maxlen=num_detailed)
        self.num_passages, self.num_sweeps, self.num_new_tokens = 0, 0, 0
        self.sweep_seconds, self.sweep_tokens = Series(), Series()
        self._lock = threading.Condition()
        self._last: Passage | None = None
        self._sweep_began_at, self._num_tokens = 0.0, 0

    def on_passage(self, passage: Passage) -> None:
        """Count a stop that was served."""
        with self._lock:
            # Riders that compute by themselves tell of stops at the same time, and not always in their order.
            is_late = self._last is not None and passage.began_at < self._last.began_at
            if self._last is None or (not is_late and _begins_sweep(self._last, passage)):
                self._end_sweep(passage.began_at)
                self._sweep_began_at = passage.began_at
                self.num_sweeps += 1
            sums = self.stops[passage.stop]
            sums.num_passages += 1
            sums.wait_seconds += passage.wait_seconds
            sums.compute_seconds += passage.compute_seconds
            self.num_passages += 1
            self._lock.notify_all()
            self.passages.append(passage)
            if not is_late:
                self._last = passage

    def on_read(self, read: StopRead) -> None:
        """Count a stop that was read."""
        with self._lock:
            sums = self.stops[read.stop]
            sums.num_reads += 1
            sums.read_seconds += read.ended_at - read.began_at
            sums.read_bytes += read.read_bytes
            self.reads.append(read)

    def on_tokens(self, num_tokens: int) -> None:
        """Count new tokens, which come from the sweep that is under way or was the last one."""
        with self._lock:
            self._num_tokens += num_tokens
            self.num_new_tokens += num_tokens

    def wait_for(self, num_passages: int) -> None:
        """Wait until so many stops were told of: the last one may be told after the results of its visits.

        At most a second, because a stop at which nobody passed is not told of.
        """
        with self._lock:
            self._lock.wait_for(lambda: self.num_passages >= num_passages, 1.0)

    def finish(self) -> None:
        """End the last sweep with its last stop."""
        with self._lock:
            if self._last is not None:
                last = self._last
                self._end_sweep(last.began_at + last.wait_seconds + last.compute_seconds)
                self._last = None

    def _end_sweep(self, now: float) -> None:
        if self._last is not None:
            self.sweep_seconds.add(self.num_sweeps, now - self._sweep_began_at)
            self.sweep_tokens.add(self.num_sweeps, self._num_tokens)
            self._num_tokens = 0


def _begins_sweep(before: Passage, now: Passage) -> bool:
    """Whether the carousel has turned, or come round to a stop that is not behind the last one."""
    if before.direction != now.direction:
        return True
    return now.stop <= before.stop if now.direction == "up" else now.stop >= before.stop
