"""The states of torch's global random generators (the CPU's, and those of the devices in use) as one value."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# The state of each generator, the CPU's first.
RandomState = tuple[Tensor, ...]


class SharedGenerators:
    """The global generators from which sampling draws.

    Args:
        others: those of devices, beside the CPU's.
    """

    def __init__(self, others: Sequence[torch.Generator] = ()) -> None:
        self._others = tuple(others)

    def get(self) -> RandomState:
        """Return the state of all generators."""
        return torch.get_rng_state(), *(other.get_state() for other in self._others)

    def set(self, state: RandomState) -> None:
        """Put all generators into a state."""
        cpu_state, *other_states = state
        torch.set_rng_state(cpu_state)
        for other, other_state in zip(self._others, other_states, strict=True):
            other.set_state(other_state)

    def seeded(self, seed: int) -> RandomState:
        """Return the state of all generators after `torch.manual_seed(seed)`."""
        states = (torch.Generator(other.device).manual_seed(seed).get_state() for other in self._others)
        return torch.Generator("cpu").manual_seed(seed).get_state(), *states

    def forked(self, source: torch.Generator) -> tuple[torch.Generator, RandomState]:
        """Return a generator that is seeded by one draw from `source`, and a state in which all have that seed."""
        generator = fork(source)
        return generator, self.seeded(generator.initial_seed())


def at_state(state: RandomState) -> torch.Generator:
    """Return a generator of the CPU, beside the global one, in a state of that one."""
    generator = torch.Generator("cpu")
    generator.set_state(state[0])
    return generator


def past_seeds(state: RandomState) -> RandomState:
    """Return the state after the draw by which `fork` seeds others, so that their seeds do not come again."""
    generator = at_state(state)
    fork(generator)
    return generator.get_state(), *state[1:]


def fork(source: torch.Generator) -> torch.Generator:
    """Return a generator that is seeded by one draw from `source`."""
    # The device is named because the caller may have made another one the default.
    seed = torch.randint(1 << 62, (), dtype=torch.int64, device="cpu", generator=source)
    return torch.Generator("cpu").manual_seed(int(seed))
