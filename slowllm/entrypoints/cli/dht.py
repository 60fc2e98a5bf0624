"""`slowllm dht`: be a peer by which others join a swarm, and keep a part of its directory. Computes nothing."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator

from slowllm.entrypoints.cli import options
from slowllm.entrypoints.cli.log_format import log_as_others
from slowllm.errors import counted


def dht(
    identity: options.Identity = None,
    host_maddrs: options.HostMaddrs = None,
    announce_maddrs: options.AnnounceMaddrs = None,
    initial_peers: options.InitialPeers = None,
    relay: options.Relay = True,
    token_file: options.TokenFile = None,
    verbose: options.Verbose = False,
) -> None:  # fmt: skip
    """Be a peer by which others join a swarm.

    Prints the multiaddresses of this peer, one a line; give one of them to servers and clients as --initial-peers. Runs
    until Ctrl-C or SIGTERM. It serves no blocks and needs little memory and no weights. Nothing is sent to anybody but the
    peers of the swarm.
    """
    options.log_to_stderr(verbose)
    options.check_identity(identity)
    from slowllm.swarm.network import Network
    from slowllm.swarm.shared_token import read_token

    log_as_others()

    token = None if token_file is None else read_token(token_file.expanduser())
    with Network.open(
        identity=None if identity is None else identity.expanduser(), host_maddrs=host_maddrs or [options.ANY_ADDRESS],
        announce_maddrs=announce_maddrs or [], initial_peers=initial_peers or [], use_relay=relay, token=token,
    ) as network, _ends_by_signal() as has_ended:  # fmt: skip
        for address in network.addresses:
            print(address, flush=True)
        what = counted(len(network.addresses), "address", "addresses")
        print(
            f"peer {network.peer} listens at {what}; others join with --initial-peers and one that leads here from where they "
            "are. Ctrl-C ends it.",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        has_ended.wait()
    print("left the swarm", file=sys.stderr, flush=True)


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
