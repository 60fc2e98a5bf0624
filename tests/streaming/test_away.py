"""Riders that wait for something elsewhere, while the others run."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slowllm.errors import RideError
from slowllm.streaming.carousel import Carousel
from slowllm.streaming.ride import Ride
from tests.support.memory_stops import Make, MemoryStops, draw, in_thread, number, results_of, sweep, until
from tests.support.properties import num_examples

pytestmark = pytest.mark.usefixtures("hang_fails")


class Alone:
    """Fails where two riders run their own code, or the work of a visit, at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        assert self._lock.acquire(blocking=False), "two at a time"
        try:
            yield
        finally:
            self._lock.release()


class Elsewhere:
    """The work of a rider that is away until it is told to come back."""

    def __init__(self) -> None:
        self.begun, self.over = threading.Event(), threading.Event()

    def __call__(self) -> str:
        self.begun.set()
        assert self.over.wait(60)
        return "from elsewhere"


# Who runs meanwhile


def test_three_riders_are_away_at_the_same_time(make: Make) -> None:
    carousel, _ = make(3)
    together = threading.Barrier(3, timeout=60)  # passed only by three who wait at once
    alone = Alone()

    def job() -> list[int]:
        seen = []
        for _ in range(4):
            for stop in range(3):
                with alone():
                    pass
                carousel.away(together.wait)
                with alone():
                    pass
                seen.append(carousel.visit(stop, "up", number))
        return seen

    assert carousel.ride([job] * 3) == [[0, 1, 2] * 4] * 3
    rides = [carousel.board(job) for _ in range(3)]
    assert [ride.result() for ride in rides] == [[0, 1, 2] * 4] * 3
    assert len(results_of(carousel.stream([job] * 3, 3))) == 3


def test_others_ride_and_guests_visit_while_a_rider_is_away(make: Make, endless_patience: None) -> None:
    carousel, _ = make(3)
    elsewhere = Elsewhere()

    def job() -> list[Any]:
        return [carousel.visit(1, "up", number), carousel.away(elsewhere), *sweep(carousel, 3)]

    ride = carousel.board(job)
    assert elsewhere.begun.wait(60)
    assert sweep(carousel, 3, back=True) == [0, 1, 2, 2, 1, 0]
    assert carousel.ride([lambda: sweep(carousel, 3)] * 2) == [[0, 1, 2]] * 2
    assert not ride.done()
    elsewhere.over.set()
    assert ride.result() == [1, "from elsewhere", 0, 1, 2]


def test_the_carousel_sleeps_while_all_are_away(make: Make) -> None:
    carousel, _ = make(2)
    patience: list[float | None] = []
    changed, own = carousel._boarding.changed, carousel._thread
    wait = changed.wait

    def recorded(timeout: float | None = None) -> bool:
        if threading.current_thread() is own:
            patience.append(timeout)
        return wait(timeout)

    changed.wait = recorded  # type: ignore[method-assign]
    works = [Elsewhere() for _ in range(2)]
    rides = [carousel.board(lambda w=work: carousel.away(w)) for work in works]
    for work in works:
        assert work.begun.wait(60)
    assert set(patience) == {None}, "it waits until it is woken"
    for work, ride in zip(works, rides, strict=True):
        work.over.set()
        assert ride.result() == "from elsewhere"


def test_riders_that_return_run_in_their_order_before_the_next_stop(make: Make) -> None:
    carousel, stops = make(3)
    works, ran = [Elsewhere() for _ in range(4)], list[int]()
    inside, go_on = threading.Event(), threading.Event()

    def job(rider: int) -> int:
        carousel.away(works[rider])
        ran.append(rider)
        return carousel.visit(2, "up", number)

    def hold(_: Any) -> None:
        inside.set()
        assert go_on.wait(60)

    rides = [carousel.board(lambda r=r: job(r)) for r in range(4)]
    for work in works:
        assert work.begun.wait(60)
    guest = in_thread(lambda: (carousel.visit(0, "up", hold), carousel.visit(1, "up", number)))
    assert inside.wait(60)
    for returned, work in enumerate(reversed(works), 1):  # the last first
        work.over.set()
        until(lambda n=returned: len(carousel._boarding.returning) == n)
    go_on.set()
    assert [ride.result() for ride in rides] == [2] * 4
    guest.join()
    assert ran == [0, 1, 2, 3]
    assert stops.visited in ([0, 1, 2], [0, 2, 1])  # the guest may come too late for the way up


def test_a_rider_that_is_away_again_and_again_starves_nobody(make: Make) -> None:
    carousel, _ = make(2)
    stopped = threading.Event()

    def loop() -> None:
        while not stopped.is_set():
            carousel.away(lambda: None)

    rides = [carousel.board(loop) for _ in range(3)]
    assert carousel.ride([lambda: sweep(carousel, 2)] * 2) == [[0, 1]] * 2
    stopped.set()
    for ride in rides:
        ride.result()


def test_a_rider_may_wait_for_another_ride_while_it_is_away(make: Make) -> None:
    carousel, _ = make(2)
    other = carousel.ride([lambda: carousel.away(carousel.board(lambda: sweep(carousel, 2)).result)])
    assert other == [[0, 1]]


# Where it is a plain call


def test_a_guest_just_does_the_work(make: Make) -> None:
    carousel, _ = make(1)
    assert carousel.away(threading.current_thread) is threading.current_thread()


def test_a_rider_that_is_away_already_just_does_the_work(make: Make) -> None:
    carousel, _ = make(1)
    assert carousel.ride([lambda: carousel.away(lambda: carousel.away(lambda: 3))]) == [3]


# Calls that are refused


def test_a_rider_that_is_away_may_not_call_the_model(make: Make) -> None:
    carousel, _ = make(2)

    def job() -> list[int]:
        with pytest.raises(RideError, match=r"inside the work of away\(\), where a rider may not run"):
            carousel.away(lambda: carousel.visit(0, "up", number))
        with pytest.raises(RideError, match=r"ride\(\) was called inside a rider"):
            carousel.away(lambda: carousel.ride([lambda: 1]))
        return sweep(carousel, 2)

    assert carousel.ride([job]) == [[0, 1]]


def test_the_carousels_own_thread_may_not_wait(make: Make) -> None:
    carousel, _ = make(2)
    with pytest.raises(RideError, match=r"away\(\) was called inside a block"):
        carousel.visit(0, "up", lambda _: carousel.away(lambda: 1))


# Errors and ends


def test_an_error_of_the_work_is_raised_when_the_rider_runs_again(make: Make) -> None:
    carousel, _ = make(2)
    alone = Alone()

    def job(rider: int) -> list[int]:
        def fail() -> None:
            raise OSError(f"socket {rider}")

        for _ in range(5):
            with pytest.raises(OSError, match=f"^socket {rider}$"):
                carousel.away(fail)
            with alone():
                pass
        return [carousel.visit(stop, "up", number) for stop in range(2)]

    assert carousel.ride([lambda r=r: job(r) for r in range(4)]) == [[0, 1]] * 4


@pytest.mark.parametrize("fails", [False, True])
def test_a_ride_that_is_cancelled_while_it_is_away_ends_when_it_comes_back(make: Make, fails: bool) -> None:
    carousel, _ = make(2)
    elsewhere = Elsewhere()

    def work() -> None:
        elsewhere()
        if fails:
            raise OSError("the socket")

    ride = carousel.board(lambda: carousel.away(work))
    assert elsewhere.begun.wait(60)
    ride.cancel()
    assert sweep(carousel, 2) == [0, 1]
    assert not ride.done()
    elsewhere.over.set()
    with pytest.raises(RideError, match="the ride was cancelled") as caught:
        ride.result()
    assert isinstance(caught.value.__context__, OSError) == fails


def test_a_rider_that_was_cancelled_does_not_go_away(make: Make) -> None:
    carousel, _ = make(1)
    rides: list[Ride[Any]] = []

    def job() -> None:
        until(lambda: bool(rides))
        rides[0].cancel()
        carousel.away(lambda: pytest.fail("the work was done"))

    rides.append(carousel.board(job))
    with pytest.raises(RideError, match="the ride was cancelled"):
        rides[0].result()


def test_closing_waits_for_no_rider_that_is_away(make: Make) -> None:
    carousel, _ = make(2)
    works = [Elsewhere() for _ in range(3)]
    rides = [carousel.board(lambda w=work: carousel.away(w)) for work in works]
    for work in works:
        assert work.begun.wait(60)
    carousel.close()
    assert not any(ride.done() for ride in rides)
    for work in works:
        work.over.set()
    for ride in rides:
        with pytest.raises(RideError, match="the model was closed"):
            ride.result()
    until(lambda: not any(thread.name.startswith("slowllm-rider") for thread in threading.enumerate()))


def test_closing_reaches_a_rider_that_waits_for_the_baton(make: Make) -> None:
    carousel, _ = make(2)
    elsewhere, inside, go_on = Elsewhere(), threading.Event(), threading.Event()

    def hold(_: Any) -> None:
        inside.set()
        assert go_on.wait(60)

    ride = carousel.board(lambda: carousel.away(elsewhere))
    assert elsewhere.begun.wait(60)
    guest = in_thread(lambda: carousel.visit(0, "up", hold))
    assert inside.wait(60)
    elsewhere.over.set()
    until(lambda: bool(carousel._boarding.returning))
    closer = in_thread(carousel.close)
    with pytest.raises(RideError, match="the model was closed"):
        ride.result()
    go_on.set()
    guest.join()
    closer.join()
    until(lambda: not any(thread.name.startswith("slowllm-rider") for thread in threading.enumerate()))


def test_a_stream_that_is_closed_early_waits_for_its_riders_that_are_away(make: Make) -> None:
    carousel, _ = make(2)
    elsewhere = Elsewhere()
    jobs: list[Callable[[], Any]] = [lambda: 1, lambda: carousel.away(elsewhere)]
    stream = carousel.stream(jobs, 2)
    assert next(stream)[1] == 1
    assert elsewhere.begun.wait(60)
    closer = in_thread(stream.close)  # type: ignore[attr-defined]
    until(lambda: carousel._boarding.parties[0].cancelled)
    assert closer.is_alive()
    elsewhere.over.set()
    closer.join()


# Random mixtures


def test_a_seeded_rider_draws_what_it_draws_alone(make: Make) -> None:
    carousel, _ = make(3)

    def job(seed: int) -> list[float]:
        torch.manual_seed(seed)
        draws = [draw()]
        for stop in range(3):
            carousel.away(lambda: None)
            draws.append(draw())
            draws.append(carousel.visit(stop, "up", lambda _: draw()))
        return draws

    alone = [job(seed) for seed in range(6)]
    assert carousel.ride([lambda s=s: job(s) for s in range(6)]) == alone
    assert results_of(carousel.stream([lambda s=s: job(s) for s in range(6)], 3)) == alone


steps = st.sampled_from(["visit", "down", "away", "with a guest", "fails", "draw"])
plans = st.lists(st.lists(st.tuples(steps, st.integers(0, 3)), max_size=8), max_size=6)


@num_examples(120)
@given(plans=plans, kinds=st.lists(st.sampled_from(["ride", "board", "stream"]), min_size=6, max_size=6))
def test_any_mixture_of_visits_and_aways_ends(plans: list[list[tuple[str, int]]], kinds: list[str]) -> None:
    alone = Alone()

    def job(plan: list[tuple[str, int]], carousel: Carousel | None, seed: int) -> list[Any]:
        def elsewhere(stop: int) -> int:
            found: list[int] = []
            assert carousel is not None
            in_thread(lambda: found.append(carousel.visit(stop, "up", number))).join()
            return found[0]

        def fail(stop: int) -> None:
            raise OSError(stop)

        def visited(weights: Any) -> int:
            with alone():
                return number(weights)

        found: list[Any] = []
        with alone():
            torch.manual_seed(seed)
        for kind, stop in plan:
            with alone():
                found.append(draw() if kind == "draw" else kind)
            if carousel is None:
                found.append(stop)
            elif kind in ("visit", "down"):
                found.append(carousel.visit(stop, "down" if kind == "down" else "up", visited))
            elif kind == "away":
                found.append(carousel.away(lambda stop=stop: stop))
            elif kind == "with a guest":
                found.append(carousel.away(lambda stop=stop: elsewhere(stop)))
            elif kind == "fails":
                with pytest.raises(OSError, match=str(stop)):
                    carousel.away(lambda stop=stop: fail(stop))
                found.append(stop)
            else:
                found.append(stop)
        return found

    wanted = [job(plan, None, seed) for seed, plan in enumerate(plans)]
    with contextlib.closing(Carousel(MemoryStops(4))) as carousel:
        jobs = {
            kind: [
                (lambda p=plan, s=seed: job(p, carousel, s), seed)
                for seed, (plan, own) in enumerate(zip(plans, kinds, strict=False))
                if own == kind
            ]
            for kind in ("ride", "board", "stream")
        }
        boarded = [carousel.board(one, seed) for one, seed in jobs["board"]]
        streamed: list[Any] = []
        thread = in_thread(
            lambda: streamed.extend(results_of(carousel.stream([one for one, _ in jobs["stream"]], 2)))
        )
        found = dict(
            zip(
                (seed for _, seed in jobs["ride"]),
                carousel.ride([one for one, _ in jobs["ride"]]),
                strict=True,
            )
        )
        thread.join()
        found |= dict(zip((seed for _, seed in jobs["stream"]), streamed, strict=True))
        found |= {seed: ride.result() for (_, seed), ride in zip(jobs["board"], boarded, strict=True)}
    assert found == dict(enumerate(wanted))
