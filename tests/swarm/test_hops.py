"""What a client's hops ask of servers, and what they make of the answers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from torch import Tensor

from slowllm.errors import PeerTimeoutError, SlowLLMError
from slowllm.modeling.remote_spans import Hop
from slowllm.modeling.span import SpanCall
from slowllm.swarm.hops import Hops
from slowllm.swarm.messages import Meta, Tensors
from slowllm.swarm.routing import Wishes

PEER = "QmW11AesEZBsQMwuZYzujBuqVfbUKMvUJgX9icaKqEhcT7"
CALL = SpanCall(0, 2, torch.zeros(1, 3, 4))
HOP = Hop(0, 2, PEER)


class Asked:
    """Takes requests, and answers each with an error, or hidden states."""

    def __init__(self, error: SlowLLMError | None = None) -> None:
        self.error = error
        self.timeouts: list[float | None] = []
        self.sent: list[Meta] = []

    def __call__(
        self,
        peer: str,
        meta: Mapping[str, Any],
        tensors: Mapping[str, Tensor] | None = None,
        *,
        timeout: float | None = None,
        compression: Mapping[str, str] | None = None,
    ) -> Future[tuple[Meta, Tensors]]:
        self.timeouts.append(timeout)
        self.sent.append(dict(meta))
        answer: Future[tuple[Meta, Tensors]] = Future()
        if self.error is not None:
            answer.set_exception(self.error)
        else:
            answer.set_result(({}, {"hidden.1": torch.zeros(1, 3, 4)}))
        return answer

    def hops(self) -> Hops:
        return Hops(lambda: [], self, lambda work: None, 4, Wishes())


def test_a_request_has_the_time_that_is_left() -> None:
    asked = Asked(PeerTimeoutError(PEER, "has not answered"))
    hops = asked.hops()
    for ask in (
        lambda deadline: hops.forward(CALL, HOP, None, deadline),
        lambda deadline: hops.backward(CALL, HOP, {1: CALL.hidden}, deadline),
    ):
        for seconds, most in ((100.0, 100.0), (-1.0, 0.0)):
            with pytest.raises(PeerTimeoutError, match="has not answered"):
                ask(time.monotonic() + seconds)
            given = asked.timeouts.pop()
            assert given is not None
            assert 0.0 <= given <= most
            assert bool(given) == (seconds > 0)
