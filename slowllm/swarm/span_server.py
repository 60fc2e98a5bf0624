"""A server's answers: spans of blocks for whoever asks, each request a rider of the server's carousel.

Checks requests, keeps sessions within the tokens that were planned for, and reports how long a request waited and was
computed. Knows no network: a request comes with the id of its peer, and is answered through a callback.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from slowllm.errors import BusyError, InputError, SlowLLMError, forward_errors
from slowllm.modeling.cutting import find_form
from slowllm.modeling.span import SpanRunner
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.swarm.sessions import Session, Sessions
from slowllm.swarm.span_messages import SpanRequest, pack_grads, pack_outputs, unpack_request

log = logging.getLogger(__name__)

Meta = dict[str, Any]
# Called once with an answer or an error, on any thread.
Respond = Callable[[Meta, Mapping[str, Tensor]], None]
Fail = Callable[[SlowLLMError], None]


@dataclass(frozen=True)
class ServedSpan:
    """What a server serves, and how much of it.

    Attributes:
        first: the first block.
        end: the number after the last.
        max_batch_tokens: of one request.
        max_waiting_tokens: of all requests that are under way or wait.
        cache_tokens: that all sessions hold together.
        session_seconds: after which an idle session ends.
        has_backward: whether gradients are computed.
    """

    first: int
    end: int
    max_batch_tokens: int
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
        self.runner = SpanRunner(lm.model, lm.layout.blocks_name, find_form(lm.model, lm.layout.blocks_name))
        self.sessions: Sessions[Cache] = Sessions(served.cache_tokens, served.session_seconds)
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

    def ask(self, peer: str, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Request:
        """Check a request, and let it ride; return what can be waited for or cancelled. Does not block on a sweep.

        Args:
            peer: that asks.
            meta: of its message.
            tensors: of its message.
        Raises:
            ProtocolError: the request is damaged.
            InputError: it asks for what is not served.
            SessionError: its session is not here, or has no room.
            BusyError: too many tokens wait already.
        """
        request = unpack_request(meta, tensors, self._lm.model.dtype)
        call, served = request.call, self.served
        if not served.first <= call.first < call.end <= served.end:
            raise InputError(
                f"blocks {call.first}:{call.end} are not served here; this server has {served.first}:{served.end}"
            )
        num_tokens = call.hidden.shape[0] * call.hidden.shape[1]
        if num_tokens > served.max_batch_tokens:
            raise InputError(
                f"a request of {num_tokens:,} tokens is longer than the {served.max_batch_tokens:,} that this server announces"
            )
        if request.grads is not None and not served.has_backward:
            raise InputError("this server computes no gradients, because its budget streams blocks in parts")
        session: Session[Cache] | None = None
        with self._lock:
            if self._waiting_tokens and self._waiting_tokens + num_tokens > served.max_waiting_tokens:
                raise BusyError(
                    f"the server is busy: {self._waiting_tokens:,} tokens wait, and it takes {served.max_waiting_tokens:,}"
                )
            if request.session is not None:
                if self._is_draining and not request.step:
                    raise BusyError("the server is leaving and takes no new sessions")
                session = self.sessions.begin_step(
                    peer, request.session, request.step,
                    call.hidden.shape[0] * (call.length + call.hidden.shape[1]),
                    lambda: self.runner.new_cache(keeps_everything=call.keeps_everything),
                )  # fmt: skip
            self._waiting_tokens += num_tokens
        return Request(self, self._lm, peer, request, session, num_tokens)

    def end_session(self, peer: str, name: str) -> None:
        """End a session of a peer."""
        self.sessions.end(peer, name)

    def _leave(self, peer: str, request: SpanRequest, num_tokens: int, *, has_failed: bool) -> None:
        with self._lock:
            self._waiting_tokens -= num_tokens
        if request.session is not None:
            self.sessions.end_step(peer, request.session, has_failed=has_failed)


class Request:
    """One request that rides. Its answer goes to `then`'s callbacks."""

    def __init__(
        self,
        server: SpanServer,
        lm: StreamedLM,
        peer: str,
        request: SpanRequest,
        session: Session[Cache] | None,
        num_tokens: int,
    ) -> None:
        self._server, self._peer, self._request, self._session = server, peer, request, session
        self._num_tokens, self._model = num_tokens, lm.model
        self._came_at, self._began_at = time.time(), 0.0
        self._ride = lm.board(self._compute)

    def then(self, respond: Respond, fail: Fail) -> None:
        """Call back with the answer, or with what went wrong; on the thread that ends the ride."""

        def ended(ride: Any) -> None:
            try:
                tensors = ride.result()
            except SlowLLMError as error:
                answer: SlowLLMError | None = error
            except BaseException as error:  # a fault of ours, which must not leave the client waiting
                log.exception("a request of %s failed", self._peer)
                answer = SlowLLMError(f"the server failed: {type(error).__name__}")
            else:
                answer = None
            self._server._leave(self._peer, self._request, self._num_tokens, has_failed=answer is not None)
            if answer is not None:
                fail(answer)
                return
            ended_at = time.time()
            meta = {
                "queue_seconds": self._began_at - self._came_at, "compute_seconds": ended_at - self._began_at,
                "began_at": self._began_at, "ended_at": ended_at,
            }  # fmt: skip
            respond(meta, tensors)

        self._ride.add_done_callback(ended)

    def cancel(self) -> None:
        """Give the seat up. The session, if there is one, ends, because it is unknown what its cache holds."""
        self._ride.cancel()

    def _compute(self) -> dict[str, Tensor]:
        self._began_at = time.time()
        call = self._request.call
        with forward_errors(self._model):
            if self._request.grads is not None:
                return pack_grads(self._server.runner.backward(call, self._request.grads))
            cache = None if self._session is None else self._session.cache
            with torch.no_grad():
                return pack_outputs(self._server.runner.forward(call, cache))
