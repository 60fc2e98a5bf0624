"""What one peer may take of a server that others share: sessions, the cache's tokens, and requests under way.

One peer may use the whole cache while nobody else wants it, so that a swarm of one person is not halved. As soon as another
peer holds a session, or was refused one for lack of room, nobody may hold more than a share: what is held above it is not
taken away, but does not grow, so its owner goes on elsewhere and gives it back. Bytes of requests are shared by the room in
which they are read. Knows peers by their names; knows no network.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from slowllm.errors import BusyError

# A client has a session for each group of prompts that it generates for; more are a mistake, or meant to harm.
MOST_SESSIONS = 128
# Of the 64 streams that a peer may open, so that it can still end sessions. Clients send no more at a time.
MOST_REQUESTS = 48
_SHARE = 0.5


@dataclass(frozen=True)
class PeerQuotas:
    """What one peer may take.

    Attributes:
        sessions: that it may have open.
        requests: that it may have under way.
        share: of the cache's tokens, that it may hold when others want some.
    """

    sessions: int = MOST_SESSIONS
    requests: int = MOST_REQUESTS
    share: float = _SHARE


class SessionQuota:
    """Keeps the sessions of each peer within its share. Called with the lock of the sessions.

    Args:
        quotas: of a peer.
        max_tokens: of the cache.
        wanted_seconds: for which a peer that was refused counts as one that wants room.
        clock: monotonic, in seconds.
    """

    def __init__(
        self, quotas: PeerQuotas, max_tokens: int, wanted_seconds: float, clock: Callable[[], float]
    ) -> None:
        self._quotas, self._max_tokens = quotas, max_tokens
        self._wanted_seconds, self._clock = wanted_seconds, clock
        self._refused: tuple[str, float] | None = None

    def check(self, peer: str, *, is_new: bool, num_sessions: int, num_tokens: int, has_others: bool) -> None:
        """Refuse a step that takes a peer above its quota.

        Args:
            peer: that asks.
            is_new: whether it begins a session.
            num_sessions: that the peer has open.
            num_tokens: that all of the peer's sessions hold after the step.
            has_others: whether another peer has a session.
        Raises:
            BusyError: it would have too many sessions, or hold too much.
        """
        if is_new and num_sessions >= self._quotas.sessions:
            raise BusyError(
                f"this peer has {num_sessions} sessions open here, and no more than {self._quotas.sessions} may be; end some"
            )
        most = int(self._quotas.share * self._max_tokens)
        if num_tokens > most and (has_others or self._is_wanted_by_others(peer)):
            raise BusyError(
                f"this peer's sessions would hold {num_tokens:,} tokens here, and while others want room no more than {most:,} "
                f"of {self._max_tokens:,} may be one peer's"
            )

    def note_refused(self, peer: str) -> None:
        """Remember that there was no room for a peer."""
        self._refused = (peer, self._clock())

    def _is_wanted_by_others(self, peer: str) -> bool:
        return (
            self._refused is not None
            and self._refused[0] != peer
            and self._clock() - self._refused[1] < self._wanted_seconds
        )


class RequestQuota:
    """Counts the requests that each peer has under way. Used on any thread.

    Args:
        most: of one peer.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._under_way: Counter[str] = Counter()

    def begin(self, peer: str) -> None:
        """Count a request that begins; `end` must follow.

        Raises:
            BusyError: the peer has too many.
        """
        with self._lock:
            if self._under_way[peer] >= self._most:
                raise BusyError(
                    f"{self._under_way[peer]} requests of this peer are under way here, and no more than {self._most} may be; ask "
                    "again later"
                )
            self._under_way[peer] += 1

    def end(self, peer: str) -> None:
        """Note that a request that was begun is over."""
        with self._lock:
            self._under_way[peer] -= 1
            if not self._under_way[peer]:
                del self._under_way[peer]
