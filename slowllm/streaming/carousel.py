"""The loop: stops go round, riders pass through them.

Knows stops, riders and directions; knows nothing of text, of transformers or of where weights come from. A rider
is a callable in a thread of its own, and only one rider runs at a time: the one that holds the baton. When every
rider waits at a stop, the carousel moves to the next stop that a visit waits for, and serves the riders there one
after the other in their order. The heavy computing is done here, on the carousel's one thread, so that forty riders
do not bring forty teams of OpenMP threads. A thread computes by itself only where nobody else rides or waits and the
weights are in memory to stay, because then a change of threads at each stop would be most of what a small block costs.

Threads that are not riders may visit stops too (a plain call of the model): they are guests. A guest is served
like a rider, but holds no baton, so nobody waits for it between its visits.

Torch's global generator (with devices, also those of the devices in use) changes hands with the baton, so during a
ride it belongs to the riders. Other global state (Python's `random`, numpy's generator, torch's flags) is shared.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from slowllm.errors import RideError
from slowllm.streaming.boarding import Boarding
from slowllm.streaming.hints import expected_stops
from slowllm.streaming.ride import Ride
from slowllm.streaming.riders import Course, Party, PartyGroup, Rider, RiderJob, Visit
from slowllm.streaming.rng_state import SharedGenerators
from slowllm.streaming.stop_service import StopService
from slowllm.streaming.stops import Direction, Passage, Stops, Totals, Weights

T = TypeVar("T")
JobT = TypeVar("JobT", bound=RiderJob)


class Carousel:
    """Serve one stop at a time to every rider that waits for it. Owns its thread, and with `Boarding` the riders'.

    Args:
        stops: where weights come from.
        on_passage: called after each stop, on the thread that computed there; must not raise and not visit.
        on_visit: called in the same way after each part of a visit's work, while others may still wait at the stop.
        generators: from which riders draw random numbers.
        gathers: whether visits may wait for one another in the middle of their work; see `gathering`.
    """

    def __init__(
        self,
        stops: Stops,
        on_passage: Callable[[Passage], None] | None = None,
        generators: SharedGenerators | None = None,
        *,
        on_visit: Callable[[], None] | None = None,
        gathers: bool = False,
    ) -> None:
        self.totals = Totals()
        self._stops, self._on_passage, self._on_visit = stops, on_passage, on_visit
        self._boarding = Boarding(generators or SharedGenerators())
        self._service = StopService(stops, self._boarding, self.totals, on_passage, on_visit, gathers=gathers)
        self._course, self._detour = Course(), Course()
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._run, name="slowllm-carousel", daemon=True)
        self._thread.start()

    def visit(
        self, stop: int, direction: Direction, work: Callable[[Weights], T], *, comes_back: bool = False
    ) -> T:
        """Wait for a stop and do `work` with its weights, on the carousel's thread or, for one alone, on this one.

        The work sees this thread's grad mode, inference mode, autocast and context variables. It must not keep
        the weights: they are overwritten once every visitor has passed.

        Args:
            stop: that is visited.
            direction: `down` in a backward pass.
            work: called with the weights of the stop.
            comes_back: whether a backward pass will follow; a hint for the reader.
        Raises:
            RideError: the carousel was closed, the ride was cancelled, or the call came from its own thread, from the
                work of `away`, or from a forked process.
            BaseException: whatever `work` raised, or what kept the weights from coming.
        """
        self.refuse_if_forked()
        if self._computes():
            raise RideError("the model was called inside a block, a watcher or the iterable of jobs")
        local = self._boarding.local
        if local.rider is not None and local.rider.is_away:
            raise RideError("the model was called inside the work of away(), where a rider may not run")
        local.comes_round = local.comes_round or (direction == "up" and stop <= local.last_stop)
        local.last_stop = stop
        # Only threads that go on: each that computes has a team of OpenMP threads of its own, and whoever passes once would
        # make one for little. A backward pass within a backward pass stays on the carousel's thread.
        goes_on = local.comes_round or local.is_kept
        if goes_on and direction == "up" and (weights := self._service.held(stop)) is not None:
            try:
                if self._boarding.claim(local.rider):
                    return self._compute_alone(stop, work, weights)
            finally:
                self._boarding.release()
        visit = Visit(stop, direction, work, local.rider)
        visit.comes_back, visit.comes_round = comes_back, local.comes_round
        self._boarding.wait(visit)
        try:
            if visit.error is not None:
                raise visit.error
            return visit.value  # type: ignore[no-any-return]
        finally:
            # The error's traceback holds this frame; a circle would keep the visitor's tensors alive.
            visit.error = visit.value = None

    def away(self, work: Callable[[], T]) -> T:
        """Wait for something elsewhere (a socket, a lock, another ride) without keeping other riders from running.

        The rider that calls this puts the baton down and does `work` on its own thread, beside whatever else runs; the
        carousel does not wait for it. When the work is over the rider waits for the baton, and goes on in its turn:
        riders that return are served in their order, before the next stop is begun. The work may neither call the model
        nor draw random numbers. Called by a thread that is no rider, or is away already, this is a plain call.

        Raises:
            RideError: the carousel was closed or the ride cancelled, before the work or meanwhile; or this is the
                carousel's own thread, which may not wait.
            BaseException: whatever `work` raised, when the rider runs again.
        """
        self.refuse_if_forked()
        if self._computes():
            raise RideError("away() was called inside a block, a watcher or the iterable of jobs")
        rider = self._boarding.local.rider
        if rider is None or rider.is_away:
            return work()
        return self._boarding.away(rider, work)

    def ride(self, jobs: Iterable[Callable[[], T]], max_riders: int | None = None) -> list[T]:
        """Run each job as a rider of shared sweeps and return their results in order.

        Args:
            jobs: callables that call the model. Each runs in a thread of its own, one at a time, so none may wait
                for another, or for another ride, but in `away`. The first has the caller's random generator, the others have
                their own, seeded from it.
            max_riders: how many may ride at once; the others board as these leave. All, by default.
        Raises:
            BaseException: what a job raised, after the others have finished, with a note that says which; of
                several errors, that of the first job in order.
            RideError: called from inside a rider or from a forked process, or the carousel was closed.
        """
        jobs = list(jobs)
        seats = max(len(jobs), 1) if max_riders is None else max_riders
        return [result for _, result in self._ride(iter(jobs), seats, is_stream=False)]

    def stream(
        self, jobs: Iterable[JobT], max_riders: int, max_tokens: float = math.inf
    ) -> Iterator[tuple[JobT, Any]]:
        """Yield each of any number of jobs with its result, in order, as they come.

        Jobs are drawn as riders leave, at most four times `max_riders` ahead of the consumer of the results. The
        carousel waits for each, so the iterable must not block; it goes on with the caller's random generator,
        and every rider's is seeded from that. When a job or the iterable raises, no more board; those that ride
        finish, and the error is raised in its place in the order. Closing the stream early cancels its riders.
        Jobs that are `Sized` hold at most `max_tokens` together, except for one that rides alone.
        """
        return self._ride(iter(jobs), max_riders, is_stream=True, max_tokens=max_tokens)

    def board(self, job: Callable[[], T], seed: int | None = None) -> Ride[T]:
        """Let a job ride with the others, and return at once; no thread needs to wait for it.

        The job is a rider, as those of `ride` and `stream` are, with which it shares sweeps. It boards at the next stop,
        however many ride, with this thread's grad mode, inference mode, autocast and context variables. Any thread may
        call this, an event loop or a rider's own included.

        Args:
            job: calls the model.
            seed: of the job's random numbers, which are those that it would draw alone after `torch.manual_seed(seed)`.
                Without a seed, torch's generators do not change hands: the job must draw nothing, or it would draw
                from whatever state another rider has left.
        Raises:
            RideError: the carousel was closed, or this is a forked process.
        """
        self.refuse_if_forked()
        return self._boarding.board([job], seed, self._refuse_to_wait)[0]

    def board_together(self, jobs: Sequence[Callable[[], T]]) -> list[Ride[T]]:
        """Let jobs ride in one sweep, served at each stop in their order, and return at once; see `board`."""
        self.refuse_if_forked()
        return self._boarding.board(jobs, None, self._refuse_to_wait)

    @contextlib.contextmanager
    def cancelling(self) -> Iterator[Callable[[], None]]:
        """Yield a function that cancels every `ride` and `stream` that this thread begins in the context.

        Any thread may call it, one that computes at a stop included. A ride that has begun raises a `RideError` where it
        is waited for, and whatever this thread begins afterwards does at once, plain calls included. Riders of other
        threads go on.
        """
        group, local = PartyGroup(), self._boarding.local
        before, local.group = local.group, group
        try:
            yield functools.partial(self._boarding.cancel_group, group)
        finally:
            local.group = before

    def _refuse_to_wait(self) -> None:
        self.refuse_if_forked()
        rider = self._boarding.local.rider
        if self._computes() or (rider is not None and not rider.is_away):
            raise RideError(
                "result() was called inside a rider; wait in Carousel.away(), or let it call back"
            )

    def _ride(
        self, jobs: Iterator[RiderJob], max_riders: int, is_stream: bool, max_tokens: float = math.inf
    ) -> Generator[tuple[Any, Any], None, None]:
        assert max_riders > 0, "a ride needs at least one rider at a time"
        self.refuse_if_forked()
        if self._is_ours():
            raise RideError(
                "ride() was called inside a rider, where the model is called directly, or by a function that is told of progress, "
                "which must not use the model"
            )
        party = Party(jobs, max_riders, is_stream, max_tokens)
        failed: list[Rider] = []
        try:
            self._boarding.admit(party)
            while (rider := self._boarding.next_ended(party)) is not None:
                if rider.error is not None:
                    failed.append(rider)
                elif not failed:
                    yield rider.result.pop()
            error = failed[0].error if failed else party.error
            if failed and error is not None:
                more = f"; {len(failed) - 1} more failed" if len(failed) > 1 else ""
                error.add_note(f"raised by rider {failed[0].index} of {party.num_boarded}{more}")
            if error is not None:
                raise error
        finally:
            # A forgotten stream may be collected as garbage on a thread that must not wait for riders; a child process
            # has its parent's stream, but no riders to wait for.
            self._boarding.cancel(party, may_wait=not (self._is_ours() or self._is_forked()))
            # The traceback holds this frame; a circle would keep what its tensors hold.
            error = party.error = None
            failed.clear()

    def _is_ours(self) -> bool:
        return self._boarding.local.rider is not None or self._computes()

    def _computes(self) -> bool:
        """Whether this thread is at a stop: the carousel's own, or one that computes by itself."""
        return self._boarding.local.is_computing or threading.current_thread() is self._thread

    def num_waiting(self, stop: int) -> int:
        """Return how many visits wait at a stop."""
        with self._boarding.changed:
            return sum(visit.stop == stop for visit in self._boarding.waiting)

    def _compute_alone(self, stop: int, work: Callable[[Weights], T], weights: Weights) -> T:
        """Do a visit's work on the visitor's thread, where nobody else waits and nothing has to be brought."""
        local, started = self._boarding.local, time.perf_counter()
        local.is_computing = True
        try:
            # A copy, as on the carousel's thread: what the work sets in it stays there.
            return contextvars.copy_context().run(work, weights)
        finally:
            seconds = time.perf_counter() - started
            self.totals.num_passages += 1
            self.totals.num_passed += 1
            self.totals.compute_seconds += seconds
            try:
                if self._on_visit is not None:
                    self._on_visit()
                if self._on_passage is not None:
                    self._on_passage(Passage(stop, "up", 1, 0.0, seconds, started))
            finally:
                local.is_computing = False

    def _is_forked(self) -> bool:
        return os.getpid() != self._process

    def refuse_if_forked(self) -> None:
        """Raise a RideError in a process that was forked after the model was loaded."""
        # Before the lock is asked for: the thread that held it at the fork is not there to release it.
        if self._is_forked():
            raise RideError(
                "this process was forked after the model was loaded, and a fork has none of the model's threads; "
                "load it here"
            )

    def close(self) -> None:
        """End the carousel: every visit that waits raises a `RideError`. Joins the thread, and those of boarded jobs.

        The thread may be waiting for a stop's weights; the owner of the stops ends that wait before this call. A rider,
        or a visit's work, may close the carousel as well; it does not wait for other riders, who wait for it. Nobody
        waits for a rider that is away, which hears of the end when it comes back.
        """
        if self._is_forked():
            return
        self._boarding.end(RideError("the model was closed"))
        if not self._computes():
            self._thread.join()
            self._boarding.alone.wait_until_over()
        if not self._is_ours():
            self._boarding.join()

    # The loop, on the carousel's thread.

    def _run(self) -> None:
        boarding = self._boarding
        try:
            while True:
                with boarding.changed:
                    visits = boarding.settle()
                    if not visits:
                        return
                    # A guest that is served while a rider runs does not take the riders' carousel along.
                    course = self._course if boarding.baton.holder is None else self._detour
                    course.move(visits)
                    upcoming = expected_stops(
                        course.stop, course.direction, self._stops.num_stops, boarding.waiting,
                        has_jobs=any(party.drawn for party in boarding.parties),
                    )  # fmt: skip
                del visits  # or they would be kept until the next
                self._service.serve(course, upcoming)
        except BaseException as error:  # a fault of ours must not leave threads blocked
            reason = RideError(f"the carousel failed: {error!r}")
            reason.__cause__ = error
            boarding.end(reason)
