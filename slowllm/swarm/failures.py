"""Which servers failed a client lately, why, and until when they are left alone.

Knows no network and no calls; who asks servers tells it what came of that.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from slowllm.errors import BusyError, LimitError, MissingBlocksError, PeerError, SlowLLMError
from slowllm.swarm.patience import Patience


@dataclass(frozen=True)
class Failure:
    """The last failure of a server.

    Attributes:
        error: why.
        number: of failures since the server last answered, this one included; refusals of one that is well do not count, nor
            failures in the time in which it is left alone.
        at: when, on the clock of `time.monotonic`.
        until: when the server is asked again.
    """

    error: SlowLLMError
    number: int
    at: float
    until: float

    @property
    def is_well(self) -> bool:
        """Whether the server works, and only has no room for this."""
        return isinstance(self.error, BusyError | LimitError)


class Failures:
    """The servers that failed. All methods may be called from any thread.

    Args:
        name_of: returns how people know a server, by its peer id.
        timeout: seconds for one call.
        patience: how long servers are left alone.
    """

    def __init__(self, name_of: Callable[[str], str], timeout: float, patience: Patience) -> None:
        self._name_of, self._timeout, self._patience = name_of, timeout, patience
        self._lock = threading.Lock()
        self._failures: dict[str, Failure] = {}

    def note(self, peer: str, error: SlowLLMError) -> Failure:
        """Note that a server failed, and return until when it is left alone."""
        now, is_well = time.monotonic(), isinstance(error, BusyError | LimitError)
        with self._lock:
            last = self._failures.get(peer)
            # Several calls that were at the server when it failed, or the hops of one call, are one failure of it.
            is_known = last is not None and not last.is_well and now < last.until
            number = (0 if last is None else last.number) + (not is_well and not is_known)
            seconds = self._patience.seconds_banned(number, is_well=is_well)
            self._failures[peer] = Failure(error, number, now, now + seconds)
            return self._failures[peer]

    def forget(self, peer: str) -> None:
        """Forget the failures of a server that has answered, or its bans would grow for ever."""
        with self._lock:
            self._failures.pop(peer, None)

    def is_left_alone(self, peer: str) -> bool:
        """Whether a server was just lost or answers wrongly, so that its sessions are better looked for elsewhere.

        One that is busy, or has lost a session, works for others.
        """
        with self._lock:
            failure = self._failures.get(peer)
        return (
            failure is not None and isinstance(failure.error, PeerError) and time.monotonic() < failure.until
        )

    def since(self, deadline: float) -> dict[str, Failure]:
        """Return the servers that failed since a call with this deadline began, or are not asked because of it."""
        now = time.monotonic()
        with self._lock:
            return {
                peer: failure
                for peer, failure in self._failures.items()
                if failure.at >= deadline - self._timeout or failure.until > now
            }

    def out_of_time(
        self, blocks: tuple[int, ...], problem: str, deadline: float, *, is_full: bool = False
    ) -> MissingBlocksError:
        """Return the error at the end of a call's time, with the servers that were tried, and why each failed."""
        tried = self.since(deadline).items()
        told = "; ".join(f"{self._name_of(peer)}: {failure.error}" for peer, failure in tried)
        seconds = self._timeout - max(0.0, deadline - time.monotonic())
        return MissingBlocksError(
            blocks, f"{problem}; tried for {seconds:.1f} s{': ' if told else ''}{told}", is_full=is_full
        )
