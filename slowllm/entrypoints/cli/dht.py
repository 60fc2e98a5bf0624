"""`slowllm dht`: be a peer by which others join a swarm, and keep a part of its directory. Computes nothing."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from slowllm.entrypoints.cli import options
from slowllm.errors import InputError, counted

ANY_ADDRESS = "/ip4/0.0.0.0/tcp/0"


def dht(
    identity: Annotated[
        Path | None,
        typer.Option(
            "--identity",
            help="File of this peer's key, made if it is not there; with it, and a port, addresses stay the same after a "
            "restart.",
            show_default="a new one each time",
        ),
    ] = None,
    host_maddrs: Annotated[
        list[str] | None,
        typer.Option(
            "--host-maddrs",
            help="Multiaddress to listen at, such as /ip4/0.0.0.0/tcp/31330; may be given several times.",
            show_default=f"{ANY_ADDRESS}: all interfaces, a free port",
        ),
    ] = None,
    announce_maddrs: Annotated[
        list[str] | None,
        typer.Option(
            "--announce-maddrs",
            help="Multiaddress that others are told, such as /ip4/203.0.113.7/tcp/31330 behind a router that forwards the "
            "port; may be given several times.",
            show_default="those listened at",
        ),
    ] = None,
    initial_peers: Annotated[
        list[str] | None,
        typer.Option(
            "--initial-peers",
            help="Multiaddress of a peer of the swarm to join, as `slowllm dht` printed it there; may be given several times.",
            show_default="none: begin a new swarm",
        ),
    ] = None,
    relay: Annotated[
        bool,
        typer.Option(
            "--relay/--no-relay",
            help="Pass on the traffic of peers that others cannot reach directly, and be reached so through the initial peers.",
        ),
    ] = True,
    verbose: options.Verbose = False,
) -> None:  # fmt: skip
    """Be a peer by which others join a swarm.

    Prints the multiaddresses of this peer, one a line; give one of them to servers and clients as --initial-peers. Runs
    until Ctrl-C or SIGTERM. It serves no blocks and needs little memory and no weights. Nothing is sent to anybody but the
    peers of the swarm.
    """
    options.log_to_stderr(verbose)
    if identity is not None and not identity.expanduser().parent.is_dir():
        raise InputError(f"{identity.parent}: no such folder for --identity {identity.name}")
    from slowllm.swarm.network import Network

    with Network.open(
        identity=None if identity is None else identity.expanduser(), host_maddrs=host_maddrs or [ANY_ADDRESS],
        announce_maddrs=announce_maddrs or [], initial_peers=initial_peers or [], use_relay=relay,
    ) as network, _ends_by_signal() as has_ended:  # fmt: skip
        for address in network.addresses:
            print(address, flush=True)
        what = counted(len(network.addresses), "address", "addresses")
        print(
            f"peer {network.peer} listens at {what}; others join with --initial-peers and one that leads here from where they "
            "are. Ctrl-C ends it.",
            file=sys.stderr,
            flush=True,
        )
        has_ended.wait()
    print("left the swarm", file=sys.stderr)


@contextlib.contextmanager
def _ends_by_signal() -> Iterator[threading.Event]:
    """Yield what is set by Ctrl-C and SIGTERM, which end this verb as they should."""
    event = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: event.set()) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
