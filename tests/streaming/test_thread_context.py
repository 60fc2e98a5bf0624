"""What torch and Python keep per thread reaches riders, their work and the iterable of jobs."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from slowllm.streaming.stops import Weights
from tests.support.memory_stops import Job, Make, results_of, sweep

pytestmark = pytest.mark.usefixtures("hang_fails")


variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="nothing")


def modes(*_: Any) -> tuple[bool, bool, torch.dtype | None, str]:
    autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, variable.get()


PLAIN = (True, False, None, "nothing")


def test_modes_of_the_caller_reach_riders_and_their_work(make: Make) -> None:
    carousel, _ = make(2)

    def job() -> tuple[Any, ...]:
        return modes(), carousel.visit(0, "up", modes)

    assert carousel.ride([job] * 2) == [(PLAIN, PLAIN)] * 2
    token = variable.set("the caller's")
    try:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
            wanted = (False, False, torch.float16, "the caller's")
            assert carousel.ride([job] * 2) == [(wanted, wanted)] * 2
            assert results_of(carousel.stream([job] * 2, 2)) == [(wanted, wanted)] * 2
        with torch.inference_mode():
            wanted = (False, True, None, "the caller's")
            assert carousel.ride([job] * 2) == [(wanted, wanted)] * 2
    finally:
        variable.reset(token)
    assert carousel.ride([job]) == [(PLAIN, PLAIN)]


def test_modes_of_a_rider_reach_its_work_and_no_other_rider(make: Make) -> None:
    carousel, _ = make(3)

    def work(weights: Weights) -> tuple[Any, ...]:
        found = modes()
        variable.set("set in the work")  # stays there
        return found

    def job(rider: int) -> list[tuple[Any, ...]]:
        variable.set(f"rider {rider}")
        with contextlib.ExitStack() as stack:
            if rider == 0:
                stack.enter_context(torch.inference_mode())
            if rider == 1:
                stack.enter_context(torch.no_grad())
            if rider == 2:
                stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
            return [found for stop in range(3) for found in (modes(), carousel.visit(stop, "up", work))]

    found = carousel.ride([lambda r=r: job(r) for r in range(4)])
    wanted = [(False, True, None), (False, False, None), (True, False, torch.bfloat16), (True, False, None)]
    assert found == [[(*mode, f"rider {rider}")] * 6 for rider, mode in enumerate(wanted)]
    assert modes() == PLAIN


def test_modes_of_a_guest_reach_its_work(make: Make) -> None:
    carousel, _ = make(2)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert carousel.visit(0, "up", modes) == (False, False, torch.bfloat16, "nothing")
    assert carousel.visit(0, "up", modes) == PLAIN


def test_modes_of_the_caller_reach_the_iterable(make: Make) -> None:
    carousel, _ = make(2)
    found = []

    def jobs() -> Iterator[Job]:
        for _ in range(3):
            found.append(modes())
            yield lambda: sweep(carousel, 2)

    token = variable.set("the caller's")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        list(carousel.stream(jobs(), 1))
    variable.reset(token)
    assert found == [(True, False, torch.bfloat16, "the caller's")] * 3
