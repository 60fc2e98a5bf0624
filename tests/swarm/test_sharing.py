"""A server's requests share its sweeps, its budget holds, and servers compute at the same time."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import slowllm
from slowllm.errors import RemoteError
from slowllm.modeling.span import SpanCall
from slowllm.options import parse_bytes
from slowllm.streaming.stops import Passage
from slowllm.swarm.network import Network
from slowllm.swarm.replay_messages import ReplayRequest, pack_replay, unpack_replayed
from tests.support.families import save_tiny
from tests.support.served import Served, use_route
from tests.support.serving import hidden_states, send, serving
from tests.support.swarm_processes import SwarmProcesses, serve_arguments

GREEDY: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}


def test_requests_of_two_clients_that_wait_together_share_a_sweep(served: Served) -> None:
    hidden = [hidden_states(64, seed=seed) for seed in range(3)]
    with (
        serving(served.whole, "1:5") as server,
        Network.open(host_maddrs=(), initial_peers=server.network.addresses) as one,
        Network.open(host_maddrs=(), initial_peers=server.network.addresses) as other,
    ):
        peer = server.network.peer
        alone = [send(one, peer, SpanCall(1, 5, states)).result()[1]["hidden.4"] for states in hidden]
        before = server.spans.status().num_passages
        num_alone = 4
        # The first request holds the carousel at its first stop until the others wait there.
        others_wait = threading.Event()

        def hold(passage: Passage) -> None:
            assert others_wait.wait(60)

        with server.lm.watching(hold):
            answers = [send(one, peer, SpanCall(1, 5, hidden[0]))]
            answers += [
                send(client, peer, SpanCall(1, 5, states))
                for client, states in zip((one, other), hidden[1:], strict=True)
            ]
            while server.spans.waiting_tokens < 33:
                threading.Event().wait(0.001)
            others_wait.set()
            found = [answer.result()[1]["hidden.4"] for answer in answers]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, alone, strict=True))
        assert server.spans.status().num_passages - before <= 2 * num_alone


def test_a_session_is_filled_anew_in_one_sweep(served: Served) -> None:
    first, end = 1, 5
    calls = [SpanCall(first, end, hidden_states(64, num_positions=5))]
    calls += [
        SpanCall(first, end, hidden_states(64, num_positions=1, seed=length), length=length)
        for length in range(5, 12)
    ]
    *past, last = calls
    with (
        serving(served.whole, f"{first}:{end}", keep_resident=False) as server,
        Network.open(host_maddrs=(), initial_peers=server.network.addresses) as network,
    ):
        peer = server.network.peer
        said = [send(network, peer, call, "grown", step).result()[1] for step, call in enumerate(calls)]
        before = server.spans.status()
        answer = network.ask(peer, *pack_replay(ReplayRequest(past, "filled", returns=True))).result()
        num_passages = server.spans.status().num_passages - before.num_passages
        outputs = unpack_replayed(answer[1], past)
        assert all(torch.equal(our[4], their["hidden.4"]) for our, their in zip(outputs, said, strict=False))
        assert num_passages == end - first
        assert server.spans.status().num_sessions == 2
        assert server.spans.status().cache_tokens_free == before.cache_tokens_free - 11
        again = send(network, peer, last, "filled", len(past)).result()[1]
        assert torch.equal(again["hidden.4"], said[-1]["hidden.4"])

        # One that cannot go on ends its session, and says of which passage.
        gap = network.ask(peer, *pack_replay(ReplayRequest([past[0], past[2]], "gap")))
        with pytest.raises(
            RemoteError, match="continues 1 rows of 6 positions, but the session holds 1 of 5"
        ):
            gap.result()
        with pytest.raises(RemoteError, match="the session is not here any more"):
            send(network, peer, past[1], "gap", 1).result()
        for calls, sentence in (
            ([replace(past[0], end=6)], "blocks 1:6 are not served here"),
            (
                [SpanCall(first, end, hidden_states(64, 1, 513))],
                "longer than the 512 that this server announces",
            ),
            ([SpanCall(first, end, hidden_states(64, 4, 1), length=498)], "the server's cache is full"),
        ):
            with pytest.raises(RemoteError, match=sentence):
                network.ask(peer, *pack_replay(ReplayRequest(calls, "new"))).result()
        assert server.spans.waiting_tokens == 0


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose blocks have 10 MB, of which a few tokens are quickly computed and a thousand are not."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    }
    save_tiny("llama-2", folder, num_hidden_layers=6, shard="100MB", **sizes)
    return folder


def smallest_ram(swarm: SwarmProcesses, arguments: list[object]) -> int:
    """Return the smallest budget that a server is accepted with, as its refusal says."""
    ended = swarm.run(*arguments, "--ram", "1MiB")
    assert ended.returncode == 2
    found = re.search(r"smallest that would do is ([0-9.]+[KMG]iB)", ended.stderr)
    assert found is not None, ended.stderr
    return parse_bytes(found[1])


@pytest.mark.long
def test_a_server_within_a_small_budget_streams_for_two_clients(large: Path, swarm: SwarmProcesses) -> None:
    arguments = serve_arguments(large, "0:6", "--stream-all", "--max-batch-tokens", "64", "--forward-only")
    ram = smallest_ram(swarm, arguments)
    (process,) = swarm.start_all([[*arguments, "--ram", str(ram)]])
    ids = [torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    with (
        slowllm.load(large, swarm=[process.address], ram="3GiB") as one,
        slowllm.load(large, swarm=[process.address], ram="3GiB") as other,
        slowllm.load(large, ram="3GiB", dtype="float32") as local,
        ThreadPoolExecutor(2) as threads,
    ):
        (record,) = one.swarm.records()
        caches = [DynamicCache(config=local.config) for _ in ids]

        def generated(lm: Any, rows: torch.Tensor, cache: Any = None) -> torch.Tensor:
            return lm.model.generate(rows, past_key_values=cache, **GREEDY)

        jobs = [
            threads.submit(generated, lm, rows, cache)
            for lm, rows, cache in zip((one, other), ids, caches, strict=True)
        ]
        tokens = [job.result() for job in jobs]
        status = one.swarm.status(record.peer)
        assert all(torch.equal(ours, generated(local, rows)) for ours, rows in zip(tokens, ids, strict=True))
    assert status.num_sessions == 2
    assert status.read_bytes > 2 * 6 * 10e6, "the blocks did not stream"
    assert status.peak_rss_bytes <= ram
    # Two clients with three passages of six blocks each, after the three by which the server measured itself.
    assert status.num_passages <= (3 + 2 * 3) * 6


@pytest.mark.long
def test_two_servers_compute_at_the_same_time_for_micro_batches_of_one_client(
    large: Path, swarm: SwarmProcesses
) -> None:
    meeting = swarm.start(*serve_arguments(large, "0:3", "--max-batch-tokens", "1024"))
    second = swarm.start(
        *serve_arguments(large, "3:6", "--max-batch-tokens", "1024", "--initial-peers", meeting.address)
    )
    peers = [process.address.rpartition("/")[2] for process in (meeting, second)]
    rows = torch.randint(3, 300, (4, 2, 512), generator=torch.Generator().manual_seed(0))
    with slowllm.load(large, swarm=[meeting.address], ram="3GiB") as lm:
        use_route(lm, (0, 3, peers[0]), (3, 6, peers[1]))
        answers: list[tuple[str, Any]] = []
        ask = lm.swarm._ask

        def noted(peer: str, *args: Any, **options: Any) -> Any:
            answers.append((peer, ask(peer, *args, **options)))
            return answers[-1][1]

        lm.swarm._ask = noted
        with torch.no_grad():
            lm.ride([lambda row=row: lm.model(row, use_cache=False, logits_to_keep=1).logits for row in rows])
    times: dict[str, list[tuple[float, float]]] = {peer: [] for peer in peers}
    for peer, answer in answers:
        if "began_at" in (said := answer.result()[0]):
            times[peer].append((said["began_at"], said["ended_at"]))
    assert [len(found) for found in times.values()] == [4, 4]
    both = product(*times.values())
    assert any(max(a[0], b[0]) < min(a[1], b[1]) for a, b in both), times
