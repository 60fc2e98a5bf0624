"""The carousel alone: stops are numbers in memory, riders are loops over `visit`."""

from __future__ import annotations

import contextlib
import contextvars
import faulthandler
import functools
import gc
import itertools
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slowllm.errors import RideError
from slowllm.streaming import boarding as module
from slowllm.streaming import riders as rooms
from slowllm.streaming.carousel import Carousel
from slowllm.streaming.stops import Direction, Passage, Weights
from tests.support.memory_stops import MemoryStops, number, results_of, sweep
from tests.support.paths import ROOT
from tests.support.properties import num_examples

Job = Callable[[], Any]


Make = Callable[..., tuple[Carousel, MemoryStops]]


@pytest.fixture(autouse=True)
def _a_hang_fails_loudly(request: pytest.FixtureRequest) -> Iterator[None]:
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        stderr = os.dup(2)
    faulthandler.dump_traceback_later(120, exit=True, file=stderr)
    yield
    faulthandler.cancel_dump_traceback_later()
    os.close(stderr)


@pytest.fixture
def make() -> Iterator[Make]:
    """Return a function that makes a carousel and its stops. At the end, no thread is left."""
    before = set(threading.enumerate())
    made: list[Carousel] = []

    def new(num_stops: int, on_passage: Callable[[Passage], None] | None = None) -> Any:
        stops = MemoryStops(num_stops)
        made.append(Carousel(stops, on_passage))
        return made[-1], stops

    yield new
    for carousel in made:
        carousel.close()
    assert set(threading.enumerate()) - before == set()


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread is about to do."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.001)


def in_thread(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def draw() -> float:
    return float(torch.rand(()))


# The order of stops


@pytest.mark.parametrize("num_riders", [1, 3])
def test_a_forward_ride_visits_every_stop_once_in_order(make: Make, num_riders: int) -> None:
    carousel, stops = make(5)
    results = carousel.ride([lambda: sweep(carousel, 5)] * num_riders)
    assert results == [[0, 1, 2, 3, 4]] * num_riders
    assert stops.visited == [0, 1, 2, 3, 4]
    assert len(stops.threads) == 1


@pytest.mark.parametrize("num_riders", [1, 3])
def test_a_forward_and_backward_ride_visits_the_turning_stop_once(make: Make, num_riders: int) -> None:
    passages: list[Passage] = []
    carousel, stops = make(4, passages.append)
    results = carousel.ride([lambda: sweep(carousel, 4, back=True)] * num_riders)
    assert results == [[0, 1, 2, 3, 3, 2, 1, 0]] * num_riders
    assert stops.visited == [0, 1, 2, 3, 2, 1, 0]
    carousel.close()
    assert [passage.stop for passage in passages] == stops.visited
    assert [passage.direction for passage in passages] == ["up"] * 4 + ["down"] * 3
    assert [passage.num_passed for passage in passages] == [num_riders * n for n in (1, 1, 1, 2, 1, 1, 1)]


def test_steps_of_training_follow_each_other_without_a_stop_twice(make: Make) -> None:
    carousel, stops = make(3)
    carousel.ride([lambda: [sweep(carousel, 3, back=True) for _ in range(2)]] * 2)
    assert stops.visited == [0, 1, 2, 1, 0, 1, 2, 1, 0]


def test_forty_riders_of_different_lengths_share_the_sweeps_of_the_longest(make: Make) -> None:
    carousel, stops = make(3)

    def job(length: int) -> int:
        for _ in range(length):
            assert sweep(carousel, 3) == [0, 1, 2]
        return length

    lengths = [index % 7 + 1 for index in range(40)]
    assert carousel.ride([lambda n=n: job(n) for n in lengths]) == lengths
    assert stops.visited == [0, 1, 2] * 7


def test_riders_may_leave_at_any_stop(make: Make) -> None:
    carousel, stops = make(4)
    assert carousel.ride([lambda n=n: sweep(carousel, n) for n in (2, 4, 0, 1, 3)]) == [
        list(range(n)) for n in (2, 4, 0, 1, 3)
    ]
    assert stops.visited == [0, 1, 2, 3]
    assert carousel.totals.num_passed == 10


def test_a_stop_that_nobody_waits_for_is_passed_over(make: Make) -> None:
    carousel, stops = make(9)
    carousel.ride([lambda s=s: [carousel.visit(n, "up", number) for n in s] for s in [(1, 4), (4, 7)]])
    assert stops.visited == [1, 4, 7]


def test_a_model_of_one_stop_goes_round_and_every_round_is_a_passage(make: Make) -> None:
    passed: list[int] = []
    carousel, stops = make(1)

    def job(rider: int) -> list[int]:
        return [
            carousel.visit(0, "up", lambda weights: passed.append(rider) or number(weights)) for _ in "abc"
        ]

    assert carousel.ride([lambda r=r: job(r) for r in range(3)]) == [[0, 0, 0]] * 3
    assert passed == [0, 1, 2] * 3
    assert stops.visited == [0, 0, 0]
    carousel, stops = make(1)
    carousel.ride([lambda: sweep(carousel, 1, back=True)] * 2)
    assert stops.visited == [0]


def test_riders_pass_a_stop_in_their_order_whatever_the_order_they_came_in(make: Make) -> None:
    carousel, _ = make(3)
    passed: list[tuple[int, int]] = []

    def job(rider: int) -> None:
        stops = [0, 1, 2] if rider % 2 else [1, 2]  # odd ones come to stop 1 later than even ones
        for stop in stops:
            carousel.visit(stop, "up", lambda _: passed.append((stop, rider)))

    carousel.ride([lambda r=r: job(r) for r in range(6)])
    assert passed == sorted(passed)
    assert len(passed) == 15


def test_gradients_come_back_in_rider_order(make: Make) -> None:
    carousel, _ = make(3)
    added: list[int] = []

    def job(rider: int) -> None:
        sweep(carousel, 3, back=True)
        added.append(rider)

    carousel.ride([lambda r=r: job(r) for r in range(5)])
    assert added == [0, 1, 2, 3, 4]


# One at a time


def test_exactly_one_rider_runs_at_a_time_and_its_work_is_part_of_it(make: Make) -> None:
    carousel, _ = make(3)
    lock = threading.Lock()

    def alone(*_: Any) -> None:
        assert lock.acquire(blocking=False), "two at a time"
        for _ in range(3):
            time.sleep(0)  # lets other threads in
        lock.release()

    def job(length: int) -> None:
        for stop in [*range(3)] * length:
            alone()
            carousel.visit(stop, "up", alone)
        alone()

    carousel.ride([lambda n=n: job(n % 3 + 1) for n in range(12)], max_riders=5)
    list(carousel.stream([lambda n=n: job(n % 3 + 1) for n in range(12)], 3))


def test_riders_of_a_cancelled_stream_leave_one_at_a_time(make: Make) -> None:
    carousel, _ = make(2)
    lock, left = threading.Lock(), []

    def job(rider: int) -> int:
        if rider == 0:
            return 0
        try:
            while True:
                sweep(carousel, 2)
        finally:
            assert lock.acquire(blocking=False), "two at a time"
            for _ in range(20):
                time.sleep(0)
            left.append(rider)
            lock.release()

    stream = carousel.stream([lambda r=r: job(r) for r in range(8)], 8)
    assert next(stream)[1] == 0
    until(lambda: carousel._boarding.parties[0].num_boarded == 8)
    stream.close()  # type: ignore[attr-defined]
    assert sorted(left) == [1, 2, 3, 4, 5, 6, 7]


# Boarding


def test_no_more_than_max_riders_are_aboard_and_others_board_as_these_leave(make: Make) -> None:
    carousel, stops = make(3)
    aboard: set[int] = set()
    most = 0

    def job(rider: int) -> int:
        nonlocal most
        aboard.add(rider)
        most = max(most, len(aboard))
        sweep(carousel, 3)
        aboard.discard(rider)
        return rider

    assert carousel.ride([lambda r=r: job(r) for r in range(10)], max_riders=4) == list(range(10))
    assert most == 4
    # Seats are filled at the last stop, so nobody waits for a half-empty carousel: 4 + 4 + 2 riders.
    assert stops.visited == [0, 1, 2] * 3


def test_a_rider_boards_where_the_carousel_is_when_a_seat_becomes_free(make: Make) -> None:
    carousel, stops = make(5)
    jobs = [lambda: sweep(carousel, 5), lambda: sweep(carousel, 2), lambda: carousel.visit(3, "up", number)]
    carousel.ride(jobs, max_riders=2)
    assert stops.visited == [0, 1, 2, 3, 4]


def test_two_rides_at_once_share_the_sweeps(make: Make) -> None:
    carousel, stops = make(3)
    results: dict[str, list[list[int]]] = {}

    def first() -> list[int]:
        other = in_thread(lambda: results.update(other=carousel.ride([lambda: sweep(carousel, 3)] * 2)))
        threads.append(other)
        until(lambda: len(carousel._boarding.parties) == 2)
        return sweep(carousel, 3)

    threads: list[threading.Thread] = []
    results["one"] = carousel.ride([first])
    threads[0].join()
    assert results == {"one": [[0, 1, 2]], "other": [[0, 1, 2]] * 2}
    assert stops.visited == [0, 1, 2]


def test_no_jobs_are_no_results(make: Make) -> None:
    carousel, stops = make(2)
    assert carousel.ride([]) == []
    assert list(carousel.stream([], 3)) == []
    assert stops.visited == []


def test_a_job_that_is_none_is_an_error_and_not_the_end_of_the_list(make: Make) -> None:
    carousel, _ = make(2)
    with pytest.raises(TypeError, match="not callable") as caught:
        carousel.ride([lambda: 1, None, lambda: 3])  # type: ignore[list-item]
    assert caught.value.__notes__ == ["raised by rider 1 of 3"]


def test_a_ride_without_seats_is_refused(make: Make) -> None:
    carousel, _ = make(2)
    for ride in (carousel.ride, lambda jobs, seats: next(carousel.stream(jobs, seats))):
        with pytest.raises(AssertionError, match="at least one rider"):
            ride([lambda: 1], 0)


# Riders that fail


def test_the_error_of_one_rider_is_raised_after_the_others_have_finished(make: Make) -> None:
    carousel, stops = make(4)
    finished: list[int] = []

    def job(rider: int) -> None:
        sweep(carousel, 2)
        if rider == 2:
            raise ValueError("broken")
        sweep(carousel, 4)
        finished.append(rider)

    with pytest.raises(ValueError, match="broken") as caught:
        carousel.ride([lambda r=r: job(r) for r in range(5)])
    assert caught.value.__notes__ == ["raised by rider 2 of 5"]
    assert finished == [0, 1, 3, 4]
    assert carousel.ride([lambda: sweep(carousel, 4)]) == [[0, 1, 2, 3]]
    assert stops.visited == [0, 1, 0, 1, 2, 3, 0, 1, 2, 3]


def test_of_several_errors_the_first_in_order_is_raised_and_the_others_are_counted(make: Make) -> None:
    carousel, _ = make(3)

    def job(rider: int) -> None:
        sweep(carousel, 3 - rider // 2)  # the later ones fail sooner
        if rider % 2:
            raise ValueError(f"rider {rider}")

    with pytest.raises(ValueError, match="rider 1") as caught:
        carousel.ride([lambda r=r: job(r) for r in range(6)])
    assert caught.value.__notes__ == ["raised by rider 1 of 6; 2 more failed"]


def test_an_error_in_the_work_reaches_its_rider_who_may_go_on(make: Make) -> None:
    carousel, _ = make(2)

    def job() -> list[int]:
        with pytest.raises(ZeroDivisionError):
            carousel.visit(1, "up", lambda weights: 1 // (number(weights) - 1))
        return sweep(carousel, 2)

    assert carousel.ride([job, lambda: sweep(carousel, 2)]) == [[0, 1], [0, 1]]


def test_an_exit_in_a_rider_reaches_the_caller(make: Make) -> None:
    carousel, _ = make(2)
    with pytest.raises(SystemExit):
        carousel.ride([lambda: sys.exit(3), lambda: sweep(carousel, 2)])


def test_a_rider_for_whom_there_is_no_thread_fails_alone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    carousel, _ = make(2)
    start = threading.Thread.start

    def no_more(thread: threading.Thread) -> None:
        if thread.name == "slowllm-rider-1":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", no_more)
    finished: list[bool] = []
    with pytest.raises(RuntimeError, match="can't start new thread") as caught:
        carousel.ride([lambda: finished.append(bool(sweep(carousel, 2)))] * 3)
    assert caught.value.__notes__ == ["raised by rider 1 of 3"]
    assert finished == [True, True]


# Streams


def test_a_stream_yields_in_order_whoever_ends_first(make: Make) -> None:
    carousel, stops = make(2)

    def job(index: int) -> int:
        for _ in range(5 - index % 5):
            sweep(carousel, 2)
        return index

    results = (result for _, result in carousel.stream((lambda i=i: job(i) for i in range(23)), 4))
    assert next(results) == 0
    assert list(results) == list(range(1, 23))
    assert len(stops.visited) < 2 * sum(5 - i % 5 for i in range(23)) / 2  # shared


def test_a_stream_yields_each_job_with_its_result(make: Make) -> None:
    carousel, _ = make(2)

    def job(index: int) -> int:
        for _ in range(3 - index % 3):
            sweep(carousel, 2)
        return index

    jobs = [functools.partial(job, index) for index in range(7)]
    pairs = list(carousel.stream(iter(jobs), 3))
    assert [drawn for drawn, _ in pairs] == jobs
    assert [result for _, result in pairs] == list(range(7))


def test_a_stream_draws_a_bounded_number_of_jobs_ahead_of_its_consumer(make: Make) -> None:
    carousel, _ = make(2)
    drawn = 0

    def jobs() -> Iterator[Callable[[], int]]:
        nonlocal drawn
        for index in itertools.count():
            drawn += 1
            yield lambda index=index: sweep(carousel, 2) and index

    stream = carousel.stream(jobs(), 3)
    assert drawn == 0
    for wanted in range(6):
        assert next(stream)[1] == wanted
        for _ in range(
            50
        ):  # the consumer takes its time: fifty sweeps, each of which could finish three riders
            sweep(carousel, 2)
        assert drawn == wanted + 1 + 4 * 3 + 1
    stream.close()  # type: ignore[attr-defined]
    assert drawn == 5 + 1 + 4 * 3 + 1


def test_a_rider_that_takes_long_does_not_let_results_pile_up_behind_it(make: Make) -> None:
    carousel, _ = make(2)
    ended: list[int] = []

    def job(index: int) -> int:
        for _ in range(1 if index else 30):
            sweep(carousel, 2)
        ended.append(index)
        return index

    assert results_of(carousel.stream((lambda i=i: job(i) for i in range(50)), 2)) == list(range(50))
    assert ended.index(0) == 7  # 4 * 2 were ahead, itself among them


def test_an_error_in_a_stream_stops_boarding_but_those_aboard_finish(make: Make) -> None:
    carousel, _ = make(3)
    begun: list[int] = []
    finished: list[int] = []

    def job(index: int) -> int:
        begun.append(index)
        sweep(carousel, 3)
        if index == 2:
            raise ValueError("broken")
        if index in (1, 3):
            sweep(carousel, 3)
        finished.append(index)
        return index

    stream = carousel.stream((lambda i=i: job(i) for i in itertools.count()), 4)
    assert [next(stream)[1], next(stream)[1]] == [0, 1]
    with pytest.raises(ValueError, match="broken") as caught:
        next(stream)
    # The first left a seat, which was taken before the third failed.
    assert begun == [0, 1, 2, 3, 4]
    assert sorted(finished) == [0, 1, 3, 4]
    assert caught.value.__notes__ == ["raised by rider 2 of 5"]
    with pytest.raises(StopIteration):
        next(stream)


def test_results_before_an_error_are_yielded_even_if_the_error_came_first(make: Make) -> None:
    carousel, _ = make(3)

    def job(index: int) -> int:
        if index:
            raise ValueError("at once")
        return len(sweep(carousel, 3))

    stream = carousel.stream((lambda i=i: job(i) for i in range(9)), 2)
    assert next(stream)[1] == 3
    with pytest.raises(ValueError, match="at once"):
        next(stream)


def test_an_iterable_that_raises_is_heard_after_the_results_of_those_aboard(make: Make) -> None:
    carousel, _ = make(2)

    def jobs() -> Iterator[Callable[[], list[int]]]:
        for _ in range(3):
            yield lambda: sweep(carousel, 2)
        raise ValueError("bad line 4")

    stream = carousel.stream(jobs(), 2)
    assert [next(stream)[1] for _ in range(3)] == [[0, 1]] * 3
    with pytest.raises(ValueError, match="bad line 4"):
        next(stream)
    with pytest.raises(ValueError, match="bad line 4"):
        carousel.ride(jobs())
    assert carousel.ride([lambda: sweep(carousel, 2)]) == [[0, 1]]


def test_a_rider_that_fails_comes_before_an_iterable_that_does(make: Make) -> None:
    carousel, _ = make(2)

    def fail() -> None:
        sweep(carousel, 2)
        raise ValueError("the rider")

    def jobs() -> Iterator[Job]:
        yield fail
        raise ValueError("the iterable")

    with pytest.raises(ValueError, match="the rider"):
        next(carousel.stream(jobs(), 2))


def test_closing_a_stream_early_cancels_its_riders_and_joins_them(make: Make) -> None:
    carousel, _ = make(2)
    heard: list[str] = []

    def job(index: int) -> int:
        try:
            for _ in range(index * 1_000_000 + 1):
                sweep(carousel, 2)
        except RideError as error:
            heard.append(str(error))
            with pytest.raises(RideError, match="cancelled"):
                carousel.visit(0, "up", number)
            raise
        return index

    before = set(threading.enumerate())
    stream = carousel.stream([lambda i=i: job(i) for i in range(4)], 3)
    assert next(stream)[1] == 0
    until(lambda: len(set(threading.enumerate()) - before) == 3)
    stream.close()  # type: ignore[attr-defined]
    assert set(threading.enumerate()) == before
    assert heard == ["the ride was cancelled"] * 3
    assert carousel.ride([lambda: sweep(carousel, 2)]) == [[0, 1]]


def test_a_stream_closed_by_one_of_its_riders_hangs_nobody(make: Make) -> None:
    # As when garbage collection, which runs in any thread, finds a forgotten stream.
    carousel, _ = make(2)

    def close() -> None:
        until(lambda: not stream.gi_running)  # type: ignore[attr-defined]
        stream.close()  # type: ignore[attr-defined]
        sweep(carousel, 2)

    def wait() -> None:
        while True:
            sweep(carousel, 2)

    before = set(threading.enumerate())
    stream = carousel.stream([lambda: 1, close, wait, wait], 4)
    assert next(stream)[1] == 1
    until(lambda: set(threading.enumerate()) == before and not carousel._boarding.parties)
    assert carousel.ride([lambda: sweep(carousel, 2)]) == [[0, 1]]


def test_a_consumer_may_call_the_model_between_results(make: Make) -> None:
    carousel, _ = make(3)
    results = []
    for _, result in carousel.stream((lambda: sweep(carousel, 3) for _ in range(7)), 2):
        assert sweep(carousel, 3, back=True) == [0, 1, 2, 2, 1, 0]
        assert carousel.ride([lambda: sweep(carousel, 3)] * 2) == [[0, 1, 2]] * 2
        results.append(result)
    assert results == [[0, 1, 2]] * 7


def test_an_iterable_that_takes_its_time_does_not_keep_the_carousel_from_closing(make: Make) -> None:
    carousel, _ = make(2)
    asked, told = threading.Event(), threading.Event()

    def job() -> None:
        try:
            sweep(carousel, 2)
        except RideError:
            told.set()
            raise

    def jobs() -> Iterator[Job]:
        yield job
        yield job
        asked.set()
        assert told.wait(60), "the rider aboard did not hear that it is over"
        yield job

    def consume() -> None:
        with pytest.raises(RideError, match="closed"):
            list(carousel.stream(jobs(), 1 + 1))

    consumer = in_thread(consume)
    assert asked.wait(60)
    carousel.close()
    consumer.join()


def test_an_iterable_may_not_call_the_model(make: Make) -> None:
    carousel, _ = make(2)
    jobs = (lambda: value for value in [sweep(carousel, 2) for _ in iter([1])])
    assert results_of(carousel.stream(jobs, 1)) == [[0, 1]]  # here it was called before the stream began

    def late() -> Iterator[Job]:
        yield lambda: sweep(carousel, 2)
        sweep(carousel, 2)

    stream = carousel.stream(late(), 1)
    assert next(stream)[1] == [0, 1]
    with pytest.raises(RideError, match="the iterable of jobs"):
        next(stream)


# Stops that fail


class Awkward(Exception):
    """Cannot be copied: its class wants two arguments and keeps one."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"{what} at {where}")


@pytest.mark.parametrize("error", [OSError(5, "the disk failed"), Awkward("the disk failed", "stop 2")])
def test_a_stop_that_cannot_be_had_is_heard_by_everybody_there(make: Make, error: Exception) -> None:
    carousel, stops = make(4)
    stops.broken[2] = error
    heard: list[BaseException] = []
    lock = threading.Lock()

    def job(depth: int) -> list[int]:
        try:
            return sweep(carousel, depth)
        except Exception as caught:
            assert lock.acquire(blocking=False), "two at a time"
            time.sleep(0)
            heard.append(caught)
            lock.release()
            raise

    def guest() -> None:
        with pytest.raises(type(error), match="the disk failed"):
            carousel.visit(2, "up", number)

    threads: list[threading.Thread] = []

    def with_guest() -> list[int]:
        threads.append(in_thread(guest))
        until(lambda: len(carousel._boarding.waiting) == 1)
        return job(2)

    with pytest.raises(type(error), match="the disk failed") as caught:
        carousel.ride([with_guest, *[lambda: job(4)] * 3])
    threads[0].join()
    assert caught.value.__notes__ == ["raised by rider 1 of 4; 2 more failed"]
    assert len(heard) == 3
    if isinstance(error, OSError):
        assert len({id(one) for one in heard}) == 3  # an object each, with a traceback and notes of its own
        assert error not in heard
    assert stops.visited == [0, 1, 2]
    stops.broken.clear()
    assert carousel.ride([lambda: sweep(carousel, 4)]) == [[0, 1, 2, 3]]


def test_a_copied_error_keeps_its_cause(make: Make) -> None:
    carousel, stops = make(2)
    cause = OSError("the socket")
    try:
        raise ValueError("no weights") from cause
    except ValueError as error:
        stops.broken[0] = error
    with pytest.raises(ValueError, match="no weights") as caught:
        carousel.ride([lambda: sweep(carousel, 2)])
    assert caught.value.__cause__ is cause


def test_a_stop_that_cannot_be_given_back_ends_the_carousel(make: Make) -> None:
    # Its visitors have gone on, so there is nobody but everybody to tell.
    carousel, stops = make(3)
    stops.cannot_be_left[1] = OSError("the disk failed")
    with pytest.raises(RideError, match=r"the carousel failed: OSError\('the disk failed'\)") as caught:
        carousel.ride([lambda: sweep(carousel, 3)] * 2)
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(RideError, match="the carousel failed"):
        sweep(carousel, 3)


def test_an_internal_fault_hangs_nobody(make: Make) -> None:
    def on_passage(passage: Passage) -> None:
        if passage.stop == 1:
            raise ZeroDivisionError("in the progress bar")

    carousel, _ = make(4, on_passage)
    guests: list[str] = []

    def guest() -> None:
        with pytest.raises(RideError) as caught:
            carousel.visit(3, "up", number)
        guests.append(str(caught.value))

    def first() -> None:
        threads.append(in_thread(guest))
        until(lambda: len(carousel._boarding.waiting) == 1)
        sweep(carousel, 4)

    threads: list[threading.Thread] = []
    with pytest.raises(RideError, match="the carousel failed: ZeroDivisionError") as caught:
        carousel.ride([first, *[lambda: sweep(carousel, 4)] * 4])
    threads[0].join()
    assert guests == ["the carousel failed: ZeroDivisionError('in the progress bar')"]
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(RideError, match="the carousel failed"):
        carousel.ride([lambda: 1])


# Random numbers


def test_seeded_riders_draw_what_they_draw_alone(make: Make) -> None:
    carousel, _ = make(3)

    def job(seed: int) -> list[float]:
        torch.manual_seed(seed)
        draws = []
        for _ in range(seed % 3 + 1):
            for stop in range(3):
                draws.append(draw())
                carousel.visit(stop, "up", lambda _: None)
        return [*draws, draw()]

    jobs = [lambda seed=seed: job(seed) for seed in range(8)]
    alone = [job() for job in jobs]
    assert carousel.ride(jobs) == alone
    assert carousel.ride(jobs, max_riders=3) == alone
    assert results_of(carousel.stream(jobs, 5)) == alone
    assert len({draws[0] for draws in alone}) == 8


def test_the_work_of_a_rider_draws_from_its_generator(make: Make) -> None:
    carousel, _ = make(2)

    def job(seed: int) -> list[float]:
        torch.manual_seed(seed)
        return [carousel.visit(stop, "up", lambda _: draw()) for stop in (0, 1, 0, 1)]

    jobs = [lambda seed=seed: job(seed) for seed in range(4)]
    assert carousel.ride(jobs) == [job() for job in jobs]


def test_unseeded_riders_draw_different_numbers_which_the_callers_seed_decides(make: Make) -> None:
    carousel, _ = make(2)

    def job() -> list[float]:
        first = draw()
        sweep(carousel, 2)
        return [first, draw()]

    def rides() -> list[list[float]]:
        torch.manual_seed(5)
        return carousel.ride([job] * 6) + carousel.ride([job] * 6)

    once, again = rides(), rides()
    assert once == again
    assert len(set(itertools.chain(*once))) == 24


@pytest.mark.parametrize("kind", ["ride", "stream"])
def test_unseeded_riders_of_later_rides_draw_other_numbers(make: Make, kind: str) -> None:
    # Even where the first rider draws nothing, and the caller's generator would stand where it stood.
    carousel, _ = make(2)
    found: list[float] = []
    for _ in range(12):
        jobs: list[Job] = [lambda: None, draw, draw, draw]
        results = carousel.ride(jobs) if kind == "ride" else results_of(carousel.stream(jobs, 2))
        found += results[1:]
    assert len(set(found)) == 36


def test_a_single_rider_draws_what_a_plain_call_would_and_the_caller_goes_on(make: Make) -> None:
    carousel, _ = make(2)

    def job() -> float:
        sweep(carousel, 2)
        return draw()

    torch.manual_seed(1)
    plain = [draw() for _ in range(6)]
    torch.manual_seed(1)
    assert [draw(), carousel.ride([job])[0], draw(), carousel.ride([job])[0], draw(), draw()] == plain
    torch.manual_seed(1)
    found = carousel.ride([job] * 3)
    assert found[0] == plain[0]
    assert len({*found, draw()}) == 4


def test_riders_of_two_rides_at_once_draw_different_numbers(make: Make) -> None:
    carousel, _ = make(2)
    others: list[float] = []

    def first() -> float:
        threads.append(in_thread(lambda: others.extend(carousel.ride([draw] * 2))))
        until(lambda: len(carousel._boarding.parties) == 2)
        sweep(carousel, 2)
        return draw()

    threads: list[threading.Thread] = []
    found = carousel.ride([first, draw])
    threads[0].join()
    assert len({*found, *others}) == 4


def test_an_iterable_goes_on_with_the_callers_generator(make: Make) -> None:
    carousel, _ = make(2)
    drawn: list[float] = []

    def jobs() -> Iterator[Callable[[], float]]:
        for _ in range(5):
            drawn.append(draw())
            yield lambda: sweep(carousel, 2) and draw()

    torch.manual_seed(2)
    plain = [draw() for _ in range(5)]
    torch.manual_seed(2)
    riders = results_of(carousel.stream(jobs(), 2))
    assert drawn == plain
    assert len({*riders, *plain, draw()}) == 11


def test_another_default_device_does_not_disturb_the_seeds(make: Make) -> None:
    carousel, _ = make(2)
    with torch.device("meta"):
        found = carousel.ride([lambda: float(torch.rand((), device="cpu"))] * 3)
    assert len(set(found)) == 3


# What torch and Python keep per thread


variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="nothing")


def modes(*_: Any) -> tuple[bool, bool, torch.dtype | None, str]:
    autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, variable.get()


PLAIN = (True, False, None, "nothing")


def test_modes_of_the_caller_reach_riders_and_their_work(make: Make) -> None:
    carousel, _ = make(2)

    def job() -> tuple[Any, ...]:
        return modes(), carousel.visit(0, "up", modes)

    assert carousel.ride([job] * 2) == [(PLAIN, PLAIN)] * 2
    token = variable.set("the caller's")
    try:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
            wanted = (False, False, torch.float16, "the caller's")
            assert carousel.ride([job] * 2) == [(wanted, wanted)] * 2
            assert results_of(carousel.stream([job] * 2, 2)) == [(wanted, wanted)] * 2
        with torch.inference_mode():
            wanted = (False, True, None, "the caller's")
            assert carousel.ride([job] * 2) == [(wanted, wanted)] * 2
    finally:
        variable.reset(token)
    assert carousel.ride([job]) == [(PLAIN, PLAIN)]


def test_modes_of_a_rider_reach_its_work_and_no_other_rider(make: Make) -> None:
    carousel, _ = make(3)

    def work(weights: Weights) -> tuple[Any, ...]:
        found = modes()
        variable.set("set in the work")  # stays there
        return found

    def job(rider: int) -> list[tuple[Any, ...]]:
        variable.set(f"rider {rider}")
        with contextlib.ExitStack() as stack:
            if rider == 0:
                stack.enter_context(torch.inference_mode())
            if rider == 1:
                stack.enter_context(torch.no_grad())
            if rider == 2:
                stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
            return [found for stop in range(3) for found in (modes(), carousel.visit(stop, "up", work))]

    found = carousel.ride([lambda r=r: job(r) for r in range(4)])
    wanted = [(False, True, None), (False, False, None), (True, False, torch.bfloat16), (True, False, None)]
    assert found == [[(*mode, f"rider {rider}")] * 6 for rider, mode in enumerate(wanted)]
    assert modes() == PLAIN


def test_modes_of_a_guest_reach_its_work(make: Make) -> None:
    carousel, _ = make(2)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert carousel.visit(0, "up", modes) == (False, False, torch.bfloat16, "nothing")
    assert carousel.visit(0, "up", modes) == PLAIN


def test_modes_of_the_caller_reach_the_iterable(make: Make) -> None:
    carousel, _ = make(2)
    found = []

    def jobs() -> Iterator[Job]:
        for _ in range(3):
            found.append(modes())
            yield lambda: sweep(carousel, 2)

    token = variable.set("the caller's")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        list(carousel.stream(jobs(), 1))
    variable.reset(token)
    assert found == [(True, False, torch.bfloat16, "the caller's")] * 3


# Guests


@pytest.fixture
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GUEST_PATIENCE_SECONDS", 0.0)


@pytest.fixture
def endless_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GUEST_PATIENCE_SECONDS", 1e6)


def test_plain_threads_visit_without_a_ride(make: Make) -> None:
    carousel, _ = make(3)
    found: list[list[int]] = []

    def guest() -> None:
        for _ in range(20):
            found.append(sweep(carousel, 3, back=True))

    for thread in [in_thread(guest) for _ in range(4)]:
        thread.join()
    assert found == [[0, 1, 2, 2, 1, 0]] * 80


def test_guests_and_riders_are_served_side_by_side(make: Make, no_patience: None) -> None:
    carousel, _ = make(3)
    done = threading.Event()
    found: list[list[int]] = []

    def guest() -> None:
        while not done.is_set():
            found.append(sweep(carousel, 3))

    guests = [in_thread(guest) for _ in range(3)]
    results = carousel.ride([lambda: sweep(carousel, 3, back=True)] * 20, max_riders=6)
    until(lambda: len(found) > 3)
    done.set()
    for thread in guests:
        thread.join()
    assert results == [[0, 1, 2, 2, 1, 0]] * 20
    assert found == [[0, 1, 2]] * len(found)


def test_a_rider_may_wait_for_a_thread_that_calls_the_model(make: Make) -> None:
    carousel, _ = make(3)

    def job() -> list[int]:
        found: list[list[int]] = []
        carousel.visit(0, "up", number)
        in_thread(lambda: found.append(sweep(carousel, 3, back=True))).join()
        sweep(carousel, 3)
        return found[0]

    assert carousel.ride([job, lambda: sweep(carousel, 3), job]) == [
        [0, 1, 2, 2, 1, 0],
        [0, 1, 2],
        [0, 1, 2, 2, 1, 0],
    ]


def test_a_guest_elsewhere_does_not_part_the_riders_of_a_stop(make: Make, endless_patience: None) -> None:
    carousel, stops = make(4)
    threads: list[threading.Thread] = []
    passed: list[str] = []

    def first() -> None:
        carousel.visit(0, "up", number)
        threads.append(in_thread(lambda: carousel.visit(3, "up", lambda _: passed.append("guest"))))
        until(lambda: any(visit.rider is None for visit in carousel._boarding.waiting))
        for stop in (1, 2, 3):
            carousel.visit(stop, "up", lambda _: passed.append("rider"))

    carousel.ride([first, *[lambda: sweep(carousel, 4)] * 3])
    threads[0].join()
    assert stops.visited == [0, 1, 2, 3]
    assert passed == ["rider", "rider", "rider", "guest"]  # of a stop, riders come first


def test_after_serving_a_guest_elsewhere_the_carousel_comes_back(make: Make, no_patience: None) -> None:
    carousel, stops = make(6)

    def first() -> None:
        carousel.visit(1, "up", number)
        in_thread(lambda: carousel.visit(3, "up", number)).join()
        carousel.visit(2, "up", number)

    def from_one() -> None:
        for stop in (1, 2, 4, 5):
            carousel.visit(stop, "up", number)

    def from_four() -> None:
        for stop in (4, 5):
            carousel.visit(stop, "up", number)

    carousel.ride([first, from_one, from_one, from_four])
    # Without coming back, those at 4 would go first, and those at 1 would need a sweep of their own.
    assert stops.visited == [1, 3, 1, 2, 4, 5]


def test_a_guest_at_the_same_stop_is_served_while_a_rider_runs(make: Make, endless_patience: None) -> None:
    carousel, stops = make(2)

    def job() -> None:
        carousel.visit(0, "up", number)
        in_thread(lambda: carousel.visit(0, "up", number)).join()

    carousel.ride([job, lambda: sweep(carousel, 2)])
    assert stops.visited == [0, 1]


def test_guests_that_loop_at_one_stop_starve_nobody(make: Make) -> None:
    carousel, _ = make(3)
    done = threading.Event()
    count = 0

    def loop() -> None:
        nonlocal count
        while not done.is_set():
            carousel.visit(1, "up", number)
            count += 1

    guests = [in_thread(loop) for _ in range(6)]
    assert carousel.ride([lambda: sweep(carousel, 3, back=True)] * 3) == [[0, 1, 2, 2, 1, 0]] * 3
    assert sweep(carousel, 3) == [0, 1, 2]
    done.set()
    for thread in guests:
        thread.join()


def test_a_rider_that_loops_at_one_stop_starves_nobody(make: Make) -> None:
    carousel, stops = make(3)
    others: list[list[int]] = []

    def loop() -> int:
        count = 0
        while len(others) < 2:
            carousel.visit(0, "up", number)
            count += 1
        return count

    results = carousel.ride([loop, *[lambda: others.append(sweep(carousel, 3))] * 2])
    assert results[0] == 2
    assert stops.visited == [0, 1, 2, 0]


def test_a_guest_interrupted_while_it_waits_is_not_served(make: Make) -> None:
    ready, go_on = threading.Event(), threading.Event()
    served: list[int] = []

    class Slow(MemoryStops):
        @contextlib.contextmanager
        def visit(self, stop: int, upcoming: Sequence[int] = ()) -> Iterator[Weights]:
            ready.set()
            assert go_on.wait(60)
            with super().visit(stop, upcoming) as weights:
                yield weights

    def interrupt() -> None:
        assert ready.wait(60)
        while not go_on.wait(0.1):  # again, should it come just before the main thread begins to wait
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    make(1)
    carousel = Carousel(Slow(2))
    thread = in_thread(interrupt)
    with pytest.raises(KeyboardInterrupt):
        carousel.visit(0, "up", lambda _: served.append(0))
    go_on.set()
    thread.join()
    assert carousel.visit(1, "up", number) == 1
    carousel.close()
    assert served == []


# What is refused


def test_a_nested_ride_is_refused(make: Make) -> None:
    carousel, _ = make(2)
    for inner in (lambda: carousel.ride([lambda: 1]), lambda: list(carousel.stream([lambda: 1], 1))):
        with pytest.raises(RideError, match=r"ride\(\) was called inside a rider"):
            carousel.ride([inner])
        with pytest.raises(RideError, match=r"ride\(\) was called inside a rider"):
            carousel.visit(0, "up", lambda _: inner())


def test_a_visit_from_inside_a_work_is_refused(make: Make) -> None:
    carousel, _ = make(2)
    with pytest.raises(RideError, match="inside a block"):
        carousel.visit(0, "up", lambda _: carousel.visit(1, "up", number))
    assert sweep(carousel, 2) == [0, 1]


def test_riders_of_one_carousel_may_ride_another(make: Make) -> None:
    one, _ = make(2)
    other, _ = make(3)

    def job() -> list[list[int]]:
        return [sweep(one, 2), *other.ride([lambda: sweep(other, 3)] * 2), sweep(other, 3), sweep(one, 2)]

    assert one.ride([job] * 3) == [[[0, 1], [0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1]]] * 3


# The end


def test_closing_tells_riders_and_guests_who_wait(make: Make) -> None:
    carousel, stops = make(3)
    before = set(threading.enumerate())
    inside, go_on = threading.Event(), threading.Event()
    heard: list[str] = []

    def held(_: Weights) -> None:
        inside.set()
        assert go_on.wait(60)

    def visitor(stop: int, work: Callable[[Weights], Any]) -> Job:
        def job() -> None:
            try:
                carousel.visit(stop, "up", work)
                carousel.visit(2, "up", number)
            except RideError as error:
                heard.append(str(error))
                raise

        return job

    def ride() -> None:
        with pytest.raises(RideError, match="closed") as caught:
            carousel.ride([visitor(0, held), visitor(0, number), visitor(1, number)])
        assert caught.value.__notes__ == ["raised by rider 0 of 3; 2 more failed"]

    def guest() -> None:
        with pytest.raises(RideError, match="closed"):
            visitor(1, number)()

    rider, other = in_thread(ride), in_thread(guest)
    assert inside.wait(60)
    until(lambda: len(carousel._boarding.waiting) == 3)
    closer = in_thread(carousel.close)
    until(lambda: not carousel._boarding.waiting)
    go_on.set()
    for thread in (closer, rider, other):
        thread.join()
    assert heard == ["the model was closed"] * 4
    assert set(threading.enumerate()) == before - {carousel._thread}
    assert stops.visited == [0]
    carousel.close()  # twice does no harm
    with pytest.raises(RideError, match="closed"):
        carousel.visit(0, "up", number)
    with pytest.raises(RideError, match="closed"):
        carousel.ride([lambda: 1])


def test_closing_reaches_a_guest_for_whom_a_rider_waits(make: Make, endless_patience: None) -> None:
    carousel, _ = make(3)

    def job() -> None:
        def guest() -> None:
            with pytest.raises(RideError, match="closed"):
                carousel.visit(2, "up", number)

        carousel.visit(0, "up", number)
        in_thread(guest).join()

    def close() -> None:
        until(lambda: len(carousel._boarding.waiting) == 2)
        carousel.close()

    closer = in_thread(close)
    with pytest.raises(RideError, match="closed") as caught:
        carousel.ride([job, lambda: sweep(carousel, 3)])
    assert caught.value.__notes__ == ["raised by rider 1 of 2"]
    closer.join()


def test_closing_never_shortens_the_results(make: Make) -> None:
    # The rider who closes ends well; the others never board.
    for seats in (1, 2):
        carousel, _ = make(2)
        with pytest.raises(RideError, match="closed"):
            carousel.ride([carousel.close, *[lambda: 1] * 3], max_riders=seats)


def test_an_interrupt_of_a_ride_ends_it_promptly_and_joins_its_threads() -> None:
    script = """
        import contextlib, threading
        from slowllm.streaming.carousel import Carousel

        class Stops:
            num_stops = 3

            @contextlib.contextmanager
            def visit(self, stop, upcoming=()):
                yield {}

        carousel = Carousel(Stops())

        def job():
            for sweep in range(10**9):
                for stop in range(3):
                    carousel.visit(stop, "up", lambda weights: None)
                if sweep == 3:
                    print("riding", flush=True)

        try:
            carousel.ride([job] * 8)
        except KeyboardInterrupt:
            print(sorted(thread.name for thread in threading.enumerate()), flush=True)
            print(carousel.ride([lambda: carousel.visit(1, "up", lambda weights: "again")]), flush=True)
            raise
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "riding\n"
    child.send_signal(signal.SIGINT)
    output, errors = child.communicate(timeout=60)
    assert "['MainThread', 'slowllm-carousel']\n['again']\n" in output
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert child.returncode == -signal.SIGINT


# What the reader is told


def test_stops_are_expected_upwards_and_no_further_at_the_end_of_the_jobs(make: Make) -> None:
    carousel, stops = make(4)
    carousel.ride([lambda: sweep(carousel, 4)] * 2)
    assert stops.expected == [[1, 2, 3], [2, 3], [3], []]


def test_after_a_first_wrap_another_is_expected(make: Make) -> None:
    carousel, stops = make(4)
    carousel.ride([lambda: [sweep(carousel, 4) for _ in range(2)]])
    assert stops.expected == [[1, 2, 3], [2, 3], [3], [], [1, 2, 3], [2, 3, 0], [3, 0, 1], [0, 1, 2]]


def test_while_jobs_are_left_another_sweep_is_expected(make: Make) -> None:
    carousel, stops = make(3)
    carousel.ride([lambda: sweep(carousel, 3)] * 2, max_riders=1)
    assert stops.expected == [[1, 2], [2, 0], [0, 1], [1, 2], [2], []]


def test_whoever_waits_behind_is_expected(make: Make) -> None:
    carousel, stops = make(3)

    def job() -> None:
        carousel.visit(2, "up", number)
        carousel.visit(1, "up", number)

    carousel.ride([job, lambda: sweep(carousel, 3)])
    # At 0 nobody comes round yet. At 2 the second rider has still to pass, and the first is known to go on at 1.
    assert stops.visited == [0, 1, 2, 1]
    assert stops.expected[:3] == [[1, 2], [2], []]


def test_a_backward_pass_is_expected_before_it_begins(make: Make) -> None:
    carousel, stops = make(3)
    carousel.ride([lambda: sweep(carousel, 3, back=True)] * 2)
    assert stops.visited == [0, 1, 2, 1, 0]
    assert stops.expected == [[1, 2, 0], [2, 1, 0], [2, 1, 0], [0, 1, 2], [0, 1, 2]]


# What is reported


def test_totals_are_complete_when_a_ride_returns(make: Make) -> None:
    carousel, _ = make(3)
    for count in range(1, 30):
        carousel.ride([lambda: sweep(carousel, 3)] * 4)
        assert carousel.totals.num_passed == count * 12
        assert carousel.totals.num_passages == count * 3
    assert carousel.totals.compute_seconds > 0
    assert carousel.totals.wait_seconds > 0


def test_passages_add_up_to_the_totals(make: Make) -> None:
    passages: list[Passage] = []
    carousel, _ = make(3, passages.append)
    carousel.ride([lambda n=n: sweep(carousel, n) for n in (1, 2, 3)])
    carousel.close()
    assert [passage.num_passed for passage in passages] == [3, 2, 1]
    assert sum(p.compute_seconds for p in passages) == pytest.approx(carousel.totals.compute_seconds)
    assert sum(p.wait_seconds for p in passages) == pytest.approx(carousel.totals.wait_seconds)


# Memory


class Big:
    """Something of which it matters that it goes."""


@pytest.mark.parametrize("kind", ["ride", "stream"])
def test_a_finished_ride_keeps_neither_jobs_nor_results(make: Make, kind: str) -> None:
    carousel, _ = make(2)
    kept: list[weakref.ref[Big]] = []

    def new() -> Big:
        kept.append(weakref.ref(big := Big()))
        return big

    def job(of_job: Big) -> Big:
        of_work = new()
        carousel.visit(0, "up", lambda _, __=of_work: new())
        return carousel.visit(1, "up", lambda _: new())

    jobs = [functools.partial(job, new()) for _ in range(4)]
    results = carousel.ride(jobs) if kind == "ride" else results_of(carousel.stream(jobs, 2))
    assert len(kept) == 16
    gc.disable()  # not even circles are left
    try:
        until(lambda: sum(ref() is not None for ref in kept) == 8)
        del jobs, results
        assert [ref() for ref in kept] == [None] * 16
    finally:
        gc.enable()


def test_a_stream_lets_go_of_a_job_and_a_result_that_were_taken(make: Make) -> None:
    carousel, _ = make(2)
    stream = carousel.stream((lambda: sweep(carousel, 2) and Big() for _ in range(5)), 2)
    for _ in range(5):
        job, result = map(weakref.ref, next(stream))
        until(lambda: job() is None and result() is None)
    assert list(stream) == []


def test_a_failed_ride_keeps_nothing_but_the_error(make: Make) -> None:
    carousel, _ = make(2)
    kept: list[weakref.ref[Big]] = []

    def job(fails: bool) -> Big:
        kept.append(weakref.ref(big := Big()))
        carousel.visit(0, "up", lambda _: big if not fails else 1 // 0)
        return big

    def ride() -> None:
        with contextlib.suppress(ZeroDivisionError):
            carousel.ride([lambda f=f: job(f) for f in (False, True, False, True)])

    ride()
    gc.collect()
    until(lambda: all(ref() is None for ref in kept))
    assert len(kept) == 4


# Schedules of all kinds

Plan = list[tuple[str, int]]


def run_plan(carousel: Carousel, plan: Plan) -> list[Any]:
    """Do as the plan says: one entry of the result for each step."""
    found: list[Any] = []
    for step, value in plan:
        if step in ("up", "down"):
            direction: Direction = "up" if step == "up" else "down"
            found.append(carousel.visit(value, direction, number, comes_back=bool(value % 2)))
        elif step == "seed":
            torch.manual_seed(value)
            found.append(value)
        elif step == "draw":
            found.append(draw())
        elif step == "thread":
            of_thread: list[int] = []
            in_thread(lambda: of_thread.append(carousel.visit(value, "up", number))).join()
            found += of_thread
        else:
            raise ValueError(str(value))
    return found


def foresee(plan: Plan) -> list[Any] | str:
    """What the plan comes to without a carousel; of a plan that fails, the error's message."""
    found: list[Any] = []
    generator = torch.Generator()
    for step, value in plan:
        if step == "raise":
            return str(value)
        if step == "seed":
            generator.manual_seed(value)
        found.append(float(torch.rand((), generator=generator)) if step == "draw" else value)
    return found


def check(carousel: Carousel, plans: list[Plan], max_riders: int, as_stream: bool) -> None:
    wanted = [foresee(plan) for plan in plans]
    failures = [plan for plan in wanted if isinstance(plan, str)]
    jobs = [lambda plan=plan: run_plan(carousel, plan) for plan in plans]
    found: list[Any] = []

    def ride() -> None:
        found.extend(
            results_of(carousel.stream(iter(jobs), max_riders))
            if as_stream
            else carousel.ride(jobs, max_riders)
        )

    if not failures:
        ride()
        assert found == wanted
        return
    with pytest.raises(ValueError, match=f"^{failures[0]}") as caught:
        ride()
    assert caught.value.__notes__[0].startswith(f"raised by rider {wanted.index(failures[0])} of ")
    if as_stream:  # what was yielded before is lost in extend(); a list of the same length says enough
        return
    more = f"; {len(failures) - 1} more failed" if len(failures) > 1 else ""
    assert caught.value.__notes__[0].endswith(f" of {len(plans)}{more}")


def random_plan(dice: random.Random, num_stops: int) -> Plan:
    plan: Plan = [("seed", dice.randrange(100))] if dice.random() < 0.3 else []
    drawing = bool(plan)
    for _ in range(dice.randrange(4)):
        kind = dice.choice(["sweep", "sweep", "training", "jump", "thread", "draw", "raise"])
        depth = dice.randrange(num_stops) + 1
        if kind == "sweep":
            plan += [("up", stop) for stop in range(depth)]
        elif kind == "training":
            plan += [("up", stop) for stop in range(depth)] + [("down", s) for s in reversed(range(depth))]
        elif kind == "jump":
            plan += [(dice.choice(["up", "down"]), dice.randrange(num_stops)) for _ in range(3)]
        elif kind == "thread" and dice.random() < 0.3:
            plan.append(("thread", dice.randrange(num_stops)))
        elif kind == "draw" and drawing:
            plan.append(("draw", 0))
        elif kind == "raise" and dice.random() < 0.2:
            plan.append(("raise", dice.randrange(1000, 2000)))
    return plan


def test_a_thousand_random_schedules_end_as_foreseen(make: Make, no_patience: None) -> None:
    dice = random.Random(20240607)
    carousels = [make(num_stops)[0] for num_stops in (1, 2, 3, 5, 8)]
    done = threading.Event()

    def guest(carousel: Carousel, seed: int) -> None:
        own = random.Random(seed)
        while not done.is_set():
            plan = [step for step in random_plan(own, carousel._stops.num_stops) if step[0] in ("up", "down")]
            assert run_plan(carousel, plan) == foresee(plan)
            done.wait(0.002)

    guests = [in_thread(lambda c=c, n=n: guest(c, n)) for n, c in enumerate(carousels[1:4])]
    try:
        for _ in range(1000):
            carousel = dice.choice(carousels)
            plans = [random_plan(dice, carousel._stops.num_stops) for _ in range(dice.randrange(1, 9))]
            check(carousel, plans, dice.randrange(1, 9), dice.random() < 0.3)
    finally:
        done.set()
        for thread in guests:
            thread.join()
    assert all(carousel._boarding.over is None for carousel in carousels)


def sweeps(depths: list[tuple[int, bool]]) -> Plan:
    plan: Plan = []
    for depth, back in depths:
        plan += [("up", stop) for stop in range(depth)]
        plan += [("down", stop) for stop in reversed(range(depth))] if back else []
    return plan


def num_passages(plan: Plan) -> int:
    """Return how many a rider needs that is alone: one for a step, and one for both ways at a stop where it turns."""
    count, passed = 0, set[tuple[str, int]]()
    for way, stop in plan:
        if (way, stop) in passed or stop not in {at for _, at in passed}:
            count, passed = count + 1, set()
        passed.add((way, stop))
    return count


riders = st.lists(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=3).map(sweeps), max_size=6)


@num_examples(150)
@given(plans=riders, max_riders=st.integers(1, 6))
def test_any_mixture_of_sweeps_is_served_in_few_passages(plans: list[Plan], max_riders: int) -> None:
    carousel = Carousel(MemoryStops(4))
    check(carousel, plans, max_riders, as_stream=False)
    carousel.close()
    assert carousel.totals.num_passed == sum(map(len, plans))
    alone = list(map(num_passages, plans))
    assert max(alone, default=0) <= carousel.totals.num_passages <= sum(alone)


waiting = st.lists(
    st.tuples(st.integers(0, 5), st.sampled_from(["up", "down"])), min_size=1, max_size=8, unique=True
)


@num_examples(200)
@given(waiting=waiting, start=st.integers(0, 5), up=st.booleans(), loops=st.booleans())
def test_a_course_reaches_everybody_who_waits(
    waiting: list[tuple[int, Direction]], start: int, up: bool, loops: bool
) -> None:
    # One visitor may come back to its stop at once, for ever; the others are reached within a sweep up and down.
    course = rooms.Course()
    course.stop, course.direction = start, "up" if up else "down"
    visits = [rooms.Visit(stop, direction, number, None) for stop, direction in waiting]
    for index, visit in enumerate(visits):
        visit.key = (visit.stop, visit.direction, index)
    left = list(visits)
    for _ in range(24):
        course.move(left)
        here = [visit for visit in course.due(left) if visit.stop == course.stop]
        assert here, "the carousel goes where somebody is due"
        course.passed.update(visit.key for visit in here)
        left = [visit for visit in left if visit not in here or (loops and visit is visits[0])]
        if set(left) <= {visits[0]}:
            break
    assert set(left) <= {visits[0]}
