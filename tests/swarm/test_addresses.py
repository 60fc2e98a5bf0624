"""Multiaddresses that cannot be right are refused before anything starts, and failures are explained."""

from __future__ import annotations

import socket
import threading

import pytest

from slowllm.errors import InputError, NetworkError
from slowllm.swarm.addresses import (
    Address,
    check_addresses,
    explain_hanging,
    explain_refusal,
    explain_unreachable,
    is_peer,
    parse_address,
    refuse_dead,
    refuse_taken_ports,
)

PEER = "QmbFTxrLH22v1EbhBqqeZSgDdQFCUVdXjQnrCvvGUVTJqn"


def test_an_address_says_host_port_and_peer() -> None:
    assert parse_address(f"/ip4/1.2.3.4/tcp/5/p2p/{PEER}", "x") == Address(
        f"/ip4/1.2.3.4/tcp/5/p2p/{PEER}", "ip4", "1.2.3.4", "tcp", 5, PEER
    )
    assert parse_address("/ip6/::1/udp/0/quic-v1", "x").peer is None
    assert parse_address("/dns4/a.example/tcp/65535", "x").host == "a.example"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("hello", "initial peer 'hello' is no multiaddress such as /ip4/203.0.113.7/tcp/31330"),
        ("/ip4/1.2.3.4", "is no multiaddress"),
        ("/ip4/1.2.3/tcp/5", "is no multiaddress .*Expected 4 octets"),
        ("/ip4/1.2.3.4:5/tcp/5", "is no multiaddress"),
        ("/ip6/1.2.3.4/tcp/5", "is no multiaddress"),
        ("/unix/tmp/tcp/5", "begins with neither /ip4/, /ip6/ nor /dns/"),
        ("/dns/a b/tcp/5", "begins with neither"),
        ("/ip4/1.2.3.4/sctp/5", "no /tcp/ or /udp/ with a port up to 65535"),
        ("/ip4/1.2.3.4/tcp/65536", "no /tcp/ or /udp/ with a port"),
        ("/ip4/1.2.3.4/udp/5/quic", "/udp/5 is not followed by /quic-v1"),
        ("/ip4/1.2.3.4/tcp/-1", "no /tcp/ or /udp/ with a port"),
        (f"/ip4/1.2.3.4/tcp/5/p2p/{PEER}0", "does not end in /p2p/ and a peer id"),
        (f"/ip4/1.2.3.4/tcp/5/p2p/{PEER},/ip4/", "does not end in /p2p/"),
        (f"/ip4/1.2.3.4/tcp/5/nonsense/p2p/{PEER}", "does not end in /p2p/"),
        ("/ip4/1.2.3.4/tcp/5/p2p/1111111111111111111", "does not end in /p2p/ and a peer id"),
        (f"/ip4/1.2.3.4/tcp/5/p2p/{PEER}/p2p-circuit/p2p/1111111111111111111", "does not end in /p2p/ and a peer id"),
        ("/ip4/1.2.3.4/tcp/5", "lacks its port or its peer id; copy all of the line that `slowllm dht` prints there"),
        (f"/ip4/1.2.3.4/tcp/0/p2p/{PEER}", "lacks its port or its peer id"),
    ],
)  # fmt: skip
def test_an_initial_peer_that_cannot_be_right_is_refused(text: str, match: str) -> None:
    with pytest.raises(InputError, match=match):
        check_addresses([], [], [text])


def test_addresses_of_the_wrong_kind_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"host address .* has more than a host and a port; leave the rest out"
    ):
        check_addresses([f"/ip4/127.0.0.1/tcp/0/p2p/{PEER}"], [], [])
    with pytest.raises(InputError, match=r"announced address '/ip4/1\.2\.3\.4/tcp/0' has the port 0"):
        check_addresses([], ["/ip4/1.2.3.4/tcp/0"], [])
    check_addresses(["/ip4/0.0.0.0/tcp/0"], ["/dns/a.example/tcp/9"], [f"/ip4/1.2.3.4/tcp/5/p2p/{PEER}"])


def test_taken_ports_and_foreign_addresses_are_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            InputError, match=f"port {port} is taken by another process; choose another one, or 0"
        ):
            refuse_taken_ports([f"/ip4/127.0.0.1/tcp/{port}"])
    refuse_taken_ports([f"/ip4/127.0.0.1/tcp/{port}", "/ip4/127.0.0.1/tcp/0"])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(InputError, match="is taken by another process"):
            refuse_taken_ports([f"/ip4/127.0.0.1/udp/{taken.getsockname()[1]}/quic-v1"])
    # libp2p would leave it out and listen at the other one.
    for number in (port, 0):
        with pytest.raises(
            InputError,
            match=rf"/ip4/203\.0\.113\.7/tcp/{number}: this machine does not have the address 203\.0\.113\.7; listen at",
        ):
            refuse_taken_ports(["/ip4/127.0.0.1/tcp/0", f"/ip4/203.0.113.7/tcp/{number}"])
    with pytest.raises(InputError, match=r"the name no-such-host\.invalid is not known"):
        refuse_taken_ports(["/dns/no-such-host.invalid/tcp/0"])


def test_a_port_that_may_not_be_used_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forbidden(socket.socket):
        def bind(self, address: object) -> None:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket, "socket", Forbidden)
    with pytest.raises(InputError, match=r"cannot be listened at \(Permission denied\)"):
        refuse_taken_ports(["/ip4/127.0.0.1/tcp/80"])


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        (PEER, True),
        ("12D3KooWGC6TvWhfapngX6wvJHMYvKpDMXPb3ZnCZ6dMoaMtimQ5", True),
        ("1111111111111111111", False),
        (PEER[:-1], False),
        (PEER[:-1] + "0", False),
        ("Q" * 20, False),
        ("", False),
    ],
)
def test_a_peer_id_is_the_hash_of_a_key_or_a_short_key(text: str, is_one: bool) -> None:
    assert is_peer(text) is is_one


def test_what_is_at_an_address_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        addresses = [f"/ip4/127.0.0.1/tcp/{port}/p2p/{PEER}", f"/ip4/127.0.0.1/udp/{port}/quic-v1/p2p/{PEER}"]

        def answer() -> None:
            with other.accept()[0] as connection:
                connection.sendall(connection.recv(20))

        answering = threading.Thread(target=answer)
        answering.start()
        said = explain_unreachable(addresses)
        answering.join()
        hanging = explain_hanging(addresses)
    assert (
        said
        == f"{addresses[0]}: somebody listens there, but not a peer with this id; {addresses[1]} cannot be joined"
    )
    assert (
        hanging
        == f"{addresses[0]}: somebody takes connections there and says nothing; it hangs, or is no peer"
    )
    assert explain_unreachable(addresses[:1]) == f"{addresses[0]}: nobody answers there"
    assert explain_hanging(addresses) == ""


def test_peers_where_nobody_listens_are_refused_at_once_and_others_are_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as other:
        there, dead = (f"/ip4/127.0.0.1/tcp/{one.getsockname()[1]}/p2p/{PEER}" for one in (silent, other))
        other.close()
        with pytest.raises(
            NetworkError, match=f"no initial peer can be joined: {dead}: nobody answers there; {dead}: nobody"
        ):
            refuse_dead([dead, dead])
        for known in ([dead, there], [dead.replace("/tcp/", "/udp/").replace("/p2p", "/quic-v1/p2p")], []):
            refuse_dead(known)


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("local time must be within 3 seconds  of others(local: 110.5, peer: 100.5)", "clock is 10 s ahead of the clock of one of A, B; set it: 3 s"),
        ("local time must be within 3 seconds  of others(local: 100.0, peer: 104.0)", "clock is 4 s behind the clock of one of A, B"),
        ("Peer X can't access this node. Probably,", "A, B cannot connect to this machine at H; open the port"),
        ("bootstrap failed: none of the initial_peers responded to a ping.", "none of A, B answers as a peer of the swarm's directory"),
        (" else ", "A, B cannot be joined (else)"),
    ],
)  # fmt: skip
def test_why_peers_refuse_this_one_is_one_sentence(reason: str, said: str) -> None:
    assert said in explain_refusal(reason, ["A", "B"], ["H"])
