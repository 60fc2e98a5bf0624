"""When a server looks whether it should move, and what it does then; without a network and without waiting."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import cast

import pytest

from slowllm.errors import CheckpointError, NetworkError
from slowllm.swarm.rebalancer import Move, Rebalancer
from slowllm.swarm.rebalancing import MEAN_CHECK_SECONDS, MOST_DELAY_SECONDS
from slowllm.swarm.records import ServerRecord, State

NUM_BLOCKS = 10


def server(name: str, first: int, end: int, state: State = "online") -> ServerRecord:
    return ServerRecord(
        peer=name * 16, addresses=(), model="m", first=first, end=end, state=state, dtype="float32", version="1",
        block_hashes=("h",) * (end - first), forward_tokens_per_second=10.0,
    )  # fmt: skip


GAP = [server("b", 0, 5)]
FULL = [*GAP, server("c", 5, 10)]


class Scene:
    """A server in a swarm, whose looks are given, and what it did."""

    def __init__(
        self,
        *looks: Sequence[ServerRecord] | Exception,
        state: State = "online",
        outcome: Move | Exception = "moved",
    ) -> None:
        self.looks = list(looks)
        self.own = server("a", 0, 5, state)
        self.outcome = outcome
        self.moves: list[tuple[int, int, str]] = []
        self.waits: list[float] = []
        self.failures: list[BaseException] = []
        self.is_closed: Callable[[], bool] = lambda: False

    def find(self) -> Sequence[ServerRecord]:
        found = self.looks.pop(0)
        if isinstance(found, Exception):
            raise found
        return [self.own, *found]

    def move(self, first: int, end: int, why: str) -> Move:
        self.moves.append((first, end, why))
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        return self.is_closed()

    def rebalancer(self, allowed: Sequence[int] = range(NUM_BLOCKS)) -> Rebalancer:
        return Rebalancer(
            self.find, lambda: self.own, self.move, NUM_BLOCKS, allowed, self.failures.append, wait=self.wait
        )


def test_a_server_that_is_wanted_elsewhere_waits_looks_again_and_moves() -> None:
    scene = Scene(GAP, GAP)
    assert scene.rebalancer().look() == "moved"
    assert scene.moves == [(5, 10, "5 blocks more are served then")]
    assert len(scene.waits) == 1
    assert 0 <= scene.waits[0] <= MOST_DELAY_SECONDS


@pytest.mark.parametrize(
    "scene",
    [
        Scene(FULL), Scene(GAP, FULL), Scene(NetworkError("nobody answers")), Scene(GAP, NetworkError("nobody answers")),
        Scene(GAP, state="draining"),
    ],
    ids=["no gap", "others were first", "no swarm", "no swarm later", "it leaves"],
)  # fmt: skip
def test_a_server_stays(scene: Scene) -> None:
    assert scene.rebalancer().look() is None
    assert not scene.moves
    assert not scene.looks


def test_a_server_stays_that_is_closed_while_it_waits() -> None:
    scene = Scene(GAP)
    scene.is_closed = lambda: True
    assert scene.rebalancer().look() is None
    assert not scene.moves


def test_a_server_moves_only_to_blocks_that_are_in_its_folder() -> None:
    assert Scene(GAP).rebalancer(range(5)).look() is None


def test_a_server_that_is_in_use_tries_again_and_one_that_failed_does_not() -> None:
    scene = Scene(*[GAP] * 4, outcome="in use")
    rebalancer = scene.rebalancer()
    assert rebalancer.look() == rebalancer.look() == "in use"
    scene = Scene(*[GAP] * 3, outcome="failed")
    rebalancer = scene.rebalancer()
    assert rebalancer.look() == "failed"
    assert rebalancer.look() is None
    assert len(scene.moves) == 1


def test_the_thread_looks_once_in_a_while_until_it_is_closed(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene(NetworkError("nobody answers"), GAP, GAP, FULL)
    has_looked, may_end = threading.Event(), threading.Event()

    def is_closed() -> bool:
        if scene.looks:
            return False
        has_looked.set()
        return may_end.wait(60)

    scene.is_closed = is_closed
    with caplog.at_level(logging.INFO, "slowllm"), scene.rebalancer():
        assert has_looked.wait(60)
        may_end.set()
    assert "whether other blocks need this server is not known (nobody answers)" in caplog.text
    assert [move[:2] for move in scene.moves] == [(5, 10)]
    checks = [*scene.waits[:2], *scene.waits[3:]]
    assert all(MEAN_CHECK_SECONDS / 2 <= seconds <= MEAN_CHECK_SECONDS * 3 / 2 for seconds in checks)
    assert not scene.failures


def test_what_ends_the_thread_is_handed_on() -> None:
    scene = Scene(GAP, GAP, outcome=CheckpointError("the shard is gone"))
    with scene.rebalancer() as rebalancer:
        cast(threading.Thread, rebalancer._thread).join(60)
    assert [str(error) for error in scene.failures] == ["the shard is gone"]


def test_closing_what_was_never_opened_does_no_harm() -> None:
    Scene().rebalancer().close()
