"""The loop: in which order stops are visited, who passes them when, and how the carousel ends."""

from __future__ import annotations

import functools
import gc
import signal
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from slowllm.errors import RideError
from slowllm.streaming.stops import Passage, Weights
from tests.support.memory_stops import Big, Job, Make, in_thread, number, results_of, sweep, until
from tests.support.paths import ROOT

pytestmark = pytest.mark.usefixtures("hang_fails")


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
    ends = [passage.began_at + passage.wait_seconds + passage.compute_seconds for passage in passages]
    assert all(end <= later.began_at for end, later in zip(ends, passages[1:], strict=False))


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


# Calls that are refused


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
        until(lambda: any(visit.rider is None for visit in carousel._boarding.waiting))
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
