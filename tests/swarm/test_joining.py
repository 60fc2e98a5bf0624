"""Servers that choose their blocks at the same time choose different ones."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from slowllm.errors import NetworkError
from slowllm.swarm.joining import take_scarcest
from slowllm.swarm.network import Network
from slowllm.swarm.records import ServerRecord


@pytest.fixture(scope="module")
def networks() -> Iterator[list[Network]]:
    """A peer by which two others have joined, and these."""
    with Network.open() as meeting:
        joined = [Network.open(initial_peers=meeting.addresses) for _ in range(2)]
        yield [meeting, *joined]
        for network in joined:
            network.close()


def joining(network: Network, model: str) -> ServerRecord:
    """Return a record of a network whose blocks are not chosen yet."""
    return ServerRecord(
        peer=network.peer, addresses=network.addresses, model=model, first=0, end=1, state="joining",
        dtype="auto", version="1",
    )  # fmt: skip


def test_servers_that_look_at_the_same_time_take_different_blocks(
    networks: list[Network], monkeypatch: pytest.MonkeyPatch
) -> None:
    barrier = threading.Barrier(len(networks))

    def together(network: Network) -> None:
        find, looks = network.find, 0

        def find_together(model: str) -> list[ServerRecord]:
            nonlocal looks
            found = find(model)
            looks += 1
            if looks == 1:
                barrier.wait(60)  # nobody has announced yet when the last one has looked
            return found

        monkeypatch.setattr(network, "find", find_together)

    for network in networks:
        together(network)
    with ThreadPoolExecutor(len(networks)) as pool:
        chosen = list(pool.map(lambda n: take_scarcest(n, joining(n, "same-9"), 9, 3, 0.5), networks))
    assert sorted((record.first, record.end) for record in chosen) == [(0, 3), (3, 6), (6, 9)]
    lowest = min(chosen, key=lambda record: record.peer)
    assert lowest.first == 0
    assert {(r.peer, r.first) for r in networks[0].find("same-9")} == {(r.peer, r.first) for r in chosen}


def test_what_a_server_said_in_a_former_life_does_not_count(networks: list[Network]) -> None:
    network = networks[0]
    network.announce(joining(network, "former-4"), 30)
    assert take_scarcest(network, joining(network, "former-4"), 4, 2, 0.0).first == 0


def test_an_announcement_that_fails_is_said_and_no_reason_to_end(
    networks: list[Network], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(record: ServerRecord, ttl: float) -> None:
        raise NetworkError("nobody took it")

    monkeypatch.setattr(networks[0], "announce", refuse)
    with caplog.at_level(logging.WARNING):
        assert take_scarcest(networks[0], joining(networks[0], "deaf-4"), 4, 2, 0.0).end == 2
    assert "nobody took it; others that join now may take the same blocks" in caplog.text


def test_a_swarm_that_changes_all_the_while_does_not_hold_up_a_server_for_ever(
    networks: list[Network], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    names = iter(range(10**6))

    def find_another(model: str) -> list[ServerRecord]:
        record = joining(networks[0], model)
        return [
            ServerRecord(
                **{
                    **vars(record),
                    "peer": "1" * 20 + "".join("abcdefghij"[int(d)] for d in str(next(names))),
                    "end": 4,
                }
            )
        ]

    monkeypatch.setattr(networks[0], "find", find_another)
    with caplog.at_level(logging.WARNING):
        take_scarcest(networks[0], joining(networks[0], "busy-4"), 4, 2, 0.0)
    assert "blocks 0:2 are taken by others, too, and more join all the while" in caplog.text
