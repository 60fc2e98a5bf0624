"""One peer may use all of a cache while nobody else wants it, and a share from then on."""

from __future__ import annotations

import pytest

from slowllm.errors import BusyError
from slowllm.swarm.quotas import PeerQuotas, RequestQuota
from slowllm.swarm.sessions import Sessions


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def sessions(clock: Clock, **quotas: int) -> Sessions[list[int]]:
    return Sessions(100, 60.0, clock, PeerQuotas(**quotas))


def step(held: Sessions[list[int]], peer: str, name: str, number: int, tokens: int) -> None:
    held.begin_step(peer, name, number, tokens, list)
    held.end_step(peer, name, has_failed=False)


def test_one_peer_alone_may_hold_all() -> None:
    held = sessions(Clock())
    step(held, "a", "x", 0, 60)
    step(held, "a", "y", 0, 40)
    assert held.free_tokens == 0


def test_who_holds_more_than_the_share_does_not_grow_once_another_was_refused() -> None:
    clock = Clock()
    held = sessions(clock)
    step(held, "a", "x", 0, 95)
    with pytest.raises(BusyError, match="the server's cache is full"):
        step(held, "b", "z", 0, 10)
    with pytest.raises(
        BusyError, match="would hold 96 tokens here, and while others want room no more than 50 of 100"
    ):
        step(held, "a", "x", 1, 96)
    # It goes on elsewhere, and there is room for both.
    held.end("a", "x")
    step(held, "b", "z", 0, 10)
    with pytest.raises(BusyError, match="would hold 51 tokens"):
        step(held, "a", "x", 0, 51)
    step(held, "a", "x", 0, 50)
    # When the other one has left and has not asked for long, all may be held again.
    held.end("b", "z")
    clock.seconds = 59.0
    with pytest.raises(BusyError, match="would hold 60 tokens"):
        step(held, "a", "x", 1, 60)
    step(held, "a", "x", 1, 50)
    clock.seconds = 60.0
    step(held, "a", "x", 2, 60)


def test_sessions_of_one_peer_are_counted() -> None:
    held = sessions(Clock(), sessions=2)
    for name in "xy":
        step(held, "a", name, 0, 1)
    with pytest.raises(BusyError, match="2 sessions open here, and no more than 2 may be; end some"):
        step(held, "a", "z", 0, 1)
    step(held, "a", "x", 1, 2)
    step(held, "b", "z", 0, 1)


def test_requests_of_one_peer_are_counted() -> None:
    quota = RequestQuota(2)
    quota.begin("a")
    quota.begin("a")
    with pytest.raises(BusyError, match="2 requests of this peer are under way here, and no more than 2"):
        quota.begin("a")
    quota.begin("b")
    quota.end("a")
    quota.begin("a")
