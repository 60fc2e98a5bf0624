"""Servers choose among the blocks that they have, and move to others while nobody uses them."""

from __future__ import annotations

import functools
import json
import logging
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from slowllm.errors import CheckpointError, PlanError, RemoteError
from slowllm.malloc import give_back
from slowllm.modeling.span import SpanCall
from slowllm.swarm import server as server_module
from slowllm.swarm.client import SwarmOptions
from slowllm.swarm.joining import take_scarcest
from slowllm.swarm.network import Network
from slowllm.swarm.patience import Patience
from slowllm.swarm.server import Server
from tests.support.families import save_tiny
from tests.support.parted import parted, shard_of
from tests.support.paths import ROOT
from tests.support.served import GREEDY, NUM_BLOCKS, Served, save_model, texts
from tests.support.serving import hidden_states, send, serving


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def meeting() -> Iterator[Network]:
    """A peer by which servers join."""
    with Network.open() as network:
        yield network


@pytest.fixture
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let servers that choose their blocks not wait for others that might join at the same time."""
    monkeypatch.setattr(server_module, "take_scarcest", functools.partial(take_scarcest, settle_seconds=0.0))


def span_of(server: Server) -> tuple[int, int]:
    return server.spans.served.first, server.spans.served.end


def ask(network: Network, server: Server, first: int, end: int, *session: Any) -> torch.Tensor:
    """Return the hidden states that a server computes."""
    call = SpanCall(first, end, hidden_states(64))
    return send(network, server.network.peer, call, *session).result(60)[1][f"hidden.{end - 1}"]


def end_session(network: Network, server: Server, session: str) -> None:
    network.ask(server.network.peer, {"op": "end_session", "session": session}).result(60)


def test_a_server_moves_and_computes_what_one_that_began_there_does(
    model: Path, meeting: Network, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(model, "0:2", meeting.addresses[0], name="goes") as server:
        before = ask(meeting, server, 0, 2)
        done, former = server.status().num_passages, weakref.ref(server.lm.model)
        assert server.move(3, 6, "others need it") == "moved"
        assert "this server moves from blocks 0:2 to 3:6: others need it" in caplog.text
        assert span_of(server) == (3, 6)
        assert former() is None, "its memory would be missing for the new blocks"
        (found,) = (r for r in meeting.find(server.record().model) if r.name == "goes")
        assert (found.first, found.end, found.state, len(found.block_hashes)) == (3, 6, "online", 3)
        assert server.status().num_passages > done
        # A client that has not heard of it is told to look again, not that its request is wrong.
        with pytest.raises(
            RemoteError, match="BusyError: blocks 0:2 are not served here; this server has 3:6"
        ):
            ask(meeting, server, 0, 2)
        with serving(model, "3:6", meeting.addresses[0]) as other:
            assert torch.equal(ask(meeting, server, 3, 6), ask(meeting, other, 3, 6))
        assert server.move(0, 2) == "moved"
        assert torch.equal(ask(meeting, server, 0, 2), before)


def test_a_server_in_which_a_session_is_open_does_not_move(model: Path, meeting: Network) -> None:
    with serving(model, "0:2", meeting.addresses[0]) as server:
        ask(meeting, server, 0, 2, "open")
        assert server.is_in_use
        assert server.move(3, 5) == "in use"
        assert span_of(server) == (0, 2)
        ask(meeting, server, 0, 2)
        end_session(meeting, server, "open")
        assert server.move(3, 5) == "moved"
        server.drain()
        assert server.move(0, 2) == "in use"


def test_requests_are_refused_as_busy_while_the_server_moves(
    model: Path, meeting: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(model, "0:2", meeting.addresses[0], name="busy") as server:
        opened, seen = server._open, list[Any]()

        def look_and_open(part: Any) -> None:
            (record,) = (r for r in meeting.find(server.record().model) if r.name == "busy")
            seen.append((record.first, record.end, record.state))
            with pytest.raises(RemoteError, match="BusyError: the server is moving to other blocks"):
                ask(meeting, server, 2, 4)
            end_session(meeting, server, "none")
            status, _ = meeting.ask(server.network.peer, {"op": "status"}).result(60)
            seen.append(status["cache_tokens_free"])
            assert "slowllm_sessions 0" in server.metrics()
            assert not server.is_in_use
            with pytest.raises(AssertionError, match="no blocks are open while the server moves"):
                _ = server.lm
            opened(part)

        monkeypatch.setattr(server, "_open", look_and_open)
        assert server.move(2, 4) == "moved"
        assert seen == [(2, 4, "joining"), 0]
        assert ask(meeting, server, 2, 4).shape == (1, 11, 64)


def test_a_move_that_fails_goes_back_with_one_warning(
    model: Path, meeting: Network, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = parted(model, tmp_path / "some", *map(shard_of, (0, 1, 4)))
    with serving(folder, "0:2", meeting.addresses[0], name="returns") as server:
        before = ask(meeting, server, 0, 2)
        caplog.clear()
        assert server.move(4, 6) == "failed"
        said = [record.message for record in caplog.records if "goes back" in record.message]
        assert len(said) == 1
        assert said[0].startswith("blocks 4:6 cannot be served (")
        assert "block-5.safetensors" in said[0]
        assert torch.equal(ask(meeting, server, 0, 2), before)
        states = {(r.first, r.state) for r in meeting.find(server.record().model) if r.name == "returns"}
        assert states == {(0, "online")}
        assert server.failure is None
        server.check()


@pytest.mark.long
def test_a_server_that_cannot_go_back_leaves_with_the_error(
    model: Path, meeting: Network, tmp_path: Path
) -> None:
    folder = parted(model, tmp_path / "gone", *map(shard_of, (0, 1, 4)))
    with serving(folder, "0:2", meeting.addresses[0], name="lost") as server:
        (folder / shard_of(1)).unlink()
        with pytest.raises(CheckpointError, match=r"block-1\.safetensors"):
            server.move(4, 6)
        with pytest.raises(CheckpointError, match=r"block-1\.safetensors"):
            server.check()
        states = [r.state for r in meeting.find(server.record().model) if r.name == "lost"]
        assert states == ["offline"]
        with pytest.raises(RemoteError, match="the server is moving"):
            ask(meeting, server, 0, 1)


@pytest.mark.long
@pytest.mark.usefixtures("_alone")
def test_auto_takes_all_blocks_that_are_in_the_folder_and_in_memory(
    model: Path, meeting: Network, tmp_path: Path
) -> None:
    with serving(model, "auto", meeting.addresses[0], rebalances=False) as server:
        assert span_of(server) == (0, NUM_BLOCKS)
        assert not server.lm.plan.ring_bytes
        assert server._rebalancer is None
    # Of two runs the longer one counts, and --blocks 2 takes the scarcest that are there.
    folder = parted(model, tmp_path / "some", *map(shard_of, (0, 2, 3, 4)))
    with serving(folder, "auto", meeting.addresses[0]) as server:
        assert span_of(server) == (2, 5)
        with serving(folder, "2", meeting.addresses[0]) as other:
            assert span_of(other) in ((2, 4), (3, 5))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose blocks have 67 MB: more than two starts of a process differ by."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    }
    save_tiny("llama-2", folder, num_hidden_layers=4, shard="100MB", **sizes)
    return folder


def smallest_ram(folder: Path, blocks: str, meeting: Network) -> int:
    """Return the bytes of the smallest budget that a server says it can be started with in this process."""
    give_back()  # what was freed and is still here would count
    with (
        pytest.raises(PlanError, match="the smallest that would do is") as caught,
        serving(folder, blocks, meeting.addresses[0], ram="64MiB", backward=False),
    ):
        pass
    size = str(caught.value).partition("the smallest that would do is ")[2].partition(" ")[0]
    return int(float(size.removesuffix("GiB").removesuffix("MiB")) * (1 << (30 if "GiB" in size else 20))) + (
        1 << 20
    )


@pytest.mark.long
@pytest.mark.usefixtures("_alone")
def test_auto_takes_fewer_blocks_where_memory_is_small(large: Path, meeting: Network) -> None:
    least = smallest_ram(large, "0:1", meeting)
    # For one block or two more; this process may be smaller by half of one by now.
    with serving(large, "auto", meeting.addresses[0], ram=least + (96 << 20), backward=False) as server:
        first, end = span_of(server)
        assert 1 <= end - first <= 3
        assert not server.lm.plan.ring_bytes


@pytest.mark.long
def test_a_server_moves_back_and_forth_in_the_smallest_budget(large: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.moving_server", large], capture_output=True, text=True, check=True, timeout=300,
        cwd=ROOT,
    )  # fmt: skip
    told = json.loads(done.stdout.splitlines()[-1])
    assert len(told["opened"]) == 5, "it moved each time"
    assert max(told["opened"]) <= told["ram"]
    # What a model leaves behind would be missing for the next one.
    assert max(told["between"]) < told["between"][0] + (8 << 20)
    # More than the ring of 35 MB: what requests took on the heap goes back as well.
    assert all(
        rss - after > 60 << 20 for rss, after in zip(told["opened"], told["between"][1:], strict=False)
    ), told


@pytest.mark.long
@pytest.mark.usefixtures("_alone")
def test_a_client_goes_on_when_a_server_leaves_and_another_moves_there(
    model: Path, meeting: Network, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        serving(model, "0:3", meeting.addresses[0], name="first") as first,
        serving(model, "3:6", meeting.addresses[0], name="second") as second,
        serving(model, "3", meeting.addresses[0], name="third") as third,
    ):
        stays, leaves = (first, second) if span_of(third) == (0, 3) else (second, first)
        rebalancer = third._rebalancer
        assert rebalancer is not None
        rebalancer._wait = lambda seconds: False
        assert rebalancer.look() is None
        served = Served(model, model, meeting.addresses[0], ())
        swarm = SwarmOptions((meeting.addresses[0],), patience=Patience(refresh_seconds=600.0))
        ids, _ = texts()
        with served.load(swarm=swarm) as lm, served.load_local() as local:
            expected = local.model.generate(ids[:1], **GREEDY)
            assert torch.equal(lm.model.generate(ids[:1], **GREEDY), expected)
            leaves.close()
            lm.swarm.records()
            with caplog.at_level(logging.WARNING):
                ends_at = 0
                while (done := rebalancer.look()) == "in use" and ends_at < 100:
                    ends_at += 1  # the client's sessions end soon
            assert done == "moved"
            assert "3 blocks more are served then" in caplog.text
            assert {span_of(third), span_of(stays)} == {(0, 3), (3, 6)}
            # The client still has the old records.
            assert torch.equal(lm.model.generate(ids[:1], **GREEDY), expected)
