"""Cases of a test: all in the long form of the tests, and of those a stated few in the quick one."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from typing import Any

import pytest


def quick_and_long(names: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """Return values as parameters; those that are not in `quick` are marked as long."""
    values = list(names)
    _refuse_unknown(quick, values)
    return [pytest.param(value, marks=() if value in quick else pytest.mark.long) for value in values]


def crossed(*columns: Iterable[Any], quick: Collection[tuple[Any, ...]]) -> list[Any]:
    """Return every combination of values as parameters; those that are not in `quick` are marked as long."""
    values = list(itertools.product(*columns))
    _refuse_unknown(quick, values)
    return [
        pytest.param(*case, id="-".join(map(str, case)), marks=() if case in quick else pytest.mark.long)
        for case in values
    ]


def _refuse_unknown(quick: Collection[Any], values: Collection[Any]) -> None:
    # A misspelt case would be left out in silence.
    unknown = [case for case in quick if case not in values]
    assert not unknown, f"no cases of this test: {unknown}"
