"""The sessions of a server: caches of clients, the tokens that they hold, and when they end.

A session belongs to the peer that began it, and lives until it is ended, its peer has left, or it was idle for a time. All sessions
together hold at most as many tokens as the plan has counted. Called on one thread at a time or on several; knows no
network and no models, of caches only that they are kept.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from slowllm.errors import BusyError, LimitError, SessionError
from slowllm.swarm.quotas import PeerQuotas, SessionQuota

C = TypeVar("C")


@dataclass
class ServedSession(Generic[C]):
    """One client's cache.

    Attributes:
        cache: what is kept.
        num_tokens: held, rows times positions.
        num_steps: passages that it has had.
        used_at: when it was last used, on the clock of `Sessions`.
        is_busy: whether a passage is under way.
    """

    cache: C
    num_tokens: int = 0
    num_steps: int = 0
    used_at: float = 0.0
    is_busy: bool = False
    was_ended: bool = field(default=False, repr=False)


class Sessions(Generic[C]):
    """The sessions of one server.

    Args:
        max_tokens: that all may hold together.
        idle_seconds: after which a session that is not used ends.
        clock: monotonic, in seconds.
        quotas: of each peer; None for no limits.
    """

    def __init__(
        self,
        max_tokens: int,
        idle_seconds: float,
        clock: Callable[[], float] = time.monotonic,
        quotas: PeerQuotas | None = None,
    ) -> None:
        self._quota = None if quotas is None else SessionQuota(quotas, max_tokens, idle_seconds, clock)
        self.max_tokens, self.idle_seconds, self._clock = max_tokens, idle_seconds, clock
        self._lock = threading.Lock()
        self._sessions: dict[tuple[str, str], ServedSession[C]] = {}

    @property
    def free_tokens(self) -> int:
        """Tokens for which there is room; sessions that were idle for too long end first."""
        with self._lock:
            self._end_idle()
            return self.max_tokens - self._held()

    def __len__(self) -> int:
        return len(self._sessions)

    def begin_step(
        self, peer: str, name: str, step: int, num_tokens: int, make_cache: Callable[[], C]
    ) -> ServedSession[C]:
        """Reserve room for a passage within a session, which is begun by its first one.

        Args:
            peer: of the client.
            name: of the session.
            step: how many passages the client thinks that the session has had.
            num_tokens: that the session holds after the passage.
            make_cache: called for a new session.
        Raises:
            SessionError: the session has ended or is in use, or has had another number of passages.
            BusyError: other sessions leave no room.
            LimitError: it is larger than all of the room.
        """
        if num_tokens > self.max_tokens:
            raise LimitError(
                f"a session of {num_tokens:,} tokens is larger than the {self.max_tokens:,} that this server keeps in all"
            )
        with self._lock:
            self._end_idle()
            session = self._sessions.get((peer, name))
            if session is None and step:
                raise SessionError(
                    "the session is not here any more: it was idle for too long, or the server was started anew"
                )
            if session is not None and session.is_busy:
                raise SessionError("a passage of this session is still under way")
            if session is not None and session.num_steps != step:
                raise SessionError(f"the session has had {session.num_steps} passages, not {step}")
            self._check_quota(peer, session, num_tokens)
            others = self._held() - (0 if session is None else session.num_tokens)
            if others + num_tokens > self.max_tokens:
                if self._quota is not None:
                    self._quota.note_refused(peer)
                raise BusyError(
                    f"the server's cache is full: the session would hold {num_tokens:,} tokens, and "
                    f"{self.max_tokens - others:,} of {self.max_tokens:,} are free"
                )
            if session is None:
                session = self._sessions[peer, name] = ServedSession(make_cache())
            session.is_busy, session.num_tokens = True, num_tokens
            return session

    def _check_quota(self, peer: str, session: ServedSession[C] | None, num_tokens: int) -> None:
        if self._quota is None:
            return
        own = [one for (owner, _), one in self._sessions.items() if owner == peer]
        held = sum(one.num_tokens for one in own if one is not session)
        self._quota.check(
            peer, is_new=session is None, num_sessions=len(own), num_tokens=held + num_tokens,
            has_others=len(own) < len(self._sessions),
        )  # fmt: skip

    def end_step(
        self, peer: str, name: str, *, has_failed: bool, num_steps: int = 1, num_tokens: int | None = None
    ) -> None:
        """Note that a passage is over. After one that failed it is unknown what the cache holds, so the session ends.

        Args:
            peer: of the client.
            name: of the session.
            has_failed: whether the passage did not end well.
            num_steps: passages that it was; more than one where a session was filled anew.
            num_tokens: that the session holds now, where that is less than was reserved.
        """
        with self._lock:
            session = self._sessions.get((peer, name))
            if session is None:
                return
            session.is_busy, session.used_at = False, self._clock()
            session.num_steps += num_steps
            session.num_tokens = session.num_tokens if num_tokens is None else num_tokens
            if has_failed or session.was_ended:
                del self._sessions[peer, name]

    def end(self, peer: str, name: str) -> None:
        """End a session, at once or after the passage that is under way. Ending one that is not there is no error."""
        with self._lock:
            session = self._sessions.get((peer, name))
            if session is not None and session.is_busy:
                session.was_ended = True
            elif session is not None:
                del self._sessions[peer, name]

    def end_all_of(self, peer: str) -> None:
        """End the sessions of a peer that has left, those in which a passage is under way after it."""
        with self._lock:
            names = [name for owner, name in self._sessions if owner == peer]
        for name in names:
            self.end(peer, name)

    def end_idle(self) -> None:
        """End the sessions that were idle for too long."""
        with self._lock:
            self._end_idle()

    def _end_idle(self) -> None:
        oldest = self._clock() - self.idle_seconds
        idle = [
            key for key, session in self._sessions.items() if not session.is_busy and session.used_at < oldest
        ]
        for key in idle:
            del self._sessions[key]

    def _held(self) -> int:
        return sum(session.num_tokens for session in self._sessions.values())
