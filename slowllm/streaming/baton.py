"""The right to run: exactly one rider holds it, and torch's generators change hands with it.

Knows riders and the turns that they wait for; starts no thread and has no lock. All methods are called with the lock of
`boarding.Boarding` held.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from slowllm.errors import twin
from slowllm.streaming.riders import Party, Rider, Turn
from slowllm.streaming.rng_state import RandomState, SharedGenerators, at_state, fork


class Baton:
    """Who runs, and in which state the generators are.

    Attributes:
        holder: the rider that runs, None where every rider waits.
        runs_since: when it began to run, by `time.monotonic`.
    """

    def __init__(self, generators: SharedGenerators) -> None:
        self.holder: Rider | None = None
        self.runs_since = 0.0
        self._generators = generators
        self._dismissed: list[Turn] = []  # of riders, which raise their errors one at a time

    def hand(self, rider: Rider | None) -> None:
        """Let a rider run; a guest (None) holds no baton."""
        if rider is None:
            return
        # Sampling draws from the one global generator, so while the rider runs, its state is the rider's own.
        if rider.random_state is not None:
            if rider.party.ride is not None:
                rider.outer_state = self._generators.get()
            self._generators.set(rider.random_state)
        self.holder, rider.is_away = rider, False
        self.runs_since = time.monotonic()

    def put_down(self, rider: Rider | None) -> None:
        """Let a rider run no more; the next one that was dismissed may."""
        if rider is None:
            return
        if rider.random_state is not None:
            rider.random_state = self._generators.get()
            if rider.outer_state is not None:
                self._generators.set(rider.outer_state)
                rider.outer_state = None
        self.holder = None
        self._notify_dismissed()

    def dismiss(self, turns: Iterable[Turn], error: BaseException) -> None:
        """End turns with an error. Riders raise it one at a time, before another visit is served."""
        for turn in sorted(turns, key=lambda turn: turn.order):
            turn.error = twin(error)
            if turn.rider is not None:
                self._dismissed.append(turn)
            else:  # at once: the running rider may be blocked on this guest
                turn.done.set()
        self._notify_dismissed()

    @property
    def has_dismissed(self) -> bool:
        """Whether riders that were dismissed wait to raise their errors."""
        return bool(self._dismissed)

    def _notify_dismissed(self) -> None:
        if self._dismissed and self.holder is None:
            turn = self._dismissed.pop(0)
            self.hand(turn.rider)
            turn.done.set()

    def seed(self, party: Party, other: Party | None) -> None:
        """Give a `ride` or `stream` its caller's state, and what its riders are seeded from.

        During an `other` ride the generator has the state of some rider, which would draw the same numbers.
        """
        if other is not None:
            source, party.random_state = self._generators.forked(other.seeds)
        else:
            party.random_state = self.outer_state()
            source = at_state(party.random_state)
        party.seeds = fork(source)

    def seeded(self, seed: int) -> RandomState:
        """Return the state after `torch.manual_seed(seed)`."""
        return self._generators.seeded(seed)

    def first_state(self, party: Party) -> RandomState | None:
        """Return the state in which the next rider of a party begins; None if it has none of its own."""
        if party.ride is not None:
            return party.own_state
        if party.num_boarded == 0 and not party.is_stream:
            return party.random_state
        return self._generators.forked(party.seeds)[1]

    def outer_state(self) -> RandomState:
        """Return the generators' state as it is without the boarded job that runs, if one does."""
        inside = None if self.holder is None else self.holder.outer_state
        return self._generators.get() if inside is None else inside

    def set_outer_state(self, state: RandomState) -> None:
        """Set the state that the generators have when no boarded job runs."""
        if self.holder is not None and self.holder.outer_state is not None:
            self.holder.outer_state = state
        else:
            self._generators.set(state)
