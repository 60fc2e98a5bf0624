"""Requests between real processes: answers, order, cancellation, silence, death, and what is left behind."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from slowllm.errors import (
    DirectoryError,
    InputError,
    NetworkError,
    PeerError,
    PeerLostError,
    PeerTimeoutError,
    ProtocolError,
    RemoteError,
)
from slowllm.swarm import addresses
from slowllm.swarm.libp2p_log import without_faults_of_leaving
from slowllm.swarm.network import Network
from slowllm.swarm.streams import Limits
from tests.support.swarm_processes import LOOPBACK, SwarmProcess, SwarmProcesses, wait_for_end
from tests.swarm.conftest import QUICK

TENSORS = {
    "hidden": torch.randn(2, 3, 64),
    "half": torch.randn(5).bfloat16(),
    "mask": torch.tensor([[True, False]]),
    "empty": torch.empty(0, 4, dtype=torch.int64),
}
PATIENCE = 60.0


def ask(network: Network, server: SwarmProcess, op: str, **meta: Any) -> dict[str, Any]:
    """Ask a peer for tests and return the meta of its answer."""
    return network.ask(server.told["peer"], {"op": op, **meta}).result(PATIENCE)[0]


@pytest.mark.parametrize("op", ["echo", "thread", "coroutine"])
def test_tensors_come_back_with_the_same_bits(client: Network, server: SwarmProcess, op: str) -> None:
    meta, tensors = client.ask(server.told["peer"], {"op": op, "deep": [{"a": 1.5}]}, TENSORS).result(
        PATIENCE
    )
    assert meta == {"op": op, "deep": [{"a": 1.5}]}
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())


def test_both_ways_are_compressed_as_they_are_told(client: Network, server: SwarmProcess) -> None:
    meta = {"op": "echo", "compression": {"hidden": "int8"}}
    _, tensors = client.ask(server.told["peer"], meta, TENSORS, compression={"hidden": "float16"}).result(
        PATIENCE
    )
    assert torch.allclose(tensors["hidden"], TENSORS["hidden"], atol=0.03)
    assert not torch.equal(tensors["hidden"], TENSORS["hidden"])
    assert torch.equal(tensors["half"], TENSORS["half"])


def test_a_long_message_goes_both_ways(client: Network, server: SwarmProcess) -> None:
    tensor = torch.randn(3 << 20)
    _, tensors = client.ask(server.told["peer"], {"op": "echo"}, {"long": tensor}).result(PATIENCE)
    assert torch.equal(tensors["long"], tensor)


def test_answers_come_in_another_order_than_requests(client: Network, server: SwarmProcess) -> None:
    peer = server.told["peer"]
    waiting = [client.ask(peer, {"op": "wait", "name": f"order {n}"}) for n in range(5)]
    for n in (3, 0, 4, 2, 1):
        ask(client, server, "arrival", name=f"order {n}")
        ask(client, server, "release", name=f"order {n}")
        assert waiting[n].result(PATIENCE)[0] == {"released": True}


def test_many_threads_ask_at_once(client: Network, server: SwarmProcess) -> None:
    found: dict[int, int] = {}

    def work(number: int) -> None:
        for turn in range(5):
            tensor = torch.full((100,), 10 * number + turn)
            _, tensors = client.ask(server.told["peer"], {"op": "thread"}, {"x": tensor}).result(PATIENCE)
            assert torch.equal(tensors["x"], tensor)
        found[number] = number

    threads = [threading.Thread(target=work, args=[n]) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12


def test_an_answer_can_be_awaited(client: Network, server: SwarmProcess) -> None:
    async def work() -> dict[str, Any]:
        meta, _ = await asyncio.wrap_future(client.ask(server.told["peer"], {"op": "echo", "x": 1}))
        return meta

    assert asyncio.run(work()) == {"op": "echo", "x": 1}


def test_cancelling_a_request_tells_the_server(client: Network, server: SwarmProcess) -> None:
    waiting = client.ask(server.told["peer"], {"op": "wait", "name": "cancelled"})
    ask(client, server, "arrival", name="cancelled")
    assert waiting.cancel()
    ask(client, server, "cancellation", name="cancelled")
    assert ask(client, server, "echo") == {"op": "echo"}


def test_an_answer_that_takes_too_long_ends_the_request(client: Network, server: SwarmProcess) -> None:
    peer = server.told["peer"]
    with pytest.raises(PeerTimeoutError, match=rf"peer {peer}: has not answered in 0\.1 s"):
        client.ask(peer, {"op": "wait", "name": "late"}, timeout=0.1).result(PATIENCE)
    # It may have come to an end before the server had read it.
    first = client.ask(peer, {"op": "wait", "name": "later"}, timeout=3.0)
    ask(client, server, "arrival", name="later")
    with pytest.raises(PeerTimeoutError):
        first.result(PATIENCE)
    ask(client, server, "cancellation", name="later")


def test_a_slow_answer_is_no_silence(client: Network, server: SwarmProcess) -> None:
    assert ask(client, server, "delay", seconds=1.5 * QUICK["silence_seconds"]) == {}


def test_errors_of_the_server_have_its_name_and_their_own(client: Network, server: SwarmProcess) -> None:
    peer = server.told["peer"]
    with pytest.raises(
        RemoteError, match=rf"peer {peer}: answers InputError: blocks 3:5 are not here"
    ) as caught:
        ask(client, server, "refuse", sentence="blocks 3:5 are not here\x1b[2J")
    assert (caught.value.peer, caught.value.kind) == (peer, "InputError")
    assert caught.value.sentence == "blocks 3:5 are not here [2J"
    with pytest.raises(
        RemoteError, match="answers ValueError: the server failed; its log says more"
    ) as caught:
        ask(client, server, "crash")
    assert "secret" not in str(caught.value)


def test_what_cannot_be_sent_is_refused_before_it_is_sent(client: Network, server: SwarmProcess) -> None:
    peer = server.told["peer"]
    with pytest.raises(ProtocolError, match="complex64"):
        client.ask(peer, {}, {"x": torch.ones(1, dtype=torch.complex64)})
    with pytest.raises(InputError, match="'nobody' is no peer id"):
        client.ask("nobody", {})


def test_a_frozen_server_is_silent_and_answers_again_when_it_goes_on(
    client: Network, swarm: SwarmProcesses, server: SwarmProcess
) -> None:
    other = swarm.peer(server.told["addresses"], limits=QUICK)
    peer = other.told["peer"]
    assert ask(client, other, "echo") == {"op": "echo"}
    other.freeze()
    with pytest.raises(PeerTimeoutError, match=rf"peer {peer}: has been silent for 2 s"):
        ask(client, other, "echo")
    other.thaw()
    assert ask(client, other, "echo") == {"op": "echo"}
    assert other.stop().returncode == 0


@pytest.mark.long
def test_a_machine_that_stands_still_is_lost_too(swarm: SwarmProcesses, server: SwarmProcess) -> None:
    other = swarm.peer(server.told["addresses"], limits=QUICK)
    peer = other.told["peer"]
    with Network.open(
        host_maddrs=(), initial_peers=other.told["addresses"], limits=Limits(**QUICK)
    ) as client:
        assert ask(client, other, "echo") == {"op": "echo"}
        other.freeze(also_children=True)
        # libp2p opens a stream without waiting for the other side, so a new one is silent, too.
        for _ in range(2):
            with pytest.raises(PeerTimeoutError, match=rf"peer {peer}: has been silent for 2 s"):
                ask(client, other, "echo")
    other.kill()


def test_a_silent_machine_is_dialled_for_no_longer_than_silence_is_waited_for(server: SwarmProcess) -> None:
    stranger = "QmbFTxrLH22v1EbhBqqeZSgDdQFCUVdXjQnrCvvGUVTJqn"
    limits = Limits(beat_seconds=0.1, silence_seconds=0.5, connect_seconds=60.0)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        Network.open(host_maddrs=(), initial_peers=server.told["addresses"], limits=limits) as client,
    ):
        client._known[stranger] = (f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}",)
        with pytest.raises(PeerTimeoutError, match=rf"peer {stranger}: cannot be reached in 0\.5 s"):
            client.ask(stranger, {}).result(PATIENCE)


@pytest.mark.long
def test_a_peer_that_libp2p_does_not_find_is_reached_by_its_record(server: SwarmProcess) -> None:
    # With the time that libp2p may need to find nobody on a crowded machine.
    with (
        Network.open() as stranger,
        Network.open(host_maddrs=(), initial_peers=server.told["addresses"]) as client,
    ):
        stranger.serve(lambda request: request.respond({"here": True}))
        with pytest.raises(PeerLostError, match=rf"peer {stranger.peer}: cannot be reached \("):
            client.ask(stranger.peer, {}).result(PATIENCE)
        client._known[stranger.peer] = stranger.addresses  # as `find` notes it
        assert client.ask(stranger.peer, {}).result(PATIENCE)[0] == {"here": True}


def test_a_killed_server_is_lost_and_leaves_no_process(
    client: Network, swarm: SwarmProcesses, server: SwarmProcess
) -> None:
    other = swarm.peer(server.told["addresses"], limits=QUICK)
    peer = other.told["peer"]
    waiting = client.ask(peer, {"op": "wait", "name": "killed"})
    ask(client, other, "arrival", name="killed")
    other.kill()
    with pytest.raises(PeerLostError, match=f"peer {peer}: the connection ended before it had answered"):
        waiting.result(PATIENCE)
    # libp2p's process sees that its connection to the process that was killed has ended.
    for child in other.told["children"]:
        wait_for_end(child)
    with pytest.raises(PeerError, match=rf"peer {peer}: cannot be reached (\(|in 2 s)"):
        ask(client, other, "echo")


def test_a_peer_that_does_not_serve_says_so(
    client: Network, swarm: SwarmProcesses, server: SwarmProcess
) -> None:
    other = swarm.peer(server.told["addresses"], serve=False)
    with pytest.raises(
        PeerLostError, match=r"does not serve slowllm\.swarm\.1; it may be of another version"
    ):
        ask(client, other, "echo")


def test_limits_of_a_server_hold(client: Network, swarm: SwarmProcesses, server: SwarmProcess) -> None:
    limits = {**QUICK, "message_bytes": 1 << 20, "held_bytes": 3 << 20, "streams_per_peer": 5}
    other = swarm.peer(server.told["addresses"], limits=limits)
    peer = other.told["peer"]
    with pytest.raises(
        RemoteError,
        match=r"answers ProtocolError: a message claims .* bytes, more than the 1,048,576 allowed",
    ):
        client.ask(peer, {"op": "echo"}, {"x": torch.zeros(1 << 19)}).result(PATIENCE)
    with pytest.raises(
        RemoteError, match=r"answers ProtocolError: the message has .* bytes, more than the 1,048,576"
    ):
        client.ask(peer, {"op": "count", "want": 2 << 20}).result(PATIENCE)
    # Three of these may be held; the fourth is read when one of them is answered.
    waiting = [
        client.ask(peer, {"op": "wait", "name": f"held {n}"}, {"x": torch.zeros(200_000)}) for n in range(3)
    ]
    for n in range(3):
        ask(client, other, "arrival", name=f"held {n}")
    fourth = client.ask(peer, {"op": "count"}, {"x": torch.zeros(200_000)})
    # The fifth stream of this peer.
    ask(client, other, "release", name="held 1")
    assert fourth.result(PATIENCE)[0] == {"bytes": 800_000}
    for future, n in zip((waiting[0], waiting[2]), (0, 2), strict=True):
        ask(client, other, "release", name=f"held {n}")
        assert future.result(PATIENCE)[0] == {"released": True}
    several = [client.ask(peer, {"op": "wait", "name": f"many {n}"}) for n in range(5)]
    with pytest.raises(PeerLostError, match="connection ended"):
        client.ask(peer, {"op": "echo"}).result(PATIENCE)
    for future in several:
        future.cancel()


def test_closing_a_network_leaves_no_process_no_thread_and_no_request(server: SwarmProcess) -> None:
    threads = set(threading.enumerate())
    children = set(psutil.Process().children(recursive=True))
    network = Network.open(initial_peers=server.told["addresses"])
    network.serve(lambda request: request.respond())
    waiting = network.ask(server.told["peer"], {"op": "wait", "name": "closed"})
    ask(network, server, "arrival", name="closed")
    network.close()
    network.close()
    with pytest.raises(NetworkError, match="the network was closed"):
        waiting.result(PATIENCE)
    with pytest.raises(NetworkError, match="the network was closed"):
        network.ask(server.told["peer"], {})
    with pytest.raises(NetworkError, match="the network was closed"):
        network.find("m-1")
    for thread in set(threading.enumerate()) - threads:
        thread.join(PATIENCE)  # asyncio's own, which waited for the process that has ended
    assert set(threading.enumerate()) == threads
    assert set(psutil.Process().children(recursive=True)) == children


def test_a_network_whose_libp2p_process_has_died_says_so_and_can_be_closed(server: SwarmProcess) -> None:
    before = set(psutil.Process().children())
    with Network.open(initial_peers=server.told["addresses"]) as network:
        assert ask(network, server, "echo") == {"op": "echo"}
        (child,) = set(psutil.Process().children()) - before
        waiting = network.ask(server.told["peer"], {"op": "wait", "name": "died"})
        ask(network, server, "arrival", name="died")
        child.kill()
        with pytest.raises(PeerLostError, match="connection ended"):
            waiting.result(PATIENCE)
        with pytest.raises(
            NetworkError, match="libp2p's process of this peer has ended; open the network again"
        ):
            ask(network, server, "echo")
        with pytest.raises(NetworkError, match="libp2p's process of this peer has ended"):
            network.find("m-1")


def test_a_swarm_that_has_died_is_not_an_empty_one(swarm: SwarmProcesses) -> None:
    other = swarm.peer()
    (address,) = other.told["addresses"]
    with Network.open(host_maddrs=(), initial_peers=[address]) as network:
        assert network.find("m-1") == []
        other.freeze()
        with pytest.raises(DirectoryError, match=r"the swarm's directory has not answered in 0\.2 s"):
            network.find("m-1", 0.2)
        with pytest.raises(DirectoryError, match=r"the swarm's directory has not answered in 0\.2 s"):
            network.look("m-1", 0.2).result(PATIENCE)
        other.kill()
        with pytest.raises(
            NetworkError, match=f"no peer of the swarm answers any more; it was joined by {address}"
        ):
            network.find("m-1")


@pytest.mark.long
def test_a_swarm_that_was_lost_is_joined_again(swarm: SwarmProcesses) -> None:
    other = swarm.peer()
    with Network.open(
        host_maddrs=(), initial_peers=other.told["addresses"], limits=Limits(**QUICK)
    ) as network:
        record = {
            "first": 0,
            "end": 1,
            "state": "joining",
            "dtype": "float32",
            "version": "1",
            "model": "m-1",
        }
        ask(network, other, "announce", record=record, ttl=600)
        other.freeze()
        with pytest.raises(NetworkError, match="no peer of the swarm answers any more"):
            network.find("m-1")
        other.thaw()
        assert [found.peer for found in network.find("m-1")] == [other.told["peer"]]


def test_a_peer_on_the_loopback_connects_to_nothing_else(server: SwarmProcess) -> None:
    (child,) = server.told["children"]
    connections = psutil.Process(child).net_connections(kind="inet")
    assert connections
    for connection in connections:
        assert connection.laddr.ip == "127.0.0.1"
        assert not connection.raddr or connection.raddr.ip == "127.0.0.1"


@pytest.mark.long
def test_an_identity_stays_the_same_and_belongs_to_one_process(
    swarm: SwarmProcesses, server: SwarmProcess, tmp_path: Path
) -> None:
    file = tmp_path / "identity"
    options = {"identity": str(file), "limits": QUICK}
    first = swarm.peer(server.told["addresses"], **options)
    assert file.stat().st_mode & 0o777 == 0o600
    with pytest.raises(
        InputError, match="is used by another process; every process needs an identity file of its own"
    ):
        Network.open(identity=file)
    first.stop()
    with Network.open(identity=file, initial_peers=server.told["addresses"]) as again:
        assert again.peer == first.told["peer"]


def test_nobody_at_the_address_of_a_peer_is_said(server: SwarmProcess) -> None:
    peer = server.told["peer"]
    with pytest.raises(
        NetworkError,
        match=rf"no initial peer can be joined: /ip4/127\.0\.0\.1/tcp/1/p2p/{peer}: nobody answers there",
    ):
        Network.open(initial_peers=[f"/ip4/127.0.0.1/tcp/1/p2p/{peer}"])


def test_another_peer_at_the_address_is_said(server: SwarmProcess) -> None:
    (address,) = server.told["addresses"]
    other = address.rpartition("/")[0] + "/QmbFTxrLH22v1EbhBqqeZSgDdQFCUVdXjQnrCvvGUVTJqn"
    with pytest.raises(NetworkError, match="somebody listens there, but not a peer with this id"):
        Network.open(initial_peers=[other])


def test_a_taken_port_is_said(server: SwarmProcess) -> None:
    port = server.told["addresses"][0].split("/")[4]
    with pytest.raises(
        InputError, match=f"/ip4/127.0.0.1/tcp/{port}: port {port} is taken by another process"
    ):
        Network.open(host_maddrs=[f"/ip4/127.0.0.1/tcp/{port}"])


def test_what_libp2p_says_of_a_start_that_fails_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "refuse_taken_ports", lambda host: None)
    with pytest.raises(NetworkError, match=r"libp2p does not start: .*failed to listen"):
        Network.open(host_maddrs=["/dns/no-such-host.invalid/tcp/0"])


def test_connections_that_end_with_libp2ps_process_are_no_fault_in_the_log() -> None:
    logger, said = logging.getLogger("hivemind.p2p.p2p_daemon"), list[str]()
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        with without_faults_of_leaving():
            logger.error("accept unix x: use of closed network connection")
            logger.error("another fault")
    finally:
        logger.removeHandler(handler)
    assert said == ["another fault"]


@pytest.mark.parametrize(("wrong", "side"), [(10.0, "behind"), (-10.0, "ahead of")])
def test_a_wrong_clock_is_said(swarm: SwarmProcesses, wrong: float, side: str) -> None:
    other = swarm.peer(clock=wrong)
    children = set(psutil.Process().children())
    with pytest.raises(
        NetworkError,
        match=f"this machine's clock is 10 s {side} the clock of one of /ip4/127.* set it: 3 s are allowed",
    ):
        Network.open(initial_peers=other.told["addresses"], host_maddrs=[LOOPBACK])
    assert set(psutil.Process().children()) == children


def test_hivemind_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "hivemind", None)
    with pytest.raises(
        InputError,
        match=r"hivemind is not installed .* pip install hivemind, or in a checkout pip install '\.\[swarm\]'",
    ):
        Network.open()


def test_limits_that_make_no_sense_are_a_programmers_error() -> None:
    with pytest.raises(AssertionError, match="could never be held"):
        Limits(message_bytes=2, held_bytes=1)
