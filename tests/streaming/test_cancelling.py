"""Rides that another thread cancels while their own waits for them."""

from __future__ import annotations

import threading

import pytest

from slowllm.errors import RideError
from slowllm.streaming.stops import Passage
from tests.support.memory_stops import Make, in_thread, results_of, sweep

pytestmark = pytest.mark.usefixtures("hang_fails")


def test_the_carousels_thread_cancels_the_stream_that_a_thread_waits_for(make: Make) -> None:
    calls: list[int] = []

    def on_passage(passage: Passage) -> None:
        if passage.stop == 1 and calls:
            cancel()

    carousel, stops = make(3, on_passage)
    jobs = [lambda: sweep(carousel, 3) for _ in range(2)]
    with carousel.cancelling() as cancel:
        assert results_of(carousel.stream(iter(jobs), 2)) == [[0, 1, 2]] * 2
        calls.append(1)
        with pytest.raises(RideError, match="the ride was cancelled"):
            list(carousel.stream(iter(jobs), 2))
        assert stops.visited == [0, 1, 2, 0, 1]
        with pytest.raises(RideError, match="the ride was cancelled"):
            carousel.ride(jobs)
        with pytest.raises(RideError, match="the ride was cancelled"):
            sweep(carousel, 3)
    assert carousel.ride(jobs) == [[0, 1, 2]] * 2


def test_a_stream_whose_riders_end_well_is_cancelled_all_the_same(make: Make) -> None:
    carousel, _ = make(2)

    def job() -> list[int]:
        seen = sweep(carousel, 2)
        cancel()
        return seen

    with carousel.cancelling() as cancel, pytest.raises(RideError, match="the ride was cancelled"):
        list(carousel.stream(iter([job]), 1))


def test_rides_of_other_threads_and_of_outer_contexts_go_on(make: Make) -> None:
    carousel, _ = make(2)
    began, goes_on = threading.Event(), threading.Event()

    def waits() -> list[int]:
        began.set()
        carousel.away(lambda: goes_on.wait(60))
        return sweep(carousel, 2)

    found: list[list[int]] = []
    other = in_thread(lambda: found.extend(carousel.ride([waits])))
    assert began.wait(60)
    with carousel.cancelling() as outer:
        with carousel.cancelling() as cancel:
            cancel()
        assert carousel.ride([lambda: sweep(carousel, 2)]) == [[0, 1]]
        outer()
        with pytest.raises(RideError, match="the ride was cancelled"):
            carousel.ride([lambda: sweep(carousel, 2)])
    goes_on.set()
    other.join()
    assert found == [[0, 1]]
