"""Jobs that are boarded without a thread that waits for them."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import threading
import weakref
from collections import defaultdict
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slowllm.errors import RideError
from slowllm.streaming.carousel import Carousel
from slowllm.streaming.ride import Ride
from slowllm.streaming.rider_threads import RiderThreads
from slowllm.streaming.stops import Weights
from tests.support.memory_stops import Big, Make, MemoryStops, draw, in_thread, number, sweep, until
from tests.support.properties import num_examples

pytestmark = pytest.mark.usefixtures("hang_fails")


class Gate:
    """A visit's work that holds the carousel until it is opened."""

    def __init__(self) -> None:
        self.inside, self.open = threading.Event(), threading.Event()

    def __call__(self, _: Weights) -> None:
        self.inside.set()
        assert self.open.wait(60)


# Results


def test_a_boarded_job_gives_its_result(make: Make) -> None:
    carousel, stops = make(3)
    ride = carousel.board(lambda: sweep(carousel, 3, back=True))
    assert ride.result() == [0, 1, 2, 2, 1, 0]
    assert ride.done()
    assert stops.visited == [0, 1, 2, 1, 0]


def test_a_boarded_job_that_fails_gives_its_error(make: Make) -> None:
    carousel, _ = make(3)

    def job() -> None:
        carousel.visit(1, "up", number)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        carousel.board(job).result()
    assert sweep(carousel, 3) == [0, 1, 2]


def test_boarding_does_not_wait_for_a_stop_that_is_served(make: Make) -> None:
    carousel, _ = make(2)
    gate = Gate()
    first = carousel.board(lambda: carousel.visit(0, "up", gate))
    assert gate.inside.wait(60)
    rides = [carousel.board(lambda: sweep(carousel, 2)) for _ in range(3)]  # while the carousel computes
    assert not any(ride.done() for ride in (first, *rides))
    gate.open.set()
    assert [ride.result() for ride in rides] == [[0, 1]] * 3


def test_boarded_jobs_share_sweeps_with_each_other_and_with_rides_and_streams(make: Make) -> None:
    carousel, stops = make(3)
    rides: list[Ride[list[int]]] = []

    def first() -> list[int]:
        rides.extend(carousel.board(lambda: sweep(carousel, 3)) for _ in range(4))
        thread = in_thread(lambda: streamed.extend(carousel.stream([lambda: sweep(carousel, 3)] * 2, 2)))
        until(lambda: len(carousel._boarding.parties) == 6)
        threads.append(thread)
        return sweep(carousel, 3)

    streamed: list[Any] = []
    threads: list[threading.Thread] = []
    assert carousel.ride([first, lambda: sweep(carousel, 3)]) == [[0, 1, 2]] * 2
    assert [ride.result() for ride in rides] == [[0, 1, 2]] * 4
    threads[0].join()
    assert [result for _, result in streamed] == [[0, 1, 2]] * 2
    assert stops.visited == [0, 1, 2]


def test_an_event_loop_boards_and_goes_on(make: Make) -> None:
    carousel, stops = make(3)

    async def serve() -> list[list[int]]:
        loop = asyncio.get_running_loop()

        def request() -> asyncio.Future[list[int]]:
            future: asyncio.Future[list[int]] = loop.create_future()
            ride = carousel.board(lambda: sweep(carousel, 3))
            ride.add_done_callback(lambda ended: loop.call_soon_threadsafe(future.set_result, ended.result()))
            return future

        return list(await asyncio.gather(*(request() for _ in range(8))))

    assert asyncio.run(serve()) == [[0, 1, 2]] * 8
    assert len(stops.visited) <= 3 * 8


def test_a_result_is_waited_for_no_longer_than_asked(make: Make) -> None:
    carousel, _ = make(2)
    gate = Gate()
    ride = carousel.board(lambda: carousel.visit(0, "up", gate))
    with pytest.raises(TimeoutError, match=r"has not ended within 0\.01 s"):
        ride.result(0.01)
    with pytest.raises(TimeoutError, match="has not ended within 0 s"):
        ride.result(0)
    gate.open.set()
    assert ride.result(60) is None


def test_a_result_is_handed_over_once_and_then_kept_by_nobody(make: Make) -> None:
    carousel, _ = make(2)

    def job(fails: bool) -> Big:
        big = Big()
        kept.append(weakref.ref(big))
        carousel.visit(1, "up", lambda _: big)
        if fails:
            raise ValueError("broken")
        return big

    def take(ride: Ride[Big], fails: bool) -> None:
        if fails:
            with pytest.raises(ValueError, match="broken"):
                ride.result()
        else:
            assert isinstance(ride.result(), Big)

    kept: list[weakref.ref[Big]] = []
    for fails in (False, True):
        ride = carousel.board(lambda f=fails: job(f))
        take(ride, fails)
        with pytest.raises(RideError, match="was taken before"):
            ride.result()
        if fails:
            gc.collect()  # a traceback and its frames are a circle
        until(lambda: kept[-1]() is None)


def test_a_rider_may_not_wait_for_a_ride_but_may_take_one_that_has_ended(make: Make) -> None:
    carousel, _ = make(2)
    rides: list[Ride[list[int]]] = []

    def job() -> list[int]:
        rides.append(carousel.board(lambda: sweep(carousel, 2)))
        with pytest.raises(RideError, match=r"inside a rider; wait in Carousel\.away"):
            rides[0].result()
        while not rides[0].done():
            sweep(carousel, 2)
        return rides[0].result()

    assert carousel.ride([job]) == [[0, 1]]


def test_a_boarded_job_has_the_boarding_threads_grad_mode(make: Make) -> None:
    carousel, _ = make(1)
    with torch.inference_mode():
        ride = carousel.board(torch.is_inference_mode_enabled)
    assert ride.result()
    with torch.no_grad():
        ride = carousel.board(torch.is_grad_enabled)
    assert not ride.result()


def test_jobs_that_end_at_once_and_board_again_starve_nobody(make: Make) -> None:
    carousel, _ = make(2)
    stopped = threading.Event()

    def again(_: Ride[None]) -> None:
        if not stopped.is_set():
            carousel.board(lambda: None).add_done_callback(again)

    for _ in range(3):
        carousel.board(lambda: None).add_done_callback(again)
    assert [sweep(carousel, 2) for _ in range(5)] == [[0, 1]] * 5
    assert carousel.ride([lambda: sweep(carousel, 2)] * 3) == [[0, 1]] * 3
    stopped.set()


def test_a_boarded_job_for_which_there_is_no_thread_fails_alone(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    carousel, _ = make(2)
    start = threading.Thread.start
    failed: list[bool] = []

    def no_more(thread: threading.Thread) -> None:
        if thread.name.startswith("slowllm-rider") and not failed:
            failed.append(True)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", no_more)
    ride = carousel.board(lambda: sweep(carousel, 2))
    with pytest.raises(RuntimeError, match="can't start new thread"):
        ride.result()
    assert carousel.board(lambda: sweep(carousel, 2)).result() == [0, 1]


# Random numbers


def random_job(carousel: Carousel, count: int) -> list[float]:
    draws = [draw()]
    for stop in range(count):
        draws.append(carousel.visit(stop % 3, "up", lambda _: draw()))
        draws.append(draw())
    return draws


def test_seeded_jobs_draw_what_they_draw_alone_and_disturb_nobody(make: Make) -> None:
    carousel, _ = make(3)
    alone = []
    for seed in range(6):
        torch.manual_seed(seed)
        alone.append(random_job(carousel, seed + 1))
    torch.manual_seed(77)
    wanted = carousel.ride([lambda: random_job(carousel, 4)] * 3), draw()

    torch.manual_seed(77)
    rides = [carousel.board(lambda s=s: random_job(carousel, s + 1), seed=s) for s in range(6)]
    found = carousel.ride([lambda: random_job(carousel, 4)] * 3)
    assert [ride.result() for ride in rides] == alone
    until(lambda: not carousel._boarding.parties)
    assert (found, draw()) == wanted


def test_a_job_without_a_seed_leaves_the_generators_alone(make: Make) -> None:
    carousel, _ = make(3)
    moved: list[str] = []
    generators = carousel._boarding.baton._generators
    get, put = generators.get, generators.set
    generators.get = lambda: moved.append("get") or get()  # type: ignore[method-assign, func-returns-value]
    generators.set = lambda state: moved.append("set") or put(state)  # type: ignore[method-assign, func-returns-value]
    assert carousel.board(lambda: sweep(carousel, 3)).result() == [0, 1, 2]
    assert moved == []


def test_a_ride_that_ends_while_boarded_jobs_go_on_gives_its_caller_the_generator_back(make: Make) -> None:
    carousel, _ = make(2)
    stopped = threading.Event()

    def loop() -> None:
        while not stopped.is_set():
            sweep(carousel, 2)

    torch.manual_seed(3)
    plain = [draw() for _ in range(3)]
    torch.manual_seed(3)
    rides = [carousel.board(loop) for _ in range(2)]
    assert [draw(), *carousel.ride([draw]), draw()] == plain
    stopped.set()
    for ride in rides:
        ride.result()


# Callbacks


def test_callbacks_run_when_the_result_is_there_and_the_seat_is_free(make: Make) -> None:
    carousel, _ = make(2)
    heard: list[Any] = []
    gate = Gate()

    def first(ride: Ride[int]) -> None:
        heard.append((ride.done(), carousel._boarding.parties, threading.current_thread().name))

    ride: Ride[int] = carousel.board(lambda: (carousel.visit(0, "up", gate), 7)[1])
    ride.add_done_callback(first)
    ride.add_done_callback(lambda ride: heard.append(ride.result()))
    gate.open.set()
    until(lambda: len(heard) == 2)
    assert heard == [(True, [], "slowllm-rider"), 7]
    ride.add_done_callback(lambda ride: heard.append(threading.current_thread()))
    assert heard[-1] is threading.current_thread()


def test_a_callback_may_board_visit_and_cancel(make: Make) -> None:
    carousel, _ = make(2)
    rides: list[Ride[list[int]]] = []
    seen: list[list[int]] = []

    def again(ended: Ride[list[int]]) -> None:
        ended.cancel()
        seen.append(ended.result())
        seen.append(sweep(carousel, 2))  # as a guest
        if len(rides) < 20:
            rides.append(carousel.board(lambda: sweep(carousel, 2)))
            rides[-1].add_done_callback(again)

    rides.append(carousel.board(lambda: sweep(carousel, 2)))
    rides[0].add_done_callback(again)
    until(lambda: len(seen) == 40)
    assert seen == [[0, 1]] * 40


def test_a_callback_that_fails_is_logged_and_keeps_no_other_from_running(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    carousel, _ = make(1)
    heard: list[int] = []
    gate = Gate()
    ride = carousel.board(lambda: carousel.visit(0, "up", gate))
    ride.add_done_callback(lambda _: 1 // 0)
    ride.add_done_callback(lambda _: heard.append(1))
    with caplog.at_level(logging.ERROR):
        gate.open.set()
        until(lambda: heard == [1])
    assert "a callback of a ride failed" in caplog.text
    assert "ZeroDivisionError" in caplog.text
    assert ride.result() is None


# Cancelling


def loop_for_ever(carousel: Carousel) -> None:
    while True:
        sweep(carousel, 2)


@pytest.mark.parametrize("times", [1, 2])
def test_a_ride_that_is_cancelled_ends_at_its_next_stop(make: Make, times: int) -> None:
    carousel, _ = make(2)
    ride = carousel.board(lambda: loop_for_ever(carousel))
    other = carousel.board(lambda: sweep(carousel, 2))
    for _ in range(times):
        ride.cancel()
    with pytest.raises(RideError, match="the ride was cancelled"):
        ride.result()
    ride.cancel()
    assert other.result() == [0, 1]
    assert not carousel._boarding.waiting


def test_a_visit_of_a_cancelled_ride_is_dismissed_without_its_stop(make: Make) -> None:
    carousel, stops = make(3)
    aboard: list[int] = []

    def first() -> list[int]:
        waits = carousel._boarding.waiting
        assert [visit.stop for visit in waits] == [2]
        waiting.cancel()
        assert waits != carousel._boarding.waiting, "dismissed at once"
        sweep(carousel, 1)
        aboard.append(len(carousel._boarding.parties))  # the other needed no stop, only the baton
        return sweep(carousel, 2)

    waiting = carousel.board(lambda: carousel.visit(2, "up", number))
    cancels = carousel.board(first)
    assert cancels.result() == [0, 1]
    assert aboard == [1]
    with pytest.raises(RideError, match="the ride was cancelled"):
        waiting.result()
    assert 2 not in stops.visited


def test_a_job_that_is_cancelled_before_it_boards_never_runs(make: Make) -> None:
    carousel, _ = make(2)
    gate, ran, heard = Gate(), list[int](), list[str]()
    first = carousel.board(lambda: carousel.visit(0, "up", gate))
    assert gate.inside.wait(60)
    ride = carousel.board(lambda: ran.append(1))
    ride.add_done_callback(lambda _: heard.append(threading.current_thread().name))
    ride.cancel()
    assert ride.done()
    assert heard == [threading.current_thread().name]
    with pytest.raises(RideError, match="the ride was cancelled"):
        ride.result()
    assert [party.ride for party in carousel._boarding.parties] == [first]
    gate.open.set()
    first.result()
    assert ran == []


def test_a_job_that_goes_on_after_it_was_cancelled_gives_its_result(make: Make) -> None:
    carousel, _ = make(2)
    begun = threading.Event()

    def job() -> str:
        begun.set()
        with pytest.raises(RideError, match="the ride was cancelled"):
            loop_for_ever(carousel)
        return "cleaned up"

    ride = carousel.board(job)
    assert begun.wait(60)
    ride.cancel()
    assert ride.result() == "cleaned up"


def test_a_rider_may_cancel_itself_and_another(make: Make) -> None:
    carousel, _ = make(2)
    rides: list[Ride[Any]] = []

    def job() -> None:
        until(lambda: len(rides) == 2)
        for ride in rides:
            ride.cancel()
        sweep(carousel, 2)

    rides.append(carousel.board(lambda: loop_for_ever(carousel)))
    rides.append(carousel.board(job))
    for ride in rides:
        with pytest.raises(RideError, match="the ride was cancelled"):
            ride.result()


# The end


def test_closing_waits_for_threads_that_have_given_their_results(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each thread is held back when it has nothing left to do but to end, until somebody waits for it.
    awaited: dict[threading.Thread, threading.Event] = defaultdict(threading.Event)
    join = threading.Thread.join

    def told(thread: threading.Thread, timeout: float | None = None) -> None:
        awaited[thread].set()
        join(thread, timeout)

    def hold(frame: FrameType, event: str, _: object) -> None:
        if event == "return" and frame.f_code is RiderThreads._run.__code__:
            awaited[threading.current_thread()].wait(60)

    carousel = Carousel(MemoryStops(2))
    monkeypatch.setattr(threading.Thread, "join", told)
    threading.setprofile(hold)
    try:
        before = set(threading.enumerate())
        rides = [carousel.board(lambda: sweep(carousel, 2)) for _ in range(3)]
        assert [ride.result() for ride in rides] == [[0, 1]] * 3
        until(lambda: not carousel._boarding._threads._busy)
        assert set(threading.enumerate()) - before, "the last one is held back"
        carousel.close()
        left = set(threading.enumerate()) - before
    finally:
        threading.setprofile(None)
        for event in awaited.values():
            event.set()
    assert left == set()


def test_closing_ends_all_rides(make: Make) -> None:
    carousel, _ = make(2)
    gate, ran = Gate(), list[int]()
    rides: list[Ride[Any]] = [
        carousel.board(lambda: (carousel.visit(0, "up", gate), sweep(carousel, 2))),
        carousel.board(lambda: sweep(carousel, 2)),
    ]
    assert gate.inside.wait(60)
    rides.append(carousel.board(lambda: ran.append(1)))
    before = set(threading.enumerate())
    closer = in_thread(carousel.close)
    until(rides[2].done)
    gate.open.set()
    closer.join()
    for ride in rides:
        with pytest.raises(RideError, match="the model was closed"):
            ride.result()
    assert ran == []
    assert not [thread for thread in set(threading.enumerate()) & before if "slowllm" in thread.name]
    with pytest.raises(RideError, match="the model was closed"):
        carousel.board(lambda: 1)


@pytest.mark.parametrize("where", ["rider", "callback", "work", "two callbacks"])
def test_whoever_closes_deadlocks_nobody(make: Make, where: str) -> None:
    carousel, _ = make(2)
    gate = Gate()
    rides: list[Ride[Any]] = [carousel.board(lambda: carousel.visit(0, "up", gate))]
    assert gate.inside.wait(60)

    def close(*_: Any) -> None:
        carousel.close()

    if where == "rider":
        rides.append(carousel.board(close))
    elif where == "work":
        rides.append(carousel.board(lambda: carousel.visit(1, "up", close)))
    for _ in range(2 if where == "two callbacks" else 1 if where == "callback" else 0):
        rides.append(carousel.board(lambda: None))
        rides[-1].add_done_callback(close)
    rides += [carousel.board(lambda: loop_for_ever(carousel)) for _ in range(2)]
    gate.open.set()
    until(lambda: all(ride.done() for ride in rides))
    for ride in rides[-2:]:
        with pytest.raises(RideError, match="the model was closed"):
            ride.result()
    carousel.close()


def test_a_forked_process_can_neither_board_nor_wait(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    carousel, _ = make(1)
    gate = Gate()
    ride = carousel.board(lambda: carousel.visit(0, "up", gate))
    own = os.getpid()
    with monkeypatch.context() as patched:
        patched.setattr(os, "getpid", lambda: own + 1)
        for call in (lambda: carousel.board(lambda: 1), ride.result):
            with pytest.raises(RideError, match="was forked after the model was loaded"):
                call()
    gate.open.set()
    ride.result()


# All together


@num_examples(40)
@given(
    depths=st.lists(st.tuples(st.integers(0, 6), st.booleans(), st.booleans()), max_size=10),
    riders=st.integers(0, 3),
)
def test_any_mixture_of_boarded_jobs_ends(depths: list[tuple[int, bool, bool]], riders: int) -> None:
    carousel = Carousel(MemoryStops(3))
    running: list[int] = []

    def job(depth: int) -> int:
        for step in range(depth):
            assert running == []
            running.append(step)
            running.pop()
            assert carousel.visit(step % 3, "up", number) == step % 3
        return depth

    rides = [(carousel.board(lambda d=depth: job(d)), cancels) for depth, cancels, _ in depths]
    for ride, cancels in rides:
        if cancels:
            ride.cancel()
    assert carousel.ride([lambda: job(4)] * riders) == [4] * riders
    for (ride, cancels), (depth, _, _) in zip(rides, depths, strict=True):
        try:
            assert ride.result() == depth
        except RideError:
            assert cancels
    carousel.close()
