"""What threads fetch reaches the visitor, and so does what keeps them from it."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from slowllm.errors import RideError
from slowllm.streaming.prefetch import PrefetchedStops


class Numbers(PrefetchedStops[int, int]):
    """Stops that are fetched by writing down their numbers; each fails as often as it is told to."""

    def __init__(self, failing: dict[int, int] | None = None, num_threads: int = 2) -> None:
        super().__init__(9, [f"number-{number}" for number in range(num_threads)])
        self.fetched: list[int] = []
        self.under_way: set[int] = set()
        self.failing = failing or {}
        self.gate = threading.Event()
        self.gate.set()
        self._start_threads()

    def _find(self, stop: int) -> int | None:
        return stop if stop in self.fetched else None

    def _next_work(self) -> int | None:
        busy = {*self.fetched, *self.under_way, *self._errors}
        stop = next((stop for stop in self._wanted if stop not in busy), None)
        self.under_way |= {stop} - {None}
        return stop

    def _work(self) -> None:
        while (stop := self._wait_for_work()) is not None:
            self.gate.wait()
            if stop == 8:
                raise MemoryError("the thread ends")
            with self._changed:
                self.under_way.discard(stop)
                if self.failing.get(stop):
                    self.failing[stop] -= 1
                    self._errors[stop] = OSError(f"{stop} failed")
                else:
                    self.fetched.append(stop)
                self._changed.notify_all()

    @contextlib.contextmanager
    def visit(self, stop: int, upcoming: Sequence[int] = ()) -> Iterator[Any]:
        with self._changed:
            yield {stop: self._wait_for(stop, upcoming)}

    def wait_until(self, *stops: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: {*stops} <= {*self.fetched, *self._errors}, 20)

    def close(self) -> None:
        self._end_threads()


def test_stops_are_fetched_in_the_order_in_which_they_are_wanted() -> None:
    with contextlib.closing(Numbers(num_threads=1)) as stops:
        with stops.visit(5, [3, 3, 5, 1]):
            pass
        stops.wait_until(3, 1)
        assert stops.fetched == [5, 3, 1]


def test_an_error_reaches_its_visitor_and_is_tried_again_at_the_next_visit_only() -> None:
    with contextlib.closing(Numbers({2: 2})) as stops:
        for _ in range(2):
            with pytest.raises(OSError, match="2 failed"), stops.visit(2):
                pass
        with stops.visit(2):
            pass
        assert not stops.failing[2]


def test_what_failed_ahead_of_need_is_tried_once_more() -> None:
    with contextlib.closing(Numbers({2: 1})) as stops:
        with stops.visit(1, [2, 3]):
            pass
        stops.wait_until(2, 3)
        with stops.visit(3, [2]):
            pass
        assert 2 not in stops.fetched, "only whoever comes for it has it tried again"
        with stops.visit(2):
            pass


def test_an_error_that_ends_a_thread_reaches_every_visitor() -> None:
    with contextlib.closing(Numbers(num_threads=1)) as stops:
        for stop in (8, 1):
            with pytest.raises(MemoryError, match="the thread ends"), stops.visit(stop):
                pass


def test_closing_ends_a_visitors_wait() -> None:
    stops, errors = Numbers(), list[BaseException]()
    stops.gate.clear()

    def visit() -> None:
        try:
            with stops.visit(1):
                pass
        except RideError as error:
            errors.append(error)

    visitor = threading.Thread(target=visit)
    visitor.start()
    assert stops._end_threads(patience_seconds=0) in (1, 2)
    visitor.join(20)
    assert [str(error) for error in errors] == ["the model was closed"]
    stops.gate.set()
    assert not stops._end_threads()
    with pytest.raises(RideError, match="the model was closed"), stops.visit(1):
        pass


def test_a_forked_child_knows_that_it_has_no_threads() -> None:
    with contextlib.closing(Numbers()) as stops:
        assert not stops._is_forked()
        stops._process = os.getpid() + 1
        assert stops._is_forked()
        stops._process = os.getpid()
