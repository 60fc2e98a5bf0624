"""Small swarms that tests share: a server for tests and a client in this process, and servers of a model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from slowllm.entrypoints.api import LM
from slowllm.swarm.network import Network
from slowllm.swarm.streams import Limits
from tests.support.served import Served, start_served
from tests.support.swarm_processes import SwarmProcess, SwarmProcesses

# Short, so that tests of silence are, and long enough for a machine that does other work beside.
QUICK = {"beat_seconds": 0.2, "silence_seconds": 2.0}


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


@pytest.fixture(scope="session")
def served(swarm: SwarmProcesses, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Three servers of one model in fp32, in processes of their own; tests that harm one start their own."""
    return start_served(swarm, tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def lm(served: Served) -> Iterator[LM]:
    """A client of them in this process."""
    with served.load() as client:
        yield client


@pytest.fixture(scope="session")
def local(served: Served) -> Iterator[LM]:
    """The same model without a swarm."""
    with served.load_local() as model:
        yield model
