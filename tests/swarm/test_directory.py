"""Announcements are found by others, replaced by newer ones, and count only if the peer that they speak of signed them."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from slowllm.errors import NetworkError
from slowllm.swarm.directory import Directory, directory_key, may_be_stored
from slowllm.swarm.identity import new_identity
from slowllm.swarm.network import Network
from slowllm.swarm.records import MAX_RECORD_BYTES, ServerRecord
from tests.support.swarm_processes import SwarmProcess

OPTIONS: dict[str, Any] = {
    "first": 0,
    "end": 2,
    "state": "online",
    "dtype": "float32",
    "version": "1",
    "block_hashes": ["a", "b"],
}
PATIENCE = 60.0


def announce(client: Network, server: SwarmProcess, ttl: float = 300.0, **record: Any) -> None:
    """Let a server announce a record."""
    request = {"op": "announce", "record": {**OPTIONS, **record}, "ttl": ttl}
    client.ask(server.told["peer"], request).result(PATIENCE)


@pytest.fixture(scope="module")
def other(server: SwarmProcess) -> Any:
    """A second server, in this process."""
    with Network.open(initial_peers=server.told["addresses"]) as network:
        yield network


def record_of(network: Network, model: str, **change: Any) -> ServerRecord:
    """Return a record of a network in this process."""
    fields = {
        **OPTIONS,
        "block_hashes": ("a", "b"),
        "peer": network.peer,
        "addresses": network.addresses,
        **change,
    }
    return ServerRecord(**fields, model=model)


def test_records_of_all_servers_are_found_in_the_order_of_their_blocks(
    client: Network, server: SwarmProcess, other: Network
) -> None:
    assert client.find("found-4") == []
    announce(client, server, model="found-4", first=2, end=4, name="second")
    other.announce(record_of(other, "found-4"), 300)
    for network in (client, other):
        found = network.find("found-4")
        assert [record.peer for record in found] == [other.peer, server.told["peer"]]
        assert found[0] == record_of(other, "found-4")
        assert found[1].addresses == tuple(server.told["addresses"])
    assert client._known[other.peer] == other.addresses
    assert client.find("found-5") == []


def test_a_newer_record_replaces_the_last_one_even_if_its_life_is_shorter(
    client: Network, other: Network
) -> None:
    for state in ("joining", "online", "draining", "offline"):
        other.announce(record_of(other, "states-2", state=state), 300 if state == "joining" else 5)
        assert [record.state for record in client.find("states-2")] == [state]


def test_a_record_ends_with_its_time(client: Network, other: Network) -> None:
    other.announce(record_of(other, "short-2"), 0.2)
    ended = time.time() + 0.25
    while time.time() < ended:
        client.find("short-3")
    assert client.find("short-2") == []


def store(network: Network, model: str, value: object, subkey: object = None, ttl: float = 60.0) -> bool:
    """Put anything into the directory as a stranger would, with hivemind's own functions."""
    key = directory_key(model)
    expires = time.time() + ttl
    subkey = network._directory._owner if subkey is None else subkey
    return bool(network._loop.call(lambda: network._node.store(key, value, expires, subkey=subkey), 30))


def test_nobody_can_write_in_the_name_of_another(
    client: Network, server: SwarmProcess, other: Network
) -> None:
    announce(client, server, model="stolen-2", name="true")
    (found,) = other._loop.call(lambda: other._node.get(directory_key("stolen-2"), latest=True), 30).value
    forged = record_of(other, "stolen-2", peer=server.told["peer"], name="false")
    assert not store(other, "stolen-2", forged.to_bytes(), subkey=found, ttl=3000)
    assert not store(other, "stolen-2", forged.to_bytes(), subkey=b"anything")
    assert [record.name for record in client.find("stolen-2")] == ["true"]


def test_a_record_that_speaks_of_another_peer_is_left_out(
    client: Network, server: SwarmProcess, other: Network, caplog: pytest.LogCaptureFixture
) -> None:
    before = client.dropped.get("forged", 0)
    assert store(other, "forged-2", record_of(other, "forged-2", peer=server.told["peer"]).to_bytes())
    announce(client, server, model="forged-2", name="true")
    with caplog.at_level(logging.WARNING, "slowllm"):
        for _ in range(3):
            assert [record.name for record in client.find("forged-2")] == ["true"]
    assert client.dropped["forged"] == before + 3
    assert len([r for r in caplog.records if "is left out (forged: peer" in r.message]) == (
        0 if before else 1
    )


@pytest.mark.parametrize("value", [b"x" * 100, b"{}", b""])
def test_a_malformed_record_is_left_out(client: Network, other: Network, value: bytes) -> None:
    before = client.dropped.get("malformed", 0)
    assert store(other, f"malformed-{len(value)}", value)
    assert client.find(f"malformed-{len(value)}") == []
    assert client.dropped["malformed"] == before + 1


def test_a_record_under_another_models_key_is_left_out(client: Network, other: Network) -> None:
    assert store(other, "this-2", record_of(other, "that-2").to_bytes())
    assert client.find("this-2") == []
    assert client.dropped["of another model"] == 1


@pytest.mark.parametrize("value", [b"x" * (MAX_RECORD_BYTES + 1), {"first": 0}, [1, 2], "text", None])
def test_what_has_not_the_form_of_a_record_is_not_stored(other: Network, value: object) -> None:
    assert not store(other, "form-2", value)


def test_what_would_stay_for_ever_or_is_no_servers_is_not_stored(other: Network) -> None:
    data = record_of(other, "ever-2").to_bytes()
    assert not store(other, "ever-2", data, ttl=10**6)
    # Without a subkey it would replace the whole directory of the model.
    key, expires = directory_key("ever-2"), time.time() + 60
    assert not other._loop.call(lambda: other._node.store(key, data, expires), 30)
    assert not store(other, "ever-2", data, subkey=other._directory._owner + b" more")
    assert store(other, "ever-2", data)


def test_a_record_that_nobody_takes_is_said(other: Network) -> None:
    with pytest.raises(AssertionError, match="is not this peer"):
        other.announce(dataclasses.replace(record_of(other, "x-2"), peer="Q" * 20), 60)
    other._directory._expires["late-2"] = time.time() + 10**6
    with pytest.raises(NetworkError, match="no peer of the swarm took the record of"):
        other.announce(record_of(other, "late-2"), 60)


def test_what_was_stored_is_no_failure_whatever_the_last_peer_says(
    other: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_record = other._node.store

    async def store_twice(*args: Any, **options: Any) -> bool:
        assert await store_record(*args, **options)
        return bool(await store_record(*args, **options))

    monkeypatch.setattr(other._node, "store", store_twice)
    record = record_of(other, "twice-2")
    other.announce(record, 60)
    assert other.find("twice-2") == [record]


@pytest.mark.long
def test_a_peer_that_was_restarted_keeps_its_place_and_nobodys_announcement_fails(
    other: Network, tmp_path: Path
) -> None:
    nodes = set()
    for life in range(3):
        with Network.open(identity=tmp_path / "key", initial_peers=other.addresses) as restarted:
            nodes.add(restarted._node.node_id)
            for network in (restarted, other):
                network.announce(record_of(network, f"lives-{life}"), 60)
            assert {r.peer for r in other.find(f"lives-{life}")} == {restarted.peer, other.peer}
    assert len(nodes) == 1


def test_the_gate_leaves_out_what_storing_peers_should_not_have_taken() -> None:
    dropped: Counter[str] = Counter()
    directory = Directory(None, b"", {}, dropped)
    record = record_of_nobody()
    later = time.time() + 60
    owner = b"[owner:ssh-rsa AAAA]"
    found: list[tuple[object, object, float]] = [
        (b"owner", record, later), (5, record, later), (owner, "text", later), (owner, record, time.time() - 5), (owner, record, later),
    ]  # fmt: skip
    assert directory.check("m-2", found) == []
    assert dict(dropped) == {"not signed": 4, "expired": 1}


def record_of_nobody() -> bytes:
    """Return a good record of a peer that is not there."""
    fields = {**OPTIONS, "block_hashes": ("a", "b")}
    return ServerRecord(peer=new_identity().peer, addresses=(), model="m-2", **fields).to_bytes()


@pytest.mark.parametrize("length", [0, 255, 256, 65535, 65536])
def test_forms_of_byte_strings_are_told_apart_by_their_length(length: int) -> None:
    import msgpack

    owner = msgpack.packb(b"[owner:ssh-rsa AAAA]")
    later = time.time() + 60
    assert may_be_stored(owner, msgpack.packb(bytes(length)), later) == (length <= MAX_RECORD_BYTES)
    assert not may_be_stored(owner, msgpack.packb(bytes(length)) + b"x", later)
    assert not may_be_stored(owner, msgpack.packb(bytes(length))[:-1], later)
    assert not may_be_stored(b"", msgpack.packb(b""), later)
