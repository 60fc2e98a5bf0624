"""Check some forward calls, and drop a server whose answers are wrong. No proof of anything.

Stands between failover and the servers, and looks like them. Where a block of the hop is in this client's folder, it is
computed here (`home_check`), because two servers may agree on what to say. Otherwise a second server is asked: then a session
is checked from its first step to its last or not at all, because that server needs all of its steps. Where two servers
disagree, a third one decides, if there is one; whoever is alone is not asked again in this run, and the call goes on with
what two have said. Gradients are not checked.

A server that lies seldom, within the tolerance, only in gradients, in blocks that are not here, or together with the second
one is not found.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from slowllm.errors import DisagreementError, PeerError, SlowLLMError
from slowllm.modeling.remote_spans import Hop, Kept, Need
from slowllm.modeling.span import SpanCall, SpanGrads
from slowllm.swarm.home_check import HomeCheck
from slowllm.swarm.own_blocks import OwnBlocks
from slowllm.swarm.tolerances import difference, tolerance
from slowllm.swarm.verdicts import FOR_EVER, Replicated, Verdicts, was_not_checked

log = logging.getLogger(__name__)


@dataclass
class _Shadow:
    """A session at a second server, and the calls that it has had."""

    hop: Hop
    session: str
    calls: list[SpanCall] = field(default_factory=list)


class SpotCheck:
    """The servers of a client, some of whose answers are checked; an `AsksServers`.

    Attributes:
        verdicts: what has been found so far.

    Args:
        servers: that are asked.
        rate: share of the calls, and of the sessions, that are checked.
        draw: returns a number from 0 to 1, where less than `rate` checks; None for the system's numbers, which no job seeds.
        own: blocks that are computed here rather than at a second server.
    """

    def __init__(
        self,
        servers: Replicated,
        rate: float,
        draw: Callable[[], float] | None = None,
        own: OwnBlocks | None = None,
    ) -> None:
        assert 0 <= rate <= 1, f"{rate} is no share"
        self._servers, self._rate = servers, rate
        self._draw = draw or random.SystemRandom().random
        self.verdicts = Verdicts()
        self._home = None if own is None else HomeCheck(servers, own, rate, self._draw, self.verdicts)
        self._lock = threading.Lock()
        self._shadows: dict[str, _Shadow] = {}
        # Sessions that were to be checked, and have no second server.
        self._alone: set[str] = set()

    def __str__(self) -> str:
        return str(self.verdicts)

    def forward(self, call: SpanCall, hop: Hop, session: str | None, deadline: float) -> dict[int, Tensor]:
        """Compute a span at its server, and perhaps a part of it here, or all at a second one; see `AsksServers.forward`.

        Raises:
            DisagreementError: two servers disagree, and no third one can decide.
            PeerError: the server was wrong, so that others must be asked, and a session must be rebuilt there.
        """
        found = self._servers.forward(call, hop, session, deadline)
        if session is None:
            if self._draw() >= self._rate:
                return found
            if self._home is not None and self._home.was_right(call, hop, found, deadline):
                return found
            shadow = self._second(hop, None)
        elif self._is_followed(session, call, hop):
            assert self._home is not None, "who follows it"
            self._home.check_step(session, call, hop, found, deadline)
            if not self._home.follows(session):
                with self._lock:
                    self._alone.add(session)
            return found
        else:
            shadow = self._shadow_of(session, call, hop)
        if shadow is None:
            return found
        try:
            second = self._servers.forward(call, shadow.hop, shadow.session or None, deadline)
        except SlowLLMError as error:
            if not was_not_checked(error):
                raise
            self._drop(session, shadow, error)
            return found
        return self._compared(call, hop, session, shadow, found, second, deadline)

    def replay(
        self, calls: Sequence[SpanCall], hop: Hop, session: str, deadline: float, *, returns: bool
    ) -> list[dict[int, Tensor]]:
        """Fill a new session, and perhaps one at a second server, which is then checked; see `AsksServers.replay`.

        What a replay itself returns is not compared.
        """
        found = self._servers.replay(calls, hop, session, deadline, returns=returns)
        if self._home is not None and self._home.begin(session, hop, calls[-1], calls):
            return found
        if self._draw() < self._rate and (shadow := self._second(hop, uuid.uuid4().hex)) is not None:
            try:
                self._servers.replay(calls, shadow.hop, shadow.session, deadline, returns=False)
            except SlowLLMError as error:
                if not was_not_checked(error):
                    raise
                self._drop(session, shadow, error)
            else:
                shadow.calls = list(calls)
                with self._lock:
                    self._shadows[session] = shadow
        return found

    def _is_followed(self, session: str, call: SpanCall, hop: Hop) -> bool:
        """Whether a session is checked by a block that is here, which is decided at its first step."""
        if self._home is None:
            return False
        with self._lock:
            is_decided = bool(call.length) or session in self._alone or session in self._shadows
        return self._home.follows(session) or (not is_decided and self._home.begin(session, hop, call))

    def _second(self, hop: Hop, session: str | None, *besides: str) -> _Shadow | None:
        """Return another server for a hop; None, and count it, where there is none."""
        able = [
            record.peer
            for record in self._servers.replicas(hop.first, hop.end)
            if record.peer not in (hop.peer, *besides, *self.verdicts.wrong)
        ]
        if not able:
            self.verdicts.num_unchecked += not besides
            return None
        # Any of them: a server that knew its checker could agree with it on what to say.
        return _Shadow(
            Hop(hop.first, hop.end, able[int(self._draw() * len(able)) % len(able)]), session or ""
        )

    def _shadow_of(self, session: str, call: SpanCall, hop: Hop) -> _Shadow | None:
        """Return the second session of one that is checked, which is decided at its first step."""
        with self._lock:
            shadow = self._shadows.get(session)
            if session in self._alone:
                self.verdicts.num_unchecked += 1
                return None
        if shadow is None and not call.length and self._draw() < self._rate:
            shadow = self._second(hop, uuid.uuid4().hex)
            with self._lock:
                if shadow is None:
                    self._alone.add(session)
                else:
                    self._shadows[session] = shadow
        return shadow

    def _compared(
        self, call: SpanCall, hop: Hop, session: str | None, shadow: _Shadow,
        found: dict[int, Tensor], second: dict[int, Tensor], deadline: float,
    ) -> dict[int, Tensor]:  # fmt: skip
        """Return the answer that is right, as far as can be known."""
        self.verdicts.num_checked += 1
        shadow.calls.append(call)
        off = self._off(call, hop, shadow.hop, found, second)
        if not off:
            return found
        names = [self._servers.name_of(peer) for peer in (hop.peer, shadow.hop.peer)]
        what = f"{names[0]} and {names[1]} disagree about blocks {hop.first}:{hop.end} (by {off:.1g} of the largest value)"
        third_hop, third = self._third(hop, shadow, call, deadline, what)
        self.verdicts.num_wrong += 1
        if not self._off(call, hop, third_hop, found, third):
            self._banish(shadow.hop.peer, what, third_hop)
            self._forget(session)
            return found
        if self._off(call, shadow.hop, third_hop, second, third):
            name = self._servers.name_of(third_hop.peer)
            raise DisagreementError(f"{what}, and {name} says a third thing; leave out those that you do not trust with "
                                    "--blocked-peers")  # fmt: skip
        self._banish(hop.peer, what, third_hop)
        if session is not None:
            self._forget(session)
            raise PeerError(hop.peer, "was wrong at a spot check")
        return second

    def _third(
        self, hop: Hop, shadow: _Shadow, call: SpanCall, deadline: float, what: str
    ) -> tuple[Hop, dict[int, Tensor]]:
        """Return what a third server says.

        Raises:
            DisagreementError: there is none.
        """
        tried: list[str] = [shadow.hop.peer]
        while (third := self._second(hop, uuid.uuid4().hex, *tried)) is not None:
            tried.append(third.hop.peer)
            try:
                if not shadow.session:
                    return third.hop, self._servers.forward(call, third.hop, None, deadline)
                try:
                    if before := shadow.calls[:-1]:
                        self._servers.replay(before, third.hop, third.session, deadline, returns=False)
                    return third.hop, self._servers.forward(call, third.hop, third.session, deadline)
                finally:
                    self._servers.end_session(Kept(third.hop, third.session))
            except SlowLLMError as error:
                if not was_not_checked(error):
                    raise
                log.info("%s could not decide (%s)", self._servers.name_of(third.hop.peer), error)
        raise DisagreementError(
            f"{what}, and nobody else who may be asked has these blocks to decide; leave out the one that you do not trust with "
            "--blocked-peers"
        )

    def _off(
        self,
        call: SpanCall,
        one: Hop,
        other: Hop,
        ours: Mapping[int, Tensor],
        theirs: Mapping[int, Tensor],
    ) -> float:
        """Return by how much two answers differ, 0 where that is within the tolerance."""
        off = difference(ours, theirs, call.mask)
        records = {record.peer: record for record in self._servers.replicas(one.first, one.end)}
        how = [records[hop.peer].compression for hop in (one, other) if hop.peer in records]
        allowed = tolerance(str(call.hidden.dtype).removeprefix("torch."), *how)
        return 0.0 if off <= allowed else off

    def _banish(self, peer: str, what: str, third: Hop) -> None:
        name, decided_by = self._servers.name_of(peer), self._servers.name_of(third.peer)
        self.verdicts.banish(
            self._servers, peer, f"{what}; {name} was alone with its answer when {decided_by} was asked,"
        )

    def _drop(self, session: str | None, shadow: _Shadow, error: BaseException) -> None:
        """Go on without a second server that cannot be asked."""
        self.verdicts.num_unchecked += 1
        log.info("%s could not check a call (%s)", self._servers.name_of(shadow.hop.peer), error)
        if session is None:
            return
        self._forget(session)
        with self._lock:
            self._alone.add(session)

    def _forget(self, session: str | None) -> None:
        """End the second session of one that is not checked any more, and its twin."""
        if session is not None and self._home is not None:
            self._home.end(session)
        with self._lock:
            shadow = self._shadows.pop(session, None) if session is not None else None
        if shadow is not None:
            self._servers.end_session(Kept(shadow.hop, shadow.session))

    def route(
        self, first: int, need: Need, end: int | None = None, *, deadline: float = math.inf
    ) -> Sequence[Hop]:
        """Return hops; see `AsksServers.route`."""
        return self._servers.route(first, need, end, deadline=deadline)

    def backward(self, call: SpanCall, hop: Hop, grads: Mapping[int, Tensor], deadline: float) -> SpanGrads:
        """Return gradients, unchecked; see `AsksServers.backward`."""
        return self._servers.backward(call, hop, grads, deadline)

    def end_session(self, kept: Kept) -> Future[Any] | None:
        """Let the servers forget a session; see `AsksServers.end_session`."""
        self._forget(kept.session)
        with self._lock:
            self._alone.discard(kept.session)
        return self._servers.end_session(kept)

    def soon(self, work: Callable[[], object]) -> None:
        """Do a short piece of work on another thread; see `AsksServers.soon`."""
        self._servers.soon(work)

    def is_leaving(self, peer: str) -> bool:
        """Whether a server has said that it will be gone soon; see `AsksServers.is_leaving`."""
        return self._servers.is_leaving(peer)

    def ban(self, peer: str, until: float) -> None:
        """Leave a server out of routes; one that was wrong, for ever."""
        self._servers.ban(peer, FOR_EVER if peer in self.verdicts.wrong else until)

    def name_of(self, peer: str) -> str:
        """Return how people know a server."""
        return self._servers.name_of(peer)

    def close(self) -> None:
        """Give back what is kept here of blocks and sessions. Idempotent."""
        if self._home is not None:
            self._home.close()
