"""Notice that a sweep was slow, and say why, once for each cause."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING

from slowllm.planning.forecast import Forecast
from slowllm.planning.slowdown import SweepFacts, why_slow
from slowllm.runtime.pressure import SystemTimes, system_times

if TYPE_CHECKING:
    from slowllm.streaming.stops import Passage

# Sweeps after which those before count as what is usual, where no forecast is measured.
NUM_USUAL = 2


class SlowSweeps:
    """Watches the stops of a job.

    Args:
        num_stops: of a sweep.
        forecast: of the job.
        say: writes a sentence.
        read_bytes: returns the bytes read so far.
        look: returns the system's sums.
    """

    def __init__(
        self, num_stops: int, forecast: Forecast, say: Callable[[str], None], read_bytes: Callable[[], int],
        look: Callable[[], SystemTimes] = system_times,
    ) -> None:  # fmt: skip
        self._num_stops, self._forecast, self._say = num_stops, forecast, say
        self._read_bytes, self._look = read_bytes, look
        self._num_passages, self._wait_seconds = 0, 0.0
        self._seconds: list[float] = []
        self._said: set[str] = set()
        self._before, self._bytes_before = look(), read_bytes()

    def on_passage(self, passage: Passage) -> None:
        """Count a stop; at the end of a sweep, say why it was slow if it was."""
        self._num_passages += 1
        self._wait_seconds += passage.wait_seconds
        if self._num_passages % self._num_stops:
            return
        now, read_bytes = self._look(), self._read_bytes()
        seconds = now.at - self._before.at
        found = why_slow(self._facts(now, seconds, read_bytes - self._bytes_before))
        self._seconds.append(seconds)
        self._before, self._bytes_before, self._wait_seconds = now, read_bytes, 0.0
        if found is not None and found[0] not in self._said:
            self._said.add(found[0])
            self._say(found[1])

    def _facts(self, now: SystemTimes, seconds: float, num_bytes: int) -> SweepFacts:
        forecast, before = self._forecast, self._before
        if forecast.is_measured:
            expected = forecast.later_seconds if self._seconds else forecast.first_seconds
        else:
            expected = statistics.median(self._seconds) if len(self._seconds) >= NUM_USUAL else 0.0
        is_known = forecast.is_measured and forecast.read_seconds > 0
        stalled = _difference(now.memory_stall, before.memory_stall)
        others = _difference(now.others, before.others)
        return SweepFacts(
            seconds=seconds, expected_seconds=expected, read_bytes=num_bytes, wait_seconds=self._wait_seconds,
            disk=forecast.read_bytes / forecast.read_seconds if is_known else None, memory_stall_seconds=stalled,
            other_cores=None if others is None or not seconds else others / seconds, num_cores=os.cpu_count() or 1,
        )  # fmt: skip


def _difference(now: float | None, before: float | None) -> float | None:
    return None if now is None or before is None else now - before
