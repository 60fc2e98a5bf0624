"""A server's start, its place among others, and what it does when the swarm does not listen."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from slowllm.errors import PlanError
from slowllm.modeling.span import SpanCall
from slowllm.swarm.network import Network
from slowllm.swarm.server import Server
from tests.support.served import save_model
from tests.support.serving import hidden_states, send, serving


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def meeting() -> Iterator[Network]:
    """A peer by which servers join."""
    with Network.open() as network:
        yield network


@pytest.fixture(scope="module")
def first(model: Path, meeting: Network) -> Iterator[Server]:
    """A server of some blocks, which tests leave as it is."""
    with serving(model, "0:2", meeting.addresses[0]) as server:
        yield server


def test_a_server_whose_first_announcement_fails_serves_and_tries_again(
    model: Path, meeting: Network, first: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = tmp_path / "key"
    with Network.open(identity=key, initial_peers=meeting.addresses) as former:
        # What was said in a former life outlives what the server says now, so nobody takes that.
        record = dataclasses.replace(first.record(), peer=former.peer, name="former")
        former.announce(record, 600)
    with serving(model, "1:2", meeting.addresses[0], identity=key) as server:
        assert "no peer of the swarm took the record of" in caplog.text
        assert "this server tries again in 10 s" in caplog.text
        assert meeting.ask(server.network.peer, {"op": "status"}).result(60)[0]
        server.network._directory._expires[record.model] = time.time() + 700
        server.announce()
        assert "former" not in {found.name for found in meeting.find(record.model)}


@pytest.mark.long
def test_the_room_of_a_client_that_has_vanished_comes_back(first: Server, meeting: Network) -> None:
    before = first.record().cache_tokens_free
    with Network.open(host_maddrs=(), initial_peers=first.network.addresses) as client:
        send(client, first.network.peer, SpanCall(0, 2, hidden_states(64)), "a").result(60)
        assert first.record().cache_tokens_free == before - 11
    ends_at = time.monotonic() + 120
    while first.record().cache_tokens_free != before:
        assert time.monotonic() < ends_at, "the session is still there"
        meeting.ask(first.network.peer, {"op": "status"}).result(60)


@pytest.mark.long
def test_a_server_announces_what_it_takes(model: Path, meeting: Network) -> None:
    with serving(
        model, "2:4", meeting.addresses[0], max_length=777, max_batch_tokens=55, name="here"
    ) as server:
        (found,) = (r for r in meeting.find(server.record().model) if r.name == "here")
        assert (found.max_length, found.max_batch_tokens, found.first, found.end) == (777, 55, 2, 4)


@pytest.mark.long
def test_two_servers_that_start_together_share_the_blocks(model: Path) -> None:
    with (
        Network.open() as alone,
        ThreadPoolExecutor(2) as pool,
        ExitStack() as held,
    ):
        contexts = [serving(model, "3", alone.addresses[0]) for _ in range(2)]
        servers = [
            held.enter_context(closing(server)) for server in pool.map(lambda c: c.__enter__(), contexts)
        ]
        assert sorted((s.spans.served.first, s.spans.served.end) for s in servers) == [(0, 3), (3, 6)]


@pytest.mark.long
def test_a_server_that_does_not_start_says_that_it_has_left(
    model: Path, meeting: Network, first: Server
) -> None:
    with pytest.raises(PlanError), serving(model, "4:6", meeting.addresses[0], name="small", ram="64MiB"):
        pass
    states = [record.state for record in meeting.find(first.record().model) if record.name == "small"]
    assert states == ["offline"]
