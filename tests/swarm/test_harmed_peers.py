"""A peer that is frozen before others join by it, a client that is killed, a server whose files are cut: each is met in words."""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import slowllm
from slowllm.errors import MissingBlocksError, NetworkError
from slowllm.swarm import server as server_module
from slowllm.swarm.client import SwarmOptions
from slowllm.swarm.patience import Patience
from slowllm.swarm.server import limits_of
from slowllm.swarm.sessions import Sessions
from tests.support.parted import OUTSIDE, parted, shard_of
from tests.support.served import GREEDY, Served, save_model, texts
from tests.support.serving import serving
from tests.support.swarm_processes import SwarmProcesses

pytestmark = pytest.mark.long

# A client that keeps a session open until it is killed: folder and address.
CLIENT = """
import signal, sys, torch, slowllm
from transformers import DynamicCache
folder, address = sys.argv[1:]
with slowllm.load(folder, swarm=[address]) as lm, torch.no_grad():
    cache = DynamicCache(config=lm.config)
    lm.model(torch.arange(3, 14)[None], past_key_values=cache)
    print("holds a session", flush=True)
    signal.pause()
"""


@pytest.mark.parametrize(
    ("also_libp2p", "given", "said"),
    [
        (False, {"patience": Patience(open_seconds=20.0)}, "answers as a peer of the swarm's directory"),
        (False, {"timeout": 8.0}, "answers as a peer of the swarm's directory"),
        # libp2p's own start ends before libp2p has given up the peer, or behind it.
        (True, {"patience": Patience(open_seconds=4.0)}, "somebody takes connections there and says nothing; it hangs"),
        (True, {"patience": Patience(open_seconds=60.0)}, "somebody takes connections there and says nothing; it hangs"),
        (True, {"timeout": 8.0}, "somebody takes connections there and says nothing; it hangs"),
    ],
)  # fmt: skip
def test_a_frozen_peer_as_the_only_way_into_the_swarm_is_said_in_one_sentence(
    also_libp2p: bool, given: dict[str, Any], said: str, swarm: SwarmProcesses, served: Served
) -> None:
    meeting = swarm.peer()
    (address,) = meeting.told["addresses"]
    meeting.freeze(also_children=also_libp2p)
    options = SwarmOptions((address,), **given)
    try:
        with pytest.raises(NetworkError, match=said) as caught:
            slowllm.load(served.ends, swarm=options)
    finally:
        meeting.thaw()
    assert address in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("also_libp2p", [False, True])
def test_the_only_server_of_a_swarm_that_freezes_ends_the_work_in_one_sentence(
    also_libp2p: bool, swarm: SwarmProcesses, served: Served
) -> None:
    server = swarm.serve(served.whole, "0:6", "--public-name", "desk")
    # It is the only peer of the directory, too.
    patience = Patience(refresh_seconds=1e-6)
    options = SwarmOptions((server.address,), timeout=8.0, step_timeout=2.0, patience=patience)
    ids, mask = texts()
    with served.load(swarm=options) as lm:
        lm.model.generate(ids, attention_mask=mask, **GREEDY)
        server.freeze(also_children=also_libp2p)
        try:
            with pytest.raises(
                MissingBlocksError, match=r"; tried for \d+\.\d s: desk \(\w+\): peer .*(silent|not answered)"
            ) as caught:
                lm.model.generate(ids, attention_mask=mask, **GREEDY)
        finally:
            server.thaw()
    assert "\n" not in str(caught.value)


def test_a_frozen_peer_among_others_keeps_nobody_out_of_the_swarm(
    swarm: SwarmProcesses, served: Served
) -> None:
    frozen = swarm.peer([served.address])
    frozen.freeze(also_children=True)
    try:
        with served.load(swarm=[frozen.told["addresses"][0], served.address]) as lm:
            assert len(lm.swarm.records()) == len(served.servers)
    finally:
        frozen.thaw()


def test_the_room_of_a_client_that_was_killed_comes_back(
    swarm: SwarmProcesses, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended, end_all_of = threading.Event(), Sessions.end_all_of

    def end_and_tell(self: Sessions[Any], peer: str) -> None:
        end_all_of(self, peer)
        ended.set()

    monkeypatch.setattr(Sessions, "end_all_of", end_and_tell)
    monkeypatch.setattr(
        server_module, "limits_of", lambda *given: replace(limits_of(*given), left_seconds=1.0)
    )
    with serving(served.whole, "0:6") as server:
        client = swarm.start("-c", CLIENT, served.ends, server.network.addresses[0])
        assert client.line == "holds a session\n"
        assert server.spans.status().cache_tokens_free == 2000 - 11
        client.kill()
        assert ended.wait(60), "the server has not noticed that its client is gone"
        assert server.spans.status().cache_tokens_free == 2000
        assert server.spans.status().num_sessions == 0


def test_a_server_whose_file_was_cut_says_so_and_the_client_goes_on_elsewhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = save_model(tmp_path)
    cut, ends = parted(whole, tmp_path / "cut"), parted(whole, tmp_path / "ends", OUTSIDE)
    ids, mask = texts()
    with (
        serving(cut, "0:6", keep_resident=False, name="cut") as streaming,
        serving(whole, "0:6", *streaming.network.addresses, name="whole") as other,
        slowllm.load(ends, swarm=SwarmOptions((streaming.network.addresses[0],), timeout=60.0)) as lm,
        slowllm.load(whole, ram="3GiB", dtype="float32") as local,
        torch.no_grad(),
    ):
        lm.swarm.ban(other.network.peer, float("inf"))  # the session begins at the one that streams
        caches = [DynamicCache(config=lm.config) for _ in range(2)]
        begun = [m.model(ids, past_key_values=c).logits for m, c in zip((lm, local), caches, strict=True)]
        assert torch.equal(*begun)
        shard = cut / shard_of(4)
        os.truncate(shard, shard.stat().st_size // 2)
        lm.swarm.ban(other.network.peer, 0.0)
        with caplog.at_level(logging.WARNING):
            went_on = [
                m.model(ids[:, :1], past_key_values=c).logits
                for m, c in zip((lm, local), caches, strict=True)
            ]
        assert torch.equal(*went_on)
        assert torch.equal(*(m.model.generate(ids, attention_mask=mask, **GREEDY) for m in (lm, local)))
    (failed,) = [record.getMessage() for record in caplog.records if "failed (" in record.getMessage()]
    assert shard.name in failed
    assert str(tmp_path) not in failed, "a client learns where the server's files lie"
