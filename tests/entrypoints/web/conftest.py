"""A desk over a small model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.memory_stops import until
from tests.support.web_page import Counter, counter


@pytest.fixture(scope="module")
def opened() -> Iterator[Counter]:
    with counter() as made:
        yield made


@pytest.fixture
def at(opened: Counter) -> Iterator[Counter]:
    """The desk, of which every test gives its seats back."""
    yield opened
    opened.gate.open()
    until(lambda: opened.service.status().held_tokens == 0)
