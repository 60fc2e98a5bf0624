"""Caches of which other machines keep the keys and values: their steps, their room, and their end."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from slowllm.entrypoints.api import LM
from slowllm.errors import MissingBlocksError, RemoteError
from slowllm.inference import speculative
from slowllm.inference.generation_types import Settings, encode_prompt
from slowllm.inference.speculative_loop import Acceptance
from slowllm.modeling.remote_spans import Need
from slowllm.modeling.span import SpanCall
from slowllm.swarm.network import Network
from slowllm.swarm.server import Server
from tests.support.served import GREEDY, Served, same, texts
from tests.support.serving import hidden_states, send, serving

WIDTH = 64


def test_steps_on_a_cache_give_the_bits_of_a_local_cache(lm: LM, local: LM) -> None:
    ids, _ = texts()

    def stepped(model: Any) -> list[Tensor]:
        cache = DynamicCache(config=model.config)
        found = [model(ids, past_key_values=cache).logits]
        cache.crop(-3)
        found.append(model(ids[:, :2], past_key_values=cache).logits)
        cache.reorder_cache(torch.tensor([1, 0]))
        found.append(model(ids[:, :1], past_key_values=cache).logits)
        cache.batch_repeat_interleave(2)  # each row goes on in two ways
        found.append(model(torch.tensor([[5], [6], [7], [8]]), past_key_values=cache).logits)
        cache.batch_select_indices(torch.tensor([3, 0]))
        found.append(model(ids[:, :1], past_key_values=cache).logits)
        return found

    with torch.no_grad():
        same(stepped, lm.model, local.model)


def test_several_calls_of_generate_go_on_with_one_cache(lm: LM, local: LM) -> None:
    ids, _ = texts()

    def continued(model: Any) -> list[Tensor]:
        cache = DynamicCache(config=model.config)
        first = model.generate(ids, past_key_values=cache, **GREEDY)
        longer = torch.cat([first, ids[:, :2]], 1)
        return [first, model.generate(longer, past_key_values=cache, **GREEDY)]

    same(continued, lm.model, local.model)


def test_the_room_of_a_session_comes_back_when_its_cache_is_dropped(lm: LM, served: Served) -> None:
    ids, _ = texts()
    gc.collect()
    asked: list[Any] = []
    send_request = lm.swarm._ask

    def ask(peer: str, meta: Any, *args: Any, **options: Any) -> Any:
        asked.append((peer, meta["op"], send_request(peer, meta, *args, **options)))
        return asked[-1][2]

    def free() -> dict[str, int]:
        return {record.peer: lm.swarm.status(record.peer).cache_tokens_free for record in lm.swarm.records()}

    before = free()
    lm.swarm._ask = ask
    try:
        cache = DynamicCache(config=lm.config)
        with torch.no_grad():
            lm.model(ids, past_key_values=cache)
        hops = {peer for peer, operation, _ in asked if operation == "forward"}
        held = {peer: before[peer] - left for peer, left in free().items()}
        assert held == {peer: ids.numel() if peer in hops else 0 for peer in before}
        del cache
        gc.collect()
        free()  # by the thread that has ended the sessions before
        ended = [(peer, answer) for peer, operation, answer in asked if operation == "end_session"]
        for _, answer in ended:
            answer.result()
    finally:
        lm.swarm._ask = send_request
    assert {peer for peer, _ in ended} == hops
    assert free() == before


def test_a_cache_may_be_collected_where_locks_are_held(lm: LM) -> None:
    ids, _ = texts()
    cache: Any = DynamicCache(config=lm.config)
    with torch.no_grad():
        lm.model(ids, past_key_values=cache)
    peers = [record.peer for record in lm.swarm.records()]
    failover = lm.layout.blocks[0]._remote.spans
    (session,) = {layer.__dict__["_slowllm_held"].kept.session for layer in cache.layers[:1]}
    cache.itself, network = cache, lm.swarm._soon.__self__  # only the collector ends it

    def collect() -> None:
        with failover._lock, lm.swarm._lock, network._loop._lock:
            nonlocal cache
            cache = None
            gc.collect()

    collecting = threading.Thread(target=collect, daemon=True)
    collecting.start()
    collecting.join(60)
    assert not collecting.is_alive(), "a finalizer waits for a lock that its own thread holds"
    lm.swarm.status(peers[0])  # by the thread that has ended the session before
    assert session not in failover._chains


def test_a_client_that_closes_ends_its_sessions(lm: LM, served: Served) -> None:
    ids, _ = texts()

    def free() -> dict[str, int]:
        return {record.peer: lm.swarm.status(record.peer).cache_tokens_free for record in lm.swarm.records()}

    before = free()
    with served.load() as leaving:
        cache = DynamicCache(config=leaving.config)
        with torch.no_grad():
            leaving.model(ids, past_key_values=cache)
        assert free() != before
    assert free() == before
    assert len(cache.layers), "the cache is still held"


@pytest.mark.parametrize("draft", [None, "lookup", "model"])
def test_a_session_begins_where_all_that_it_will_hold_has_room(
    draft: str | None, lm: LM, served: Served
) -> None:
    needs: list[Need] = []
    find = lm.swarm.route
    lm.swarm.route = lambda first, need, *end, **how: [needs.append(need), find(first, need, *end, **how)][1]
    text = "The value is"
    length = len(lm.tokenizer(text)["input_ids"]) + 9
    prompt = encode_prompt(lm, text, Settings(9))
    try:
        if draft is None:
            list(lm.generate([text], max_new_tokens=9))
        elif draft == "lookup":
            list(speculative.generate(lm, [prompt], "lookup", counts=Acceptance()))
        else:
            with served.load_local() as small:
                list(speculative.generate(lm, [prompt], small, counts=Acceptance()))
    finally:
        del lm.swarm.route
    assert {need.length for need in needs} == {length}
    assert {need.session_tokens % length for need in needs} == {0}
    assert all(need.session_tokens >= length for need in needs)


@pytest.fixture(scope="module")
def small(served: Served) -> Iterator[Server]:
    """A server with room for 30 tokens, which is nobody's first choice: the swarm does not know it."""
    with serving(served.whole, "0:6", cache_tokens=30, max_batch_tokens=40) as server:
        yield server


@pytest.fixture(scope="module")
def asking(small: Server) -> Iterator[Network]:
    with Network.open(host_maddrs=(), initial_peers=small.network.addresses) as network:
        yield network


def test_a_servers_record_tells_what_is_free(small: Server, asking: Network) -> None:
    call = SpanCall(1, 4, hidden_states(WIDTH))
    before = small.record().cache_tokens_free
    send(asking, small.network.peer, call, "a").result()
    assert small.record().cache_tokens_free == before - 11
    asking.ask(small.network.peer, {"op": "end_session", "session": "a"}).result()
    assert small.record().cache_tokens_free == before


def test_a_full_cache_is_refused_with_what_is_free(small: Server, asking: Network, served: Served) -> None:
    send(asking, small.network.peer, SpanCall(1, 4, hidden_states(WIDTH)), "first").result()
    with pytest.raises(RemoteError, match="would hold 22 tokens, and 19 of 30 are free") as caught:
        send(asking, small.network.peer, SpanCall(1, 4, hidden_states(WIDTH, rows=2)), "second").result()
    assert caught.value.kind == "BusyError"
    asking.ask(small.network.peer, {"op": "end_session", "session": "first"}).result()
    ids, _ = texts()
    with (
        served.load(swarm=small.network.addresses) as lm,
        torch.no_grad(),
        pytest.raises(MissingBlocksError, match="but keeps 30 tokens of sessions in all, not 33"),
    ):
        lm.model(ids[:1].repeat(3, 1), past_key_values=DynamicCache(config=lm.config))


def test_a_session_whose_step_failed_is_refused_afterwards(small: Server, asking: Network) -> None:
    begin, go_on = hidden_states(WIDTH), hidden_states(WIDTH, num_positions=1)
    send(asking, small.network.peer, SpanCall(1, 4, begin), "a").result()
    with pytest.raises(RemoteError, match="the session holds 1 of 11"):
        send(asking, small.network.peer, SpanCall(1, 4, go_on, length=12), "a", 1).result()
    with pytest.raises(RemoteError, match="not here any more"):
        send(asking, small.network.peer, SpanCall(1, 4, go_on, length=11), "a", 2).result()
    assert small.record().cache_tokens_free == 30


def test_a_step_with_nan_is_refused_as_what_was_sent_and_ends_its_session(
    small: Server, asking: Network
) -> None:
    send(asking, small.network.peer, SpanCall(1, 4, hidden_states(WIDTH)), "a").result()
    wrong = hidden_states(WIDTH, num_positions=1).fill_(float("nan"))
    with pytest.raises(RemoteError, match=r"hidden: NaN at position .* in what the client sent") as caught:
        send(asking, small.network.peer, SpanCall(1, 4, wrong, length=11), "a", 1).result()
    assert caught.value.kind == "NonFiniteError"
    assert small.record().cache_tokens_free == 30


def test_an_idle_session_ends_and_says_so(served: Served, asking: Network, small: Server) -> None:
    # So short that the session has been idle for too long as soon as it is used again.
    addresses = small.network.addresses
    with serving(served.whole, "1:2", addresses[0], session_seconds=1e-6) as server:
        send(asking, server.network.peer, SpanCall(1, 2, hidden_states(WIDTH)), "a").result()
        again = SpanCall(1, 2, hidden_states(WIDTH, num_positions=1), length=11)
        with pytest.raises(RemoteError, match="it was idle for too long, or the server was started anew"):
            send(asking, server.network.peer, again, "a", 1).result()
        assert server.record().cache_tokens_free == 2000
