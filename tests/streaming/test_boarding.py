"""Who boards when: seats by riders and by tokens, one rider at a time, and rides side by side."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slowllm.streaming.carousel import Carousel
from slowllm.streaming.riders import Sized
from tests.support.memory_stops import Make, MemoryStops, in_thread, number, results_of, sweep, until
from tests.support.properties import num_examples

pytestmark = pytest.mark.usefixtures("hang_fails")


# One rider at a time


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


# Seats


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


def test_a_ride_without_seats_is_refused(make: Make) -> None:
    carousel, _ = make(2)
    for ride in (carousel.ride, lambda jobs, seats: next(carousel.stream(jobs, seats))):
        with pytest.raises(AssertionError, match="at least one rider"):
            ride([lambda: 1], 0)


# Seats by tokens

NUM_STOPS = 4


class Aboard:
    """Counts the tokens that are aboard at once."""

    def __init__(self, carousel: Carousel) -> None:
        self.carousel, self.held, self.most = carousel, 0, 0
        self.seen: list[set[str]] = []
        self.names: set[str] = set()

    def job(self, name: str, num_tokens: int, *, starts_load: bool = False) -> Sized:
        def ride() -> str:
            self.held += num_tokens
            self.names.add(name)
            self.most = max(self.most, self.held)
            for stop in range(NUM_STOPS):
                self.carousel.visit(stop, "up", lambda weights: None)
                self.seen.append(set(self.names))
            self.held -= num_tokens
            self.names.remove(name)
            return name

        return Sized(ride, num_tokens, starts_load)


@num_examples(60)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=12))
def test_no_more_tokens_are_aboard_than_allowed_but_for_one_alone(sizes: list[int]) -> None:
    carousel = Carousel(MemoryStops(NUM_STOPS))
    try:
        aboard = Aboard(carousel)
        jobs = [aboard.job(str(number), size) for number, size in enumerate(sizes)]
        assert results_of(carousel.stream(jobs, 64, 10)) == [str(number) for number in range(len(sizes))]
    finally:
        carousel.close()
    assert aboard.most <= max(10, *sizes)


def test_small_jobs_fill_one_sweep(make: Make) -> None:
    carousel, _ = make(NUM_STOPS)
    aboard = Aboard(carousel)
    list(carousel.stream([aboard.job(str(n), 2) for n in range(10)], 64, 20))
    assert carousel.totals.num_passages == NUM_STOPS


def test_a_load_boards_when_those_before_it_have_left(make: Make) -> None:
    carousel, _ = make(NUM_STOPS)
    aboard = Aboard(carousel)
    jobs = [
        aboard.job("a", 1), aboard.job("b", 1),
        aboard.job("c", 1, starts_load=True), aboard.job("d", 1),
    ]  # fmt: skip
    assert results_of(carousel.stream(jobs, 64, 100)) == ["a", "b", "c", "d"]
    assert carousel.totals.num_passages == 2 * NUM_STOPS
    assert not any(names & {"a", "b"} and names & {"c", "d"} for names in aboard.seen)
    assert {"c", "d"} in aboard.seen
