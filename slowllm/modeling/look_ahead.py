"""Guess the experts of the next block: ask its router before its turn, with what comes to the experts of this one.

What a block adds to the hidden states is small beside what they are, so a router often chooses the same before the block and behind
it. How often is measured for each block, with guesses that nothing is read for; where it is too seldom, none is read for later, and
the measuring goes on. Reads nothing itself, and knows no files.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slowllm.modeling.routers import KeptRouter

# Of more rows the union of the guesses has most experts that are asked for often, which are in memory anyway.
FEW_ROWS = 4
# At this share of right guesses a read in vain is as frequent as a read that nobody has to wait for.
LEAST_RATE = 0.5
# Before so many guesses of a block's experts have been compared, none is read for.
NUM_TRIALS = 4
# The weight of the newest comparison in the average.
NEWEST = 1 / 16


@dataclass
class GuessRate:
    """How often guesses were right, as an average that forgets.

    Attributes:
        rate: the share of experts guessed that were then chosen; that of experts in memory does not count.
        num_compared: guesses so far.
    """

    rate: float = 0.0
    num_compared: int = 0

    @property
    def is_trusted(self) -> bool:
        """Whether guesses are worth a read."""
        return self.num_compared >= NUM_TRIALS and self.rate >= LEAST_RATE

    def note(self, share: float) -> None:
        """Count a guess of which so much was right."""
        self.num_compared += 1
        self.rate += (share - self.rate) * max(1 / self.num_compared, NEWEST)


@dataclass(frozen=True)
class _Guess:
    """What was guessed of a module: experts that were not in memory, in the order of their likelihood, and whether they are read."""

    units: tuple[int, ...]
    is_read: bool


class LookAhead:
    """What the routers of next blocks are expected to choose.

    Args:
        routers: of each module of experts, in the order of the blocks; None of one that cannot be asked by itself.
        modules: the units of each one's experts.
        most: units that may be read ahead at a time.
        is_kept: whether a unit is in memory to stay.
    Attributes:
        num_guessed: experts that were guessed to be needed, and were not in memory.
        num_right: those of them that were then chosen.
        num_read: of those guessed, those that were given out to be read.
        num_read_right: those of them that were then chosen.
    """

    def __init__(
        self,
        routers: Sequence[KeptRouter | None],
        modules: Sequence[range],
        most: int,
        is_kept: Callable[[int], bool],
    ) -> None:
        self.num_guessed = self.num_right = self.num_read = self.num_read_right = 0
        firsts = [units.start for units in modules]
        self._units = dict(zip(firsts, modules, strict=True))
        self._routers = dict(zip(firsts, routers, strict=True))
        self._following = dict(itertools.pairwise(firsts))
        self._most, self._is_kept = most, is_kept
        self._rates = {first: GuessRate() for first in firsts}
        self._guesses: dict[int, _Guess] = {}

    def keep(self, first: int) -> None:
        """Keep copies of the weights of a module's router, which are in memory now, unless it was done before."""
        router = self._routers[first]
        if router is not None and not router.is_kept:
            router.keep()

    def watch(self, first: int, note: Callable[[Tensor | None], None]) -> None:
        """Have what a guess is made from noted on its way to the experts of a module: hidden states before the norm.

        Args:
            first: the unit of the module's first expert.
            note: called with (B, T, H) or (T, H), or with None where there are too many rows, or a gradient is wanted.
        """
        router = self._routers[first]
        if router is None or self._routers.get(self._following.get(first, -1)) is None:
            return

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden: Tensor = args[0] if args else next(iter(kwargs.values()))
            is_few = hidden.numel() <= FEW_ROWS * hidden.shape[-1]
            note(hidden if is_few and not hidden.requires_grad else None)

        router.entrance.register_forward_pre_hook(hook, with_kwargs=True)

    def guess(self, first: int, hidden: Sequence[Tensor | None]) -> list[int]:
        """Return the units of the next module to be read while this one computes, the likeliest first.

        Args:
            first: the unit of this module's first expert.
            hidden: of each rider, what was noted; see `watch`.
        """
        following = self._following.get(first)
        router = None if following is None else self._routers[following]
        if following is None or router is None or not router.is_kept:
            return []
        known = [one.reshape(-1, one.shape[-1]) for one in hidden if one is not None]
        if len(known) < len(hidden) or sum(map(len, known)) > FEW_ROWS:
            return []
        with torch.no_grad():
            chosen = router.guess(known[0] if len(known) == 1 else torch.cat(known))
        units = [following + number for number in dict.fromkeys(chosen.T.reshape(-1).tolist())]
        # A router may name an expert that there is not: the sentinel of one on another machine, or because it is damaged.
        units = [unit for unit in units if unit in self._units[following] and not self._is_kept(unit)]
        units = units[: self._most]
        is_read = self._rates[following].is_trusted
        self._guesses[following] = _Guess(tuple(units), is_read)
        return units if is_read else []

    def compare(self, first: int, chosen: Sequence[int]) -> tuple[int, ...]:
        """Compare what was guessed of a module with what its router chose.

        Args:
            first: the unit of its first expert.
            chosen: units.
        Returns:
            the units that have been read for the guess, in the order in which they were.
        """
        guess = self._guesses.pop(first, None)
        if guess is None or not guess.units:
            return ()
        num_right = len(set(guess.units).intersection(chosen))
        self._rates[first].note(num_right / len(guess.units))
        self.num_guessed += len(guess.units)
        self.num_right += num_right
        if not guess.is_read:
            return ()
        self.num_read += len(guess.units)
        self.num_read_right += num_right
        return guess.units
