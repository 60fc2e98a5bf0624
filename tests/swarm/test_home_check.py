"""Servers are checked by a block that the client computes itself, though no second server has their blocks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import Cache

import slowllm
from slowllm.errors import BusyError, CheckpointError, PeerError, PlanError
from slowllm.modeling.cutting import find_form
from slowllm.modeling.remote_spans import Hop, Kept
from slowllm.modeling.span import SpanCall, SpanGrads, SpanRunner, part_of
from slowllm.planning.budget import Budget
from slowllm.runtime.block_identity import block_hashes
from slowllm.runtime.description import ModelInfo
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.storage.checkpoint import Checkpoint
from slowllm.swarm.client import SwarmOptions
from slowllm.swarm.own_blocks import OwnBlocks
from slowllm.swarm.records import ServerRecord
from slowllm.swarm.server import Server
from slowllm.swarm.spot_check import SpotCheck
from tests.support.parted import OUTSIDE, parted, shard_of
from tests.support.served import GREEDY, NUM_BLOCKS, Served, save_model, texts
from tests.support.serving import serving

A = "a" * 20
Outputs = dict[int, Tensor]
Tamper = Callable[[Outputs, str], Outputs]
GIB = 1 << 30


def honest(found: Outputs, kind: str) -> Outputs:
    return found


def noisy(found: Outputs, kind: str) -> Outputs:
    return {number: 1.1 * hidden for number, hidden in found.items()}


class OneServer:
    """The only server of the blocks: a streamed model in this process, whose answers may be tampered with."""

    def __init__(self, lm: StreamedLM, hashes: Mapping[int, str], compression: str = "none") -> None:
        self._lm, self.tamper = lm, honest
        name = lm.layout.blocks_name
        self.runner = SpanRunner(lm.model, name, find_form(lm.model, name))
        self.sessions: dict[str, Cache] = {}
        self.is_full = False
        self.banned: dict[str, float] = {}
        self.asked: list[str] = []
        self.record = ServerRecord(
            A, (), "m-6", 0, NUM_BLOCKS, "online", "float32", "1", tuple(hashes.values()), cache_tokens=1000,
            compression=compression,
        )  # fmt: skip

    def forward(self, call: SpanCall, hop: Hop, session: str | None, deadline: float) -> Outputs:
        self.asked.append("all" if call.returns_all else "last")
        cache = None if session is None else self._cache_of(session)
        found = self._lm.ride([lambda: self.runner.forward(call, cache)])[0]
        return self.tamper(found, self.asked[-1])

    def replay(
        self, calls: Sequence[SpanCall], hop: Hop, session: str, deadline: float, *, returns: bool
    ) -> list[Outputs]:
        self.asked.append(f"replay {len(calls)}")
        if self.is_full:
            raise BusyError("the server's cache is full")
        found = self._lm.ride(self.runner.replay(calls, self._cache_of(session)))
        return [self.tamper(outputs, "replay") for outputs in found] if returns else []

    def _cache_of(self, session: str) -> Cache:
        if session not in self.sessions:
            self.sessions[session] = self.runner.new_cache()
        return self.sessions[session]

    def replicas(self, first: int, end: int) -> list[ServerRecord]:
        return [] if self.banned else [self.record]

    def route(
        self, first: int, need: Any, end: int | None = None, *, deadline: float = float("inf")
    ) -> list[Hop]:
        return [Hop(0, NUM_BLOCKS, A)]

    def backward(self, call: SpanCall, hop: Hop, grads: Mapping[int, Tensor], deadline: float) -> SpanGrads:
        raise AssertionError("gradients are not checked")

    def end_session(self, kept: Kept) -> Future[Any] | None:
        self.sessions.pop(kept.session, None)
        return None

    def soon(self, work: Callable[[], object]) -> None:
        work()

    def is_leaving(self, peer: str) -> bool:
        return False

    def ban(self, peer: str, until: float) -> None:
        self.banned[peer] = until

    def name_of(self, peer: str) -> str:
        return self.record.label


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def lm(model: Path) -> Iterator[StreamedLM]:
    with slowllm.load(model, dtype="float32", ram="3GiB") as lm:
        yield lm


@pytest.fixture(scope="module")
def hashes(model: Path) -> dict[int, str]:
    return block_hashes(Checkpoint.open(model), range(NUM_BLOCKS))


@pytest.fixture
def server(lm: StreamedLM, hashes: dict[int, str]) -> OneServer:
    return OneServer(lm, hashes)


@pytest.fixture
def own(model: Path, hashes: dict[int, str]) -> Iterator[OwnBlocks]:
    """All blocks of the model, as a client has them whose folder is whole."""
    budget = Budget(GIB, 0)
    blocks = OwnBlocks(ModelInfo(model), hashes, budget, "float32")
    yield blocks
    blocks.close()
    assert budget.used_bytes == 0, "what a check took is given back"


HOP = Hop(0, NUM_BLOCKS, A)


def step(lm: StreamedLM, length: int = 0, width: int = 3, rows: int = 2, hop: Hop = HOP) -> SpanCall:
    """Return a call of rows, the second of which begins with a position of padding."""
    generator = torch.Generator().manual_seed(length)
    hidden = torch.randn(rows, width, lm.config.hidden_size, generator=generator)
    mask = torch.ones(rows, length + width, dtype=torch.int64)
    mask[1:, 0] = 0
    return SpanCall(hop.first, hop.end, hidden, mask=mask, length=length)


def test_an_honest_server_passes_and_each_call_costs_one_block_here(
    lm: StreamedLM, server: OneServer, own: OwnBlocks
) -> None:
    checked = SpotCheck(server, 1.0, lambda: 0.4, own)
    call = step(lm)
    expected = lm.ride([lambda: server.runner.forward(call)])[0]
    assert torch.equal(checked.forward(call, HOP, None, 0.0)[NUM_BLOCKS - 1], expected[NUM_BLOCKS - 1])
    assert server.asked == ["last", "all"], "the server answers before it can know that it is checked"
    checked.forward(replace(call, returns_all=True), HOP, None, 0.0)
    assert server.asked == ["last", "all", "all"], "what it has said of all blocks is checked as it is"
    assert not server.banned
    assert "2 calls were computed twice, a block of 2 of them here, 0 answers were wrong" in str(checked)


@pytest.mark.parametrize("block", range(NUM_BLOCKS))
def test_each_block_can_be_the_one(
    lm: StreamedLM, server: OneServer, own: OwnBlocks, block: int, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong_once(found: Outputs, kind: str) -> Outputs:
        return {**found, block: found[block] + 0.01} if block in found else found

    server.tamper = wrong_once
    checked = SpotCheck(server, 1.0, lambda: (block + 0.5) / NUM_BLOCKS, own)
    with pytest.raises(PeerError, match="was wrong at a spot check"):
        checked.forward(step(lm), HOP, None, 0.0)
    assert server.banned == {A: float("inf")}
    (record,) = caplog.records
    assert (
        f"{server.record.label} computes block {block} otherwise than this machine with the weights in"
        in record.message
    )
    assert record.message.endswith("and is not asked again in this run")


def test_a_server_that_is_right_only_when_it_is_asked_again_is_found(
    lm: StreamedLM, server: OneServer, own: OwnBlocks, caplog: pytest.LogCaptureFixture
) -> None:
    server.tamper = lambda found, kind: noisy(found, kind) if kind == "last" else found
    for session in (None, "x"):
        server.banned.clear()
        checked = SpotCheck(server, 1.0, lambda: 0.0, own)
        with pytest.raises(PeerError, match="was wrong at a spot check"):
            checked.forward(step(lm), HOP, session, 0.0)
        assert "gave two answers to the same work in blocks 0:6" in caplog.text


def test_numbers_of_which_nothing_finite_comes_here_are_wrong(
    lm: StreamedLM, server: OneServer, own: OwnBlocks
) -> None:
    server.tamper = lambda found, kind: {
        number: torch.full_like(h, float("inf")) for number, h in found.items()
    }
    with pytest.raises(PeerError, match="was wrong at a spot check"):
        SpotCheck(server, 1.0, lambda: 0.9, own).forward(step(lm), HOP, None, 0.0)


def test_a_session_is_checked_by_its_twin_with_all_steps_since_the_last_check(
    lm: StreamedLM, server: OneServer, own: OwnBlocks
) -> None:
    draws = iter([0.5, 0.9, 0.9, 0.0, 0.9, 0.0])  # the first one chooses the block
    checked = SpotCheck(server, 0.5, draws.__next__, own)
    cache = server.runner.new_cache()
    for number, length in enumerate([0, 3, 4, 5, 6]):
        call = step(lm, length, 1 if length else 3)
        expected = lm.ride([lambda call=call: server.runner.forward(call, cache)])[0]
        found = checked.forward(call, HOP, "x", 0.0)
        assert torch.equal(found[NUM_BLOCKS - 1], expected[NUM_BLOCKS - 1]), f"step {number}"
    assert server.asked == ["last"] * 3 + ["replay 3"] + ["last"] * 2 + ["replay 2"]
    assert len(server.sessions) == 2
    checked.end_session(Kept(HOP, "x"))
    assert not server.sessions
    assert not own._held
    assert not server.banned


def test_a_session_at_a_server_that_turns_wrong_is_to_be_rebuilt_elsewhere_and_checked_there(
    lm: StreamedLM, server: OneServer, own: OwnBlocks
) -> None:
    checked = SpotCheck(server, 1.0, lambda: 0.0, own)
    steps = [step(lm), step(lm, 3, 1), step(lm, 4, 1)]
    checked.forward(steps[0], HOP, "x", 0.0)
    server.tamper = noisy
    with pytest.raises(PeerError, match="was wrong at a spot check"):
        checked.forward(steps[1], HOP, "x", 0.0)
    assert set(server.sessions) == {"x"}  # which failover ends
    server.tamper = honest
    server.banned.clear()
    server.asked.clear()
    checked.replay(steps[:2], HOP, "y", 0.0, returns=False)
    checked.forward(steps[2], HOP, "y", 0.0)
    assert server.asked == ["replay 2", "last", "replay 3"]
    assert not server.banned


def test_a_hop_of_one_block_needs_no_second_answer(lm: StreamedLM, server: OneServer, own: OwnBlocks) -> None:
    hop = Hop(3, 4, A)
    checked = SpotCheck(server, 1.0, lambda: 0.0, own)
    checked.forward(step(lm, hop=hop), hop, None, 0.0)
    for length in (0, 3, 4):
        checked.forward(step(lm, length, 1 if length else 3, hop=hop), hop, "x", 0.0)
    assert server.asked == ["last"] * 4
    server.tamper = noisy
    with pytest.raises(PeerError, match="was wrong at a spot check"):
        checked.forward(step(lm, 5, 1, hop=hop), hop, "x", 0.0)


def test_blocks_that_are_not_here_or_are_others_are_not_computed_here(
    model: Path, lm: StreamedLM, server: OneServer, hashes: dict[int, str]
) -> None:
    own = OwnBlocks(ModelInfo(model), {2: hashes[2], 4: "another"}, Budget(GIB, 0), "float32")
    checked = SpotCheck(server, 1.0, lambda: 0.99, own)
    server.tamper = lambda found, kind: {number: h + (number == 4) * 0.1 for number, h in found.items()}
    checked.forward(step(lm), HOP, None, 0.0)
    assert not server.banned, "block 4 of this folder has other weights, so only block 2 is computed here"
    part = Hop(3, 6, A)
    checked.forward(step(lm, hop=part), part, None, 0.0)
    assert checked.verdicts.num_unchecked == 1
    checked.close()


def test_a_session_whose_server_has_no_room_for_its_twin_goes_on_unchecked(
    lm: StreamedLM, server: OneServer, own: OwnBlocks
) -> None:
    checked = SpotCheck(server, 1.0, lambda: 0.0, own)
    server.is_full = True
    for length in (0, 3, 4):
        checked.forward(step(lm, length, 1 if length else 3), HOP, "x", 0.0)
    assert server.asked == ["last", "replay 1", "last", "last"]
    assert checked.verdicts.num_unchecked == 3
    # One that would fill more than half of the cache has no twin from the start.
    checked.forward(replace(step(lm), final_length=251), HOP, "y", 0.0)
    assert server.asked[4:] == ["last"]


def test_a_budget_without_room_for_a_block_is_said_and_second_servers_are_asked(
    model: Path, lm: StreamedLM, server: OneServer, hashes: dict[int, str], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(PlanError, match="too small for this model"):
        OwnBlocks(ModelInfo(model), hashes, Budget(1 << 20, 0), "float32")
    budget = Budget(GIB, 0)
    checked = SpotCheck(server, 1.0, lambda: 0.0, OwnBlocks(ModelInfo(model), hashes, budget, "float32"))
    checked.forward(step(lm), HOP, "x", 0.0)
    budget.total_bytes = 0  # others have taken the rest of it
    for session in (None, "y", "x"):
        checked.forward(step(lm, 3 * (session == "x"), 80), HOP, session, 0.0)
    warned = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 1
    assert (
        "spot checks ask second servers from now on, as no block can be computed here: a budget of"
        in warned[0]
    )
    assert checked.verdicts.num_unchecked == 3
    assert budget.used_bytes == 0


def test_a_block_that_cannot_be_read_any_more_is_said(
    model: Path, lm: StreamedLM, server: OneServer, hashes: dict[int, str], tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    folder = parted(model, tmp_path)
    own = OwnBlocks(ModelInfo(folder), hashes, Budget(GIB, 0), "float32")
    shard = folder / shard_of(1)
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=shard_of(1)):
        own.forward(part_of(step(lm), 1, 2, step(lm).hidden), None)
    checked = SpotCheck(server, 1.0, lambda: 0.2, own)
    checked.forward(step(lm), HOP, None, 0.0)
    assert shard_of(1) in caplog.text


def test_the_compression_of_a_server_is_allowed_for(
    lm: StreamedLM, hashes: dict[int, str], own: OwnBlocks
) -> None:
    def rounded(found: Outputs, kind: str) -> Outputs:
        return {number: hidden.to(torch.bfloat16).float() for number, hidden in found.items()}

    plain, compressed = OneServer(lm, hashes), OneServer(lm, hashes, "bfloat16")
    for server in (plain, compressed):
        server.tamper = rounded
    SpotCheck(compressed, 1.0, lambda: 0.5, own).forward(step(lm), HOP, None, 0.0)
    with pytest.raises(PeerError, match="was wrong"):
        SpotCheck(plain, 1.0, lambda: 0.5, own).forward(step(lm), HOP, None, 0.0)


@pytest.fixture(scope="module")
def servers(model: Path) -> Iterator[list[Server]]:
    """One server of all blocks, and two that have a half each: none has the blocks of another."""
    # It boasts of its speed, so that it is asked first.
    with serving(model, "0:6", name="liar", tokens_per_second=1e6) as first:
        address = first.network.addresses[0]
        with serving(model, "0:3", address) as second, serving(model, "3:6", address) as third:
            yield [first, second, third]


@pytest.mark.long
@pytest.mark.parametrize("shards", [(), (OUTSIDE, shard_of(2))], ids=["all blocks here", "one block here"])
def test_tokens_are_those_of_a_local_model_though_the_only_server_of_a_span_lies(
    model: Path, servers: list[Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: tuple[str, ...],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    runner = servers[0].spans.runner
    run = runner._run
    monkeypatch.setattr(runner, "_run", lambda *given, **named: noisy(run(*given, **named), ""))
    address = servers[0].network.addresses[0]
    served = Served(model, parted(model, tmp_path / "client", *shards), address, ())
    ids, mask = texts()
    with (
        served.load(swarm=SwarmOptions((address,), spot_check=1.0)) as lm,
        served.load_local() as local,
        torch.no_grad(),
    ):
        for _ in range(2):
            assert torch.equal(
                lm.model.generate(ids, attention_mask=mask, num_beams=2, **GREEDY),
                local.model.generate(ids, attention_mask=mask, num_beams=2, **GREEDY),
            )
            assert torch.equal(lm.model(ids).logits, local.model(ids).logits)
    warned = [
        record.message for record in caplog.records if "is not asked again in this run" in record.message
    ]
    assert len(warned) == 1
    assert f"liar ({servers[0].network.peer[-6:]}) computes block" in warned[0]


@pytest.mark.long
def test_a_client_whose_budget_has_no_room_for_a_block_says_so(
    model: Path, servers: list[Server], caplog: pytest.LogCaptureFixture
) -> None:
    address = servers[0].network.addresses[0]
    served = Served(model, model, address, ())
    options = SwarmOptions((address,), spot_check=1.0)
    with served.load(swarm=options, ram=Budget(GIB, 0)) as lm:
        needed = lm.plan.peak_bytes
    assert "no room for a block" not in caplog.text
    with served.load(swarm=options, ram=Budget(needed + (1 << 20), 0)) as lm, torch.no_grad():
        lm.model(texts()[0])
    said = "spot checks ask second servers, because the budget has no room for a block of one's own"
    assert caplog.text.count(said) == 1
