"""Torch's global generators, as one thing that changes hands: the processor's, and those of the devices in use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# What each generator will draw next, the processor's first.
RandomState = tuple[Tensor, ...]


class SharedGenerators:
    """The generators from which sampling draws.

    Args:
        others: global generators of devices, beside the processor's.
    """

    def __init__(self, others: Sequence[torch.Generator] = ()) -> None:
        self._others = tuple(others)

    def get(self) -> RandomState:
        """Return what the generators will draw next."""
        return torch.get_rng_state(), *(other.get_state() for other in self._others)

    def set(self, state: RandomState) -> None:
        """Let the generators go on from a state."""
        first, *rest = state
        torch.set_rng_state(first)
        for other, own in zip(self._others, rest, strict=True):
            other.set_state(own)

    def forked(self, source: torch.Generator) -> tuple[torch.Generator, RandomState]:
        """Return a generator that is seeded by one draw from another, and a state in which all are seeded so."""
        generator = fork(source)
        seed = generator.initial_seed()
        seeded = (torch.Generator(other.device).manual_seed(seed) for other in self._others)
        return generator, (generator.get_state(), *(other.get_state() for other in seeded))


def fork(generator: torch.Generator) -> torch.Generator:
    """Make a generator that is seeded by one draw from another."""
    # The device is named because the caller may have made another one the default.
    seed = torch.randint(1 << 62, (), dtype=torch.int64, device="cpu", generator=generator)
    return torch.Generator("cpu").manual_seed(int(seed))
