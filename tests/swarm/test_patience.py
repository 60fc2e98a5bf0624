"""Every number by which a client is told how long to wait is checked before anything is joined."""

from __future__ import annotations

import math
from typing import Any

import pytest

from slowllm.errors import InputError
from slowllm.swarm.client import SwarmOptions
from slowllm.swarm.patience import MOST_SECONDS, Patience

WORD = "0123456789abcdef" * 2
NO_TIMES = ("x", None, True, math.nan, -1, 1e300, 1j)


@pytest.mark.parametrize("value", [*NO_TIMES, 0, math.inf], ids=repr)
@pytest.mark.parametrize("name", ["timeout", "step_timeout"])
def test_what_is_no_timeout_of_a_client_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(
        InputError, match=f"^{name}=.* is no time that can be used; give seconds, more than 0"
    ):
        SwarmOptions((), **{name: value})


@pytest.mark.parametrize("value", ["x", None, True, math.nan, -0.1, 1.1, math.inf], ids=repr)
def test_what_is_no_share_of_the_calls_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match=r"^spot_check=.* is no share; give a number from 0 to 1"):
        SwarmOptions((), spot_check=value)


@pytest.mark.parametrize("value", [*NO_TIMES, 0, math.inf], ids=repr)
@pytest.mark.parametrize("name", [name for name in Patience.__annotations__ if name.endswith("seconds")])
def test_what_is_no_time_of_a_clients_patience_is_refused_by_name(name: str, value: Any) -> None:
    allowed = (value == 0 and name in ("ban_seconds", "min_wait_seconds", "max_wait_seconds")) or (
        value == math.inf and name == "request_seconds"
    )
    if allowed:
        assert getattr(Patience(**{name: value}), name) == value
        return
    with pytest.raises(InputError, match=f"^{name}=.* is no time that can be used"):
        Patience(**{name: value})


def test_other_fields_of_a_clients_patience_are_checked_too() -> None:
    for attempts in (0, "x", 1.5, True, math.nan):
        with pytest.raises(InputError, match=r"^max_attempts=.* is no number of attempts; give 1 or more"):
            Patience(max_attempts=attempts)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^shown_routes='some' is unknown; use 'all', 'inference', 'none'"):
        Patience(shown_routes="some")  # type: ignore[arg-type]
    assert Patience(ban_seconds=MOST_SECONDS, max_attempts=1).seconds_banned(1, is_well=False) == 300


@pytest.mark.parametrize("word", ["abc", WORD[1:], WORD + "0", "g" * 32, " " * 32, 7, None])
def test_what_is_no_word_for_weights_is_refused(word: Any) -> None:
    with pytest.raises(InputError, match=r"^weights '.*' is no word of 32 hexadecimal digits"):
        SwarmOptions((), weights=word)


def test_a_word_for_weights_may_be_in_upper_case() -> None:
    assert SwarmOptions((), weights=WORD.upper()) == SwarmOptions((), weights=WORD)
    assert SwarmOptions(()).weights == ""
