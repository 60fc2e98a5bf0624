"""A peer has left when it has had neither a stream nor a connection for a while, and that is said once."""

from __future__ import annotations

import threading

from slowllm.swarm.network import Network
from slowllm.swarm.presence import Presence
from slowllm.swarm.streams import Limits


def test_a_peer_without_stream_and_connection_has_left_after_a_while() -> None:
    now = [0.0]
    presence = Presence(30, lambda: now[0])

    def left_at(seconds: float, asking: str, connected: str) -> list[str]:
        now[0] = seconds
        return presence.left(asking, connected)

    assert left_at(0, "ab", "abx") == []
    assert left_at(10, "a", "abx") == []  # a server closes streams that are not used
    assert left_at(39, "a", "x") == []
    assert left_at(40, "a", "x") == ["b"]
    assert left_at(90, "a", "") == []  # a stranger who never asked is not missed
    assert left_at(100, "", "") == []
    assert left_at(110, "b", "") == []  # it is back
    assert left_at(125, "", "b") == ["a"]
    assert left_at(500, "", "") == ["b"]


def test_a_peer_that_closed_its_network_has_left_and_an_idle_one_has_not() -> None:
    gone: list[str] = []
    told = threading.Event()
    limits = Limits(left_seconds=0.3, idle_seconds=0.1)
    with Network.open(limits=limits) as server:

        def left(peer: str) -> None:
            gone.append(peer)
            told.set()

        server.serve(lambda request: request.respond(), left)
        with Network.open(host_maddrs=(), initial_peers=server.addresses) as idle:
            idle.ask(server.peer, {}).result(60)
            with Network.open(host_maddrs=(), initial_peers=server.addresses) as leaving:
                leaving.ask(server.peer, {}).result(60)
            assert told.wait(60)
            assert gone == [leaving.peer]
