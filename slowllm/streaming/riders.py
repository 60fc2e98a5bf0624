"""Who rides, and where the carousel goes: visits, riders, parties of riders, and the course over the stops.

Knows no weights and starts no thread; the carousel does.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from slowllm.streaming.rng_state import RandomState
from slowllm.streaming.stops import Direction, Weights

Work = Callable[[Weights], Any]
Job = Callable[[], Any]

# A stream runs at most this many times `max_riders` ahead of its consumer. One would leave seats empty behind a
# rider that takes long; without a limit, results would pile up behind it, or behind a consumer that pauses.
MAX_AHEAD = 4


@dataclass(frozen=True)
class Reach:
    """Where a thread will go: a hint for the reader, which would else read what nobody waits for.

    Attributes:
        first: the lowest stop that it comes to, but for a first visit to those below.
        end: the number of stops from 0 that it comes to on the way up; None for all.
        turn: the number of stops from 0 that it comes to again on the way down, where it comes down; None for all.
        again: whether it, or another after it, goes up again when it has come down.
    """

    first: int = 0
    end: int | None = None
    turn: int | None = None
    again: bool = True


reach: ContextVar[Reach] = ContextVar("reach", default=Reach())  # noqa: B039 (frozen)


@dataclass(frozen=True)
class Sized:
    """A job that says what it brings aboard.

    Attributes:
        job: called in its turn.
        num_tokens: that it holds while it is aboard.
        starts_load: whether it boards only after those before it have left, because those after it need it beside
            them.
    """

    job: Callable[[], Any]
    num_tokens: int = 0
    starts_load: bool = False

    def __call__(self) -> Any:
        """Run the job."""
        return self.job()


@dataclass(frozen=True)
class Autocast:
    """How autocast is set for one kind of device."""

    kind: str
    enabled: bool
    dtype: torch.dtype

    def again(self, cache_enabled: bool | None = None) -> torch.autocast:
        """Return a context in which it is so."""
        return torch.autocast(self.kind, self.dtype, self.enabled, cache_enabled)


def autocast_here() -> list[Autocast]:
    """Return how autocast is set for this thread, for the processor and for GPUs where they are in use."""
    kinds = ["cpu"]
    if torch.cuda.is_initialized():
        kinds.append("cuda")
    return [Autocast(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]


def as_here() -> Callable[..., Any]:
    """Return a function that runs work, in whatever thread, with what torch and Python keep for this one.

    A backward pass inside that work runs in the same thread as well. Autograd has one thread for each GPU, which all
    callers share: a block that is computed again within a backward pass would wait there for itself.
    """
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    autocasts, cache = autocast_here(), torch.is_autocast_cache_enabled()
    context = contextvars.copy_context()

    def run(work: Callable[..., Any], *args: Any) -> Any:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(inference))
            stack.enter_context(torch.set_grad_enabled(grad))
            for autocast in autocasts:
                stack.enter_context(autocast.again(cache))
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            # A copy: all riders of a party start from one context, and none may see what another sets.
            return context.copy().run(work, *args)

    return run


class Visit:
    """One thread's wait for a stop, and what came of it."""

    comes_back = comes_round = False

    def __init__(self, stop: int, direction: Direction, work: Work, rider: Rider | None) -> None:
        self.stop, self.direction, self.work, self.rider = stop, direction, work, rider
        # Riders in their order, guests after them.
        self.order = math.inf if rider is None else rider.order
        self.key = (stop, direction, -threading.get_ident() if rider is None else rider.order)
        self.run = as_here()
        self.reach = reach.get()
        self.done = threading.Event()
        self.value: Any = None
        self.error: BaseException | None = None


class Rider:
    """One job of a party, the thread it runs in, and what came of it."""

    def __init__(self, party: Party, order: int, job: Job, random_state: RandomState) -> None:
        self.party, self.index, self.order = party, party.num_boarded, order
        self.job, self.random_state = job, random_state
        self.num_tokens = job.num_tokens if isinstance(job, Sized) else 0
        self.thread: threading.Thread | None = None
        self.result: list[Any] = []
        self.error: BaseException | None = None


class Party:
    """The riders of one `ride` or `stream`; those that have ended wait for their turn to be taken."""

    def __init__(
        self, jobs: Iterator[Job], max_riders: int, is_stream: bool, max_tokens: float = math.inf
    ) -> None:
        self.jobs, self.max_riders, self.is_stream = jobs, max_riders, is_stream
        self.max_tokens = max_tokens
        self.run = as_here()
        self.random_state: RandomState
        self.seeds: torch.Generator
        # Drawn one ahead of need: whether more will come is then known.
        self.drawn: list[Job] = []
        self.exhausted = self.cancelled = False
        self.error: BaseException | None = None
        self.num_boarded = self.num_taken = 0
        self.aboard: set[Rider] = set()
        self.ended: dict[int, Rider] = {}

    def stop_boarding(self, error: BaseException | None) -> None:
        """Let nobody else board; keep the error for the caller where somebody is left behind."""
        if self.drawn or not self.exhausted:  # else none is left behind
            self.error = error
        self.exhausted = True
        self.drawn.clear()

    @property
    def has_seat(self) -> bool:
        """Whether the next job may board."""
        in_reach = not self.is_stream or self.num_boarded - self.num_taken < MAX_AHEAD * self.max_riders
        if not in_reach or not self.drawn or len(self.aboard) >= self.max_riders:
            return False
        job = self.drawn[0]
        if not self.aboard or not isinstance(job, Sized):
            return True
        held = sum(rider.num_tokens for rider in self.aboard)
        return not job.starts_load and held + job.num_tokens <= self.max_tokens


class Course:
    """Where the carousel is, which way it goes, and who has passed there.

    Nobody passes one stop again in one direction while somebody waits who has not had a turn: a thread that comes
    back to one stop for ever must not keep the carousel there.
    """

    def __init__(self) -> None:
        self.stop = -1
        self.direction: Direction = "up"
        self.passed: set[tuple[int, Direction, int]] = set()

    def due(self, visits: Sequence[Visit]) -> list[Visit]:
        """Return those who have not had their turn here."""
        return [visit for visit in visits if visit.key not in self.passed]

    def move(self, visits: Sequence[Visit]) -> None:
        """Go to the next stop that somebody waits for: onward first, then back down, or round to the start."""
        due = self.due(visits)
        stops = {visit.stop for visit in due}
        if self.stop in stops:
            return
        self.passed.clear()
        if not due:  # nobody but those who have just passed: another round of this stop
            return
        up = self.direction == "up"
        ahead = [stop for stop in stops if (stop > self.stop) == up]
        if ahead:
            self.stop = min(ahead) if up else max(ahead)
        elif up and any(visit.direction == "down" for visit in due):
            self.stop, self.direction = max(stops), "down"
        else:
            self.stop, self.direction = min(stops), "up"
