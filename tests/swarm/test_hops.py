"""What a client's hops ask of servers, and what they make of the answers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from slowllm.errors import (
    ArchitectureError,
    BusyError,
    InputError,
    LimitError,
    MissingBlocksError,
    NonFiniteError,
    PeerError,
    PeerTimeoutError,
    ProtocolError,
    RemoteError,
    SessionError,
    SlowLLMError,
    UnsupportedError,
)
from slowllm.modeling.remote_spans import Hop, Need
from slowllm.modeling.span import SpanCall
from slowllm.swarm.hops import Hops
from slowllm.swarm.messages import Meta, Tensors
from slowllm.swarm.patience import Patience, ShownRoutes
from slowllm.swarm.records import ServerRecord
from slowllm.swarm.routing import Wishes

PEER = "QmW11AesEZBsQMwuZYzujBuqVfbUKMvUJgX9icaKqEhcT7"
CALL = SpanCall(0, 2, torch.zeros(1, 3, 4))
HOP = Hop(0, 2, PEER)


def found(records: list[ServerRecord]) -> Future[list[ServerRecord]]:
    """Return the future of a look that has ended."""
    looked: Future[list[ServerRecord]] = Future()
    looked.set_result(records)
    return looked


class Asked:
    """Takes requests, and answers each with an error, or hidden states."""

    def __init__(self, error: SlowLLMError | None = None, hidden: Tensor | None = None) -> None:
        self.error, self.hidden = error, torch.zeros(1, 3, 4) if hidden is None else hidden
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
        on_progress: Any = None,
    ) -> Future[tuple[Meta, Tensors]]:
        self.timeouts.append(timeout)
        self.sent.append(dict(meta))
        answer: Future[tuple[Meta, Tensors]] = Future()
        if self.error is not None:
            answer.set_exception(self.error)
        else:
            answer.set_result(({}, {"hidden.1": self.hidden}))
        return answer

    def hops(self) -> Hops:
        return Hops(lambda: found([]), self, lambda work: None, 4, Wishes())


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


@pytest.mark.parametrize(
    "kind",
    [
        SessionError, BusyError, LimitError, InputError, NonFiniteError, ArchitectureError, UnsupportedError,
    ],
)  # fmt: skip
def test_an_error_of_a_server_has_its_own_kind_here(kind: type[SlowLLMError]) -> None:
    hops = Asked(RemoteError(PEER, kind.__name__, "no")).hops()
    with pytest.raises(SlowLLMError, match=f"{PEER[-6:]}: no") as caught:
        hops.forward(CALL, HOP, None, time.monotonic() + 9)
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    "asked",
    [
        Asked(ProtocolError(f"peer {PEER}: too short")),
        Asked(RemoteError(PEER, "ValueError", "the server failed")),
        Asked(hidden=torch.zeros(1, 2, 4)),
    ],
    ids=["damaged", "failed", "another shape"],
)
def test_what_is_no_answer_is_the_servers_fault(asked: Asked) -> None:
    problem = r"answers ValueError|sends what is no answer \((too short|the answer (lacks|has))"
    with pytest.raises(PeerError, match=f"peer {PEER}: ({problem})"):
        asked.hops().forward(CALL, HOP, None, time.monotonic() + 9)


def test_what_cannot_be_sent_is_not() -> None:
    mask = torch.full((1, 3), 2)
    with pytest.raises(UnsupportedError, match="other values than 0 and 1"):
        Asked().hops().forward(replace(CALL, mask=mask), HOP, None, time.monotonic() + 9)


def record(first: int, end: int) -> ServerRecord:
    return ServerRecord(
        peer=PEER, first=first, end=end, state="online", dtype="float32", version="1", addresses=(), model="m-4",
        block_hashes=("a",) * (end - first), decode_seconds=0.01, forward_tokens_per_second=9.0, max_batch_tokens=99,
        cache_tokens_free=99, has_backward=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("shown", "logged"), [("all", [True, True]), ("inference", [False, True]), ("none", [False, False])]
)
def test_routes_are_logged_of_the_calls_that_are_wanted(
    shown: ShownRoutes, logged: list[bool], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "slowllm.swarm.hops")
    for keeps_cache, is_logged in zip((False, True), logged, strict=True):
        patience = Patience(shown_routes=shown)
        hops = Hops(lambda: found([record(0, 4)]), Asked(), lambda work: None, 4, Wishes(), patience)
        hops.route(0, Need(1, 1, session_tokens=int(keeps_cache)))
        assert ("route: 0:4" in caplog.text) == is_logged
        caplog.clear()


def test_a_request_and_what_is_known_of_servers_have_the_clients_limits() -> None:
    asked, looks = Asked(PeerTimeoutError(PEER, "has not answered")), []

    def look() -> Future[list[ServerRecord]]:
        looks.append(record(0, 4))
        return found(looks[-1:])

    hops = Hops(
        look, asked, lambda work: None, 4, Wishes(), Patience(request_seconds=3.0, refresh_seconds=1e9)
    )
    with pytest.raises(PeerTimeoutError, match="has not answered"):
        hops.forward(CALL, HOP, None, time.monotonic() + 100.0)
    assert asked.timeouts == [3.0]
    assert [len(hops.records()) for _ in range(3)] == [1, 1, 1]
    assert len(looks) == 1
    impatient = Hops(look, asked, lambda work: None, 4, Wishes(), Patience(refresh_seconds=1e-9))
    for _ in range(3):
        impatient.records()
    assert len(looks) == 4


def test_others_are_looked_for_only_where_those_that_are_known_do_not_do() -> None:
    others = ["1" * 20, "2" * 20]
    there = [[record(0, 4), replace(record(0, 4), peer=others[0])]]
    num_looks = 0

    def look() -> Future[list[ServerRecord]]:
        nonlocal num_looks
        num_looks += 1
        return found(there[-1])

    hops = Hops(look, Asked(), lambda work: None, 4, Wishes(), Patience(refresh_seconds=1e9))
    need = Need(1, 1)
    assert hops.route(0, need)[0].peer in (PEER, others[0])
    hops.ban(PEER, float("inf"))
    assert [hop.peer for hop in hops.route(0, need)] == others[:1]
    assert num_looks == 1
    there.append([*there[0], replace(record(0, 4), peer=others[1])])
    hops.ban(others[0], float("inf"))
    assert [hop.peer for hop in hops.route(0, need)] == others[1:]
    assert num_looks == 2
    hops.ban(others[1], float("inf"))
    with pytest.raises(MissingBlocksError, match="nobody serves blocks 0:4"):
        hops.route(0, need)
