"""A client's hops: each is asked of one server, on a route that suits the work.

Finds servers, chooses routes, counts the passages of each session, and adds up where the time went. A request is sent
once: a step that may have been applied is never sent to the same session again. The `Spans` of `modeling.remote_block`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from torch import Tensor

from slowllm.errors import (
    ArchitectureError,
    BusyError,
    DirectoryError,
    InputError,
    LimitError,
    MissingBlocksError,
    NonFiniteError,
    PeerError,
    ProtocolError,
    RemoteError,
    SessionError,
    SlowLLMError,
    UnsupportedError,
)
from slowllm.modeling.remote_spans import Hop, Kept, Need
from slowllm.modeling.span import SpanCall, SpanGrads
from slowllm.swarm.hop_table import PeerTimes
from slowllm.swarm.known_servers import KnownServers
from slowllm.swarm.patience import Patience
from slowllm.swarm.progress import ProgressLog, RequestProgress
from slowllm.swarm.records import ServerRecord
from slowllm.swarm.replay_messages import ReplayRequest, pack_replay, unpack_replayed, windows
from slowllm.swarm.routing import (
    ServerHop,
    Wishes,
    fastest_route,
    format_route,
    other_weights,
    spread,
    usable_spans,
)
from slowllm.swarm.span_messages import (
    Meta,
    SpanRequest,
    Tensors,
    compressible,
    pack_request,
    unpack_grads,
    unpack_outputs,
)
from slowllm.swarm.status import ServerStatus

log = logging.getLogger(__name__)

T = TypeVar("T")

STATUS_SECONDS = 30.0
# Calls without a cache take turns on so many routes, which share the work among replicas by their speed.
_SPREAD_ROUTES = 8


class Asks(Protocol):
    """Sends a request to a peer; `Network.ask` is one."""

    def __call__(
        self,
        peer: str,
        meta: Mapping[str, Any],
        tensors: Mapping[str, Tensor] | None = None,
        *,
        timeout: float | None = None,
        compression: Mapping[str, str] | None = None,
        on_progress: Callable[[RequestProgress], None] | None = None,
    ) -> Future[tuple[Meta, Tensors]]: ...


class Hops:
    """The servers of one model, as a client asks them.

    Args:
        look: begins to look for the servers, and returns the future of their records; see `KnownServers`.
        ask: sends a request.
        soon: does a short piece of work on another thread, and takes no lock; `Network.soon` is one.
        num_blocks: of the model.
        wishes: which servers may be asked.
        patience: how long one answer is waited for, how old what is known of servers may be, and which routes are logged.
    """

    def __init__(
        self,
        look: Callable[[], Future[list[ServerRecord]]],
        ask: Asks,
        soon: Callable[[Callable[[], object]], None],
        num_blocks: int,
        wishes: Wishes,
        patience: Patience | None = None,
    ) -> None:
        self._ask, self._soon = ask, soon
        self._patience = patience or Patience()
        self._known = KnownServers(look, self._patience.refresh_seconds)
        self._num_blocks, self._wishes = num_blocks, wishes
        self._lock = threading.Lock()
        self._num_steps: dict[str, int] = {}
        self._num_calls = 0
        self._banned_until: dict[str, float] = {}
        self._leaving: set[str] = set()
        self._last_route = ""
        self._named: set[tuple[str, str]] = set()
        self.times: dict[str, PeerTimes] = {}

    def records(self) -> list[ServerRecord]:
        """Return the records of the servers, found lately; see `KnownServers.records`."""
        return self._known.records()

    def renew(self, deadline: float = math.inf) -> None:
        """Look for servers that have come or left, and wait for what is found; see `KnownServers.renew`."""
        self._known.renew(deadline)

    def hashes(self) -> dict[int, str]:
        """Return the identities of the blocks that this client keeps to, by their numbers."""
        with self._lock:
            return dict(self._wishes.hashes)

    def latencies(self) -> dict[str, float]:
        """Return the seconds that a request has spent on the way, on the average, by the peer's id."""
        with self._lock:
            return {peer: times.network_seconds / times.num_requests for peer, times in self.times.items()}

    def route(
        self, first: int, need: Need, end: int | None = None, *, deadline: float = math.inf
    ) -> Sequence[Hop]:
        """Return hops from block `first` to block `end` - 1, or to the last block; see `AsksServers.route`.

        Generation takes the route on which a token is fastest; calls without a cache are spread over replicas, so that
        all servers have work.

        Raises:
            MissingBlocksError: some blocks are served by nobody who may be asked.
        """
        with self._lock:
            self._num_calls += 1
            number = self._num_calls % _SPREAD_ROUTES
        goal = self._num_blocks if end is None else end
        try:
            chosen = self._choose(number, first, goal, need, deadline)
        except MissingBlocksError as missing:
            # Others may have come since.
            try:
                self._known.renew(deadline)
            except DirectoryError as error:
                raise MissingBlocksError(
                    missing.blocks, f"{missing}; {error}", is_full=missing.is_full
                ) from error
            chosen = self._choose(number, first, goal, need, deadline)
        shown, said = self._patience.shown_routes, format_route(chosen)
        if said != self._last_route and (shown == "all" or (shown == "inference" and need.session_tokens)):
            log.info("route: %s", said)
            self._last_route = said
        self._keep_to(chosen)
        return [Hop(hop.first, hop.end, hop.record.peer) for hop in chosen]

    def _choose(self, number: int, first: int, end: int, need: Need, deadline: float) -> Sequence[ServerHop]:
        """Return a route among the servers that are known; `number` says which one of those that share work."""
        records = self._known.records(deadline)
        with self._lock:
            now = time.monotonic()
            banned = {peer for peer, until in self._banned_until.items() if until > now} | self._leaving
        wishes = replace(
            self._wishes, banned=banned, needs_backward=need.wants_grad, batch_tokens=need.num_tokens,
            cache_tokens=need.session_tokens, length=need.length,
        )  # fmt: skip
        if need.session_tokens:
            return fastest_route(records, first, end, wishes, self.latencies())
        return spread(records, number + 1, first, end, wishes)[number]

    def replicas(self, first: int, end: int) -> list[ServerRecord]:
        """Return the servers that may be asked for all of these blocks, with the weights that this client keeps to."""
        with self._lock:
            now = time.monotonic()
            banned = {peer for peer, until in self._banned_until.items() if until > now}
            wishes = replace(self._wishes, banned=banned)
        with contextlib.suppress(MissingBlocksError):
            spans = usable_spans(self.records(), first, end, wishes)
            return [span.record for span in spans if (span.first, span.end) == (first, end)]
        return []

    def _keep_to(self, route: Sequence[ServerHop]) -> None:
        """Want from now on the weights that were chosen first, and name servers that have others, once each."""
        records = self._known.records()
        with self._lock:
            chosen = {
                block: hop.record.hash_of(block) for hop in route for block in range(hop.first, hop.end)
            }
            self._wishes = replace(self._wishes, hashes={**chosen, **self._wishes.hashes})
            others = other_weights(records, 0, self._num_blocks, self._wishes)
            new = others.items() - self._named
            self._named |= new
        for label, blocks in sorted(new):
            log.warning("%s is not used for %s: its weights are others", label, blocks)

    def forward(self, call: SpanCall, hop: Hop, session: str | None, deadline: float) -> dict[int, Tensor]:
        """Compute a span at its server; see `remote_spans.Spans`.

        Args:
            call: what is computed.
            hop: at whose server.
            session: whose keys and values are read and kept; None for a call without a past.
            deadline: of `time.monotonic`, at which the request is given up.
        Raises:
            SessionError: the session is not there any more, or has no room.
            PeerError: the server does not answer in time, or with what is no answer, or with an error of its own.
            SlowLLMError: the request cannot be sent, or the server says what is wrong with it.
        """
        if session is None:
            return self._send(SpanRequest(call), hop, deadline, lambda found: unpack_outputs(found, call))
        with self._lock:
            step = self._num_steps.get(session, 0)
            self._num_steps[session] = step + 1
        try:
            request = SpanRequest(call, session, step)
            return self._send(request, hop, deadline, lambda found: unpack_outputs(found, call))
        except BaseException:
            # It is unknown whether the step was applied, so the session is not used again.
            with self._lock:
                self._num_steps[session] = -1
            raise

    def replay(
        self, calls: Sequence[SpanCall], hop: Hop, session: str, deadline: float, *, returns: bool
    ) -> list[dict[int, Tensor]]:
        """Fill a session at a server by calls, in as few sweeps as its requests allow; see `Failover`.

        Args:
            calls: in which the session grew elsewhere, in their order.
            hop: at whose server.
            session: a new name, or of one that was filled so before and goes on.
            deadline: as for `forward`.
            returns: whether the outputs of the calls are wanted.
        Returns:
            what `forward` returns, of each call; nothing where it is not wanted.
        Raises:
            SessionError: a passage of the session has failed.
        """
        record = self._known.get(hop.peer)
        outputs: list[dict[int, Tensor]] = []
        with self._lock:
            step = self._num_steps.get(session, 0)
        _refuse_failed(step)
        for window in windows(calls, 0 if record is None else record.max_batch_tokens):
            with self._lock:
                self._num_steps[session] = -1  # until it has worked
            asked = pack_replay(ReplayRequest(window, session, step, returns))
            wanted = window if returns else []
            outputs += self._exchange(*asked, hop, deadline, functools.partial(_outputs_of, wanted))
            step += len(window)
        with self._lock:
            self._num_steps[session] = step
        return outputs

    def backward(self, call: SpanCall, hop: Hop, grads: Mapping[int, Tensor], deadline: float) -> SpanGrads:
        """Return the gradients of a call's inputs from its server, by a deadline as for `forward`."""
        request = SpanRequest(call, grads=grads)
        return self._send(request, hop, deadline, lambda found: unpack_grads(found, call))

    def end_session(self, kept: Kept) -> Future[Any] | None:
        """Tell the server that a cache is gone. Does not wait; returns the answer, None where there was no session."""
        with self._lock:
            if self._num_steps.pop(kept.session, None) is None:
                return None
        with contextlib.suppress(SlowLLMError):  # a server that has gone has no session either
            return self._ask(kept.hop.peer, {"op": "end_session", "session": kept.session})
        return None

    def soon(self, work: Callable[[], object]) -> None:
        """Do a short piece of work on another thread. Takes no lock."""
        self._soon(work)

    def status(self, peer: str) -> ServerStatus:
        """Return what a server says of its work so far.

        Raises:
            NetworkError: it does not answer within `STATUS_SECONDS`.
        """
        said, _ = self._ask(peer, {"op": "status"}, timeout=STATUS_SECONDS).result()
        return ServerStatus.from_meta(said)

    def is_leaving(self, peer: str) -> bool:
        """Whether a server has said with its last answer that it takes no new sessions and will be gone soon."""
        with self._lock:
            return peer in self._leaving

    def ban(self, peer: str, until: float) -> None:
        """Leave a server out of routes until a time of `time.monotonic`.

        Others are looked for only where those that are known do not do: a peer of the directory that hangs, as this one
        may be, holds up a look for seconds, and the call waits for it then.
        """
        with self._lock:
            self._banned_until[peer] = until

    def name_of(self, peer: str) -> str:
        """Return a server's name and the end of its id."""
        return self._name(peer)

    def _send(self, request: SpanRequest, hop: Hop, deadline: float, unpack: Callable[[Tensors], T]) -> T:
        _refuse_failed(request.step)
        return self._exchange(*pack_request(request), hop, deadline, unpack)

    def _exchange(
        self, meta: Meta, tensors: Tensors, hop: Hop, deadline: float, unpack: Callable[[Tensors], T]
    ) -> T:
        record = self._known.get(hop.peer)
        how = "none" if record is None else record.compression
        meta["compression"] = how
        began = time.perf_counter()
        answer = self._ask(
            hop.peer,
            meta,
            tensors,
            timeout=max(0.0, min(deadline - time.monotonic(), self._patience.request_seconds)),
            compression=dict.fromkeys(compressible(tensors), how),
            on_progress=ProgressLog(self._name(hop.peer)),
        )
        try:
            said, tensors = answer.result()
            with self._lock:
                (self._leaving.add if said.get("is_leaving") is True else self._leaving.discard)(hop.peer)
            found = unpack(tensors)
        except RemoteError as error:
            raise _as_own(error, self._name(hop.peer)) from error
        except ProtocolError as error:  # of the answer: what cannot be sent was refused before
            problem = str(error).removeprefix(f"peer {hop.peer}: ")
            raise PeerError(hop.peer, f"sends what is no answer ({problem})") from error
        except BaseException:  # an interrupt
            answer.cancel()
            raise
        self._add_times(hop.peer, time.perf_counter() - began, said)
        return found

    def _add_times(self, peer: str, seconds: float, said: Mapping[str, Any]) -> None:
        queue, compute = (_seconds(said.get(name)) for name in ("queue_seconds", "compute_seconds"))
        with self._lock:
            times = self.times.setdefault(peer, PeerTimes(self._name(peer)))
            times.num_requests += 1
            times.queue_seconds += queue
            times.compute_seconds += compute
            times.network_seconds += max(0.0, seconds - queue - compute)

    def _name(self, peer: str) -> str:
        record = self._known.get(peer)
        return peer[-6:] if record is None else record.label


def _outputs_of(calls: Sequence[SpanCall], tensors: Tensors) -> list[dict[int, Tensor]]:
    return unpack_replayed(tensors, calls)


def _refuse_failed(step: int) -> None:
    if step < 0:
        raise SessionError("a passage of this session has failed before, so its cache cannot be continued")


def _seconds(value: object) -> float:
    """Return a time that a server tells, 0 where it tells none."""
    return float(value) if isinstance(value, int | float) and 0 <= value < float("inf") else 0.0


def _as_own(error: RemoteError, name: str) -> SlowLLMError:
    """Return what a server says went wrong as the kind of error that it was there."""
    kinds: tuple[type[SlowLLMError], ...] = (
        SessionError, BusyError, LimitError, InputError, NonFiniteError, ArchitectureError, UnsupportedError,
    )  # fmt: skip
    for kind in kinds:
        if error.kind == kind.__name__:
            return kind(f"{name}: {error.sentence}")
    return error
