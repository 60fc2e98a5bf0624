"""Check multiaddresses that people type, and say in one sentence what is wrong with them or at their other end.

Knows sockets; knows nothing of hivemind.
"""

from __future__ import annotations

import errno
import hashlib
import ipaddress
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from slowllm.errors import InputError, NetworkError
from slowllm.swarm.identity import ALPHABET, SHA256_CODE

EXAMPLE = "/ip4/203.0.113.7/tcp/31330"
_PEER = re.compile(r"[1-9A-HJ-NP-Za-km-z]{16,128}")
_NAME = re.compile(r"[\w.-]+", re.ASCII)
# What may follow a port: how the bytes go, the peer, and the peer that is reached through it.
_REST = re.compile(
    r"(?:/quic-v1|/ws|/tls/ws|/wss)?(?:/p2p/(?P<peer>\w+)(?:/p2p-circuit(?:/p2p/(\w+))?)?)?", re.ASCII
)
# Of an Ed25519 key, as go-libp2p's own ids have it.
_SHORT_KEY = b"\x00\x24"
# That it takes at most to say what is at addresses: half of it to connect, and half to hear something.
EXPLAIN_SECONDS = 4.0
# That a machine which is there takes to say that nobody listens at a port.
_REFUSE_SECONDS = 1.0
# By which libp2p's peers begin; the other side answers with the same.
_HELLO = b"\x13/multistream/1.0.0\n"
_NOBODY = "nobody answers there"
_HANGS = "somebody takes connections there and says nothing; it hangs, or is no peer"
# By which hivemind lets the clocks of peers differ.
CLOCK_SECONDS = 3.0
_TIMES = re.compile(r"local: ([\d.]+), peer: ([\d.]+)")
_MAX_PORT = 65535
_NUM_WORDS = 4


@dataclass(frozen=True)
class Address:
    """What a multiaddress says.

    Attributes:
        text: all of it.
        family: ``ip4``, ``ip6``, ``dns``, ``dns4`` or ``dns6``.
        host: the number or the name.
        transport: ``tcp`` or ``udp``.
        port: 0 for any that is free.
        peer: the id at its end; None where there is none.
    """

    text: str
    family: str
    host: str
    transport: str
    port: int
    peer: str | None


def is_peer(text: str) -> bool:
    """Whether this is a peer id: in base58, the SHA-256 of a key, or a short key as it is."""
    if _PEER.fullmatch(text) is None:
        return False
    number = 0
    for letter in text:
        number = number * len(ALPHABET) + ALPHABET.index(letter)
    code = bytes(len(text) - len(text.lstrip(ALPHABET[0]))) + number.to_bytes(
        -(-number.bit_length() // 8), "big"
    )
    kinds = {
        SHA256_CODE: len(SHA256_CODE) + hashlib.sha256().digest_size,
        _SHORT_KEY: len(_SHORT_KEY) + _SHORT_KEY[1],
    }
    return len(code) == kinds.get(code[:2])


def parse_address(text: str, option: str) -> Address:
    """Return what a multiaddress says.

    Raises:
        InputError: it is none; the message names the option.
    """
    words = text.split("/")[1:]
    problem = f"{option} {text!r} is no multiaddress such as {EXAMPLE}"
    if not text.startswith("/") or len(words) < _NUM_WORDS:
        raise InputError(problem)
    family, host, transport, port, *rest = words
    if family in ("ip4", "ip6"):
        try:
            (ipaddress.IPv4Address if family == "ip4" else ipaddress.IPv6Address)(host)
        except ValueError as error:
            raise InputError(f"{problem}: {error}") from error
    elif family not in ("dns", "dns4", "dns6") or not _NAME.fullmatch(host):
        raise InputError(f"{problem}: it begins with neither /ip4/, /ip6/ nor /dns/ and a host")
    if transport not in ("tcp", "udp") or not port.isascii() or not port.isdigit() or int(port) > _MAX_PORT:
        raise InputError(f"{problem}: after the host stands no /tcp/ or /udp/ with a port up to {_MAX_PORT}")
    if transport == "udp" and rest[:1] != ["quic-v1"]:
        raise InputError(f"{problem}: /udp/{port} is not followed by /quic-v1")
    match = _REST.fullmatch("".join(f"/{word}" for word in rest))
    if match is None or not all(map(is_peer, filter(None, match.groups()))):
        raise InputError(f"{problem}: it does not end in /p2p/ and a peer id")
    peer = match["peer"]
    return Address(text, family, host, transport, int(port), peer)


def check_swarm(
    peers: Sequence[str], allowed: Iterable[str], blocked: Iterable[str], named: Callable[[str], str]
) -> None:
    """Refuse what a client's options cannot mean, before anything heavy is imported.

    Args:
        peers: of the swarm.
        allowed: ids of servers that may be asked.
        blocked: ids of servers that may not.
        named: returns how people write the option ``swarm``, ``allowed_peers`` or ``blocked_peers``.
    Raises:
        InputError: one is no multiaddress with a peer id, or no peer id; the message names the option.
    """
    for text in peers:
        _check_initial(text, named("swarm"))
    for option, ids in (("allowed_peers", allowed), ("blocked_peers", blocked)):
        for text in ids:
            if not is_peer(text):
                raise InputError(
                    f"{named(option)} {text!r} is no peer id; copy what stands behind /p2p/ in the line that the server prints"
                )


def peer_of(text: str) -> str:
    """Return the id at the end of an initial peer's address that was checked."""
    peer = parse_address(text, "initial peer").peer
    assert peer is not None, f"{text} was not checked"
    return peer


def check_addresses(host: Sequence[str], announce: Sequence[str], initial: Sequence[str]) -> None:
    """Refuse addresses that cannot be right, before anything is started.

    Raises:
        InputError: one is no multiaddress, or lacks the port or the peer id that it needs.
    """
    for text in host:
        address = parse_address(text, "host address")
        # libp2p leaves out, and says nothing of, addresses that it cannot listen at as long as there is one that it can.
        if text != f"/{address.family}/{address.host}/{address.transport}/{address.port}" + (
            "/quic-v1" if address.transport == "udp" else ""
        ):
            raise InputError(f"host address {text!r} has more than a host and a port; leave the rest out")
    for text in announce:
        if not parse_address(text, "announced address").port:
            raise InputError(f"announced address {text!r} has the port 0; name the one that leads here")
    for text in initial:
        _check_initial(text, "initial peer")


def _check_initial(text: str, option: str) -> None:
    address = parse_address(text, option)
    if address.peer is None or not address.port:
        raise InputError(
            f"{option} {text!r} lacks its port or its peer id; copy all of the line that `slowllm dht` prints there"
        )


def refuse_taken_ports(host: Sequence[str]) -> None:
    """Refuse ports that another process listens at: libp2p would share them, and connections would go to either.

    Raises:
        InputError: a port is taken, or may not be used, or the machine does not have the address.
    """
    for address in (parse_address(text, "host address") for text in host):
        kind = socket.SOCK_STREAM if address.transport == "tcp" else socket.SOCK_DGRAM
        for family, where in _places_of(address, kind):
            with socket.socket(family, kind) as trial:
                # What a process that ended a minute ago has left behind does not matter.
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(kind == socket.SOCK_STREAM))
                try:
                    trial.bind(where)
                except OSError as error:
                    if error.errno == errno.EADDRINUSE:
                        raise InputError(
                            f"{address.text}: port {address.port} is taken by another process; choose another one, or 0 for any "
                            "that is free"
                        ) from error
                    if error.errno == errno.EADDRNOTAVAIL:
                        raise InputError(
                            f"{address.text}: this machine does not have the address {where[0]}; listen at /ip4/0.0.0.0 for all "
                            "that it has"
                        ) from error
                    raise InputError(f"{address.text}: cannot be listened at ({error.strerror})") from error


def _places_of(
    address: Address, kind: socket.SocketKind
) -> list[tuple[socket.AddressFamily, tuple[str, int]]]:
    """Return the families and numbers that an address to listen at means."""
    if address.family in ("ip4", "ip6"):
        family = socket.AF_INET if address.family == "ip4" else socket.AF_INET6
        return [(family, (address.host, address.port))]
    wanted = {"dns4": socket.AF_INET, "dns6": socket.AF_INET6}.get(address.family, socket.AF_UNSPEC)
    try:
        found = socket.getaddrinfo(address.host, address.port, wanted, kind)
    except OSError as error:
        raise InputError(
            f"{address.text}: the name {address.host} is not known ({error.strerror})"
        ) from error
    return [(family, (str(place[0]), int(place[1]))) for family, _, _, _, place in found]


def refuse_dead(initial: Sequence[str]) -> None:
    """Refuse initial peers where nobody listens, before anything heavy is imported to join them.

    Raises:
        NetworkError: the machines of all of them say so. What else may be wrong is found when they are joined.
    """

    def is_dead(address: Address) -> bool:
        try:
            with socket.create_connection((address.host, address.port), _REFUSE_SECONDS):
                return False
        except ConnectionRefusedError:
            return True
        except OSError:
            return False

    addresses = [parse_address(text, "initial peer") for text in initial]
    if any(address.transport != "tcp" for address in addresses):
        return
    with ThreadPoolExecutor(max(1, len(addresses))) as pool:
        if addresses and all(pool.map(is_dead, addresses)):
            sides = "; ".join(f"{address.text}: {_NOBODY}" for address in addresses)
            raise NetworkError(f"no initial peer can be joined: {sides}")


def explain_unreachable(initial: Sequence[str], seconds: float = EXPLAIN_SECONDS) -> str:
    """Return what is known of each initial peer after none of them could be joined; connects to those with a number."""
    return "; ".join(_explanations(initial, seconds))


def explain_refusal(reason: str, initial: Sequence[str], host: Sequence[str]) -> str:
    """Return in one sentence why peers do not take this one into the swarm's directory.

    Args:
        reason: what hivemind says of it.
        initial: the peers that were given.
        host: addresses that this one listens at.
    """
    if times := _TIMES.search(reason):
        ahead = float(times[1]) - float(times[2])
        return (
            f"this machine's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the clock of one of "
            f"{', '.join(initial)}; set it: {CLOCK_SECONDS:.0f} s are allowed"
        )
    if "access this node" in reason:
        return (
            f"{', '.join(initial)} cannot connect to this machine at {', '.join(host)}; open the port, announce an address "
            "that leads here, or use relays"
        )
    if "none of the initial_peers responded" in reason:
        return f"none of {', '.join(initial)} answers as a peer of the swarm's directory"
    return f"{', '.join(initial)} cannot be joined ({reason.strip()})"


def explain_hanging(initial: Sequence[str], seconds: float = EXPLAIN_SECONDS) -> str:
    """Return which initial peers take connections and say nothing; empty where none does, or none can be asked."""
    return "; ".join(text for text in _explanations(initial, seconds) if text.endswith(_HANGS))


def _explanations(initial: Sequence[str], seconds: float) -> Iterator[str]:
    with ThreadPoolExecutor(max(1, len(initial))) as pool:
        addresses = [parse_address(text, "initial peer") for text in initial]
        yield from pool.map(lambda address: _explanation(address, seconds), addresses)


def _explanation(address: Address, seconds: float) -> str:
    if address.transport != "tcp":
        return f"{address.text} cannot be joined"
    reason, place = _NOBODY, (address.host, address.port)
    with suppress(OSError), socket.create_connection(place, seconds / 2) as connection:
        # The system takes connections for a process that is frozen, too.
        reason = _HANGS
        connection.sendall(_HELLO)
        if connection.recv(1):
            reason = "somebody listens there, but not a peer with this id"
    return f"{address.text}: {reason}"
