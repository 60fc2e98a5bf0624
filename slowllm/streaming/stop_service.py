"""Bring the weights of one stop, and serve every visit that waits there.

Knows visits, their work and the weights that they get; where the carousel goes next is the carousel's.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from slowllm.streaming.boarding import Boarding
from slowllm.streaming.gathering import Paused, pausable, serve_all
from slowllm.streaming.riders import Course, Visit
from slowllm.streaming.stops import HeldStops, Passage, Stops, Totals, Weights


class StopService:
    """What is done at a stop, on the carousel's thread.

    Args:
        stops: where weights come from.
        boarding: who waits.
        totals: that are counted up.
        on_passage, on_visit: see `Carousel`.
        gathers: whether visits may wait for one another in the middle of their work; see `gathering`.
    """

    def __init__(
        self,
        stops: Stops,
        boarding: Boarding,
        totals: Totals,
        on_passage: Callable[[Passage], None] | None,
        on_visit: Callable[[], None] | None,
        *,
        gathers: bool,
    ) -> None:
        self.totals, self._gathers, self._on_visit = totals, gathers, on_visit
        self._stops, self._boarding, self._on_passage = stops, boarding, on_passage
        self._held_stops = stops if isinstance(stops, HeldStops) else None

    def held(self, stop: int) -> Weights | None:
        """Return the weights of a stop that nobody has to bring, None of another one."""
        return None if self._held_stops is None else self._held_stops.held_weights(stop)

    def serve(self, course: Course, upcoming: Sequence[int]) -> None:
        """Bring the weights of a stop, and serve every visit that waits there."""
        stop = course.stop
        started = time.perf_counter()
        compute_seconds, num_passed, wait_seconds = 0.0, 0, None
        paused: list[tuple[Visit, Paused]] = []
        ready: deque[tuple[Visit, Callable[[], Any]]] = deque()
        try:
            held = self.held(stop)
            with self._stops.visit(stop, upcoming) if held is None else nullcontext(held) as weights:
                wait_seconds = time.perf_counter() - started
                self.totals.num_passages += 1
                self.totals.wait_seconds += wait_seconds
                while True:
                    if (seconds := self._pass_next(course, weights, paused)) is not None:
                        num_passed += 1
                    elif ready:
                        seconds = self._resume(*ready.popleft(), paused)
                    elif paused:  # everybody at this stop has passed, or waits for the others
                        seconds, waited = self._serve_together(paused, ready)
                        wait_seconds += waited
                        self.totals.wait_seconds += waited
                    else:
                        break
                    compute_seconds += seconds
                    self.totals.compute_seconds += seconds
                    if self._on_visit is not None:
                        self._on_visit()
        except BaseException as error:
            if wait_seconds is not None:  # a fault of ours; whoever has passed cannot raise it
                for visit, _ in (*paused, *ready):
                    visit.error = error
                    self._boarding.finish(visit)
                raise
            self._boarding.dismiss_at(stop, error)
            return
        if self._on_passage is not None and num_passed:
            passed = Passage(stop, course.direction, num_passed, wait_seconds, compute_seconds, started)
            self._on_passage(passed)

    def _pass_next(
        self, course: Course, weights: Weights, paused: list[tuple[Visit, Paused]]
    ) -> float | None:
        """Serve the next visit to this stop; return the seconds that it took, None if there is none.

        A visit that waits for others is added to those that are `paused`.
        """
        with self._boarding.changed:
            here = [v for v in course.due(self._boarding.settle(course)) if v.stop == course.stop]
            if not here:
                return None
            # One at a time: a rider may come back to the same stop at once (head and last block, at the turn).
            visit = min(here, key=lambda visit: visit.order)
            course.passed.add(visit.key)
            self._boarding.begin(visit)
        started = time.perf_counter()
        if self._gathers:
            self._go_on(visit, pausable(functools.partial(visit.run, visit.work, weights)).start, paused)
        else:
            self._go_on(visit, functools.partial(visit.run, visit.work, weights), paused)
        seconds = time.perf_counter() - started
        self.totals.num_passed += 1
        return seconds

    def _go_on(self, visit: Visit, step: Callable[[], Any], paused: list[tuple[Visit, Paused]]) -> None:
        """Do a visit's work until it ends or pauses."""
        try:
            value = step()
        except BaseException as caught:  # raised again by the visitor's call
            visit.error = caught
        else:
            if isinstance(value, Paused):
                paused.append((visit, value))
                with self._boarding.changed:
                    self._boarding.baton.put_down(visit.rider)
                return
            visit.value = value
        self._boarding.finish(visit)

    def _resume(self, visit: Visit, step: Callable[[], Any], paused: list[tuple[Visit, Paused]]) -> float:
        """Let a visit go on that was served with others, once no rider runs; return the seconds that it took."""
        started = time.perf_counter()
        with self._boarding.changed:
            # A rider that runs still may be blocked on a guest who waits elsewhere, and so on those who wait here.
            if self._boarding.baton.holder is None:
                self._boarding.baton.hand(visit.rider)
        self._go_on(visit, step, paused)
        return time.perf_counter() - started

    @staticmethod
    def _serve_together(
        paused: list[tuple[Visit, Paused]], ready: deque[tuple[Visit, Callable[[], Any]]]
    ) -> tuple[float, float]:
        """Serve all that wait for one another; return the seconds computed, and those waited for bytes.

        Those that are `paused` become `ready` to go on, in their order.
        """
        started, waiting = time.perf_counter(), sorted(paused, key=lambda item: item[0].order)
        gatherings = list(dict.fromkeys(one.gathering for _, one in waiting))
        before = sum(gathering.wait_seconds for gathering in gatherings)
        outcomes = serve_all([one for _, one in waiting])
        paused.clear()
        ready.extend(
            (visit, functools.partial(one.resume, outcome))
            for (visit, one), outcome in zip(waiting, outcomes, strict=True)
        )
        waited = sum(gathering.wait_seconds for gathering in gatherings) - before
        return max(0.0, time.perf_counter() - started - waited), waited
