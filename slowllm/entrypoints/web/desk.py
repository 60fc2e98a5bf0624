"""Who asks what of the one service: the rides of every visitor, so that they can be stopped and shown.

Knows visitors by the names of their sessions; knows nothing of pages.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from slowllm.errors import BusyError, RideError, counted
from slowllm.inference.service import Service
from slowllm.inference.service_tasks import checked_size
from slowllm.inference.service_types import Answer, Ask, OnPartial, PartialContinuation, ServiceStatus
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.streaming.ride import Ride

STOPPED = "it was stopped"


@dataclass(frozen=True)
class ErrandRow:
    """What a visitor has under way.

    Attributes:
        number: of the visitor, from 1, in the order in which they came.
        visitor: the name of its session.
        kind: of the errand, in words.
        num_riding: asks that ride.
        num_waiting: asks that wait for room.
        num_tokens: new ones so far, of the asks that have not ended.
    """

    number: int
    visitor: str
    kind: str
    num_riding: int
    num_waiting: int
    num_tokens: int


class Errand:
    """One thing that a visitor wants, of any number of asks. Made by `Desk.errand`."""

    def __init__(self, desk: Desk, visitor: str, kind: str) -> None:
        self._desk, self.visitor, self.kind = desk, visitor, kind
        self.is_stopped = False
        # New tokens of each continuation of each ride, told on riders' threads.
        self.told: dict[Ride[Answer], dict[int, int]] = {}

    def submit(self, ask: Ask, on_partial: OnPartial | None = None) -> Ride[Answer]:
        """Ask the service, as `Service.submit` does.

        Raises:
            InputError: this model cannot do that, or was not opened for so many tokens.
            BusyError: too many asks wait, or the service is closing.
            RideError: the errand was stopped.
        """
        return self._desk.submit(self, ask, on_partial)

    def stop(self) -> None:
        """Cancel what is under way, and let nothing more be asked."""
        self._desk.stop([self])


class Desk:
    """Takes what visitors want to the service. Owns neither the model nor the service. All methods may be called by any thread.

    Args:
        lm: a loaded model.
        service: of that model, to which nobody else submits.
        max_rows: that the service continues at once.
    """

    def __init__(self, lm: StreamedLM, service: Service, max_rows: int) -> None:
        self.lm, self._service, self._max_rows = lm, service, max_rows
        # A ride may end, and call back, while it is submitted.
        self._lock = threading.RLock()
        self._tokenizing = threading.Lock()
        self._errands: list[Errand] = []
        self._numbers: dict[str, int] = {}
        self._num_visitors = 0
        # In the order in which the service took them, which is the order in which they board.
        self._rides: dict[Ride[Answer], Errand] = {}

    @contextmanager
    def tokenizing(self) -> Iterator[None]:
        """Keep others from using the tokenizer for the length of the context: Rust's cannot be changed while it is used."""
        with self._tokenizing:
            yield

    @contextmanager
    def errand(self, visitor: str, kind: str) -> Iterator[Errand]:
        """Yield an errand, and stop it when the context ends."""
        errand = Errand(self, visitor, kind)
        with self._lock:
            if visitor not in self._numbers:
                self._num_visitors += 1
                self._numbers[visitor] = self._num_visitors
            self._errands.append(errand)
        try:
            yield errand
        finally:
            errand.stop()
            with self._lock:
                self._errands.remove(errand)

    def check(self, ask: Ask) -> None:
        """Refuse what can never be asked, without asking it.

        Raises:
            InputError: this model cannot do that, or was not opened for so many tokens.
        """
        checked_size(self.lm, ask, self._max_rows, joins=False)

    def refuse_more(self, kind: str, most: int) -> None:
        """Refuse an errand that is one too many of its kind.

        Raises:
            BusyError: with it, there are more than `most`.
        """
        with self._lock:
            number = sum(one.kind == kind for one in self._errands)
        if number > most:
            raise BusyError(f"{counted(most, kind)} of visitors are under way already; ask again later")

    def submit(self, errand: Errand, ask: Ask, on_partial: OnPartial | None) -> Ride[Answer]:
        """Ask the service for an errand; see `Errand.submit`."""
        counts: dict[int, int] = {}

        def note(partial: PartialContinuation) -> None:
            counts[partial.number] = len(partial.ids)
            if on_partial is not None:
                on_partial(partial)

        with self._lock:
            if errand.is_stopped:
                raise RideError(STOPPED)
            ride = self._service.submit(ask, note)
            self._rides[ride] = errand
            errand.told[ride] = counts
        ride.add_done_callback(functools.partial(self._has_ended, errand))
        return ride

    def _has_ended(self, errand: Errand, ride: Ride[Answer]) -> None:
        with self._lock:
            del self._rides[ride], errand.told[ride]

    def stop(self, errands: list[Errand]) -> None:
        """Cancel what is under way for errands, and let nothing more be asked for them."""
        with self._lock:
            for errand in errands:
                errand.is_stopped = True
            rides = [ride for ride, errand in self._rides.items() if errand in errands]
        for ride in rides:
            ride.cancel()

    def leave(self, visitor: str, kind: str | None = None) -> None:
        """Stop the errands of a visitor: those of a kind, or all because it has left."""
        with self._lock:
            wanted = [one for one in self._errands if one.visitor == visitor and kind in (None, one.kind)]
            if kind is None:
                self._numbers.pop(visitor, None)
        self.stop(wanted)

    def status(self) -> ServiceStatus:
        """Return how the service is doing now."""
        return self._service.status()

    def rows(self) -> list[ErrandRow]:
        """Return what visitors have under way, those first whose asks board first."""
        with self._lock:
            rides = list(self._rides.items())
            # The service takes asks in their order, so those that wait are the last ones.
            num_waiting = min(self._service.status().num_waiting, len(rides))
            found: dict[Errand, list[int]] = {}
            for place, (ride, errand) in enumerate(rides):
                counts = found.setdefault(errand, [0, 0, 0])
                counts[1 if place >= len(rides) - num_waiting else 0] += 1
                counts[2] += sum(list(errand.told[ride].values()))
            return [
                ErrandRow(self._numbers.get(errand.visitor, 0), errand.visitor, errand.kind, *counts)
                for errand, counts in found.items()
            ]
