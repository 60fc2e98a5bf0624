"""Riders that fail, and stops that cannot be had."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import time
import weakref

import pytest

from slowllm.errors import RideError
from slowllm.streaming.stops import Passage
from tests.support.memory_stops import Big, Make, in_thread, number, sweep, until

pytestmark = pytest.mark.usefixtures("hang_fails")


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


def test_a_job_that_is_none_is_an_error_and_not_the_end_of_the_list(make: Make) -> None:
    carousel, _ = make(2)
    with pytest.raises(TypeError, match="not callable") as caught:
        carousel.ride([lambda: 1, None, lambda: 3])  # type: ignore[list-item]
    assert caught.value.__notes__ == ["raised by rider 1 of 3"]


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
