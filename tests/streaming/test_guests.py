"""Threads that visit stops without being riders."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence

import pytest

from slowllm.streaming.carousel import Carousel
from slowllm.streaming.stops import Weights
from tests.support.memory_stops import Make, MemoryStops, in_thread, number, sweep, until

pytestmark = pytest.mark.usefixtures("hang_fails")


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
