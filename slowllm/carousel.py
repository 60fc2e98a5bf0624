"""The loop: stops go round, riders pass through them.

Knows stops, riders and directions; knows nothing of text, of transformers or of where weights come from. A rider
is a callable in a thread of its own. Exactly one of them runs at a time: a baton goes round. When every rider
waits at a stop, the carousel moves to the next stop that somebody waits for, and takes them through it one after
the other in rider order. The heavy computing is done here, on the carousel's one thread, so that forty riders do
not bring forty teams of OpenMP threads.

Threads that are not riders may visit stops too (a plain call of the model): they are guests. A guest is served
like a rider, but holds no baton, so nobody waits for it between its visits.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from slowllm.errors import RideError

T = TypeVar("T")
Weights = Mapping[str, Tensor]
Direction = Literal["up", "down"]


class Stops(Protocol):
    """Where the weights of a stop come from: a disk, memory, or other machines."""

    num_stops: int

    def visit(self, stop: int, upcoming: Sequence[int] = ()) -> AbstractContextManager[Weights]:
        """Hold the weights of a stop for the length of the context; `upcoming` are the stops expected next."""
        ...


@dataclass(frozen=True)
class Passage:
    """What happened at one stop.

    Attributes:
        stop: which.
        direction: in which the carousel went.
        num_passed: visits served.
        wait_seconds: until the stop's weights were there.
        compute_seconds: that the visits took.
    """

    stop: int
    direction: Direction
    num_passed: int
    wait_seconds: float
    compute_seconds: float


@dataclass
class Totals:
    """What a carousel has done since it began; complete whenever a result is handed over.

    Attributes:
        num_passages: stops at which somebody was served.
        num_passed: visits served.
        wait_seconds: spent waiting for weights.
        compute_seconds: spent computing.
    """

    num_passages: int = 0
    num_passed: int = 0
    wait_seconds: float = 0.0
    compute_seconds: float = 0.0


@dataclass
class _ThreadState:
    """What torch and Python keep per thread, so that work done elsewhere behaves as in the rider's own."""

    grad: bool
    inference: bool
    autocast: bool
    autocast_dtype: torch.dtype
    autocast_cache: bool
    context: contextvars.Context

    @classmethod
    def capture(cls) -> _ThreadState:
        return cls(
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
            contextvars.copy_context(),
        )

    def run(self, work: Callable[[], T]) -> T:
        with (
            torch.inference_mode(self.inference),
            torch.set_grad_enabled(self.grad),
            torch.autocast(
                "cpu", enabled=self.autocast, dtype=self.autocast_dtype, cache_enabled=self.autocast_cache
            ),
        ):
            # A copy, because a context cannot be entered twice at a time.
            return self.context.copy().run(work)


class _Visit:
    """One thread's wait for a stop, and what came of it."""

    def __init__(self, stop: int, direction: Direction, work: Callable[[Weights], Any]) -> None:
        self.stop, self.direction, self.work = stop, direction, work
        self.rider: _Rider | None = None
        self.comes_back = False
        self.comes_round = False
        self.state = _ThreadState.capture()
        self.done = threading.Semaphore(0)
        self.value: Any = None
        self.error: BaseException | None = None

    @property
    def order(self) -> tuple[int, int]:
        # Riders in their order, guests after them.
        return (0, self.rider.order) if self.rider else (1, 0)


class _Rider:
    """One job of a party, and the thread it runs in."""

    def __init__(
        self, party: _Party, index: int, order: int, job: Callable[[], Any], random_state: Tensor
    ) -> None:
        self.party, self.index, self.order, self.job = party, index, order, job
        self.random_state = random_state


class _Party:
    """The riders of one `ride`, and what came of those that have ended."""

    def __init__(self, jobs: Iterator[Callable[[], Any]], max_riders: int) -> None:
        self.jobs, self.max_riders = jobs, max_riders
        self.state = _ThreadState.capture()
        # The first rider goes on with the caller's generator; the others' seeds come from a copy of it.
        self.random_state = torch.get_rng_state()
        self.seeds = torch.Generator()
        self.seeds.set_state(self.random_state)
        self.num_boarded = 0
        self.next_job: Callable[[], Any] | None = None
        self.exhausted = False
        self.cancelled = False
        self.aboard: set[_Rider] = set()
        self.outcomes: dict[int, tuple[Any, BaseException | None]] = {}
        self.jobs_error: BaseException | None = None

    def draw(self) -> None:
        """Take the next job from the caller's iterable, one ahead of need: whether more will come is then known."""
        try:
            self.next_job = None if self.exhausted else self.state.context.run(next, self.jobs, None)
        except BaseException as error:  # the caller's iterable failed; the caller hears of it
            self.next_job, self.jobs_error = None, error
        self.exhausted = self.next_job is None

    @property
    def has_seat(self) -> bool:
        return not self.exhausted and len(self.aboard) < self.max_riders


class Carousel:
    """Serve one stop at a time to every rider that waits for it. Owns the riders' threads and its own.

    Args:
        stops: where weights come from.
        on_passage: called after each stop, on the carousel's thread; must not raise and not visit.
        on_thread_start: called once at the start of every rider's thread.
    """

    def __init__(
        self,
        stops: Stops,
        on_passage: Callable[[Passage], None] | None = None,
        on_thread_start: Callable[[], None] | None = None,
    ) -> None:
        self.totals = Totals()
        self._stops = stops
        self._on_passage = on_passage
        self._on_thread_start = on_thread_start
        self._changed = threading.Condition()
        self._waiting: list[_Visit] = []
        self._parties: list[_Party] = []
        self._baton: _Rider | None = None
        self._random_owner: _Rider | None = None
        self._last_order = 0
        self._here: int | None = None
        self._direction: Direction = "up"
        self._closing = False
        self._local = threading.local()
        self._thread = threading.Thread(target=self._run, name="slowllm-carousel", daemon=True)
        self._thread.start()

    # For riders and guests.

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
            RideError: the carousel was closed, the ride was cancelled, or the call came from a stop's own work.
            BaseException: whatever `work` raised.
        """
        if threading.current_thread() is self._thread:
            raise RideError("a streamed model cannot be called from inside one of its own blocks")
        visit = _Visit(stop, direction, work)
        rider = visit.rider = getattr(self._local, "rider", None)
        visit.comes_back = comes_back
        last = getattr(self._local, "last_stop", -1)
        self._local.comes_round = getattr(self._local, "comes_round", False) or stop < last
        self._local.last_stop, visit.comes_round = stop, self._local.comes_round
        with self._changed:
            self._refuse_if_over(rider)
            self._waiting.append(visit)
            if rider is not None:
                self._put_baton_down(rider)
            self._changed.notify_all()
        try:
            visit.done.acquire()
        except BaseException:  # an interrupt: nobody is to serve a visit that is not waited for
            with self._changed:
                if visit in self._waiting:
                    self._waiting.remove(visit)
            raise
        if visit.error is not None:
            raise visit.error
        return visit.value  # type: ignore[no-any-return]

    def _refuse_if_over(self, rider: _Rider | None) -> None:
        if self._closing:
            raise RideError("the model was closed")
        if rider is not None and rider.party.cancelled:
            raise RideError("the ride was cancelled")

    # For whoever has jobs.

    def ride(self, jobs: Iterable[Callable[[], T]], max_riders: int | None = None) -> list[T]:
        """Run each job as a rider of shared sweeps and return their results in order.

        Args:
            jobs: callables that call the model. Each runs in a thread of its own, one at a time, with a random
                generator of its own: the first has the caller's, the others are seeded from it.
            max_riders: how many are aboard at once; the others board as these leave.
        Raises:
            BaseException: what a job raised, after the others have finished, with a note that says which.
            RideError: called from inside a rider.
        """
        jobs = list(jobs)
        results: list[Any] = [None] * len(jobs)
        failures: list[tuple[int, BaseException]] = []
        for index, value, error in self._ride(iter(jobs), max_riders or max(len(jobs), 1)):
            results[index] = value
            if error is not None:
                failures.append((index, error))
        if failures:
            index, error = min(failures, key=lambda failure: failure[0])
            others = f"; {len(failures) - 1} others failed too" if len(failures) > 1 else ""
            error.add_note(f"raised by rider {index} of {len(jobs)}{others}")
            raise error
        return results

    def stream(self, jobs: Iterable[Callable[[], T]], max_riders: int) -> Iterator[T]:
        """Yield the results of any number of jobs, in order, as they come.

        Jobs are drawn from the iterable as riders leave. When one raises, no more board; those aboard finish,
        and the error is raised in its place in the order.
        """
        kept: dict[int, tuple[Any, BaseException | None]] = {}
        position = 0
        with contextlib.closing(self._ride(iter(jobs), max_riders, stop_at_error=True)) as outcomes:
            for index, value, error in outcomes:
                kept[index] = (value, error)
                while position in kept:
                    result, failure = kept.pop(position)
                    if failure is not None:
                        failure.add_note(f"raised by rider {position}")
                        raise failure
                    position += 1
                    yield result

    def _ride(
        self, jobs: Iterator[Callable[[], Any]], max_riders: int, stop_at_error: bool = False
    ) -> Generator[tuple[int, Any, BaseException | None], None, None]:
        assert max_riders > 0, "a ride needs at least one rider at a time"
        if getattr(self._local, "rider", None) is not None or threading.current_thread() is self._thread:
            raise RideError("ride() was called inside a rider; call the model directly there")
        party = _Party(jobs, max_riders)
        party.draw()
        with self._changed:
            self._refuse_if_over(None)
            self._parties.append(party)
            self._changed.notify_all()
        try:
            while True:
                with self._changed:
                    while not party.outcomes and not (party.exhausted and not party.aboard):
                        self._changed.wait()
                    ready, party.outcomes = party.outcomes, {}
                if not ready:
                    break
                for index, (value, error) in ready.items():
                    if error is not None and stop_at_error:
                        with self._changed:
                            party.exhausted = True
                    yield index, value, error
            if party.jobs_error is not None:
                raise party.jobs_error
        finally:
            with self._changed:
                party.cancelled = party.exhausted = True
                for visit in [v for v in self._waiting if v.rider is not None and v.rider.party is party]:
                    self._waiting.remove(visit)
                    visit.error = RideError("the ride was cancelled")
                    visit.done.release()
                self._changed.notify_all()
                while party.aboard:
                    self._changed.wait()
                self._parties.remove(party)
                if not self._parties:
                    # The caller's generator goes on as if the first rider had run in its place; one step further
                    # where there were others, or their seeds would come again.
                    torch.set_rng_state(party.random_state)
                    if party.num_boarded > 1:
                        torch.rand(())
                    self._random_owner = None

    def close(self) -> None:
        """End the carousel: whoever waits gets a `RideError`. Joins the thread."""
        with self._changed:
            self._end("the model was closed")
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _end(self, reason: str, cause: BaseException | None = None) -> None:
        self._closing = True
        for party in self._parties:
            party.cancelled = party.exhausted = True
        for visit in self._waiting:
            visit.error = RideError(reason)
            visit.error.__cause__ = cause
            visit.done.release()
        self._waiting.clear()
        self._changed.notify_all()

    # The carousel's own thread.

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._settle()
                    while not self._waiting and not self._closing:
                        self._changed.wait()
                        self._settle()
                    if self._closing:
                        return
                    stop, direction = self._choose()
                    upcoming = self._upcoming(stop)
                self._serve(stop, direction, upcoming)
        except BaseException as error:  # a fault of ours must not leave everybody waiting
            with self._changed:
                self._end(f"the carousel failed: {error!r}", error)

    def _serve(self, stop: int, direction: Direction, upcoming: Sequence[int]) -> None:
        started = time.perf_counter()
        compute_seconds, num_passed, wait_seconds = 0.0, 0, 0.0
        try:
            with self._stops.visit(stop, upcoming) as weights:
                wait_seconds = time.perf_counter() - started
                self.totals.num_passages += 1
                self.totals.wait_seconds += wait_seconds
                while (visit := self._next_visit(stop)) is not None:
                    compute_seconds += self._pass(visit, weights)
                    num_passed += 1
        except BaseException as error:  # the weights could not be had: every visitor of this stop hears of it
            with self._changed:
                visits = [visit for visit in self._waiting if visit.stop == stop]
                self._waiting = [visit for visit in self._waiting if visit.stop != stop]
            for visit in sorted(visits, key=lambda visit: visit.order):
                with self._changed:
                    self._settle()
                # A copy each: threads that raise one object would mix their tracebacks in it.
                self._deliver(visit, None, copy.copy(error).with_traceback(error.__traceback__))
        if self._on_passage is not None and num_passed:
            self._on_passage(Passage(stop, direction, num_passed, wait_seconds, compute_seconds))

    def _pass(self, visit: _Visit, weights: Weights) -> float:
        """Serve one visit; return the seconds that it took."""
        started = time.perf_counter()
        value, error = None, None
        try:
            value = visit.state.run(lambda: visit.work(weights))
        except BaseException as caught:  # the visitor's, whatever it is
            error = caught
        seconds = time.perf_counter() - started
        self.totals.num_passed += 1
        self.totals.compute_seconds += seconds
        self._deliver(visit, value, error)
        return seconds

    def _deliver(self, visit: _Visit, value: Any, error: BaseException | None) -> None:
        with self._changed:
            if visit.rider is not None:
                if visit.rider.party.cancelled:
                    error = RideError("the ride was cancelled")
                self._hand_baton(visit.rider)
        visit.value, visit.error = value, error
        visit.done.release()

    def _next_visit(self, stop: int) -> _Visit | None:
        """Take the next visit to this stop, once whoever runs has come back or left.

        One at a time: a rider may come back to the same stop at once (head and last block, at the turn).
        """
        with self._changed:
            self._settle()
            here = [visit for visit in self._servable() if visit.stop == stop]
            if not here or self._closing:
                return None
            visit = min(here, key=lambda visit: visit.order)
            self._waiting.remove(visit)
            return visit

    # What follows runs with the lock held.

    def _settle(self) -> None:
        """Let everybody board who can, and wait until no rider runs.

        Guests are served while a rider runs its own code: the rider may be waiting for that very guest.
        """
        while not self._closing:
            if self._baton is None:
                if not self._board():
                    return
            elif self._servable():
                return
            else:
                self._changed.wait()

    def _servable(self) -> list[_Visit]:
        return [visit for visit in self._waiting if self._baton is None or visit.rider is None]

    def _board(self) -> bool:
        """Start the next job that finds a seat; return False where there is none."""
        party = next((party for party in self._parties if party.has_seat), None)
        if party is None:
            return False
        job = party.next_job
        assert job is not None, "a party that is not exhausted has a next job"
        random_state = party.random_state
        if party.num_boarded:
            seed = int(torch.randint(1 << 62, (), dtype=torch.int64, generator=party.seeds))
            random_state = torch.Generator().manual_seed(seed).get_state()
        self._last_order += 1
        rider = _Rider(party, party.num_boarded, self._last_order, job, random_state)
        party.num_boarded += 1
        party.aboard.add(rider)
        party.draw()
        self._hand_baton(rider)
        name = f"slowllm-rider-{rider.index}"
        threading.Thread(target=self._run_rider, args=(rider,), name=name, daemon=True).start()
        return True

    def _run_rider(self, rider: _Rider) -> None:
        self._local.rider = rider
        value, error = None, None
        try:
            if self._on_thread_start is not None:
                self._on_thread_start()
            value = rider.party.state.run(rider.job)
        except BaseException as caught:  # handed to whoever called ride()
            error = caught
        with self._changed:
            rider.party.outcomes[rider.index] = (value, error)
            rider.party.aboard.discard(rider)
            self._put_baton_down(rider)
            if rider.index == 0:
                rider.party.random_state = rider.random_state
            self._changed.notify_all()

    def _hand_baton(self, rider: _Rider) -> None:
        # Sampling draws from the one global generator, so its state is the rider's own while it runs.
        if self._random_owner is not rider:
            torch.set_rng_state(rider.random_state)
            self._random_owner = rider
        self._baton = rider

    def _put_baton_down(self, rider: _Rider) -> None:
        if self._baton is rider:
            rider.random_state = torch.get_rng_state()
            self._baton = None

    def _choose(self) -> tuple[int, Direction]:
        """Return the next stop that somebody waits for: onward first, then back down, or round to the start."""
        visits = self._servable()
        stops = {visit.stop for visit in visits}
        here = -1 if self._here is None else self._here
        if here in stops:
            stop = here
        elif self._direction == "up":
            ahead = [stop for stop in stops if stop > here]
            if ahead:
                stop = min(ahead)
            elif any(visit.direction == "down" for visit in visits):
                self._direction = "down"
                stop = max(stops)
            else:
                stop = min(stops)
        else:
            ahead = [stop for stop in stops if stop < here]
            if not ahead:
                self._direction = "up"
            stop = max(ahead) if ahead else min(stops)
        self._here = stop
        return stop, self._direction

    def _upcoming(self, stop: int) -> list[int]:
        """Guess the stops after this one; the reader goes by it, and a wrong guess costs one read."""
        last = self._stops.num_stops
        if self._direction == "down":
            return [*range(stop - 1, -1, -1), *range(1, last)]
        onward = list(range(stop + 1, last))
        if any(visit.comes_back or visit.direction == "down" for visit in self._waiting):
            return onward + list(range(last - 2, -1, -1))
        # Past the last stop only where somebody is known to come round again.
        again = any(visit.comes_round for visit in self._waiting) or any(
            not p.exhausted for p in self._parties
        )
        return onward + list(range(stop)) if again else onward
