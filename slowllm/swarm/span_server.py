"""A server's answers: spans of blocks for whoever asks, each request a rider of the server's carousel.

Checks requests, keeps sessions within the tokens that were planned for, and reports how long a request waited and was
computed. Knows no network: a request comes with the id of its peer, and is answered through a callback.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from slowllm.errors import BusyError, ProtocolError, SlowLLMError, forward_errors
from slowllm.modeling.cutting import find_form
from slowllm.modeling.span import SpanCall, SpanRunner
from slowllm.options import COMPRESSIONS
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.streaming.ride import Ride
from slowllm.swarm.progress import RequestProgress
from slowllm.swarm.quotas import PeerQuotas
from slowllm.swarm.replay_messages import pack_replayed, unpack_replay
from slowllm.swarm.requests import PeerRequest
from slowllm.swarm.sessions import ServedSession, Sessions
from slowllm.swarm.span_checks import (
    ServedSpan,
    check_answer,
    check_request,
    check_sent,
    tokens_of,
    waiting_tokens,
)
from slowllm.swarm.span_messages import (
    Tensors,
    compressible,
    pack_grads,
    pack_outputs,
    unpack_request,
)
from slowllm.swarm.status import ServerStatus

T = TypeVar("T")

MOVING = "the server is moving to other blocks; ask again later"


class SpanServer:
    """Answers requests for a span of a loaded model.

    Attributes:
        block_seconds: that one block takes, as was measured, for what is said of requests under way; 0 while unknown.

    Args:
        lm: the model, or a part of it that has the blocks.
        served: what of it is served.
        quotas: of each peer.
    Raises:
        UnsupportedError: the model cannot be cut between blocks.
    """

    def __init__(self, lm: StreamedLM, served: ServedSpan, quotas: PeerQuotas | None = None) -> None:
        self._lm, self.served = lm, served
        self.form = find_form(lm.model, lm.layout.blocks_name)
        self.runner = SpanRunner(lm.model, lm.layout.blocks_name, self.form)
        self.sessions: Sessions[Any] = Sessions(
            served.cache_tokens, served.session_seconds, quotas=quotas or PeerQuotas()
        )
        self._lock = threading.Lock()
        self._waiting_tokens = 0
        self._under_way: dict[int, _Work] = {}
        self.block_seconds = 0.0
        self._is_draining = self._is_closed = False

    def close_if_unused(self) -> bool:
        """Take no more requests that are computed, if no session is open and no request under way; return whether that is so."""
        with self._lock:
            if not self._is_closed:
                self.sessions.end_idle()
                self._is_closed = not self.is_in_use
            return self._is_closed

    def drain(self) -> None:
        """Take no new sessions from now on."""
        self._is_draining = True

    @property
    def is_in_use(self) -> bool:
        """Whether sessions are open, or requests are under way."""
        return bool(len(self.sessions) or self._under_way)

    @property
    def waiting_tokens(self) -> int:
        """Tokens of the requests that are under way or wait."""
        return self._waiting_tokens

    def status(self) -> ServerStatus:
        """Return what has been done and what is held now."""
        report = self._lm.report
        return ServerStatus(
            report.num_passages, report.read_bytes, report.peak_rss_bytes, len(self.sessions), self.sessions.free_tokens,
            self.waiting_tokens,
        )  # fmt: skip

    def handle(self, request: PeerRequest) -> None:
        """Answer a request of a peer: at once, or when it has passed the span. Does not block on a sweep.

        Raises:
            ProtocolError: the request is damaged.
            InputError: it does not fit the model; or, as a LimitError, it asks for what this server does not serve.
            SessionError: its session is not here.
            BusyError: too many tokens wait already, other sessions leave no room, or the blocks are not served here any more.
        """
        operation = request.meta.get("op")
        if operation == "end_session":
            self.sessions.end(request.peer, str(request.meta.get("session")))
            request.respond()
        elif operation in ("forward", "backward"):
            self._compute(request)
        elif operation == "replay":
            self._replay(request)
        else:
            raise ProtocolError(f"{str(operation)[:40]!r} is no operation of this version")

    def _compute(self, request: PeerRequest) -> None:
        """Board a passage through the span."""
        asked = unpack_request(request.meta, request.tensors, self.form.hidden_dtype)
        call, grads = asked.call, asked.grads
        compression = _compression_of(request)
        check_request(
            call, tokens_of(call), self.served, self.form.hidden_shape, wants_grad=grads is not None
        )
        if grads is None:
            check_answer([call], self.served, compression)
        num_tokens = tokens_of(call) if grads is not None else waiting_tokens(call)
        num_visits = (3 if grads is not None else 1) * (call.end - call.first)
        work = _Work(request, compression, num_tokens, asked.session, asked.step, num_visits=num_visits)
        session = self._reserve(work, [call])

        def compute() -> Tensors:
            check_sent(call)
            if grads is not None:
                return pack_grads(self.runner.backward(call, grads, work.pass_block))
            cache = None if session is None else session.cache
            return pack_outputs(self.runner.forward(call, cache, work.pass_block))

        self._board(work, [compute], lambda results: results[0])

    def _replay(self, request: PeerRequest) -> None:
        """Board the passages in which a session grew elsewhere, all in one sweep."""
        asked = unpack_replay(request.meta, request.tensors, self.form.hidden_dtype)
        compression, num_tokens = _compression_of(request), sum(map(tokens_of, asked.calls))
        for call in asked.calls:
            check_request(call, num_tokens, self.served, self.form.hidden_shape)
        if asked.returns:
            check_answer(asked.calls, self.served, compression)
            num_tokens = sum(map(waiting_tokens, asked.calls))
        work = _Work(
            request, compression, num_tokens, asked.session, asked.step, len(asked.calls),
            _held_tokens_of(asked.calls[-1]), asked.calls[0].end - asked.calls[0].first,
        )  # fmt: skip
        session = self._reserve(work, asked.calls)
        assert session is not None, "a replay names one"
        jobs = self.runner.replay(asked.calls, session.cache, work.pass_block)

        def checked(call: SpanCall, job: Callable[[], dict[int, Tensor]]) -> dict[int, Tensor]:
            check_sent(call)
            return job()

        self._board(
            work,
            [functools.partial(checked, call, job) for call, job in zip(asked.calls, jobs, strict=True)],
            lambda results: pack_replayed(results) if asked.returns else {},
        )

    def _board(
        self, work: _Work, jobs: Sequence[Callable[[], T]], pack: Callable[[list[T]], Tensors]
    ) -> None:
        """Let jobs ride together, and answer when all have ended."""
        came_at, began_at, num_left = time.time(), list[float](), len(jobs)

        def timed(job: Callable[[], T]) -> T:
            began_at.append(time.time())
            work.has_begun = True
            with forward_errors(self._lm.model):
                return job()

        def ended(_: Ride[T]) -> None:
            nonlocal num_left
            with self._lock:
                num_left -= 1
                if num_left:
                    return
            results: list[T] = []
            error: BaseException | None = None
            for ride in rides:
                try:
                    results.append(ride.result())
                except BaseException as caught:  # told to who asked; what is a fault of ours is logged there
                    # The first one: those that ride behind a job that failed find its session as it was left.
                    error = error or caught
            self._leave(work, has_failed=error is not None)
            if error is not None:
                work.request.fail(error)
                return
            ended_at = time.time()
            said = {
                "queue_seconds": began_at[0] - came_at, "compute_seconds": ended_at - began_at[0],
                "began_at": began_at[0], "ended_at": ended_at, "is_leaving": self._is_draining,
            }  # fmt: skip
            try:
                tensors = pack(results)
                work.request.respond(said, tensors, dict.fromkeys(compressible(tensors), work.compression))
            except (
                SlowLLMError
            ) as refused:  # it is too large, or has numbers that the compression cannot hold
                work.request.fail(refused)

        work.request.progress = functools.partial(self._progress, work)
        try:
            rides = self._lm.board_together([functools.partial(timed, job) for job in jobs])
        except BaseException:
            self._leave(work, has_failed=True)
            raise
        for ride in rides:
            work.request.add_cancel_callback(ride.cancel)
            ride.add_done_callback(ended)

    def _reserve(self, work: _Work, calls: Sequence[SpanCall]) -> ServedSession[Any] | None:
        """Count a request among those that wait, and make room in its session."""
        served, num_tokens = self.served, work.num_tokens
        session: ServedSession[Any] | None = None
        with self._lock:
            if self._is_closed:
                raise BusyError(MOVING)
            if self._waiting_tokens and self._waiting_tokens + num_tokens > served.max_waiting_tokens:
                raise BusyError(
                    f"{self._waiting_tokens:,} tokens wait here, and no more than {served.max_waiting_tokens:,} may; ask again later"
                )
            if work.session is not None:
                if self._is_draining and not work.step:
                    raise BusyError("the server is leaving and takes no new sessions")
                keeps_everything = calls[0].keeps_everything
                session = self.sessions.begin_step(
                    work.request.peer, work.session, work.step, max(map(_held_tokens_of, calls)),
                    lambda: self.runner.new_cache(keeps_everything=keeps_everything),
                )  # fmt: skip
            self._waiting_tokens += num_tokens
            self._under_way[id(work)] = work
        return session

    def _progress(self, work: _Work) -> RequestProgress:
        """Return what is said of a request while it is under way."""
        ahead = 0
        if not work.has_begun:
            with self._lock:
                ahead = list(self._under_way).index(id(work)) if id(work) in self._under_way else 0
        block = None if work.block is None else min(work.block, self.served.end - 1)
        if not self.block_seconds:
            return RequestProgress(block, ahead, None)
        # One that waits boards at the first stop, which may be a whole round away.
        num_left = work.num_visits - work.num_passed
        num_left += 0 if work.has_begun else self.served.end - self.served.first
        return RequestProgress(block, ahead, num_left * self.block_seconds)

    def _leave(self, work: _Work, *, has_failed: bool) -> None:
        with self._lock:
            self._waiting_tokens -= work.num_tokens
            del self._under_way[id(work)]
        if work.session is not None:
            self.sessions.end_step(
                work.request.peer, work.session, has_failed=has_failed, num_steps=work.num_steps,
                num_tokens=work.num_held_tokens,
            )  # fmt: skip


@dataclass
class _Work:
    """A request that is computed.

    Attributes:
        request: to be answered.
        compression: of the answer.
        num_tokens: that it has.
        session: that it continues, if it does.
        step: how many passages the session has had.
        num_steps: passages that it is.
        num_held_tokens: that the session holds behind it, where that may be less than on the way.
        num_visits: blocks that it passes, up and down.
        num_passed: of these, as far as is known.
        block: that is computed next; None before it has passed one.
        has_begun: whether it rides.
    """

    request: PeerRequest
    compression: str
    num_tokens: int
    session: str | None
    step: int
    num_steps: int = 1
    num_held_tokens: int | None = None
    num_visits: int = 0
    num_passed: int = 0
    block: int | None = None
    has_begun: bool = False

    def pass_block(self, block: int) -> None:
        """Note that a block has been computed."""
        self.num_passed += 1
        self.block = block + 1


def _compression_of(request: PeerRequest) -> str:
    compression = str(request.meta.get("compression", "none"))
    if compression not in COMPRESSIONS:
        raise ProtocolError(f"the compression {compression[:40]!r} is none of {', '.join(COMPRESSIONS)}")
    return compression


def _held_tokens_of(call: SpanCall) -> int:
    """Return the tokens that a session holds behind a call."""
    return call.hidden.shape[0] * (call.length + call.hidden.shape[1])
