"""Servers are killed and frozen at random moments of every kind of work, and all of it ends with the same bits.

What is printed (`pytest -s`): each moment, and the times to recover in one JSON line.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

import pytest

from tests.support.disturbed import TwiceServed, disturb
from tests.support.swarm_processes import SwarmProcess, SwarmProcesses

NUM_MOMENTS, SEED = 20, 1

pytestmark = pytest.mark.long


@pytest.fixture(scope="module", params=["llama-2", "bloom"])
def twice_served(
    request: pytest.FixtureRequest, swarm: SwarmProcesses, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, TwiceServed]]:
    with TwiceServed(swarm, tmp_path_factory.mktemp(request.param), request.param) as served:
        yield request.param, served


@pytest.mark.parametrize("signal", ["SIGKILL", "SIGSTOP"])
def test_work_of_every_kind_outlives_servers_that_fail_at_random_moments(
    signal: str, twice_served: tuple[str, TwiceServed]
) -> None:
    family, swarm = twice_served

    def kill(process: SwarmProcess, _: random.Random) -> None:
        process.kill()

    def freeze(process: SwarmProcess, generator: random.Random) -> None:
        # With libp2p's process nobody accepts connections; without it, connections work and nobody answers.
        process.freeze(also_children=generator.random() < 0.5)

    def thaw(peer: str) -> None:
        swarm.process(peer).thaw()

    kills = signal == "SIGKILL"
    found = disturb(swarm, NUM_MOMENTS, SEED, kill if kills else freeze, swarm.restart if kills else thaw)
    said = {
        "family": family,
        "signal": signal,
        "moments": NUM_MOMENTS,
        "harmed": found.num_harmed,
        "wrong": len(found.wrong),
    }
    print(json.dumps({**said, **found.figures()}), flush=True)
    assert not found.wrong
