"""A server's answers: spans of blocks for whoever asks, each request a rider of the server's carousel.

Checks requests, keeps sessions within the tokens that were planned for, and reports how long a request waited and was
computed. Knows no network: a request comes with the id of its peer, and is answered through a callback.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

from slowllm.errors import BusyError, InputError, LimitError, ProtocolError, SlowLLMError, forward_errors
from slowllm.modeling.cutting import find_form
from slowllm.modeling.span import SpanRunner
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.streaming.ride import Ride
from slowllm.swarm.compression import COMPRESSIONS
from slowllm.swarm.requests import PeerRequest
from slowllm.swarm.sessions import ServedSession, Sessions
from slowllm.swarm.span_messages import (
    SpanRequest,
    Tensors,
    compressible,
    pack_grads,
    pack_outputs,
    unpack_request,
)
from slowllm.swarm.status import ServerStatus


@dataclass(frozen=True)
class ServedSpan:
    """What a server serves, and how much of it.

    Attributes:
        first: the first block.
        end: the number after the last.
        max_batch_tokens: of one request.
        max_length: of one sequence, what its session holds included.
        max_waiting_tokens: of all requests that are under way or wait.
        cache_tokens: that all sessions hold together.
        session_seconds: after which an idle session ends.
        has_backward: whether gradients are computed.
    """

    first: int
    end: int
    max_batch_tokens: int
    max_length: int
    max_waiting_tokens: int
    cache_tokens: int
    session_seconds: float
    has_backward: bool


class SpanServer:
    """Answers requests for a span of a loaded model.

    Args:
        lm: the model, or a part of it that has the blocks.
        served: what of it is served.
    Raises:
        UnsupportedError: the model cannot be cut between blocks.
    """

    def __init__(self, lm: StreamedLM, served: ServedSpan) -> None:
        self._lm, self.served = lm, served
        self.form = find_form(lm.model, lm.layout.blocks_name)
        self.runner = SpanRunner(lm.model, lm.layout.blocks_name, self.form)
        self.sessions: Sessions[Any] = Sessions(served.cache_tokens, served.session_seconds)
        self._lock = threading.Lock()
        self._waiting_tokens = 0
        self._is_draining = False

    def drain(self) -> None:
        """Take no new sessions from now on."""
        self._is_draining = True

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
            SessionError: its session is not here, or has no room.
            BusyError: too many tokens wait already.
        """
        operation = request.meta.get("op")
        if operation == "end_session":
            self.sessions.end(request.peer, str(request.meta.get("session")))
            request.respond()
        elif operation == "status":
            request.respond(self.status().to_meta())
        elif operation in ("forward", "backward"):
            self._board(request)
        else:
            raise ProtocolError(f"{str(operation)[:40]!r} is no operation of this version")

    def _board(self, request: PeerRequest) -> None:
        asked = unpack_request(request.meta, request.tensors, self.form.hidden_dtype)
        compression = str(request.meta.get("compression", "none"))
        if compression not in COMPRESSIONS:
            raise ProtocolError(f"the compression {compression[:40]!r} is none of {', '.join(COMPRESSIONS)}")
        num_tokens = asked.call.hidden.shape[0] * asked.call.hidden.shape[1]
        self._check(asked, num_tokens)
        session = self._reserve(request.peer, asked, num_tokens)
        came_at, began_at = time.time(), [0.0]

        def compute() -> Tensors:
            began_at[0] = time.time()
            with forward_errors(self._lm.model):
                if asked.grads is not None:
                    return pack_grads(self.runner.backward(asked.call, asked.grads))
                return pack_outputs(
                    self.runner.forward(asked.call, None if session is None else session.cache)
                )

        def ended(ride: Ride[Tensors]) -> None:
            tensors: Tensors = {}
            error: BaseException | None = None
            try:
                tensors = ride.result()
            except BaseException as caught:  # told to who asked; what is a fault of ours is logged there
                error = caught
            self._leave(request.peer, asked, num_tokens, has_failed=error is not None)
            if error is not None:
                request.fail(error)
                return
            ended_at = time.time()
            said = {
                "queue_seconds": began_at[0] - came_at, "compute_seconds": ended_at - began_at[0],
                "began_at": began_at[0], "ended_at": ended_at,
            }  # fmt: skip
            try:
                request.respond(said, tensors, dict.fromkeys(compressible(tensors), compression))
            except (
                SlowLLMError
            ) as refused:  # it is too large, or has numbers that the compression cannot hold
                request.fail(refused)

        try:
            ride = self._lm.board(compute)
        except BaseException:
            self._leave(request.peer, asked, num_tokens, has_failed=True)
            raise
        ride.add_done_callback(ended)
        request.add_cancel_callback(ride.cancel)

    def _check(self, asked: SpanRequest, num_tokens: int) -> None:
        call, served = asked.call, self.served
        if not served.first <= call.first < call.end <= served.end:
            raise LimitError(
                f"blocks {call.first}:{call.end} are not served here; this server has {served.first}:{served.end}"
            )
        if call.hidden.shape[2:] != self.form.hidden_shape:
            raise InputError(
                f"hidden states of shape {list(call.hidden.shape)} are no (rows, positions, "
                f"{', '.join(map(str, self.form.hidden_shape))}) of this model"
            )
        if num_tokens > served.max_batch_tokens:
            raise LimitError(
                f"a request of {num_tokens:,} tokens is longer than the {served.max_batch_tokens:,} that this server announces"
            )
        if call.length + call.hidden.shape[1] > served.max_length:
            raise LimitError(
                f"a sequence of {call.length + call.hidden.shape[1]:,} tokens is longer than the {served.max_length:,} that this "
                "server takes"
            )
        if asked.grads is not None and not served.has_backward:
            raise LimitError("this server computes no gradients, because its budget streams blocks in parts")

    def _reserve(self, peer: str, asked: SpanRequest, num_tokens: int) -> ServedSession[Any] | None:
        """Count a request among those that wait, and make room in its session."""
        call, served = asked.call, self.served
        session: ServedSession[Any] | None = None
        with self._lock:
            if self._waiting_tokens and self._waiting_tokens + num_tokens > served.max_waiting_tokens:
                raise BusyError(
                    f"{self._waiting_tokens:,} tokens wait here, and no more than {served.max_waiting_tokens:,} may; ask again later"
                )
            if asked.session is not None:
                if self._is_draining and not asked.step:
                    raise BusyError("the server is leaving and takes no new sessions")
                rows, width = call.hidden.shape[:2]
                session = self.sessions.begin_step(
                    peer, asked.session, asked.step, rows * (call.length + width),
                    lambda: self.runner.new_cache(keeps_everything=call.keeps_everything),
                )  # fmt: skip
            self._waiting_tokens += num_tokens
        return session

    def _leave(self, peer: str, asked: SpanRequest, num_tokens: int, *, has_failed: bool) -> None:
        with self._lock:
            self._waiting_tokens -= num_tokens
        if asked.session is not None:
            self.sessions.end_step(peer, asked.session, has_failed=has_failed)
