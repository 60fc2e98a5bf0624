"""Start libp2p's process and join the initial peers with it, or say in one sentence why that is not possible.

Knows hivemind's `P2P`, as `network` does.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slowllm.errors import NetworkError, first_line
from slowllm.swarm.addresses import EXPLAIN_SECONDS, explain_hanging, explain_unreachable
from slowllm.swarm.identity import Identity


async def start_libp2p(
    identity: Identity,
    host: Sequence[str],
    announce: Sequence[str],
    initial: Sequence[str],
    use_relay: bool,
    seconds: float,
) -> Any:
    """Return hivemind's P2P, whose process is connected to one of the initial peers.

    Args:
        identity: of this peer.
        host: addresses to listen at; none for a peer that only asks.
        announce: addresses that others are told; none for those listened at.
        initial: peers to be joined; none for a swarm that begins here.
        use_relay: whether circuit relays are used.
        seconds: for all of it, with finding out what is wrong.
    Raises:
        NetworkError: libp2p does not start, or none of the initial peers can be joined.
    """
    from hivemind.p2p import P2P, P2PDaemonError

    try:
        with tempfile.TemporaryDirectory(prefix="slowllm-") as folder:
            path = Path(folder) / "identity"
            path.touch(0o600)
            path.write_bytes(identity.file_bytes())
            return await P2P.create(
                identity_path=str(path), host_maddrs=list(host), announce_maddrs=list(announce) or None,
                initial_peers=list(initial) or None, no_listen=not host, dht_mode="server" if host else "client",
                use_relay=use_relay, use_auto_relay=use_relay and bool(initial), use_ipfs=False,
                auto_nat=False, nat_port_map=False, check_if_identity_free=False, startup_timeout=seconds / 2,
            )  # fmt: skip
    except P2PDaemonError as error:
        # One that hangs may keep libp2p from its start until that is given up.
        explain = explain_unreachable if "bootstrap" in str(error) else explain_hanging
        sides = await asyncio.to_thread(explain, initial, min(seconds / 2, EXPLAIN_SECONDS))
        if not sides:
            raise NetworkError(f"libp2p does not start: {first_line(error)}") from error
        raise NetworkError(f"no initial peer can be joined: {sides}") from error
