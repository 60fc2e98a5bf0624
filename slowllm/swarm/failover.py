"""Go on when a server dies, hangs, refuses or leaves: cut its blocks anew, and rebuild what it kept.

To a client's blocks a hop stays a hop. Behind it stands a chain of links, each at one server. When a link's server fails,
its span alone is cut anew among the other servers, and a session's keys and values are rebuilt there from the history of
the link's inputs, by the very calls in which they grew, so that they have the same bits, and in one sweep. A call that may
have been applied is never sent to the same session again.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from torch import Tensor

from slowllm.errors import (
    BusyError,
    LimitError,
    MissingBlocksError,
    PeerError,
    RemoteError,
    SessionError,
    SlowLLMError,
)
from slowllm.modeling.merged_calls import merged
from slowllm.modeling.remote_spans import Hop, Kept, Need, need_of
from slowllm.modeling.span import SpanCall, SpanGrads, part_of
from slowllm.swarm.asking import AsksServers
from slowllm.swarm.failures import Failure, Failures
from slowllm.swarm.patience import Patience

log = logging.getLogger(__name__)

Replay = Literal["steps", "fast"]
REPLAYS: tuple[str, ...] = get_args(Replay)

# What another server may do better. What is wrong here, such as a request that cannot be encoded, is not tried elsewhere;
# where a server says that its input is wrong or its pass fails, another one is asked whether it is.
_RETRIED = (PeerError, BusyError, SessionError, LimitError)
# Servers that say the same of what they were given are believed.
_OPINIONS = 2
# That a client waits at its end for servers to forget its sessions; they end by themselves when they are idle.
CLOSE_SECONDS = 2.0


@dataclass
class _Link:
    """A part of a hop at one server, and the calls that its session has had, with their inputs."""

    hop: Hop
    session: str | None
    history: list[SpanCall] = field(default_factory=list)


class Failover:
    """The `Spans` of a client that outlives its servers.

    Args:
        servers: asks them.
        timeout: seconds for one call of a hop's blocks, with all retries and what is rebuilt.
        replay: ``steps`` rebuilds sessions by the calls in which they grew, with equal bits; ``fast`` in one pass.
        patience: how many servers are tried, and with which waits.
    """

    def __init__(
        self, servers: AsksServers, timeout: float, replay: Replay = "steps", patience: Patience | None = None
    ) -> None:
        self._servers, self._timeout, self._replay = servers, timeout, replay
        self._patience = patience or Patience()
        self._local = threading.local()  # a call and its retries are on one thread
        self._lock = threading.Lock()
        self._chains: dict[str, list[_Link]] = {}
        self._dropped: deque[str] = deque()
        self._failures = Failures(servers.name_of, timeout, self._patience)
        self.num_rebuilt = 0
        self.rebuilt: Counter[str] = Counter()

    def route(self, first: int, need: Need) -> Sequence[Hop]:
        """Return hops from block `first` to the last block; see `remote_spans.Spans`.

        Raises:
            MissingBlocksError: some blocks are served by nobody who may be asked, and nobody came in time.
        """
        deadline = time.monotonic() + self._timeout
        return self._wait_for_route(lambda: self._servers.route(first, need), deadline)

    def forward(self, call: SpanCall, hop: Hop, session: str | None) -> dict[int, Tensor]:
        """Compute a span; see `remote_spans.Spans`.

        Raises:
            NetworkError: no servers could do it in time; the message says which were tried, and why each failed.
        """
        deadline = self._begin()
        if session is None:
            return self._pass([_Link(hop, None)], call, deadline)
        with self._lock:
            chain = self._chains.setdefault(session, [_Link(hop, session)])
        return self._pass(chain, call, deadline)

    def backward(self, call: SpanCall, hop: Hop, grads: Mapping[int, Tensor]) -> SpanGrads:
        """Return the gradients of a call's inputs; see `remote_spans.Spans`."""
        return self._backward(call, hop, grads, self._begin())

    def _begin(self) -> float:
        """Begin to count the failures of a call; return when it is given up."""
        self._local.num_failed, self._local.accusers = 0, []
        return time.monotonic() + self._timeout

    def end_session(self, kept: Kept) -> None:
        """Let the servers forget a session soon, wherever it is by now.

        The garbage collector calls this on any thread, also where that thread holds a lock of ours: so it takes none.
        """
        self._dropped.append(kept.session)
        self._servers.soon(self._end_dropped)

    def _end_dropped(self) -> None:
        """End the sessions whose caches are gone."""
        while self._dropped:
            session = self._dropped.popleft()
            with self._lock:
                chain = self._chains.pop(session, [])
            self._forget(chain)

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Let the servers forget all sessions, and wait until they have, at most so long in all."""
        with self._lock:
            chains, self._chains = self._chains, {}
        wait([answer for chain in chains.values() for answer in self._forget(chain)], seconds)

    def _pass(self, chain: list[_Link], call: SpanCall, deadline: float) -> dict[int, Tensor]:
        """Pass a call through a chain, whose links are replaced as their servers fail."""
        hidden, number = call.hidden, 0
        outputs: dict[int, Tensor] = {}
        while number < len(chain):
            part = _part_of(call, chain[number].hop, hidden)
            if chain[number].history and self._servers.is_leaving(chain[number].hop.peer):
                chain[number : number + 1] = self._moved(chain[number], part, deadline)
                part = _part_of(call, chain[number].hop, hidden)
            try:
                found = self._ask(chain[number], part, deadline)
            except _FailedError as failed:
                chain[number : number + 1] = self._replaced(chain[number], failed, part, deadline)
                continue
            hidden = found[part.end - 1]
            outputs |= found
            number += 1
        wanted = range(call.first, call.end) if call.returns_all else (call.end - 1,)
        return {block: outputs[block] for block in wanted}

    def _ask(self, link: _Link, call: SpanCall, deadline: float) -> dict[int, Tensor]:
        """Ask the server of a link, and note the call in the history of its session."""
        try:
            found = self._servers.forward(call, link.hop, link.session, deadline)
        except SlowLLMError as error:
            if not _may_be_retried(error):
                raise
            raise _FailedError(link.hop.peer, error) from error
        self._failures.forget(link.hop.peer)
        if link.session is not None:
            link.history.append(call)
        return found

    def _replaced(self, link: _Link, failed: _FailedError, call: SpanCall, deadline: float) -> list[_Link]:
        """Return links in the place of one whose server failed, in which what its session kept is rebuilt."""
        need = need_of(*link.history, call, keeps_cache=link.session is not None)
        self._forget([link])
        while True:
            route = self._route_around(failed, link.hop, need, deadline)
            links = [_Link(hop, None if link.session is None else uuid.uuid4().hex) for hop in route]
            try:
                if link.history:
                    self._rebuild(self._calls_for(link, call), links, deadline)
            except _FailedError as again:
                failed = again
                self._forget(links)
                continue
            if link.history:
                self._count(links)
            return links

    def _moved(self, link: _Link, call: SpanCall, deadline: float) -> list[_Link]:
        """Return links in the place of one whose server is about to leave; that one where nobody can take it over yet."""
        need = need_of(*link.history, call, keeps_cache=True)
        links: list[_Link] = []
        try:
            route = self._servers.route(link.hop.first, need, link.hop.end)
            links = [_Link(hop, uuid.uuid4().hex) for hop in route]
            self._rebuild(self._calls_for(link, call), links, deadline)
        except (MissingBlocksError, _FailedError) as error:
            # Its server still serves; whatever fails here is met again when it has gone.
            log.info("the session at %s stays there (%s)", self._servers.name_of(link.hop.peer), error)
            self._forget(links)
            return [link]
        log.info("%s is leaving; its session goes on elsewhere", self._servers.name_of(link.hop.peer))
        self._forget([link])
        self._count(links)
        return links

    def _count(self, links: Sequence[_Link]) -> None:
        """Count a session that was rebuilt, and where."""
        self.num_rebuilt += 1
        self.rebuilt.update(link.hop.peer for link in links)

    def _calls_for(self, link: _Link, call: SpanCall) -> Sequence[SpanCall]:
        """Return the calls by which the session of a link is rebuilt before a call."""
        num_kept = len(call.hidden) * (call.length + call.hidden.shape[1])
        fast = merged(link.history, num_kept) if self._replay == "fast" else None
        return link.history if fast is None else fast

    def _rebuild(self, history: Sequence[SpanCall], links: Sequence[_Link], deadline: float) -> None:
        """Fill the new sessions of links by the calls that their predecessor had, one link after the other."""
        inputs = [call.hidden for call in history]
        for link in links:
            calls = [
                replace(_part_of(call, link.hop, hidden), returns_all=False)
                for call, hidden in zip(history, inputs, strict=True)
            ]
            assert link.session is not None, "only sessions are rebuilt"
            try:
                found = self._servers.replay(
                    calls, link.hop, link.session, deadline, returns=link is not links[-1]
                )
            except SlowLLMError as error:
                if not _may_be_retried(error):
                    raise
                raise _FailedError(link.hop.peer, error) from error
            inputs = [outputs[link.hop.end - 1] for outputs in found]
            link.history.extend(calls)

    def _forget(self, links: Sequence[_Link]) -> list[Future[Any]]:
        """Let servers forget the sessions of links, so that these take no room from those that come in their place."""
        kept = [Kept(link.hop, link.session) for link in links if link.session is not None]
        return [answer for one in kept if (answer := self._servers.end_session(one)) is not None]

    def _backward(self, call: SpanCall, hop: Hop, grads: Mapping[int, Tensor], deadline: float) -> SpanGrads:
        try:
            answer = self._servers.backward(call, hop, grads, deadline)
            self._failures.forget(hop.peer)
            return answer
        except SlowLLMError as error:
            if not _may_be_retried(error):
                raise
            failed = _FailedError(hop.peer, error)
        route = self._route_around(failed, hop, need_of(call, wants_grad=True), deadline)
        # The hidden states between the new hops were never here.
        parts = [_part_of(call, route[0], call.hidden)]
        for before, after in itertools.pairwise(route):
            found = self._pass([_Link(before, None)], replace(parts[-1], returns_all=False), deadline)
            parts.append(_part_of(call, after, found[before.end - 1]))
        flowing: Tensor | None = None
        vectors: dict[int, Tensor] = {}
        pairs: dict[int, tuple[Tensor | None, Tensor | None]] = {}
        for own_hop, part in zip(reversed(route), reversed(parts), strict=True):
            own = {number: grad for number, grad in grads.items() if part.first <= number < part.end}
            if flowing is not None:
                last = part.end - 1
                own[last] = own[last] + flowing if last in own else flowing
            result = self._backward(part, own_hop, own, deadline)
            flowing = result.hidden
            vectors |= result.vectors
            pairs |= result.pairs
        return SpanGrads(flowing, vectors, pairs)

    def _route_around(self, failed: _FailedError, hop: Hop, need: Need, deadline: float) -> Sequence[Hop]:
        """Ban a server that failed, and return hops over the span of one of its hops at others.

        Raises:
            MissingBlocksError: see `_wait_for_route`.
            SlowLLMError: of the server, which was the last that may be tried.
        """
        failure = self._failures.note(failed.peer, failed.error)
        self._local.num_failed += 1
        if self._local.num_failed == self._patience.max_attempts:
            self._servers.ban(failed.peer, failure.until)
            raise failed.error
        if not isinstance(failed.error, _RETRIED):
            return self._route_to_another_opinion(failed, failure, hop, need)
        self._servers.ban(failed.peer, failure.until)
        if failure.at >= deadline:
            blocks = tuple(range(hop.first, hop.end))
            raise self._failures.out_of_time(
                blocks, f"blocks {hop.first}:{hop.end} were not computed", deadline
            )
        name = self._servers.name_of(failed.peer)
        level = logging.INFO if failure.is_well else logging.WARNING
        seconds = round(failure.until - failure.at, 3)
        log.log(level, "%s failed (%s); it is not asked for %g s", name, failed.error, seconds)
        route = self._wait_for_route(
            lambda: self._servers.route(hop.first, need, hop.end),
            deadline,
            is_too_large=isinstance(failed.error, LimitError),
        )
        others = ", ".join(f"{own.first}:{own.end} {self._servers.name_of(own.peer)}" for own in route)
        log.warning("blocks %d:%d go on: %s", hop.first, hop.end, others)
        return route

    def _route_to_another_opinion(
        self, failed: _FailedError, failure: Failure, hop: Hop, need: Need
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
                route = self._servers.route(hop.first, need, hop.end)
                name = self._servers.name_of(failed.peer)
                log.warning("%s refuses its work (%s); others are asked", name, failed.error)
                return route
        except MissingBlocksError:
            pass
        for peer in accusers:  # they may be right, and then they are well
            self._failures.forget(peer)
            self._servers.ban(peer, 0.0)
        raise failed.error

    def _wait_for_route(
        self, find: Callable[[], Sequence[Hop]], deadline: float, *, is_too_large: bool = False
    ) -> Sequence[Hop]:
        """Return a route; wait while blocks are missing because servers have failed, or our own sessions fill them.

        Args:
            find: returns a route, if there is one now.
            deadline: of the call.
            is_too_large: whether a server has refused the call by its limits.

        Raises:
            MissingBlocksError: the time is over, or nobody takes so much; it says which servers were tried, and why each
                failed.
        """
        num_looks = 0
        while True:
            try:
                return find()
            except MissingBlocksError as error:
                tried = self._failures.since(deadline)
                # Sessions of this client may be what fills the servers, and they end.
                waits_for_room = error.is_full and bool(self._chains)
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


def _may_be_retried(error: SlowLLMError) -> bool:
    """Whether another server may do better; so may it where a server says that what it was given is wrong."""
    return isinstance(error, _RETRIED) or isinstance(error.__cause__, RemoteError)


class _FailedError(Exception):
    """A server failed at a call that others may do."""

    def __init__(self, peer: str, error: SlowLLMError) -> None:
        super().__init__(str(error))
        self.peer, self.error = peer, error


def _part_of(call: SpanCall, hop: Hop, hidden: Tensor) -> SpanCall:
    return part_of(call, hop.first, hop.end, hidden)
