"""Threads that compute by themselves, because nobody else waits and the weights stay where they are."""

from __future__ import annotations

import contextlib
import contextvars
import random
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from slowllm.errors import RideError
from slowllm.streaming.carousel import Carousel
from slowllm.streaming.ride import Ride
from slowllm.streaming.stops import Passage, Weights
from tests.support.memory_stops import draw, in_thread, number, results_of, sweep, until

pytestmark = pytest.mark.usefixtures("hang_fails")


class LastingStops:
    """Stops whose weights stay; counts those that the carousel brought."""

    def __init__(self, num_stops: int) -> None:
        self.num_stops = num_stops
        self.weights = [{"number": torch.tensor(stop)} for stop in range(num_stops)]

    @contextlib.contextmanager
    def visit(self, stop: int, upcoming: Sequence[int] = ()) -> Iterator[Weights]:
        yield self.weights[stop]

    def held_weights(self, stop: int) -> Weights | None:
        return self.weights[stop]


@pytest.fixture
def carousel() -> Iterator[Carousel]:
    before = set(threading.enumerate())
    with contextlib.closing(Carousel(LastingStops(3))) as made:
        yield made
    until(lambda: set(threading.enumerate()) == before)


def threads_of(carousel: Carousel, num_sweeps: int) -> list[bool]:
    """Whether the work of each visit was done on this thread."""
    own = threading.get_ident()
    return [
        carousel.visit(stop, "up", lambda _: threading.get_ident() == own)
        for _ in range(num_sweeps)
        for stop in range(3)
    ]


def test_whoever_is_alone_computes_by_itself_from_its_second_sweep(carousel: Carousel) -> None:
    wanted = [False] * 3 + [True] * 6
    found: list[bool] = []
    in_thread(lambda: found.extend(threads_of(carousel, 3))).join()
    assert found == wanted
    assert carousel.ride([lambda: threads_of(carousel, 3)]) == [wanted]
    assert carousel.board(lambda: threads_of(carousel, 3)).result() == wanted
    # The way down is the carousel's.
    assert not carousel.visit(0, "down", lambda _: threading.current_thread() is threading.main_thread())


def test_a_thread_that_is_kept_for_other_jobs_computes_them_by_itself(carousel: Carousel) -> None:
    found = []
    for _ in range(3):
        found.append(carousel.board(lambda: (threads_of(carousel, 1), threading.get_ident())).result())
        until(lambda: carousel._boarding._threads._kept is not None)
    assert [computes for computes, _ in found] == [[False] * 3, [True] * 3, [True] * 3]
    assert len({thread for _, thread in found}) == 1


def test_of_several_riders_the_carousel_computes_all(carousel: Carousel) -> None:
    assert carousel.ride([lambda: threads_of(carousel, 4)] * 3) == [[False] * 12] * 3


def test_a_rider_of_stops_that_are_brought_never_computes_by_itself(make: Any) -> None:
    carousel, stops = make(3)
    assert carousel.ride([lambda: threads_of(carousel, 3)]) == [[False] * 9]
    assert len(stops.visited) == 9


@pytest.mark.parametrize("who", ["guest", "board", "ride", "away"])
def test_a_rider_that_decodes_for_ever_starves_nobody(carousel: Carousel, who: str) -> None:
    stopped, alone, go = threading.Event(), threading.Event(), threading.Event()

    def loop() -> None:
        while not stopped.is_set():
            if all(threads_of(carousel, 1)):
                alone.set()

    waits: Ride[Any] | None = None
    if who == "away":
        waits = carousel.board(lambda: [carousel.away(lambda: go.wait(60)), *sweep(carousel, 3)])
    rider = carousel.board(loop)
    assert alone.wait(60)
    if waits is not None:
        go.set()
        assert waits.result() == [True, 0, 1, 2]
    elif who == "guest":
        assert [sweep(carousel, 3) for _ in range(3)] == [[0, 1, 2]] * 3
    elif who == "board":
        assert carousel.board(lambda: sweep(carousel, 3)).result() == [0, 1, 2]
    else:
        assert carousel.ride([lambda: sweep(carousel, 3)] * 2) == [[0, 1, 2]] * 2
    alone.clear()
    assert alone.wait(60), "and then it is alone again"
    stopped.set()
    rider.result()


def second_sweep(carousel: Carousel, work: Callable[[Weights], Any]) -> Any:
    """Do some work as one that computes by itself."""
    sweep(carousel, 3)
    return carousel.visit(0, "up", work)


def test_what_is_refused_inside_a_work_is_refused_there_too(carousel: Carousel) -> None:
    calls: list[tuple[str, Callable[[Weights], Any]]] = [
        ("inside a block", lambda _: carousel.visit(1, "up", number)),
        (r"ride\(\) was called inside a rider", lambda _: carousel.ride([lambda: 1])),
        (r"away\(\) was called inside a block", lambda _: carousel.away(lambda: 1)),
        (r"result\(\) was called inside", lambda _: carousel.board(lambda: sweep(carousel, 3)).result()),
    ]
    for message, call in calls:
        for run in (lambda job: job(), lambda job: carousel.ride([job])):
            with pytest.raises(RideError, match=message):
                run(lambda call=call: second_sweep(carousel, call))
    assert carousel.ride([lambda: sweep(carousel, 3)]) == [[0, 1, 2]]


def test_an_error_or_an_interrupt_of_the_work_lets_the_carousel_go_on(carousel: Carousel) -> None:
    with pytest.raises(ZeroDivisionError):
        second_sweep(carousel, lambda _: 1 // 0)
    with pytest.raises(KeyboardInterrupt):
        second_sweep(carousel, lambda _: signal.raise_signal(signal.SIGINT))
    assert carousel.ride([lambda: sweep(carousel, 3)] * 2) == [[0, 1, 2]] * 2


def test_what_the_work_sets_in_the_context_stays_there(carousel: Carousel) -> None:
    variable = contextvars.ContextVar("variable", default=0)
    assert second_sweep(carousel, lambda _: (variable.get(), variable.set(2))[0]) == 0
    variable.set(1)
    assert second_sweep(carousel, lambda _: (variable.get(), variable.set(2))[0]) == 1
    assert variable.get() == 1


def test_passages_and_totals_count_every_visit() -> None:
    passages: list[Passage] = []
    carousel = Carousel(LastingStops(3), passages.append)
    for _ in range(4):
        sweep(carousel, 3)
    carousel.close()
    assert [(p.stop, p.direction, p.num_passed) for p in passages] == [(n, "up", 1) for n in (0, 1, 2)] * 4
    assert (carousel.totals.num_passages, carousel.totals.num_passed) == (12, 12)
    assert sum(p.compute_seconds for p in passages) == pytest.approx(carousel.totals.compute_seconds)


@pytest.mark.parametrize("is_rider", [False, True])
def test_closing_waits_for_a_work_but_not_for_one_that_closes(is_rider: bool) -> None:
    carousel = Carousel(LastingStops(3))
    inside, go_on, ended = threading.Event(), threading.Event(), list[str]()

    def work(_: Weights) -> None:
        inside.set()
        assert go_on.wait(60)
        ended.append("work")

    def job() -> None:
        second_sweep(carousel, work)
        sweep(carousel, 1)

    def visit() -> None:
        with pytest.raises(RideError, match="the model was closed"):
            carousel.ride([job]) if is_rider else job()

    def close() -> None:
        carousel.close()
        ended.append("close")

    visitor = in_thread(visit)
    assert inside.wait(60)
    closer = in_thread(close)
    until(lambda: carousel._boarding.over is not None)
    go_on.set()
    closer.join()
    visitor.join()
    assert ended == ["work", "close"]
    other = Carousel(LastingStops(3))
    second_sweep(other, lambda _: other.close())
    with pytest.raises(RideError, match="the model was closed"):
        sweep(other, 1)
    other.close()


def test_a_seeded_rider_that_computes_by_itself_draws_what_it_draws_alone(carousel: Carousel) -> None:
    def job() -> list[float]:
        return [carousel.visit(stop, "up", lambda _: draw()) + draw() for _ in range(3) for stop in range(3)]

    torch.manual_seed(5)
    plain = [draw() + draw() for _ in range(9)]
    assert carousel.board(job, seed=5).result() == plain
    torch.manual_seed(5)
    assert carousel.ride([job]) == [plain]


@pytest.mark.parametrize("num_schedules", [25, pytest.param(400, marks=pytest.mark.long)])
def test_works_never_overlap_whoever_comes_and_goes(carousel: Carousel, num_schedules: int) -> None:
    rng = random.Random(7)
    lock, stopped = threading.Lock(), threading.Event()

    def work(weights: Weights) -> int:
        assert lock.acquire(blocking=False), "two at a time"
        try:
            return number(weights)
        finally:
            lock.release()

    def job(num_sweeps: int) -> list[int]:
        found = []
        for _ in range(num_sweeps):
            found += [carousel.visit(stop, "up", work) for stop in range(3)]
            carousel.away(lambda: None)
        found.append(carousel.visit(1, "down", work))
        return found

    def guest() -> None:
        while not stopped.is_set():
            assert job(2) == [0, 1, 2] * 2 + [1]
            stopped.wait(0.001)

    guests = [in_thread(guest) for _ in range(2)]
    try:
        for _ in range(num_schedules):
            lengths = [rng.randrange(1, 5) for _ in range(rng.randrange(1, 4))]
            jobs = [lambda n=n: job(n) for n in lengths]
            wanted = [[0, 1, 2] * n + [1] for n in lengths]
            rides = [carousel.board(one) for one in jobs]
            found = carousel.ride(jobs) if rng.random() < 0.5 else results_of(carousel.stream(jobs, 2))
            assert found == wanted
            assert [ride.result() for ride in rides] == wanted
    finally:
        stopped.set()
        for thread in guests:
            thread.join()
