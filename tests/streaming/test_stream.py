"""Streams of jobs: order, how far they run ahead, errors in them, and closing them early."""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest

from slowllm.errors import RideError
from tests.support.memory_stops import Big, Job, Make, in_thread, number, results_of, sweep, until

pytestmark = pytest.mark.usefixtures("hang_fails")


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


def test_a_stream_lets_go_of_a_job_and_a_result_that_were_taken(make: Make) -> None:
    carousel, _ = make(2)
    stream = carousel.stream((lambda: sweep(carousel, 2) and Big() for _ in range(5)), 2)
    for _ in range(5):
        job, result = map(weakref.ref, next(stream))
        until(lambda: job() is None and result() is None)
    assert list(stream) == []
