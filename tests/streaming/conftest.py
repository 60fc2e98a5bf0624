"""Carousels for tests, and a guard against tests that hang."""

from __future__ import annotations

import faulthandler
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from slowllm.streaming import boarding
from slowllm.streaming.carousel import Carousel
from slowllm.streaming.stops import Passage
from tests.support.memory_stops import Make, MemoryStops


@pytest.fixture
def hang_fails(request: pytest.FixtureRequest) -> Iterator[None]:
    """Show every thread and end the process if a test hangs."""
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        stderr = os.dup(2)
    faulthandler.dump_traceback_later(120, exit=True, file=stderr)
    yield
    faulthandler.cancel_dump_traceback_later()
    os.close(stderr)


@pytest.fixture
def make() -> Iterator[Make]:
    """Return a function that makes a carousel and its stops. At the end, no thread is left."""
    before = set(threading.enumerate())
    made: list[Carousel] = []

    def new(num_stops: int, on_passage: Callable[[Passage], None] | None = None) -> Any:
        stops = MemoryStops(num_stops)
        made.append(Carousel(stops, on_passage))
        return made[-1], stops

    yield new
    for carousel in made:
        carousel.close()
    assert set(threading.enumerate()) - before == set()


@pytest.fixture
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve guests at other stops at once."""
    monkeypatch.setattr(boarding, "GUEST_PATIENCE_SECONDS", 0.0)


@pytest.fixture
def endless_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never serve guests at other stops while a rider runs."""
    monkeypatch.setattr(boarding, "GUEST_PATIENCE_SECONDS", 1e6)
