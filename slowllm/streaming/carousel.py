"""The loop: stops go round, riders pass through them.

Knows stops, riders and directions; knows nothing of text, of transformers or of where weights come from. A rider
is a callable in a thread of its own. Exactly one of them runs at a time: whoever holds the baton. When every rider
waits at a stop, the carousel moves to the next stop that somebody waits for, and takes them through it one after
the other in rider order. The heavy computing is done here, on the carousel's one thread, so that forty riders do
not bring forty teams of OpenMP threads.

Threads that are not riders may visit stops too (a plain call of the model): they are guests. A guest is served
like a rider, but holds no baton, so nobody waits for it between its visits.

Torch's global generator (on devices, those of the devices in use too) changes hands with the baton, so while anybody
rides, it belongs to the riders. Other global state (Python's `random`, numpy's generator, torch's flags) is everybody's.
"""

from __future__ import annotations

import copy
import math
import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from slowllm.errors import RideError
from slowllm.streaming.hints import Reach
from slowllm.streaming.riders import Course, Party, Rider, RiderJob, Visit
from slowllm.streaming.rng_state import SharedGenerators, fork
from slowllm.streaming.stops import Direction, Passage, Stops, Totals, Weights

T = TypeVar("T")
JobT = TypeVar("JobT", bound=RiderJob)

# How long a rider may run its own code before a guest that waits at another stop is served meanwhile. The rider
# may be waiting for that very guest, which cannot be known; where it is not, the riders' stop is read once more.
# So the patience is about as long as reading a stop takes.
GUEST_PATIENCE_SECONDS = 0.5
# Callers' waits are cut into pieces of this length: a signal that arrives just before a lock is waited for is not
# heard until the wait ends.
SIGNAL_SECONDS = 1.0


class _Local(threading.local):
    """What the carousel knows of the thread that calls it."""

    rider: Rider | None = None
    last_stop, comes_round = -1, False


class Carousel:
    """Serve one stop at a time to every rider that waits for it. Owns the riders' threads and its own.

    Args:
        stops: where weights come from.
        on_passage: called after each stop, on the carousel's thread; must not raise and not visit.
        dice: that riders draw from.
    """

    def __init__(
        self,
        stops: Stops,
        on_passage: Callable[[Passage], None] | None = None,
        dice: SharedGenerators | None = None,
    ) -> None:
        self.totals = Totals()
        self._dice = dice or SharedGenerators()
        self._stops, self._on_passage = stops, on_passage
        self._changed = threading.Condition()
        self._waiting: list[Visit] = []
        self._dismissed: list[Visit] = []  # will not be served; each rider hears of it when it has the baton
        self._parties: list[Party] = []
        self._last_order = 0
        self._baton: Rider | None = None
        self._runs_since = 0.0
        self._course, self._detour = Course(), Course()
        self._over: RideError | None = None
        self._local = _Local()
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._run, name="slowllm-carousel", daemon=True)
        self._thread.start()

    def visit(
        self, stop: int, direction: Direction, work: Callable[[Weights], T], *, comes_back: bool = False
    ) -> T:
        """Wait for a stop and do `work` with its weights, on the carousel's thread.

        The work sees this thread's grad mode, inference mode, autocast and context variables. It must not keep
        the weights: they are overwritten once every visitor has passed.

        Args:
            stop: where.
            direction: `down` in a backward pass.
            work: called with the weights of the stop.
            comes_back: whether a backward pass will follow; a hint for the reader.
        Raises:
            RideError: the carousel was closed, the ride was cancelled, or the call came from its own thread or from
                a forked process.
            BaseException: whatever `work` raised, or what kept the weights from coming.
        """
        self._refuse_if_forked()
        if threading.current_thread() is self._thread:
            raise RideError("the model was called inside a block, on_passage or the iterable of jobs")
        local, rider = self._local, self._local.rider
        local.comes_round = local.comes_round or (direction == "up" and stop <= local.last_stop)
        local.last_stop = stop
        visit = Visit(stop, direction, work, rider)
        visit.comes_back, visit.comes_round = comes_back, local.comes_round
        try:
            with self._changed:
                self._refuse_if_over(rider)
                self._waiting.append(visit)
                self._put_baton_down(rider)
                self._changed.notify_all()
            while not visit.done.wait(SIGNAL_SECONDS):
                pass
        except BaseException:  # an interrupt: nobody is to serve a visit that is not waited for
            with self._changed:
                if visit in self._waiting:
                    self._waiting.remove(visit)
            raise
        try:
            if visit.error is not None:
                raise visit.error
            return visit.value  # type: ignore[no-any-return]
        finally:
            # The error's traceback holds this frame; a circle would keep the visitor's tensors alive.
            visit.error = visit.value = None

    def _refuse_if_over(self, rider: Rider | None) -> None:
        if self._over is not None:
            raise _twin(self._over)
        if rider is not None and rider.party.cancelled:
            raise RideError("the ride was cancelled")

    def _refuse_if_forked(self) -> None:
        # Before the lock is asked for: whoever held it at the fork is not there to give it back.
        if self._is_forked():
            raise RideError(
                "this process was forked after the model was loaded, and a fork has none of the model's threads; "
                "load it here"
            )

    def _is_forked(self) -> bool:
        return os.getpid() != self._process

    def ride(self, jobs: Iterable[Callable[[], T]], max_riders: int | None = None) -> list[T]:
        """Run each job as a rider of shared sweeps and return their results in order.

        Args:
            jobs: callables that call the model. Each runs in a thread of its own, one at a time, so none may wait
                for another, or for another ride. The first has the caller's random generator, the others have
                their own, seeded from it.
            max_riders: how many are aboard at once; the others board as these leave. All, by default.
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

        Jobs are drawn as riders leave, at most four times `max_riders` ahead of whoever takes the results. The
        carousel waits for each, so the iterable must not block; it goes on with the caller's random generator,
        and every rider's is seeded from that. When a job or the iterable raises, no more board; those aboard
        finish, and the error is raised in its place in the order. Closing the stream early cancels its riders.
        Jobs that are `Sized` hold at most `max_tokens` together, but for one that is alone aboard.
        """
        return self._ride(iter(jobs), max_riders, is_stream=True, max_tokens=max_tokens)

    def _ride(
        self, jobs: Iterator[RiderJob], max_riders: int, is_stream: bool, max_tokens: float = math.inf
    ) -> Generator[tuple[Any, Any], None, None]:
        assert max_riders > 0, "a ride needs at least one rider at a time"
        self._refuse_if_forked()
        if self._is_ours():
            raise RideError("ride() was called inside a rider; call the model directly there")
        party = Party(jobs, max_riders, is_stream, max_tokens)
        failed: list[Rider] = []
        try:
            with self._changed:
                self._refuse_if_over(None)
                # During another ride the generator is that of some rider, who would draw the same numbers.
                if self._parties:
                    source, party.random_state = self._dice.forked(self._parties[0].seeds)
                else:
                    source, party.random_state = torch.default_generator, self._dice.get()
                party.seeds = fork(source)
                self._parties.append(party)
                self._changed.notify_all()
            while (rider := self._next_ended(party)) is not None:
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
            self._cancel(party)
            # The traceback holds this frame; a circle would keep what its tensors hold.
            error = party.error = None
            failed.clear()

    def _next_ended(self, party: Party) -> Rider | None:
        """Wait for the next rider in order, and for its thread; return None where the party has ended."""
        with self._changed:
            while not self._changed.wait_for(
                lambda: party.num_taken in party.ended or party not in self._parties, SIGNAL_SECONDS
            ):
                pass
            rider = party.ended.pop(party.num_taken, None)
            party.num_taken += 1
            self._changed.notify_all()
        if rider is not None and rider.thread is not None:
            rider.thread.join()
        return rider

    def _cancel(self, party: Party) -> None:
        """End a party, where it has not ended by itself, and wait for its riders."""
        reason = RideError("the ride was cancelled")
        party.cancelled = True
        party.stop_boarding(reason)
        if self._is_ours() or self._is_forked():
            # A forgotten stream, collected as garbage on a thread that must not wait for riders: the marks end it.
            # Or a stream that a child has from its parent: there are no riders to wait for.
            return
        with self._changed:
            self._dismiss([v for v in self._waiting if v.rider and v.rider.party is party], reason)
            self._end_parties()
        while self._next_ended(party) is not None:
            pass

    def _is_ours(self) -> bool:
        return self._local.rider is not None or threading.current_thread() is self._thread

    def close(self) -> None:
        """End the carousel: whoever waits gets a `RideError`. Joins the thread.

        The thread may be waiting for a stop's weights; whoever owns the stops ends that wait before this call.
        """
        if self._is_forked():
            return
        with self._changed:
            self._end(RideError("the model was closed"))
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # The threads of the carousel and its riders.

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    visits = self._settle()
                    if not visits:
                        return
                    # A guest who is served while a rider runs does not take the riders' carousel along.
                    course = self._course if self._baton is None else self._detour
                    course.move(visits)
                    upcoming = self._expected(course)
                del visits  # or they would be kept until the next
                self._serve(course, upcoming)
        except BaseException as error:  # a fault of ours must not leave everybody waiting
            reason = RideError(f"the carousel failed: {error!r}")
            reason.__cause__ = error
            with self._changed:
                self._end(reason)

    def _serve(self, course: Course, upcoming: Sequence[int]) -> None:
        stop = course.stop
        started = time.perf_counter()
        compute_seconds, num_passed, wait_seconds = 0.0, 0, None
        try:
            with self._stops.visit(stop, upcoming) as weights:
                wait_seconds = time.perf_counter() - started
                self.totals.num_passages += 1
                self.totals.wait_seconds += wait_seconds
                while (seconds := self._pass_next(course, weights)) is not None:
                    compute_seconds += seconds
                    num_passed += 1
        except BaseException as error:
            if wait_seconds is not None:  # all have passed, so there is nobody here who could hear of it
                raise
            with self._changed:
                self._dismiss([visit for visit in self._waiting if visit.stop == stop], error)
            return
        if self._on_passage is not None and num_passed:
            self._on_passage(Passage(stop, course.direction, num_passed, wait_seconds, compute_seconds))

    def _pass_next(self, course: Course, weights: Weights) -> float | None:
        """Serve the next visit to this stop; return the seconds that it took, None where nobody is left."""
        with self._changed:
            here = [visit for visit in course.due(self._settle(course)) if visit.stop == course.stop]
            if not here:
                return None
            # One at a time: a rider may come back to the same stop at once (head and last block, at the turn).
            visit = min(here, key=lambda visit: visit.order)
            self._waiting.remove(visit)
            course.passed.add(visit.key)
            self._hand_baton(visit.rider)
        started = time.perf_counter()
        try:
            visit.value = visit.run(visit.work, weights)
        except BaseException as caught:  # the visitor's, whatever it is
            visit.error = caught
        seconds = time.perf_counter() - started
        self.totals.num_passed += 1
        self.totals.compute_seconds += seconds
        if visit.rider is not None:
            self._runs_since = time.monotonic()
        visit.done.set()
        return seconds

    def _run_rider(self, rider: Rider) -> None:
        self._local.rider = rider
        try:
            rider.result.append((rider.job, rider.party.run(rider.job)))
        except BaseException as caught:  # handed to whoever called ride()
            rider.error = caught
        del rider.job
        with self._changed:
            self._leave(rider)

    # What follows runs with the lock held.

    def _settle(self, course: Course | None = None) -> list[Visit]:
        """Let everybody board who can, and wait until no rider runs. Return who may be served; none at the end.

        Guests may be served while a rider runs, because the rider may be waiting for that very guest: those at
        the stop of `course`, where the carousel is, at once; others only after a while, as the carousel may have
        to come back for riders who are still to pass here. Without a course, wait until somebody comes.
        """
        while self._over is None:
            self._end_parties()
            patience = None
            if self._baton is None:
                if self._draw() or self._board():
                    continue
                if self._waiting or course is not None:
                    return self._waiting
            elif guests := [visit for visit in self._waiting if visit.rider is None]:
                patience = self._runs_since + GUEST_PATIENCE_SECONDS - time.monotonic()
                is_here = course is not None and any(v.stop == course.stop for v in course.due(guests))
                if is_here or patience <= 0:
                    return guests
            self._changed.wait(patience)
        return []

    def _draw(self) -> bool:
        """Take the next job from a caller's iterable; return False where no party needs one."""
        party = next((party for party in self._parties if not party.drawn and not party.exhausted), None)
        if party is None:
            return False
        self._dice.set(party.random_state)
        # Without the lock: it is the caller's code, and may take its time.
        self._changed.release()
        try:
            job = party.run(next, party.jobs)
        except BaseException as error:  # the end, or what the caller is to hear
            party.stop_boarding(None if isinstance(error, StopIteration) else error)
        finally:
            self._changed.acquire()
        party.random_state = self._dice.get()
        if not party.exhausted:  # nor cancelled meanwhile
            party.drawn.append(job)
        return True

    def _board(self) -> bool:
        """Start the next job that finds a seat; return False where there is none."""
        party = next((party for party in self._parties if party.has_seat), None)
        if party is None:
            return False
        has_callers = party.num_boarded == 0 and not party.is_stream
        random_state = party.random_state if has_callers else self._dice.forked(party.seeds)[1]
        self._last_order += 1
        rider = Rider(party, self._last_order, party.drawn.pop(), random_state)
        party.num_boarded += 1
        party.aboard.add(rider)
        self._hand_baton(rider)
        name = f"slowllm-rider-{rider.index}"
        thread = threading.Thread(target=self._run_rider, args=(rider,), name=name, daemon=True)
        try:
            thread.start()
            rider.thread = thread
        except RuntimeError as error:  # no more threads are to be had
            rider.error = error
            self._leave(rider)
        return True

    def _leave(self, rider: Rider) -> None:
        party = rider.party
        party.aboard.discard(rider)
        party.ended[rider.index] = rider
        self._put_baton_down(rider)
        if rider.index == 0 and not party.is_stream:
            party.random_state = rider.random_state
        if rider.error is not None and party.is_stream:
            party.stop_boarding(None)
        self._end_parties()
        self._changed.notify_all()

    def _end_parties(self) -> None:
        """Strike off those that are complete. After the last one, the generator is the caller's again."""
        for party in [p for p in self._parties if p.exhausted and not p.drawn and not p.aboard]:
            self._parties.remove(party)
            if not self._parties:
                self._dice.set(party.random_state)
                if party.num_boarded > 1 or party.is_stream:
                    fork(torch.default_generator)  # past the number of the seeds, or they would come again
            self._changed.notify_all()

    def _hand_baton(self, rider: Rider | None) -> None:
        if rider is not None:  # a guest has no part in it
            # Sampling draws from the one global generator, so its state is the rider's own meanwhile.
            self._dice.set(rider.random_state)
            self._baton = rider
            self._runs_since = time.monotonic()

    def _put_baton_down(self, rider: Rider | None) -> None:
        if rider is not None:
            rider.random_state = self._dice.get()
            self._baton = None
            self._tell_dismissed()

    def _dismiss(self, visits: Sequence[Visit], error: BaseException) -> None:
        """End visits unserved. Riders hear of it one after the other, and before anybody else is served."""
        for visit in sorted(visits, key=lambda visit: visit.order):
            self._waiting.remove(visit)
            visit.error = _twin(error)
            if visit.rider is not None:
                self._dismissed.append(visit)
            else:  # at once: whoever runs may be waiting for it
                visit.done.set()
        self._tell_dismissed()

    def _tell_dismissed(self) -> None:
        if self._dismissed and self._baton is None:
            visit = self._dismissed.pop(0)
            self._hand_baton(visit.rider)
            visit.done.set()

    def _end(self, reason: RideError) -> None:
        self._over = self._over or reason
        for party in self._parties:
            party.cancelled = True
            party.stop_boarding(_twin(reason))
        self._dismiss(self._waiting, reason)
        self._end_parties()
        self._changed.notify_all()

    def _expected(self, course: Course) -> list[int]:
        """Guess the stops after this one; the reader goes by it, and a wrong guess costs one read."""
        stop, num_stops = course.stop, self._stops.num_stops
        reaches = [visit.reach for visit in self._waiting] or [Reach()]
        first = min(reach.first for reach in reaches)
        end = max(num_stops if reach.end is None else reach.end for reach in reaches)
        if course.direction == "down":
            # Where it goes up again, it begins with the stop at which it came down, which need not be read twice.
            again = range(first, end) if any(reach.again for reach in reaches) else ()
            return _once([*range(stop - 1, first - 1, -1), *again])
        onward = list(range(stop + 1, end))
        if any(visit.comes_back or visit.direction == "down" for visit in self._waiting):
            turn = max(end if reach.turn is None else reach.turn for reach in reaches)
            return _once([*onward, *range(turn - 1, first - 1, -1)])
        # Past the last stop only where somebody waits at an earlier one, or is likely to come there.
        again_up = any(visit.stop < stop or visit.comes_round for visit in self._waiting)
        again_up |= any(party.drawn for party in self._parties)
        return onward + list(range(first, stop)) if again_up else onward


def _once(stops: Sequence[int]) -> list[int]:
    return list(dict.fromkeys(stops))


def _twin(error: BaseException) -> BaseException:
    """Copy an error: threads that raise one object would mix their tracebacks and notes in it."""
    try:
        twin = copy.copy(error)
    except Exception:  # its class wants other arguments than it keeps; then all share the one
        return error
    twin.__cause__, twin.__context__ = error.__cause__, error.__context__
    twin.__suppress_context__ = error.__suppress_context__
    return twin.with_traceback(error.__traceback__)
