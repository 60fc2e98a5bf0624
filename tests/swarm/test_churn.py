"""Peers of a directory die and new ones join: the dead are forgotten in time, and every block keeps a server.

What is printed (`pytest -s`): the times in one JSON line.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from slowllm.swarm.announcer import RECORD_SECONDS
from slowllm.swarm.records import ServerRecord
from tests.support.churn import MODEL, Crowd

NUM_PEERS, NUM_BLOCKS, NUM_EACH, NUM_DEATHS, SEED = 20, 16, 3, 10, 1
# Between looks, so that those who look leave the processor to those who are looked at.
LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class Look:
    """What the client found: when it began to look and had found, the records, and the blocks that nobody alive has."""

    began_at: float
    ended_at: float
    records: Sequence[ServerRecord]
    uncovered: Sequence[int]

    def names(self, peer: str) -> bool:
        return any(record.peer == peer for record in self.records)


class Watch:
    """Looks at the swarm again and again from the client, in a thread of its own; a context manager."""

    def __init__(self, crowd: Crowd) -> None:
        self._crowd, self.looks = crowd, list[Look]()
        self.error: BaseException | None = None
        self._closed, self._seen = threading.Event(), threading.Condition()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        try:
            while not self._closed.wait(LOOK_SECONDS):
                began_at = time.time()
                records = self._crowd.client.find(MODEL)
                look = Look(began_at, time.time(), records, self._crowd.uncovered(records))
                with self._seen:
                    self.looks.append(look)
                    self._seen.notify_all()
        except BaseException as error:  # handed to who waits
            with self._seen:
                self.error = error
                self._seen.notify_all()

    def wait_until_began(self, when: float) -> Look:
        """Return the first look that began after a time."""
        with self._seen:
            while self.error is None and not (self.looks and self.looks[-1].began_at > when):
                assert self._seen.wait(120), "nobody looks any more"
        if self.error is not None:
            raise self.error
        return next(look for look in self.looks if look.began_at > when)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()


@pytest.mark.long
def test_the_dead_are_forgotten_and_every_block_keeps_a_server_while_peers_come_and_go() -> None:
    with Crowd(NUM_PEERS, NUM_BLOCKS, NUM_EACH, SEED) as crowd:
        assert not crowd.uncovered(crowd.client.find(MODEL))
        deaths: dict[str, float] = {}
        with Watch(crowd) as watch:
            for _ in range(NUM_DEATHS):
                dead = crowd.kill_one()
                deaths[dead.id] = time.time()
                crowd.join_one()
            # Whatever a peer announced last before it died has expired then.
            last = watch.wait_until_began(max(deaths.values()) + RECORD_SECONDS)
        assert {record.peer for record in last.records} == {peer.id for peer in crowd.peers}
        forgotten, covered = [], []
        for peer, died_at in deaths.items():
            late = [look for look in watch.looks if look.began_at > died_at + RECORD_SECONDS]
            assert late
            assert not any(look.names(peer) for look in late), f"{peer} is remembered"
            within = [look for look in watch.looks if died_at < look.began_at < died_at + RECORD_SECONDS]
            forgotten.append(
                min(look.ended_at for look in [*within, *late] if not look.names(peer)) - died_at
            )
            covering = [look for look in within if not look.uncovered]
            assert covering, f"blocks {within[-1].uncovered} have no server after the death of {peer}"
            covered.append(covering[0].ended_at - died_at)
        said = {
            "peers": NUM_PEERS, "blocks": NUM_BLOCKS, "deaths": NUM_DEATHS, "looks": len(watch.looks),
            "looks_without_cover": sum(bool(look.uncovered) for look in watch.looks),
            "median_forgotten_seconds": round(statistics.median(forgotten), 2),
            "worst_forgotten_seconds": round(max(forgotten), 2),
            "median_covered_seconds": round(statistics.median(covered), 2),
            "worst_covered_seconds": round(max(covered), 2),
        }  # fmt: skip
        print(json.dumps(said), flush=True)
