"""Schedules of all kinds, random and exhaustive, end as foreseen."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slowllm.streaming.carousel import Carousel
from slowllm.streaming.stops import Direction
from tests.support.memory_stops import Make, MemoryStops, draw, in_thread, number, results_of
from tests.support.properties import num_examples

pytestmark = pytest.mark.usefixtures("hang_fails")


Plan = list[tuple[str, int]]


def run_plan(carousel: Carousel, plan: Plan) -> list[Any]:
    """Do as the plan says: one entry of the result for each step."""
    found: list[Any] = []
    for step, value in plan:
        if step in ("up", "down"):
            direction: Direction = "up" if step == "up" else "down"
            found.append(carousel.visit(value, direction, number, comes_back=bool(value % 2)))
        elif step == "seed":
            torch.manual_seed(value)
            found.append(value)
        elif step == "draw":
            found.append(draw())
        elif step == "thread":
            of_thread: list[int] = []
            in_thread(lambda: of_thread.append(carousel.visit(value, "up", number))).join()
            found += of_thread
        else:
            raise ValueError(str(value))
    return found


def foresee(plan: Plan) -> list[Any] | str:
    """What the plan comes to without a carousel; of a plan that fails, the error's message."""
    found: list[Any] = []
    generator = torch.Generator()
    for step, value in plan:
        if step == "raise":
            return str(value)
        if step == "seed":
            generator.manual_seed(value)
        found.append(float(torch.rand((), generator=generator)) if step == "draw" else value)
    return found


def check(carousel: Carousel, plans: list[Plan], max_riders: int, as_stream: bool) -> None:
    wanted = [foresee(plan) for plan in plans]
    failures = [plan for plan in wanted if isinstance(plan, str)]
    jobs = [lambda plan=plan: run_plan(carousel, plan) for plan in plans]
    found: list[Any] = []

    def ride() -> None:
        found.extend(
            results_of(carousel.stream(iter(jobs), max_riders))
            if as_stream
            else carousel.ride(jobs, max_riders)
        )

    if not failures:
        ride()
        assert found == wanted
        return
    with pytest.raises(ValueError, match=f"^{failures[0]}") as caught:
        ride()
    assert caught.value.__notes__[0].startswith(f"raised by rider {wanted.index(failures[0])} of ")
    if as_stream:  # what was yielded before is lost in extend(); a list of the same length says enough
        return
    more = f"; {len(failures) - 1} more failed" if len(failures) > 1 else ""
    assert caught.value.__notes__[0].endswith(f" of {len(plans)}{more}")


def random_plan(rng: random.Random, num_stops: int) -> Plan:
    plan: Plan = [("seed", rng.randrange(100))] if rng.random() < 0.3 else []
    drawing = bool(plan)
    for _ in range(rng.randrange(4)):
        kind = rng.choice(["sweep", "sweep", "training", "jump", "thread", "draw", "raise"])
        depth = rng.randrange(num_stops) + 1
        if kind == "sweep":
            plan += [("up", stop) for stop in range(depth)]
        elif kind == "training":
            plan += [("up", stop) for stop in range(depth)] + [("down", s) for s in reversed(range(depth))]
        elif kind == "jump":
            plan += [(rng.choice(["up", "down"]), rng.randrange(num_stops)) for _ in range(3)]
        elif kind == "thread" and rng.random() < 0.3:
            plan.append(("thread", rng.randrange(num_stops)))
        elif kind == "draw" and drawing:
            plan.append(("draw", 0))
        elif kind == "raise" and rng.random() < 0.2:
            plan.append(("raise", rng.randrange(1000, 2000)))
    return plan


@pytest.mark.parametrize("num_schedules", [60, pytest.param(1000, marks=pytest.mark.long)])
def test_random_schedules_end_as_foreseen(make: Make, no_patience: None, num_schedules: int) -> None:
    rng = random.Random(20240607)
    carousels = [make(num_stops)[0] for num_stops in (1, 2, 3, 5, 8)]
    done = threading.Event()

    def guest(carousel: Carousel, seed: int) -> None:
        own = random.Random(seed)
        while not done.is_set():
            plan = [step for step in random_plan(own, carousel._stops.num_stops) if step[0] in ("up", "down")]
            assert run_plan(carousel, plan) == foresee(plan)
            done.wait(0.002)

    guests = [in_thread(lambda c=c, n=n: guest(c, n)) for n, c in enumerate(carousels[1:4])]
    try:
        for _ in range(num_schedules):
            carousel = rng.choice(carousels)
            plans = [random_plan(rng, carousel._stops.num_stops) for _ in range(rng.randrange(1, 9))]
            check(carousel, plans, rng.randrange(1, 9), rng.random() < 0.3)
    finally:
        done.set()
        for thread in guests:
            thread.join()
    assert all(carousel._boarding.over is None for carousel in carousels)


def sweeps(depths: list[tuple[int, bool]]) -> Plan:
    plan: Plan = []
    for depth, back in depths:
        plan += [("up", stop) for stop in range(depth)]
        plan += [("down", stop) for stop in reversed(range(depth))] if back else []
    return plan


def num_passages(plan: Plan) -> int:
    """Return how many a rider needs that is alone: one for a step, and one for both ways at a stop where it turns."""
    count, passed = 0, set[tuple[str, int]]()
    for way, stop in plan:
        if (way, stop) in passed or stop not in {at for _, at in passed}:
            count, passed = count + 1, set()
        passed.add((way, stop))
    return count


riders = st.lists(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=3).map(sweeps), max_size=6)


@num_examples(150)
@given(plans=riders, max_riders=st.integers(1, 6))
def test_any_mixture_of_sweeps_is_served_in_few_passages(plans: list[Plan], max_riders: int) -> None:
    carousel = Carousel(MemoryStops(4))
    check(carousel, plans, max_riders, as_stream=False)
    carousel.close()
    assert carousel.totals.num_passed == sum(map(len, plans))
    alone = list(map(num_passages, plans))
    assert max(alone, default=0) <= carousel.totals.num_passages <= sum(alone)
