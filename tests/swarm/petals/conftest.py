"""Models that the tests of Petals' names share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.petals import FAMILIES, Case


@pytest.fixture(scope="module", params=FAMILIES)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, Any]]:
    """A model under Petals' names, and plain transformers on the same weights."""
    with Case(request.param, tmp_path_factory.mktemp(request.param)) as case:
        yield case.model, case.plain
