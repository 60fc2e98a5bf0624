"""How long servers that failed are left alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from slowllm.errors import BusyError, PeerLostError, SessionError, SlowLLMError
from slowllm.swarm import failures as failures_module
from slowllm.swarm.failures import Failures
from slowllm.swarm.patience import Patience


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(failures_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_all_calls_that_were_at_a_server_when_it_died_are_one_failure(clock: list[float]) -> None:
    failures, lost = Failures(str, 60.0, Patience(ban_seconds=5.0)), PeerLostError("a", "is gone")
    assert [failures.note("a", lost).until for _ in range(8)] == [105.0] * 8
    clock[0] = 104.0
    assert failures.note("a", lost).until == 109.0
    clock[0] = 110.0  # it was asked again, and failed again
    assert [failures.note("a", lost).until for _ in range(8)] == [120.0] * 8


def test_a_server_that_was_lost_is_left_alone_for_its_time_and_one_that_works_is_not(
    clock: list[float],
) -> None:
    failures = Failures(str, 60.0, Patience(ban_seconds=5.0))
    assert not failures.is_left_alone("a")
    failures.note("a", PeerLostError("a", "is gone"))
    assert failures.is_left_alone("a")
    clock[0] = 105.0
    assert not failures.is_left_alone("a")
    for error in (BusyError("is full"), SessionError("is not here")):
        failures.note("b", error)
        assert not failures.is_left_alone("b")


def test_a_server_that_was_busy_and_fails_then_is_left_alone_as_after_any_failure(clock: list[float]) -> None:
    failures = Failures(str, 60.0, Patience(ban_seconds=5.0))
    errors: list[SlowLLMError] = [BusyError("is full"), PeerLostError("a", "is gone"), BusyError("is full")]
    assert [failures.note("a", error).until for error in errors] == [101.0, 105.0, 101.0]
    failures.forget("a")
    assert failures.note("a", errors[1]).until == 105.0
