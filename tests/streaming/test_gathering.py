"""Riders at one stop wait for one another in the middle of their work, and are served together."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from slowllm.streaming.carousel import Carousel
from slowllm.streaming.gathering import gather
from tests.support.memory_stops import MemoryStops


class Sums:
    """Gives each item the sum of all that came together; keeps what came."""

    wait_seconds = 0.0

    def __init__(self) -> None:
        self.calls: list[list[Any]] = []

    def serve(self, items: Sequence[Any]) -> Sequence[Any]:
        self.calls.append(list(items))
        if "bad call" in items:
            raise ValueError("nobody is served")
        total = sum(item for item in items if isinstance(item, int))
        return [ValueError("not served") if item == "bad" else total for item in items]


def test_those_who_are_at_a_stop_are_served_together_and_in_their_order() -> None:
    sums = Sums()
    carousel = Carousel(MemoryStops(3), gathers=True)

    def job(number: int) -> Any:
        found = []
        for stop in range(3):
            found.append(carousel.visit(stop, "up", lambda weights: (gather(sums, number), gather(sums, 1))))
        return found

    try:
        results = carousel.ride([lambda number=number: job(number) for number in (10, 20, 30)])
    finally:
        carousel.close()
    assert results == [[(60, 3)] * 3] * 3
    assert sums.calls == [[10, 20, 30], [1, 1, 1]] * 3


def test_who_needs_nothing_passes_and_who_comes_alone_is_served_alone() -> None:
    sums = Sums()
    carousel = Carousel(MemoryStops(1), gathers=True)
    try:
        results = carousel.ride(
            [
                lambda: carousel.visit(0, "up", lambda weights: "passed"),
                lambda: carousel.visit(0, "up", lambda weights: gather(sums, 7)),
            ]
        )
        assert results == ["passed", 7]
        assert gather(sums, 5) == 5  # on a thread that is at no stop
    finally:
        carousel.close()


def test_an_error_is_raised_by_whom_it_concerns() -> None:
    sums = Sums()
    carousel = Carousel(MemoryStops(1), gathers=True)
    found: dict[str, Any] = {}

    def job(item: Any) -> None:
        try:
            found[item] = carousel.visit(0, "up", lambda weights: gather(sums, item))
        except ValueError as error:
            found[item] = str(error)

    try:
        carousel.ride([lambda: job("bad"), lambda: job(3)])
        assert found == {"bad": "not served", 3: 3}
        carousel.ride([lambda: job("bad call"), lambda: job(4)])
        assert found["bad call"] == found[4] == "nobody is served"
    finally:
        carousel.close()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_modes_are_those_of_each_rider_before_and_after(mode: Any) -> None:
    modes = []

    class Look(Sums):
        def serve(self, items: Sequence[Any]) -> Sequence[Any]:
            modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
            return super().serve(items)

    look = Look()
    carousel = Carousel(MemoryStops(1), gathers=True)

    def job(own: Any) -> Any:
        def work(weights: Any) -> Any:
            before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
            gather(look, 1)
            return before == (torch.is_grad_enabled(), torch.is_inference_mode_enabled()), before

        with own():
            return carousel.visit(0, "up", work)

    try:
        first, second = carousel.ride([lambda: job(mode), lambda: job(torch.no_grad)])
    finally:
        carousel.close()
    assert first[0]
    assert second[0]
    assert first[1] == (mode is torch.enable_grad, mode is torch.inference_mode)
    assert modes == [(True, False)]  # of the carousel's own thread


def test_one_rider_runs_at_a_time_when_those_that_were_served_go_on() -> None:
    sums, running, most = Sums(), [0], [0]
    carousel = Carousel(MemoryStops(2), gathers=True)
    lock = threading.Lock()

    def job() -> None:
        for stop in (0, 1):
            carousel.visit(stop, "up", lambda weights: gather(sums, 1))
            with lock:
                running[0] += 1
                most[0] = max(most[0], running[0])
            for _ in range(20000):
                pass
            with lock:
                running[0] -= 1

    try:
        carousel.ride([job] * 5)
    finally:
        carousel.close()
    assert most == [1]
    assert [len(call) for call in sums.calls] == [5, 5]


def test_a_fault_while_others_wait_in_the_middle_of_a_stop_hangs_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sums = Sums()
    carousel = Carousel(MemoryStops(1), gathers=True)

    def fault(*args: Any) -> Any:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr("slowllm.streaming.stop_service.serve_all", fault)
    try:
        with pytest.raises(RuntimeError, match="a fault of ours"):
            carousel.ride(
                [lambda: carousel.visit(0, "up", lambda weights: gather(sums, 1)) for _ in range(2)]
            )
    finally:
        carousel.close()
