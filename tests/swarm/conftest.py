"""A small swarm that tests share: one server in a process of its own, and a client in this one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from slowllm.swarm.network import Network
from slowllm.swarm.streams import Limits
from tests.support.swarm_processes import SwarmProcess, SwarmProcesses

# Short, so that tests of silence are, and long enough for a machine that does other work beside.
QUICK = {"beat_seconds": 0.2, "silence_seconds": 2.0}


@pytest.fixture(scope="session")
def swarm() -> Iterator[SwarmProcesses]:
    """What starts peers in processes of their own."""
    with SwarmProcesses() as processes:
        yield processes


@pytest.fixture(scope="session")
def server(swarm: SwarmProcesses) -> SwarmProcess:
    """A server that all tests share; those that harm one start their own."""
    return swarm.peer(limits=QUICK)


@pytest.fixture(scope="session")
def client(server: SwarmProcess) -> Iterator[Network]:
    """A client in this process, which listens nowhere."""
    with Network.open(
        host_maddrs=(), initial_peers=server.told["addresses"], limits=Limits(**QUICK)
    ) as network:
        yield network
