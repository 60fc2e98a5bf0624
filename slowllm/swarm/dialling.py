"""Open a stream to a peer, and say in one sentence why that is not possible. Knows hivemind's `P2P`, as `network` does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

from slowllm.errors import NetworkError, PeerLostError, PeerTimeoutError, first_line
from slowllm.swarm.directory import DIED
from slowllm.swarm.streams import Stream

PROTOCOL_NAME = "slowllm.swarm.1"


async def open_stream(p2p: Any, peer: str, ways: Sequence[str], seconds: float) -> Stream:
    """Return a stream to a peer, of which nothing was used yet.

    Args:
        p2p: hivemind's P2P.
        peer: its id.
        ways: multiaddresses that its record names.
        seconds: to open it.
    Raises:
        PeerLostError: the peer cannot be reached.
        PeerTimeoutError: not in this time.
        NetworkError: libp2p's process has ended.
    """
    from hivemind.p2p import P2PDaemonError, PeerID
    from hivemind.utils.multiaddr import Multiaddr

    target = PeerID.from_base58(peer)
    failure: NetworkError
    try:
        async with asyncio.timeout(seconds):
            # libp2p asks others where a peer is, and one of them that hangs holds it up for seconds: its record may say it.
            # hivemind has no public way to pass that on, and its addresses have no room for ids.
            direct = [Multiaddr(way.partition("/p2p/")[0]) for way in ways if "circuit" not in way]
            if direct:
                with contextlib.suppress(P2PDaemonError):  # it may have moved, or be behind a relay
                    await p2p._client.connect(target, direct)
            opened = await p2p.call_binary_stream_handler(target, PROTOCOL_NAME)
            return Stream(opened[1], opened[2])
    except TimeoutError:
        failure = PeerTimeoutError(peer, f"cannot be reached in {seconds:g} s")
    except P2PDaemonError as error:
        reason = first_line(error).removeprefix("Connect failed. msg=")
        if "protocols not supported" in reason:
            reason = f"it does not serve {PROTOCOL_NAME}; it may be of another version"
        failure = PeerLostError(peer, f"cannot be reached ({reason})")
    except (OSError, EOFError):
        failure = NetworkError(DIED)
    # Not inside `except`: hivemind leaves a connection to the error's traceback, to be closed by whichever thread lets
    # go of it, and this must be the loop's.
    raise failure
