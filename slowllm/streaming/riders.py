"""Who visits stops, and where the carousel goes: visits, riders, parties of riders, and the course over the stops.

Plain data and decisions; knows no weights and starts no thread.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from slowllm.streaming.call_context import current_call
from slowllm.streaming.ride import Ride
from slowllm.streaming.rng_state import RandomState
from slowllm.streaming.stops import Direction, Weights
from slowllm.streaming.thread_context import with_this_context

RiderJob = Callable[[], Any]

# A stream runs at most this many times `max_riders` ahead of its consumer. One would leave seats empty behind a
# rider that takes long; without a limit, results would pile up behind it, or behind a consumer that pauses.
MAX_AHEAD = 4


@dataclass(frozen=True)
class Sized:
    """A job that says how many tokens it holds.

    Attributes:
        job: called in its turn.
        num_tokens: held from boarding to leaving.
        starts_load: whether it starts a load, riders that must share one sweep: it boards only after all riders
            before it have left.
    """

    job: Callable[[], Any]
    num_tokens: int = 0
    starts_load: bool = False

    def __call__(self) -> Any:
        """Run the job."""
        return self.job()


class ThreadState(threading.local):
    """What a carousel knows of the thread that calls it."""

    rider: Rider | None = None
    group: PartyGroup | None = None  # that the rides which this thread begins belong to
    last_stop, comes_round = -1, False
    is_kept = False  # for one job after the other
    is_computing = False  # at a stop, by itself

    def begin(self, rider: Rider, *, is_kept: bool) -> None:
        """Forget the rider that this thread ran before."""
        self.rider, self.is_kept = rider, is_kept
        self.last_stop, self.comes_round = -1, False


class Turn:
    """One thread's wait for its turn to run. A guest has no rider."""

    def __init__(self, rider: Rider | None) -> None:
        self.rider = rider
        # Riders in their order, guests after them.
        self.order = math.inf if rider is None else rider.order
        self.done = threading.Event()
        self.error: BaseException | None = None


class Visit(Turn):
    """One thread's wait for a stop, and what came of it. A guest's visit has no rider."""

    comes_back = False  # whether a backward pass will follow
    comes_round = False  # whether the thread has begun a second sweep, and so may begin another

    def __init__(
        self, stop: int, direction: Direction, work: Callable[[Weights], Any], rider: Rider | None
    ) -> None:
        super().__init__(rider)
        self.stop, self.direction, self.work = stop, direction, work
        self.reach = current_call().reach
        self.key = (stop, direction, -threading.get_ident() if rider is None else rider.order)
        self.run = with_this_context()
        self.value: Any = None


class Rider:
    """One job of a party, the thread it runs in, and what came of it.

    Attributes:
        is_away: whether it waits for something elsewhere, without the baton.
        random_state: in which the generators are when it runs; None if it has none of its own.
        outer_state: in which they were before a boarded job ran, and will be after; None for others.
    """

    def __init__(self, party: Party, order: int, job: RiderJob, random_state: RandomState | None) -> None:
        self.party, self.index, self.order = party, party.num_boarded, order
        self.job, self.random_state = job, random_state
        self.outer_state: RandomState | None = None
        self.is_away = False
        self.num_tokens = job.num_tokens if isinstance(job, Sized) else 0
        self.thread: threading.Thread | None = None
        # The job and its result, until both are handed over.
        self.result: list[tuple[RiderJob, Any]] = []
        self.error: BaseException | None = None

    def hand_over(self, ride: Ride[Any]) -> None:
        """Give the outcome of a job that was boarded alone to its ride, and keep nothing of it."""
        error, self.error = self.error, None
        ride.end(self.result.pop()[1] if error is None else None, error)


class Party:
    """The riders of one `ride` or `stream`; those that have ended are kept until the caller takes them in order.

    Attributes:
        random_state: of the caller's generator, from which riders of a `ride` or `stream` are seeded.
        seeds: from which they are.
        number: of the party, in the order of admission.
    """

    random_state: RandomState
    seeds: torch.Generator
    number: int
    # Of a job that is boarded alone: nobody takes its rider, and its caller's generator is no concern of it.
    ride: Ride[Any] | None = None
    own_state: RandomState | None = None

    def __init__(
        self, jobs: Iterator[RiderJob], max_riders: int, is_stream: bool, max_tokens: float = math.inf
    ) -> None:
        self.jobs, self.max_riders, self.is_stream = jobs, max_riders, is_stream
        self.max_tokens = max_tokens
        self.run = with_this_context()
        # At most one job, drawn ahead of need: so it is known whether more will come.
        self.drawn: list[RiderJob] = []
        self.exhausted = self.cancelled = False
        self.error: BaseException | None = None
        self.num_boarded = self.num_taken = 0
        self.active: set[Rider] = set()
        self.ended: dict[int, Rider] = {}

    @classmethod
    def of_one(cls, job: RiderJob, ride: Ride[Any], own_state: RandomState | None) -> Party:
        """Return the party of a job that is boarded alone; without a state, it draws no random numbers."""
        party = cls(iter(()), 1, is_stream=False)
        party.drawn.append(job)
        party.exhausted, party.ride, party.own_state = True, ride, own_state
        return party

    def stop_boarding(self, error: BaseException | None) -> None:
        """Let no other rider board; keep the error for the caller if jobs are left behind."""
        if self.drawn or not self.exhausted:
            self.error = error
        self.exhausted = True
        self.drawn.clear()

    @property
    def has_seat(self) -> bool:
        """Whether the next job may board."""
        in_reach = not self.is_stream or self.num_boarded - self.num_taken < MAX_AHEAD * self.max_riders
        if not in_reach or not self.drawn or len(self.active) >= self.max_riders:
            return False
        job = self.drawn[0]
        if not self.active or not isinstance(job, Sized):
            return True
        held_tokens = sum(rider.num_tokens for rider in self.active)
        return not job.starts_load and held_tokens + job.num_tokens <= self.max_tokens


class PartyGroup:
    """The rides and streams that a thread begins while somebody else may cancel them all."""

    def __init__(self) -> None:
        self.parties: list[Party] = []
        self.is_cancelled = False

    def under_way(self, parties: Collection[Party]) -> list[Party]:
        """Return those of its parties that have not ended, which are among `parties`."""
        return [party for party in self.parties if party in parties]


class Course:
    """Where the carousel is, in which direction it goes, and which visits it has served there.

    No thread passes one stop twice in one direction while another waits that has not had its turn: a thread that
    visits one stop for ever must not keep the carousel there.
    """

    def __init__(self) -> None:
        self.stop = -1
        self.direction: Direction = "up"
        self.passed: set[tuple[int, Direction, int]] = set()

    def due(self, visits: Sequence[Visit]) -> list[Visit]:
        """Return the visits that have not had their turn here."""
        return [visit for visit in visits if visit.key not in self.passed]

    def move(self, visits: Sequence[Visit]) -> None:
        """Go to the next stop that a visit waits for: onward first, then back down, or round to the start."""
        due = self.due(visits)
        stops = {visit.stop for visit in due}
        if self.stop in stops:
            return
        self.passed.clear()
        if not due:  # only threads that have just passed: another round of this stop
            return
        up = self.direction == "up"
        ahead = [stop for stop in stops if (stop > self.stop) == up]
        if ahead:
            self.stop = min(ahead) if up else max(ahead)
        elif up and any(visit.direction == "down" for visit in due):
            self.stop, self.direction = max(stops), "down"
        else:
            self.stop, self.direction = min(stops), "up"
