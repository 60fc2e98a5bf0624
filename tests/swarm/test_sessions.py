"""The sessions of a server: whose they are, how much they hold, and when they end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slowllm.errors import BusyError, LimitError, SessionError
from slowllm.swarm.sessions import Sessions


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def passed(sessions: Sessions[list[int]], peer: str, name: str, step: int, num_tokens: int) -> list[int]:
    cache = sessions.begin_step(peer, name, step, num_tokens, list).cache
    sessions.end_step(peer, name, has_failed=False)
    return cache


def test_a_session_keeps_its_cache_from_step_to_step() -> None:
    sessions: Sessions[list[int]] = Sessions(100, 60)
    first = passed(sessions, "a", "x", 0, 10)
    assert passed(sessions, "a", "x", 1, 11) is first
    assert sessions.free_tokens == 89


def test_a_session_belongs_to_its_peer() -> None:
    sessions: Sessions[list[int]] = Sessions(100, 60)
    mine = passed(sessions, "a", "x", 0, 10)
    assert passed(sessions, "b", "x", 0, 10) is not mine
    sessions.end("c", "x")
    assert len(sessions) == 2


def test_a_full_cache_says_what_is_free() -> None:
    sessions: Sessions[list[int]] = Sessions(100, 60)
    passed(sessions, "a", "x", 0, 70)
    with pytest.raises(BusyError, match="would hold 40 tokens, and 30 of 100 are free"):
        sessions.begin_step("a", "y", 0, 40, list)
    with pytest.raises(
        LimitError, match="a session of 101 tokens is larger than the 100 that this server keeps"
    ):
        sessions.begin_step("a", "x", 1, 101, list)
    passed(sessions, "a", "x", 1, 100)


def test_a_step_is_applied_once() -> None:
    sessions: Sessions[list[int]] = Sessions(100, 60)
    passed(sessions, "a", "x", 0, 10)
    with pytest.raises(SessionError, match="has had 1 passages, not 0"):
        sessions.begin_step("a", "x", 0, 10, list)
    with pytest.raises(SessionError, match="has had 1 passages, not 2"):
        sessions.begin_step("a", "x", 2, 10, list)


def test_a_session_has_one_passage_at_a_time() -> None:
    sessions: Sessions[list[int]] = Sessions(100, 60)
    sessions.begin_step("a", "x", 0, 10, list)
    with pytest.raises(SessionError, match="still under way"):
        sessions.begin_step("a", "x", 1, 10, list)


def test_a_session_ends_after_a_passage_that_failed() -> None:
    sessions: Sessions[list[int]] = Sessions(100, 60)
    sessions.begin_step("a", "x", 0, 10, list)
    sessions.end_step("a", "x", has_failed=True)
    with pytest.raises(SessionError, match="not here any more"):
        sessions.begin_step("a", "x", 1, 10, list)
    assert sessions.free_tokens == 100


def test_a_session_that_is_ended_during_a_passage_ends_after_it() -> None:
    sessions: Sessions[list[int]] = Sessions(100, 60)
    sessions.begin_step("a", "x", 0, 10, list)
    sessions.end("a", "x")
    assert len(sessions) == 1
    sessions.end_step("a", "x", has_failed=False)
    assert len(sessions) == 0


def test_idle_sessions_end_and_busy_ones_do_not() -> None:
    clock = Clock()
    sessions: Sessions[list[int]] = Sessions(100, 60, clock)
    passed(sessions, "a", "idle", 0, 10)
    sessions.begin_step("a", "busy", 0, 10, list)
    clock.now = 61.0
    assert sessions.free_tokens == 90
    assert len(sessions) == 1
    sessions.end_step("a", "busy", has_failed=False)
    clock.now = 100.0
    passed(sessions, "a", "busy", 1, 20)


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 60), st.sampled_from(["pass", "fail", "end"])),
        max_size=40,
    )
)
def test_sessions_never_hold_more_than_was_planned(events: list[tuple[str, int, str]]) -> None:
    sessions: Sessions[list[int]] = Sessions(100, 60)
    steps: dict[str, int] = {}
    held: dict[str, int] = {}
    for name, num_tokens, what in events:
        if what == "end":
            sessions.end("peer", name)
            steps.pop(name, None)
            held.pop(name, None)
            continue
        fits = sum(held.values()) - held.get(name, 0) + num_tokens <= 100
        try:
            sessions.begin_step("peer", name, steps.get(name, 0), num_tokens, list)
        except (BusyError, LimitError):
            assert not fits
            continue
        assert fits
        sessions.end_step("peer", name, has_failed=what == "fail")
        if what == "fail":
            steps.pop(name, None)
            held.pop(name, None)
        else:
            steps[name], held[name] = steps.get(name, 0) + 1, num_tokens
        assert sessions.free_tokens == 100 - sum(held.values()) >= 0


def test_the_sessions_of_a_peer_that_has_left_end_and_those_of_others_stay() -> None:
    sessions: Sessions[list[int]] = Sessions(100, 60)
    passed(sessions, "a", "x", 0, 10)
    passed(sessions, "b", "x", 0, 20)
    sessions.begin_step("a", "busy", 0, 30, list)
    sessions.end_all_of("a")
    assert sessions.free_tokens == 50
    sessions.end_step("a", "busy", has_failed=False)
    assert sessions.free_tokens == 80
