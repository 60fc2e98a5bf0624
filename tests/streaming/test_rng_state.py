"""Random numbers of riders, on the processor and on devices; here other generators of the processor stand for a device's."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from slowllm.streaming.carousel import Carousel
from slowllm.streaming.rng_state import SharedGenerators, fork
from tests.support.memory_stops import Job, Make, MemoryStops, draw, in_thread, results_of, sweep, until

pytestmark = pytest.mark.usefixtures("hang_fails")


def draws(generator: torch.Generator, count: int = 3) -> list[float]:
    return torch.rand(count, generator=generator).tolist()


def test_states_are_taken_and_put_back_together() -> None:
    other = torch.Generator().manual_seed(5)
    generators = SharedGenerators([other])
    torch.manual_seed(4)
    state = generators.get()
    wanted = torch.rand(3).tolist(), draws(other)
    generators.set(state)
    assert (torch.rand(3).tolist(), draws(other)) == wanted


def test_a_fork_seeds_all_by_one_draw() -> None:
    first, second = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    plain = fork(first)
    generator, state = SharedGenerators([torch.Generator(), torch.Generator()]).forked(second)
    assert torch.equal(first.get_state(), second.get_state())
    assert torch.equal(plain.get_state(), generator.get_state())
    assert all(torch.equal(part, plain.get_state()) for part in state)
    assert len(state) == 3


def test_each_rider_draws_from_a_device_as_if_it_were_alone() -> None:
    device = torch.Generator().manual_seed(7)

    def rider(carousel: Carousel, seed: int | None) -> list[float]:
        if seed is not None:
            device.manual_seed(seed)  # as torch.manual_seed does for every device
        found = []
        for stop in range(3):
            carousel.visit(stop, "up", lambda weights: None)
            found += draws(device, 1)
        return found

    with contextlib.closing(Carousel(MemoryStops(3), generators=SharedGenerators([device]))) as carousel:
        alone = [carousel.ride([lambda n=n: rider(carousel, n)])[0] for n in (1, 2)]
        before = device.get_state()
        own, *together = carousel.ride([lambda n=n: rider(carousel, n) for n in (None, 1, 2)])
        after = draws(device)
        device.set_state(before)
        assert own == draws(device, 1) + draws(device, 1) + draws(device, 1), "the first has the caller's"
        assert after == draws(device), "and the caller goes on from there"
        assert together == alone


# Riders


def test_seeded_riders_draw_what_they_draw_alone(make: Make) -> None:
    carousel, _ = make(3)

    def job(seed: int) -> list[float]:
        torch.manual_seed(seed)
        draws = []
        for _ in range(seed % 3 + 1):
            for stop in range(3):
                draws.append(draw())
                carousel.visit(stop, "up", lambda _: None)
        return [*draws, draw()]

    jobs = [lambda seed=seed: job(seed) for seed in range(8)]
    alone = [job() for job in jobs]
    assert carousel.ride(jobs) == alone
    assert carousel.ride(jobs, max_riders=3) == alone
    assert results_of(carousel.stream(jobs, 5)) == alone
    assert len({draws[0] for draws in alone}) == 8


def test_the_work_of_a_rider_draws_from_its_generator(make: Make) -> None:
    carousel, _ = make(2)

    def job(seed: int) -> list[float]:
        torch.manual_seed(seed)
        return [carousel.visit(stop, "up", lambda _: draw()) for stop in (0, 1, 0, 1)]

    jobs = [lambda seed=seed: job(seed) for seed in range(4)]
    assert carousel.ride(jobs) == [job() for job in jobs]


def test_unseeded_riders_draw_different_numbers_which_the_callers_seed_decides(make: Make) -> None:
    carousel, _ = make(2)

    def job() -> list[float]:
        first = draw()
        sweep(carousel, 2)
        return [first, draw()]

    def rides() -> list[list[float]]:
        torch.manual_seed(5)
        return carousel.ride([job] * 6) + carousel.ride([job] * 6)

    once, again = rides(), rides()
    assert once == again
    assert len(set(itertools.chain(*once))) == 24


@pytest.mark.parametrize("kind", ["ride", "stream"])
def test_unseeded_riders_of_later_rides_draw_other_numbers(make: Make, kind: str) -> None:
    # Even where the first rider draws nothing, and the caller's generator would stand where it stood.
    carousel, _ = make(2)
    found: list[float] = []
    for _ in range(12):
        jobs: list[Job] = [lambda: None, draw, draw, draw]
        results = carousel.ride(jobs) if kind == "ride" else results_of(carousel.stream(jobs, 2))
        found += results[1:]
    assert len(set(found)) == 36


def test_a_single_rider_draws_what_a_plain_call_would_and_the_caller_goes_on(make: Make) -> None:
    carousel, _ = make(2)

    def job() -> float:
        sweep(carousel, 2)
        return draw()

    torch.manual_seed(1)
    plain = [draw() for _ in range(6)]
    torch.manual_seed(1)
    assert [draw(), carousel.ride([job])[0], draw(), carousel.ride([job])[0], draw(), draw()] == plain
    torch.manual_seed(1)
    found = carousel.ride([job] * 3)
    assert found[0] == plain[0]
    assert len({*found, draw()}) == 4


def test_riders_of_two_rides_at_once_draw_different_numbers(make: Make) -> None:
    carousel, _ = make(2)
    others: list[float] = []

    def first() -> float:
        threads.append(in_thread(lambda: others.extend(carousel.ride([draw] * 2))))
        until(lambda: len(carousel._boarding.parties) == 2)
        sweep(carousel, 2)
        return draw()

    threads: list[threading.Thread] = []
    found = carousel.ride([first, draw])
    threads[0].join()
    assert len({*found, *others}) == 4


def test_an_iterable_goes_on_with_the_callers_generator(make: Make) -> None:
    carousel, _ = make(2)
    drawn: list[float] = []

    def jobs() -> Iterator[Callable[[], float]]:
        for _ in range(5):
            drawn.append(draw())
            yield lambda: sweep(carousel, 2) and draw()

    torch.manual_seed(2)
    plain = [draw() for _ in range(5)]
    torch.manual_seed(2)
    riders = results_of(carousel.stream(jobs(), 2))
    assert drawn == plain
    assert len({*riders, *plain, draw()}) == 11


def test_another_default_device_does_not_disturb_the_seeds(make: Make) -> None:
    carousel, _ = make(2)
    with torch.device("meta"):
        found = carousel.ride([lambda: float(torch.rand((), device="cpu"))] * 3)
    assert len(set(found)) == 3
