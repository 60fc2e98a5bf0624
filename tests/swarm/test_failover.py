"""Servers die at any step of a forward, a backward or a session, and the results have the same bits.

The servers are models in this process, which fail on command; processes that are killed are in `test_killed_servers`.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

import slowllm
from slowllm.errors import (
    ArchitectureError,
    BusyError,
    InputError,
    LimitError,
    MissingBlocksError,
    NonFiniteError,
    PeerLostError,
    PeerTimeoutError,
    ProtocolError,
    RemoteError,
    SessionError,
    SlowLLMError,
    UnsupportedError,
)
from slowllm.modeling.remote_spans import Hop, Kept, Need
from slowllm.modeling.soft_prompts import SoftPrompt
from slowllm.modeling.span import SpanCall
from slowllm.streaming.call_context import call_context
from slowllm.swarm.failover import Failover, Replay
from slowllm.swarm.patience import Patience
from tests.support.failing_swarm import (
    IDS,
    NUM_BLOCKS,
    PATIENCE,
    Swarm,
    at_calls,
    embeddings_of,
    failing_swarm,
    lost,
)

GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    with failing_swarm(tmp_path_factory.mktemp("model")) as swarm:
        yield swarm


@pytest.mark.parametrize("error", [lost, lambda peer: BusyError("busy"), lambda peer: SessionError("gone")])
@pytest.mark.parametrize("number", [0, 1, 4, 7])
def test_a_generation_goes_on_with_the_same_tokens(
    swarm: Swarm, number: int, error: Callable[[str], Exception]
) -> None:
    swarm.reset(at_calls([number], error))
    with torch.no_grad():
        ours = swarm.lm.model.generate(IDS, num_beams=3, **GREEDY)
        assert torch.equal(ours, swarm.plain.generate(IDS, num_beams=3, **GREEDY))
    assert len(swarm.servers.banned) == 1
    assert swarm.failover.num_rebuilt == (number > 0)
    assert bool(swarm.failover.rebuilt) == (number > 0)


@settings(max_examples=20)
@given(st.sets(st.integers(0, 25), max_size=4))
def test_servers_that_fail_at_any_calls_cost_no_bit(swarm: Swarm, numbers: set[int]) -> None:
    swarm.reset(at_calls(sorted(numbers), lost))
    # One server never fails, or nobody would be left.
    fails = swarm.servers.fails
    swarm.servers.fails = lambda peer: None if peer == "e" else fails(peer)
    with torch.no_grad():
        ours = swarm.lm.model.generate(IDS, **GREEDY)
        assert torch.equal(ours, swarm.plain.generate(IDS, **GREEDY))
        assert torch.equal(
            swarm.lm.model(IDS, use_cache=False).logits, swarm.plain(IDS, use_cache=False).logits
        )


@pytest.mark.parametrize("number", range(4))
def test_gradients_have_the_same_bits_when_a_server_dies_in_a_forward_or_backward(
    swarm: Swarm, number: int
) -> None:
    grads = []
    # Without the server that has all blocks, the span of a hop is cut into others.
    swarm.reset(at_calls([number], lost))
    swarm.servers.banned.add("e")
    for model in (swarm.lm.model, swarm.plain):
        embeddings = embeddings_of(model)
        model(inputs_embeds=embeddings, labels=IDS, use_cache=False).loss.backward()
        grads.append(embeddings.grad)
    assert torch.equal(*grads)
    assert len(swarm.servers.banned) == 2


@pytest.mark.parametrize(("replay", "num_calls"), [("steps", 5), ("fast", 1)])
def test_a_session_is_rebuilt_in_one_request_to_each_server(
    swarm: Swarm, replay: Replay, num_calls: int
) -> None:
    swarm.reset(at_calls([5], lost), replay=replay)
    with torch.no_grad():
        ours = swarm.lm.model.generate(IDS, num_beams=3, **GREEDY)
        # In one pass it rounds otherwise, by much less than what parts these tokens.
        assert torch.equal(ours, swarm.plain.generate(IDS, num_beams=3, **GREEDY))
    assert swarm.servers.replayed == [num_calls] * 2, "at the two servers of the new hops"
    assert swarm.failover.num_rebuilt == 1


def test_only_the_lost_span_is_rebuilt(swarm: Swarm) -> None:
    swarm.reset()
    swarm.servers.banned |= {"c", "d", "e"}
    cache = DynamicCache(config=swarm.plain.config)
    with torch.no_grad():
        swarm.lm.model(IDS, past_key_values=cache)
        swarm.servers.asked.clear()
        swarm.servers.banned -= {"d"}
        swarm.servers.fails = at_calls([1], lost)
        swarm.lm.model(IDS[:, :1], past_key_values=cache)
    assert swarm.servers.asked == [("a", 0, 2), ("b", 2, 4), ("d", 2, 4), ("d", 2, 4)]


def test_a_server_that_fails_while_a_session_is_rebuilt_is_replaced_as_well(swarm: Swarm) -> None:
    swarm.reset(at_calls([4, 6], lost))
    with torch.no_grad():
        ours = swarm.lm.model.generate(IDS, **GREEDY)
        assert torch.equal(ours, swarm.plain.generate(IDS, **GREEDY))
    assert len(swarm.servers.banned) == 2


def test_no_session_is_left_where_it_was_given_up(swarm: Swarm) -> None:
    swarm.reset(at_calls([4, 6], lambda peer: BusyError("busy")))
    ended: list[Kept] = []
    gc.collect()  # the caches of other tests
    end_session = swarm.servers.end_session
    swarm.servers.end_session = ended.append  # type: ignore[method-assign]
    try:
        cache = DynamicCache(config=swarm.plain.config)
        with torch.no_grad():
            for _ in range(6):
                swarm.lm.model(IDS, past_key_values=cache)
        # That of the first server, and those of both at which it was to be rebuilt, one of which failed.
        assert sorted(kept.hop.peer for kept in ended) == ["b", "c", "e"]
    finally:
        swarm.servers.end_session = end_session  # type: ignore[method-assign]


def test_servers_are_asked_that_have_room_for_a_session_at_its_end(swarm: Swarm) -> None:
    swarm.reset(at_calls([2], lost))
    swarm.servers.needs.clear()
    cache = DynamicCache(config=swarm.plain.config)
    with torch.no_grad(), call_context(final_length=20):
        swarm.lm.model(IDS, past_key_values=cache)
        for _ in range(2):
            swarm.lm.model(IDS[:, :1], past_key_values=cache)
    # At the beginning, and where it is rebuilt, by calls of at most as many tokens as the first.
    assert swarm.servers.needs == [Need(14, 20, 40)] * 2
    swarm.servers.needs.clear()
    with torch.no_grad():
        swarm.lm.model(IDS, use_cache=False)
        swarm.lm.model(IDS, past_key_values=DynamicCache(config=swarm.plain.config))
    assert swarm.servers.needs == [Need(14, 7, 0), Need(14, 7, 14)]


def test_a_new_session_waits_while_our_own_fill_the_servers(swarm: Swarm) -> None:
    swarm.reset()
    full = MissingBlocksError(
        (0,), "nobody serves block 0 (e has 0:4 but has room for 3 tokens)", is_full=True
    )
    cache: Any = DynamicCache(config=swarm.plain.config)

    def refuse_once(*_: object, **__: object) -> list[Hop]:
        del swarm.servers.route
        raise full

    with torch.no_grad():
        gc.collect()
        swarm.servers.route = refuse_once  # type: ignore[method-assign]
        with pytest.raises(MissingBlocksError, match="has room for 3 tokens"):
            swarm.lm.model(IDS)
        swarm.lm.model(IDS, past_key_values=cache)
        swarm.servers.route = refuse_once  # type: ignore[method-assign]
        assert swarm.lm.model(IDS).logits.shape[:2] == IDS.shape
        swarm.reset(timeout=0.1)
        swarm.lm.model(IDS, past_key_values=(cache := DynamicCache(config=swarm.plain.config)))
        swarm.servers.route = lambda *_, **__: raised(full)  # type: ignore[method-assign]
        try:
            with pytest.raises(MissingBlocksError, match=r"room for 3 tokens\); tried for 0.1 s$"):
                swarm.lm.model(IDS)
        finally:
            del swarm.servers.route


def raised(error: Exception) -> Any:
    raise error


def test_a_client_that_closes_leaves_no_session(swarm: Swarm) -> None:
    swarm.reset()
    gc.collect()  # the caches of other tests
    cache = DynamicCache(config=swarm.plain.config)
    swarm.servers.banned.add("e")
    ended: list[str] = []
    still_open: Future[None] = Future()

    def end_session(kept: Kept) -> Future[None]:
        ended.append(kept.hop.peer)
        return still_open

    with torch.no_grad():
        swarm.lm.model(IDS, past_key_values=cache)
    swarm.servers.end_session = end_session  # type: ignore[method-assign]
    try:
        # A server that does not answer holds up nobody for long.
        swarm.failover.close(seconds=0.01)
        assert sorted(ended) == ["b", "c"]
        del cache
        gc.collect()
        assert len(ended) == 2
    finally:
        del swarm.servers.end_session


def test_the_end_of_the_time_names_the_blocks_and_why_each_server_failed(swarm: Swarm) -> None:
    swarm.reset(lost, timeout=0.5)
    with (
        torch.no_grad(),
        pytest.raises(
            MissingBlocksError, match=r"nobody serves block 0; tried for 0.[5-9] s: .*: peer .*: has died"
        ),
    ):
        swarm.lm.model(IDS)


def test_a_request_under_way_is_given_up_at_the_end_of_the_time(swarm: Swarm) -> None:
    swarm.reset(timeout=0.05)
    deadlines: list[float] = []

    def answers_too_late(call: SpanCall, hop: Hop, session: str | None, deadline: float) -> dict[int, Tensor]:
        deadlines.append(deadline)
        threading.Event().wait(max(0.0, deadline - time.monotonic()))
        raise PeerTimeoutError(hop.peer, "has not answered in 0.05 s")

    swarm.servers.forward = answers_too_late  # type: ignore[method-assign]
    try:
        with (
            torch.no_grad(),
            pytest.raises(
                MissingBlocksError,
                match=r"blocks 0:4 were not computed; tried for 0.1 s: e: peer e: has not answered in 0.05 s",
            ) as caught,
        ):
            swarm.lm.model(IDS)
    finally:
        del swarm.servers.forward
    assert caught.value.blocks == (0, 1, 2, 3)
    assert len(deadlines) == 1


def test_a_server_that_comes_back_in_time_is_asked_again(swarm: Swarm) -> None:
    swarm.reset(lost, timeout=30.0)
    find = swarm.servers.route

    def come_back(*args: Any, **kwargs: Any) -> list[Hop]:
        try:
            return find(*args, **kwargs)
        except MissingBlocksError:
            swarm.servers.banned.clear()
            swarm.servers.fails = lambda peer: None
            raise

    swarm.servers.route = come_back  # type: ignore[method-assign]
    try:
        with torch.no_grad():
            assert torch.equal(swarm.lm.model(IDS).logits, swarm.plain(IDS).logits)
    finally:
        del swarm.servers.route


def test_windows_are_rebuilt_with_what_has_left_them(tmp_path: Path) -> None:
    look_up = IDS[:1].repeat(1, 3)
    with failing_swarm(tmp_path, "gemma-3-sliding") as swarm, torch.no_grad():
        for ids, given in ((IDS, {"num_beams": 3}), (look_up, {"prompt_lookup_num_tokens": 3})):
            swarm.reset(at_calls([2, 5], lost))
            ours = swarm.lm.model.generate(ids, **given, **GREEDY)
            assert torch.equal(ours, swarm.plain.generate(ids, **given, **GREEDY))
            assert swarm.failover.num_rebuilt >= 1


def test_prefixes_and_deep_vectors_are_rebuilt(swarm: Swarm) -> None:
    generator = torch.Generator().manual_seed(3)
    pairs = [torch.randn(2, 4, 5, 16, generator=generator) for _ in range(NUM_BLOCKS)]
    vectors = [torch.randn(9, 64, generator=generator) for _ in range(NUM_BLOCKS + 1)]
    prefix = SoftPrompt("prefix", pairs=tuple(pairs))
    deep = SoftPrompt("deep", vectors[0], tuple(vectors[1:]))

    def continued(lm: slowllm.StreamedLM) -> list[Tensor]:
        found = []
        with torch.no_grad():
            cache = prefix.growing_cache(lm.config, 2, torch.float32)
            for part in IDS.split(2, 1):
                found.append(lm.model(part, past_key_values=cache).logits)
            cache = DynamicCache(config=lm.config)
            with deep.adding():
                for part in IDS.split(2, 1):
                    found.append(lm.model(part, past_key_values=cache).logits)
        return found

    swarm.reset(at_calls([2, 7], lost))
    ours = continued(swarm.lm)
    assert swarm.failover.num_rebuilt == 2
    for our, their in zip(ours, continued(swarm.server), strict=True):
        assert torch.equal(our, their)


def test_deep_vectors_go_only_with_the_positions_that_they_are_added_to(swarm: Swarm) -> None:
    generator = torch.Generator().manual_seed(3)
    vectors = [torch.randn(3, 64, generator=generator) for _ in range(NUM_BLOCKS + 1)]
    deep = SoftPrompt("deep", vectors[0], tuple(vectors[1:]))

    def continued(lm: slowllm.StreamedLM) -> list[Tensor]:
        cache = DynamicCache(config=lm.config)
        with torch.no_grad(), deep.adding():
            return [lm.model(part, past_key_values=cache).logits for part in IDS.split(2, 1)]

    swarm.reset(at_calls([3], lost))
    swarm.servers.lengths_with_vectors.clear()
    ours = continued(swarm.lm)
    assert swarm.failover.num_rebuilt == 1
    assert swarm.servers.lengths_with_vectors == {0, 2}
    for our, their in zip(ours, continued(swarm.server), strict=True):
        assert torch.equal(our, their)


@pytest.mark.parametrize(
    "kind", [InputError, ArchitectureError, UnsupportedError, NonFiniteError, ProtocolError]
)
def test_what_would_be_wrong_everywhere_is_not_tried_elsewhere(
    swarm: Swarm, kind: type[SlowLLMError]
) -> None:
    swarm.reset(lambda peer: kind("wrong"))
    with torch.no_grad(), pytest.raises(kind, match="wrong"):
        swarm.lm.model(IDS)
    assert len(swarm.servers.asked) == 1


def test_what_no_server_takes_is_refused_at_once_and_what_one_does_goes_there(swarm: Swarm) -> None:
    too_long = LimitError("a sequence of 7 tokens is longer than the 5 that this server takes")
    swarm.reset(lambda peer: None if peer in "ab" else too_long)
    with torch.no_grad():
        assert torch.equal(swarm.lm.model(IDS).logits, swarm.plain(IDS).logits)
        swarm.reset(lambda peer: too_long)
        with pytest.raises(
            MissingBlocksError,
            match=r"nobody serves block 0; tried for .*: e: a sequence of 7 tokens is longer",
        ):
            swarm.lm.model(IDS)
    assert not [seconds for seconds in swarm.servers.ban_seconds if seconds > 1]


def ban_seconds_of(swarm: Swarm, errors: Sequence[Exception | None]) -> list[int]:
    """Return for how long one server was not asked after each of these failures; None is an answer."""
    left = iter(errors)
    swarm.reset(lambda peer: next(left) if peer == "e" else None)
    with torch.no_grad():
        for _ in errors:
            swarm.servers.banned.clear()
            # As if the time were over in which it is left alone: failures within it do not count.
            failed = swarm.failover._detours._failures._failures
            failed.update({peer: replace(failure, until=0.0) for peer, failure in failed.items()})
            swarm.lm.model(IDS)
    return swarm.servers.ban_seconds


def test_bans_double_until_a_server_has_answered_and_a_busy_one_is_asked_soon(swarm: Swarm) -> None:
    busy = BusyError("tokens wait")
    assert ban_seconds_of(swarm, [lost("e"), lost("e"), lost("e")]) == [5, 10, 20]
    assert ban_seconds_of(swarm, [lost("e"), lost("e"), None, lost("e")]) == [5, 10, 5]
    assert ban_seconds_of(swarm, [busy, busy, busy, lost("e"), busy, lost("e")]) == [1, 1, 1, 5, 1, 10]


def test_a_backward_pass_that_is_answered_ends_the_bans_too(swarm: Swarm) -> None:
    swarm.reset(at_calls([0, 2], lost))
    for _ in range(2):
        swarm.servers.banned.clear()
        embeddings = embeddings_of(swarm.lm.model)
        loss = swarm.lm.model(inputs_embeds=embeddings, labels=IDS, use_cache=False).loss
        swarm.servers.banned.clear()
        loss.backward()
    assert set(swarm.servers.ban_seconds) == {5}


def test_sessions_move_away_from_a_server_that_leaves(swarm: Swarm) -> None:
    swarm.reset()
    leave = iter(range(100))

    def leaves_after_three(peer: str) -> None:
        if next(leave) == 3:
            swarm.servers.leaving.add("e")

    swarm.servers.fails = leaves_after_three
    with torch.no_grad():
        ours = swarm.lm.model.generate(IDS, num_beams=3, **GREEDY)
        assert torch.equal(ours, swarm.plain.generate(IDS, num_beams=3, **GREEDY))
    assert not swarm.servers.banned
    assert swarm.servers.replayed == [4, 4]
    assert [peer for peer, _, _ in swarm.servers.asked].count("e") == 4
    assert swarm.failover.num_rebuilt == 1
    assert swarm.failover.rebuilt == {"c": 1, "b": 1}


def test_sessions_stay_at_a_server_that_leaves_while_nobody_else_can_have_them(swarm: Swarm) -> None:
    swarm.reset()
    swarm.servers.banned |= {"a", "c"}
    swarm.servers.fails = lambda peer: swarm.servers.leaving.add("e")  # type: ignore[func-returns-value]
    with torch.no_grad():
        cache = DynamicCache(config=swarm.plain.config)
        for _ in range(3):
            swarm.lm.model(IDS, past_key_values=cache)
    assert {peer for peer, _, _ in swarm.servers.asked} == {"e"}
    assert not swarm.servers.replayed


def test_as_many_servers_are_tried_as_the_client_allows(swarm: Swarm) -> None:
    for count in (1, 2):
        swarm.reset(lost)
        swarm.failover = Failover(swarm.servers, PATIENCE, patience=Patience(max_attempts=count))
        for _ in range(2):  # each call has so many
            swarm.servers.banned.clear()
            swarm.servers.asked.clear()
            with torch.no_grad(), pytest.raises(PeerLostError, match="has died"):
                swarm.lm.model(IDS)
            assert len(swarm.servers.asked) == count


def test_a_server_that_failed_is_not_asked_for_the_time_that_the_client_says(swarm: Swarm) -> None:
    swarm.reset(at_calls([0], lost))
    times: list[float] = []
    swarm.servers.ban = lambda peer, until: times.append(until - time.monotonic())  # type: ignore[method-assign]
    swarm.failover = Failover(swarm.servers, PATIENCE, patience=Patience(ban_seconds=77.0))
    try:
        with torch.no_grad():
            swarm.lm.model(IDS)
    finally:
        del swarm.servers.ban
    assert 70 < times[0] <= 77


def said_by(peer: str, kind: type[Exception], sentence: str) -> Exception:
    """Return what a server says of the work that it was given, as a client raises it."""
    error = kind(f"{peer}: {sentence}")
    error.__cause__ = RemoteError(peer, kind.__name__, sentence)
    return error


def test_one_server_alone_does_not_end_a_run_by_what_it_says_of_the_work(swarm: Swarm) -> None:
    swarm.reset(lambda peer: said_by(peer, InputError, "no") if peer == "e" else None)
    with torch.no_grad():
        ours = swarm.lm.model.generate(IDS, num_beams=3, **GREEDY)
        assert torch.equal(ours, swarm.plain.generate(IDS, num_beams=3, **GREEDY))
    assert swarm.servers.banned == {"e"}


def test_what_two_servers_say_of_the_work_is_believed(swarm: Swarm) -> None:
    swarm.reset(lambda peer: said_by(peer, InputError, "wrong"))
    with torch.no_grad(), pytest.raises(InputError, match="c: wrong"):
        swarm.lm.model(IDS)
    assert [peer for peer, _, _ in swarm.servers.asked] == ["e", "c"]


def test_what_the_only_server_says_is_raised_at_once(swarm: Swarm) -> None:
    swarm.reset(lambda peer: said_by(peer, InputError, "wrong"))
    swarm.servers.banned |= {"a", "b", "c", "d"}
    with torch.no_grad(), pytest.raises(InputError, match="e: wrong"):
        swarm.lm.model(IDS)


def test_a_server_that_uses_up_the_time_is_not_asked_by_the_next_call(swarm: Swarm) -> None:
    swarm.reset(timeout=0.05)

    def never_answers(peer: str) -> Exception | None:
        if peer != "e":
            return None
        threading.Event().wait(0.06)
        return PeerTimeoutError(peer, "has not answered in 0.05 s")

    swarm.servers.fails = never_answers
    with torch.no_grad():
        with pytest.raises(MissingBlocksError, match="blocks 0:4 were not computed"):
            swarm.lm.model(IDS)
        swarm.failover._detours._timeout = PATIENCE
        assert torch.equal(swarm.lm.model(IDS).logits, swarm.plain(IDS).logits)
