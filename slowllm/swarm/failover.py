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
import uuid
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from torch import Tensor

from slowllm.errors import MissingBlocksError, SlowLLMError
from slowllm.modeling.merged_calls import merged
from slowllm.modeling.remote_spans import Hop, Kept, Need, need_of
from slowllm.modeling.span import SpanCall, SpanGrads, part_of
from slowllm.swarm.asking import NO_WAIT, AsksServers
from slowllm.swarm.detours import Detours, FailedError, may_be_retried
from slowllm.swarm.patience import Patience

log = logging.getLogger(__name__)

Replay = Literal["steps", "fast"]
REPLAYS: tuple[str, ...] = get_args(Replay)

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
        timeout: seconds for one call of the model, through all hops, with all retries and what is rebuilt; and as many for
            the backward pass behind it.
        replay: ``steps`` rebuilds sessions by the calls in which they grew, with equal bits; ``fast`` in one pass.
        patience: how many servers are tried, and with which waits.
    """

    def __init__(
        self, servers: AsksServers, timeout: float, replay: Replay = "steps", patience: Patience | None = None
    ) -> None:
        self._servers, self._replay = servers, replay
        self._lock = threading.Lock()
        self._chains: dict[str, list[_Link]] = {}
        self._dropped: deque[str] = deque()
        self._detours = Detours(servers, timeout, patience or Patience(), lambda: bool(self._chains))
        self.num_rebuilt = 0
        self.rebuilt: Counter[str] = Counter()

    def deadline(self) -> float:
        """Return when a call of the model that begins now is given up; see `remote_spans.Spans`."""
        return self._detours.deadline()

    def route(self, first: int, need: Need, deadline: float) -> Sequence[Hop]:
        """Return hops from block `first` to the last block; see `remote_spans.Spans`.

        Raises:
            MissingBlocksError: some blocks are served by nobody who may be asked, and nobody came in time.
        """
        return self._detours.route(first, need, deadline)

    def forward(self, call: SpanCall, hop: Hop, session: str | None, deadline: float) -> dict[int, Tensor]:
        """Compute a span; see `remote_spans.Spans`.

        Raises:
            NetworkError: no servers could do it in time; the message says which were tried, and why each failed.
        """
        self._detours.begin()
        if session is None:
            return self._pass([_Link(hop, None)], call, deadline)
        with self._lock:
            chain = self._chains.setdefault(session, [_Link(hop, session)])
        return self._pass(chain, call, deadline)

    def backward(self, call: SpanCall, hop: Hop, grads: Mapping[int, Tensor], deadline: float) -> SpanGrads:
        """Return the gradients of a call's inputs; see `remote_spans.Spans`."""
        self._detours.begin()
        return self._backward(call, hop, grads, deadline)

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
            chain[number : number + 1] = self._where_it_works(
                chain[number], _part_of(call, chain[number].hop, hidden), deadline
            )
            link = chain[number]
            part = _part_of(call, link.hop, hidden)
            self._detours.check_time(link.hop, deadline)
            try:
                found = self._ask(link, part, deadline)
            except FailedError as failed:
                need = _need_of(link, part)
                self._forget([link])
                route = self._detours.around(failed, link.hop, need, deadline)
                chain[number : number + 1] = self._at_others(link, route, need, part, deadline)
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
            if not may_be_retried(error):
                raise
            raise FailedError(link.hop.peer, error) from error
        self._detours.answered(link.hop.peer)
        if link.session is not None:
            link.history.append(call)
        return found

    def _where_it_works(self, link: _Link, call: SpanCall, deadline: float) -> list[_Link]:
        """Return links in the place of one whose server was lost a moment ago or leaves; that one where nobody else is known."""
        need = _need_of(link, call)
        route = self._detours.before_asking(link.hop, need)
        if route is not None:
            # Whoever asks a silent server waits until it counts as dead, once for every link that is there.
            self._forget([link])
            return self._at_others(link, route, need, call, deadline)
        if link.history and self._servers.is_leaving(link.hop.peer):
            return self._moved(link, need, call, deadline)
        return [link]

    def _at_others(
        self, link: _Link, route: Sequence[Hop], need: Need, call: SpanCall, deadline: float
    ) -> list[_Link]:
        """Return links over a route in the place of a lost one, in which what its session kept is rebuilt."""
        while True:
            links = [_Link(hop, None if link.session is None else uuid.uuid4().hex) for hop in route]
            if not link.history:
                return links
            self._detours.check_time(link.hop, deadline)
            try:
                self._rebuild(self._calls_for(link, call), links, deadline)
            except FailedError as failed:
                self._forget(links)
                route = self._detours.around(failed, link.hop, need, deadline)
                continue
            self._count(links)
            return links

    def _moved(self, link: _Link, need: Need, call: SpanCall, deadline: float) -> list[_Link]:
        """Return links in the place of one whose server is about to leave; that one where nobody can take it over yet."""
        links: list[_Link] = []
        try:
            route = self._servers.route(link.hop.first, need, link.hop.end, deadline=NO_WAIT)
            links = [_Link(hop, uuid.uuid4().hex) for hop in route]
            self._rebuild(self._calls_for(link, call), links, deadline)
        except (MissingBlocksError, FailedError) as error:
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
                if not may_be_retried(error):
                    raise
                raise FailedError(link.hop.peer, error) from error
            inputs = [outputs[link.hop.end - 1] for outputs in found]
            link.history.extend(calls)

    def _forget(self, links: Sequence[_Link]) -> list[Future[Any]]:
        """Let servers forget the sessions of links, so that these take no room from those that come in their place."""
        kept = [Kept(link.hop, link.session) for link in links if link.session is not None]
        return [answer for one in kept if (answer := self._servers.end_session(one)) is not None]

    def _backward(self, call: SpanCall, hop: Hop, grads: Mapping[int, Tensor], deadline: float) -> SpanGrads:
        need = need_of(call, wants_grad=True)
        route = self._detours.before_asking(hop, need)
        if route is None:
            self._detours.check_time(hop, deadline)
            try:
                answer = self._servers.backward(call, hop, grads, deadline)
                self._detours.answered(hop.peer)
                return answer
            except SlowLLMError as error:
                if not may_be_retried(error):
                    raise
                failed = FailedError(hop.peer, error)
            route = self._detours.around(failed, hop, need, deadline)
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


def _need_of(link: _Link, call: SpanCall) -> Need:
    """Return what a link's server must do: the calls that its session has had, if it has one, and the next."""
    return need_of(*link.history, call, keeps_cache=link.session is not None)


def _part_of(call: SpanCall, hop: Hop, hidden: Tensor) -> SpanCall:
    return part_of(call, hop.first, hop.end, hidden)
