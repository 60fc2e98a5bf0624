"""Generators of devices change hands together with the processor's; here others of the processor stand for them."""

from __future__ import annotations

import contextlib

import torch

from slowllm.streaming.carousel import Carousel
from slowllm.streaming.rng_state import SharedGenerators, fork
from tests.support.memory_stops import MemoryStops


def draws(generator: torch.Generator, count: int = 3) -> list[float]:
    return torch.rand(count, generator=generator).tolist()


def test_states_are_taken_and_put_back_together() -> None:
    other = torch.Generator().manual_seed(5)
    dice = SharedGenerators([other])
    torch.manual_seed(4)
    state = dice.get()
    wanted = torch.rand(3).tolist(), draws(other)
    dice.set(state)
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
