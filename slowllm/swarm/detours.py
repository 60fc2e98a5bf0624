"""Which hops take the place of one whose server failed: at others that have its blocks, now or when somebody has come back.

Notes failures, leaves servers alone for a time, and gives up at a deadline, or when as many servers have failed as the
client tries. Knows hops and what calls need; knows nothing of what is computed, and of sessions only whether there are some.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from slowllm.errors import (
    BusyError,
    LimitError,
    MissingBlocksError,
    PeerError,
    RemoteError,
    SessionError,
    SlowLLMError,
)
from slowllm.modeling.remote_spans import Hop, Need
from slowllm.swarm.asking import NO_WAIT, AsksServers
from slowllm.swarm.failures import Failure, Failures
from slowllm.swarm.patience import Patience

log = logging.getLogger(__name__)

# What another server may do better. What is wrong here, such as a request that cannot be encoded, is not tried elsewhere;
# where a server says that its input is wrong or its pass fails, another one is asked whether it is.
_RETRIED = (PeerError, BusyError, SessionError, LimitError)
# Servers that say the same of what they were given are believed.
_OPINIONS = 2


class FailedError(Exception):
    """A server failed at something that others may do.

    Attributes:
        peer: the server's id.
        error: why.
    """

    def __init__(self, peer: str, error: SlowLLMError) -> None:
        super().__init__(str(error))
        self.peer, self.error = peer, error


def may_be_retried(error: SlowLLMError) -> bool:
    """Whether another server may do better; so may it where a server says that what it was given is wrong."""
    return isinstance(error, _RETRIED) or isinstance(error.__cause__, RemoteError)


class Detours:
    """The ways around servers that failed a client. A passage and its retries are on one thread.

    Args:
        servers: that are asked.
        timeout: seconds for one call of the model.
        patience: how many servers are tried for a passage, and with which waits.
        has_sessions: whether sessions of this client are open, which may be what fills the servers.
    """

    def __init__(
        self, servers: AsksServers, timeout: float, patience: Patience, has_sessions: Callable[[], bool]
    ) -> None:
        self._servers, self._timeout, self._patience = servers, timeout, patience
        self._has_sessions = has_sessions
        self._local = threading.local()
        self._failures = Failures(servers.name_of, timeout, patience)

    def deadline(self) -> float:
        """Return when a call of the model that begins now is given up, on the clock of `time.monotonic`."""
        return time.monotonic() + self._timeout

    def begin(self) -> None:
        """Begin to count the servers that fail at a passage of this thread."""
        self._local.num_failed, self._local.accusers = 0, []

    def answered(self, peer: str) -> None:
        """Note that a server works."""
        self._failures.forget(peer)

    def check_time(self, hop: Hop, deadline: float) -> None:
        """Refuse to ask a server when the time is over: it could only seem to fail.

        Raises:
            MissingBlocksError: it is; the message says which servers were tried, and why each failed.
        """
        if time.monotonic() >= deadline:
            blocks = tuple(range(hop.first, hop.end))
            raise self._failures.out_of_time(
                blocks, f"blocks {hop.first}:{hop.end} were not computed", deadline
            )

    def before_asking(self, hop: Hop, need: Need) -> Sequence[Hop] | None:
        """Return hops in the place of one whose server was just lost, by others that are known; does not wait.

        Returns:
            None where the server is to be asked: nothing is known against it, or nobody else has its blocks.
        """
        if not self._failures.is_left_alone(hop.peer):
            return None
        try:
            route = self._servers.route(hop.first, need, hop.end, deadline=NO_WAIT)
        except MissingBlocksError:
            return None
        if any(own.peer == hop.peer for own in route):  # it has answered another thread since
            return None
        log.info(
            "blocks %d:%d go on without %s: %s",
            hop.first,
            hop.end,
            self._servers.name_of(hop.peer),
            self._named(route),
        )
        return route

    def around(self, failed: FailedError, hop: Hop, need: Need, deadline: float) -> Sequence[Hop]:
        """Leave a server alone that failed, and return hops over the span of one of its hops at others.

        Raises:
            MissingBlocksError: see `route`.
            SlowLLMError: of the server, which was the last that may be tried.
        """
        failure = self._failures.note(failed.peer, failed.error)
        self._local.num_failed += 1
        if self._local.num_failed == self._patience.max_attempts:
            self._servers.ban(failed.peer, failure.until)
            raise failed.error
        if not isinstance(failed.error, _RETRIED):
            return self._to_another_opinion(failed, failure, hop, need, deadline)
        self._servers.ban(failed.peer, failure.until)
        self.check_time(hop, deadline)
        name = self._servers.name_of(failed.peer)
        level = logging.INFO if failure.is_well else logging.WARNING
        seconds = round(failure.until - failure.at, 3)
        log.log(level, "%s failed (%s); it is not asked for %g s", name, failed.error, seconds)
        route = self.route(
            hop.first, need, deadline, end=hop.end, is_too_large=isinstance(failed.error, LimitError)
        )
        log.warning("blocks %d:%d go on: %s", hop.first, hop.end, self._named(route))
        return route

    def _named(self, route: Sequence[Hop]) -> str:
        return ", ".join(f"{own.first}:{own.end} {self._servers.name_of(own.peer)}" for own in route)

    def _to_another_opinion(
        self, failed: FailedError, failure: Failure, hop: Hop, need: Need, deadline: float
    ) -> Sequence[Hop]:
        """Return hops at other servers than the one that says that what it was given is wrong.

        Raises:
            SlowLLMError: what it says: another server has said so, too, or there is no other.
        """
        accusers: list[str] = self._local.accusers
        accusers.append(failed.peer)
        self._servers.ban(failed.peer, failure.until)
        try:
            if len(accusers) < _OPINIONS:
                route = self._servers.route(hop.first, need, hop.end, deadline=deadline)
                name = self._servers.name_of(failed.peer)
                log.warning("%s refuses its work (%s); others are asked", name, failed.error)
                return route
        except MissingBlocksError:
            pass
        for peer in accusers:  # they may be right, and then they are well
            self._failures.forget(peer)
            self._servers.ban(peer, 0.0)
        raise failed.error

    def route(
        self, first: int, need: Need, deadline: float, *, end: int | None = None, is_too_large: bool = False
    ) -> Sequence[Hop]:
        """Return a route; wait while blocks are missing because servers have failed, or our own sessions fill them.

        Args:
            first: the first block.
            need: of the calls.
            deadline: of the call, on the clock of `time.monotonic`.
            end: the number after the last block; None for all of the model.
            is_too_large: whether a server has refused the call by its limits.

        Raises:
            MissingBlocksError: the time is over, or nobody takes so much; it says which servers were tried, and why each
                failed.
        """
        num_looks = 0
        while True:
            until = deadline
            if self._failures.since(deadline):
                # Servers that failed are asked again after their time, also while the directory hangs.
                until = min(deadline, time.monotonic() + self._patience.wait_seconds(num_looks))
            try:
                return self._servers.route(first, need, end, deadline=until)
            except MissingBlocksError as error:
                tried = self._failures.since(deadline)
                # Sessions of this client may be what fills the servers, and they end.
                waits_for_room = error.is_full and self._has_sessions()
                if not tried and not waits_for_room:
                    raise
                # What servers refuse by their limits, they refuse again.
                is_lasting = (
                    is_too_large
                    and tried
                    and all(isinstance(one.error, LimitError) for one in tried.values())
                )
                if is_lasting or time.monotonic() >= deadline:
                    raise self._failures.out_of_time(
                        error.blocks, str(error), deadline, is_full=error.is_full
                    ) from error
            time.sleep(min(self._patience.wait_seconds(num_looks), max(0.0, deadline - time.monotonic())))
            num_looks += 1
