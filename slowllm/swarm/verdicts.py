"""What spot checks have found so far: how many answers were checked, and which servers are not asked again."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from slowllm.errors import BusyError, LimitError, PeerError, RemoteError, SessionError, SlowLLMError
from slowllm.modeling.remote_spans import Hop
from slowllm.swarm.asking import AsksServers
from slowllm.swarm.records import ServerRecord

log = logging.getLogger(__name__)

FOR_EVER = float("inf")
# A server could not be asked a second time; that is no disagreement.
_NOT_CHECKED = (PeerError, BusyError, SessionError, LimitError)


class Replicated(AsksServers, Protocol):
    """Servers of which several may have the same blocks; `hops.Hops` is one."""

    def replicas(self, first: int, end: int) -> Sequence[ServerRecord]:
        """Return the servers that may be asked for all of these blocks, with the weights that the client keeps to."""


@dataclass
class Verdicts:
    """Counts of checked answers, and the servers that were wrong.

    Attributes:
        num_checked: calls that were computed twice.
        num_here: of these, those of which a block was computed on this machine.
        num_wrong: answers that were wrong.
        num_unchecked: calls that nobody could compute a second time.
        wrong: ids of the servers that were wrong.
    """

    num_checked: int = 0
    num_here: int = 0
    num_wrong: int = 0
    num_unchecked: int = 0
    wrong: set[str] = field(default_factory=set)

    def banish(self, servers: AsksServers, peer: str, why: str) -> None:
        """Ask a server no more, and say so with the reason, which ends in a clause about the server."""
        self.wrong.add(peer)
        servers.ban(peer, FOR_EVER)
        log.warning("%s and is not asked again in this run", why)

    def __str__(self) -> str:
        return (
            f"spot checks: {self.num_checked:,} calls were computed twice, a block of {self.num_here:,} of them here, "
            f"{self.num_wrong:,} answers were wrong, and {self.num_unchecked:,} calls had no second server"
        )


def record_of(servers: Replicated, hop: Hop) -> ServerRecord | None:
    """Return what the server of a hop says of itself; None where it may not be asked any more."""
    return next((one for one in servers.replicas(hop.first, hop.end) if one.peer == hop.peer), None)


def was_not_checked(error: SlowLLMError) -> bool:
    """Whether a server that was to compute something again could not, or would not."""
    return isinstance(error, _NOT_CHECKED) or isinstance(error.__cause__, RemoteError)
