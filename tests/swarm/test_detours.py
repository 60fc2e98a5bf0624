"""A server that was just lost is not asked again while others have its blocks, and a call has one time for all of its hops."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from slowllm.errors import BusyError, MissingBlocksError, PeerLostError, PeerTimeoutError, SessionError
from slowllm.modeling.remote_spans import CallTime, Hop, Need
from slowllm.modeling.span import SpanCall, SpanGrads
from slowllm.swarm.asking import NO_WAIT
from slowllm.swarm.detours import Detours, FailedError
from slowllm.swarm.failover import Failover
from slowllm.swarm.patience import Patience
from tests.support.failing_swarm import (
    IDS,
    NUM_BLOCKS,
    Swarm,
    embeddings_of,
    failing_swarm,
    lost,
)

HOP, NEED = Hop(0, 2, "a"), Need(1, 1)


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    with failing_swarm(tmp_path_factory.mktemp("model")) as swarm:
        yield swarm


@pytest.fixture
def revisited(swarm: Swarm) -> Iterator[Swarm]:
    """A swarm whose routes visit one server three times, as long as it is not banned."""
    swarm.reset()
    choose = swarm.servers.route

    def route(first: int, need: Need, end: int | None = None, *, deadline: float = math.inf) -> list[Hop]:
        if end is None and "e" not in swarm.servers.banned:
            return [Hop(a, b, "e") for a, b in ((0, 1), (1, 3), (3, NUM_BLOCKS))]
        return choose(first, need, end, deadline=deadline)

    swarm.servers.route = route  # type: ignore[method-assign]
    yield swarm
    del swarm.servers.route


def times_asked(swarm: Swarm, peer: str) -> int:
    return [asked for asked, _, _ in swarm.servers.asked].count(peer)


def e_is_silent(peer: str) -> Exception | None:
    return PeerTimeoutError(peer, "has been silent for 20 s") if peer == "e" else None


def test_a_call_asks_a_silent_server_once_for_all_of_its_hops(revisited: Swarm) -> None:
    revisited.servers.fails = e_is_silent
    with torch.no_grad():
        assert torch.equal(revisited.lm.model(IDS).logits, revisited.plain(IDS).logits)
    assert times_asked(revisited, "e") == 1


def test_all_sessions_at_a_silent_server_are_rebuilt_when_it_has_been_asked_once(revisited: Swarm) -> None:
    caches = [DynamicCache(config=revisited.plain.config) for _ in range(2)]
    with torch.no_grad():
        for part in (IDS[:, :4], IDS[:, 4:]):
            ours = revisited.lm.model(part, past_key_values=caches[0]).logits
            assert torch.equal(ours, revisited.plain(part, past_key_values=caches[1]).logits)
            assert times_asked(revisited, "e") == (3 if revisited.servers.fails("e") is None else 4)
            revisited.servers.fails = e_is_silent
    assert revisited.failover.num_rebuilt == 3


def test_a_backward_pass_asks_a_silent_server_once(revisited: Swarm) -> None:
    grads = []
    for model in (revisited.lm.model, revisited.plain):
        embeddings = embeddings_of(model)
        loss = model(inputs_embeds=embeddings, labels=IDS, use_cache=False).loss
        if model is revisited.lm.model:
            assert times_asked(revisited, "e") == 3
            revisited.servers.fails = e_is_silent
        loss.backward()
        grads.append(embeddings.grad)
    assert torch.equal(*grads)
    assert times_asked(revisited, "e") == 4


def test_sessions_stay_at_a_server_that_is_busy_or_has_lost_another_one(revisited: Swarm) -> None:
    cache = DynamicCache(config=revisited.plain.config)
    with torch.no_grad():
        revisited.lm.model(IDS, past_key_values=cache)
        for error in (BusyError("is full"), SessionError("is not here")):
            revisited.failover._detours._failures.note("e", error)
            revisited.lm.model(IDS[:, :1], past_key_values=cache)
    assert times_asked(revisited, "e") == 9
    assert revisited.failover.num_rebuilt == 0


class TwoServers:
    """Of blocks 0 and 1; those that are `there` are known, and nothing is waited for."""

    def __init__(self, *there: str) -> None:
        self.there, self.deadlines = list(there), list[float]()

    def route(
        self, first: int, need: Need, end: int | None = None, *, deadline: float = math.inf
    ) -> list[Hop]:
        self.deadlines.append(deadline)
        if not self.there:
            raise MissingBlocksError((0, 1), "nobody serves blocks 0:2")
        return [Hop(first, end or 2, self.there[0])]

    def ban(self, peer: str, until: float) -> None:
        self.there = [other for other in self.there if other != peer]

    def name_of(self, peer: str) -> str:
        return peer


def detours(servers: Any) -> Detours:
    found = Detours(servers, 60.0, Patience(), lambda: False)
    found.begin()
    return found


def test_a_server_that_nobody_can_replace_is_asked_all_the_same() -> None:
    servers = TwoServers("a", "b")
    around = detours(servers)
    assert around.before_asking(HOP, NEED) is None
    assert not servers.deadlines, "nobody was lost"
    failed = FailedError("a", PeerLostError("a", "has died"))
    assert around.around(failed, HOP, NEED, around.deadline()) == [Hop(0, 2, "b")]
    assert around.before_asking(HOP, NEED) == [Hop(0, 2, "b")]
    assert servers.deadlines.pop() == NO_WAIT
    servers.there = []
    assert around.before_asking(HOP, NEED) is None
    servers.there = ["a"]  # it has answered another thread in this moment
    assert around.before_asking(HOP, NEED) is None


def test_a_server_that_has_answered_since_is_asked_again() -> None:
    around = detours(TwoServers("a", "b"))
    around.around(FailedError("a", PeerLostError("a", "has died")), HOP, NEED, around.deadline())
    around.answered("a")
    assert around.before_asking(HOP, NEED) is None


def test_a_directory_that_hangs_does_not_keep_a_server_from_being_asked_again_after_its_time() -> None:
    servers = TwoServers("a")
    around = Detours(servers, 1000.0, Patience(min_wait_seconds=0.0), lambda: False)  # type: ignore[arg-type]
    around.begin()
    ends = around.deadline()
    assert around.route(0, NEED, ends) == [Hop(0, 2, "a")]
    assert servers.deadlines == [ends], "who has not failed comes by the directory only"
    servers.ban = lambda peer, until: None  # type: ignore[method-assign]
    around.around(FailedError("a", PeerLostError("a", "has died")), HOP, NEED, ends)
    assert servers.deadlines[-1] < ends - 900.0


def recorded(swarm: Swarm, deadlines: list[float]) -> None:
    """Let the deadlines of all requests and routes be noted."""
    servers = swarm.servers
    kinds = {name: getattr(type(servers), name) for name in ("forward", "backward", "route")}

    def forward(call: SpanCall, hop: Hop, session: str | None, deadline: float) -> dict[int, Tensor]:
        deadlines.append(deadline)
        return kinds["forward"](servers, call, hop, session, deadline)  # type: ignore[no-any-return]

    def backward(call: SpanCall, hop: Hop, grads: Mapping[int, Tensor], deadline: float) -> SpanGrads:
        deadlines.append(deadline)
        return kinds["backward"](servers, call, hop, grads, deadline)  # type: ignore[no-any-return]

    def route(first: int, need: Need, end: int | None = None, *, deadline: float = math.inf) -> Sequence[Hop]:
        deadlines.append(deadline)
        return kinds["route"](servers, first, need, end, deadline=deadline)  # type: ignore[no-any-return]

    servers.forward, servers.backward, servers.route = forward, backward, route  # type: ignore[method-assign]


def test_all_hops_of_a_call_have_one_deadline_and_so_has_its_backward_pass(swarm: Swarm) -> None:
    swarm.reset()
    swarm.servers.banned.add("e")
    deadlines: list[float] = []
    recorded(swarm, deadlines)
    try:
        embeddings = embeddings_of(swarm.lm.model)
        loss = swarm.lm.model(inputs_embeds=embeddings, labels=IDS, use_cache=False).loss
        assert len(deadlines) == 3, "a route of two hops"
        forward = set(deadlines)
        deadlines.clear()
        loss.backward(retain_graph=True)
        assert len(deadlines) == 2
        backward = set(deadlines)
        deadlines.clear()
        loss.backward()
        again = set(deadlines)
    finally:
        del swarm.servers.forward, swarm.servers.backward, swarm.servers.route
    assert len(forward) == len(backward) == len(again) == 1
    assert max(forward) < max(backward) < max(again)


def test_a_call_whose_time_is_over_asks_nobody_and_blames_nobody(swarm: Swarm) -> None:
    swarm.reset(timeout=0.2)
    swarm.servers.banned.add("e")
    forward = swarm.servers.forward

    def takes_all_of_the_time(
        call: SpanCall, hop: Hop, session: str | None, deadline: float
    ) -> dict[int, Tensor]:
        found = forward(call, hop, session, deadline)
        time.sleep(max(0.0, deadline - time.monotonic()))
        return found

    swarm.servers.forward = takes_all_of_the_time  # type: ignore[method-assign]
    try:
        with (
            torch.no_grad(),
            pytest.raises(MissingBlocksError, match=r"blocks 3:4 were not computed; tried for 0.2 s$"),
        ):
            swarm.lm.model(IDS)
    finally:
        del swarm.servers.forward
    assert swarm.servers.asked == [("c", 0, 3)]
    assert swarm.servers.banned == {"e"}


def test_no_session_is_rebuilt_when_the_time_is_over(swarm: Swarm) -> None:
    swarm.reset()
    cache = DynamicCache(config=swarm.plain.config)
    with torch.no_grad():
        swarm.lm.model(IDS, past_key_values=cache)
        swarm.failover._detours._timeout = 0.0
        swarm.failover._detours._failures.note("e", PeerLostError("e", "has died"))
        swarm.servers.banned.add("e")
        with pytest.raises(
            MissingBlocksError, match=r"blocks 0:4 were not computed; tried for .* s: e: peer e: has died"
        ):
            swarm.lm.model(IDS[:, :1], past_key_values=cache)
    assert swarm.servers.asked == [("e", 0, 4)]
    assert swarm.servers.banned == {"e"}


def test_the_time_of_a_backward_pass_begins_at_its_top() -> None:
    now = iter(range(100))

    class Spans:
        def deadline(self) -> float:
            return float(next(now))

    time_of = CallTime(Spans())  # type: ignore[arg-type]
    assert time_of.deadline == 0.0
    assert [time_of.backward(first) for first in (4, 2, 0)] == [1.0] * 3
    assert [time_of.backward(first) for first in (4, 0)] == [2.0] * 2


def test_gradients_have_the_same_bits_when_servers_are_lost_one_after_the_other(revisited: Swarm) -> None:
    revisited.failover = Failover(revisited.servers, 60.0)
    revisited.servers.fails = lambda peer: lost(peer) if peer in "ed" else None
    grads = []
    for model in (revisited.lm.model, revisited.plain):
        embeddings = embeddings_of(model)
        model(inputs_embeds=embeddings, labels=IDS, use_cache=False).loss.backward()
        grads.append(embeddings.grad)
    assert torch.equal(*grads)
