"""HTML of results: what is written in it is escaped, and it needs nothing but the page that it stands on."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slowllm import html

EVIL = '<script>alert("&")</script>'


@pytest.mark.parametrize(
    "made",
    [
        html.surprisal_html([EVIL], [-1.0]), html.text_html(EVIL), html.table_html([], [EVIL]),
        html.facts_html(EVIL, [(EVIL, EVIL)]), html.line_html([1.0, 2.0], EVIL), html.visible(EVIL),
    ],
)  # fmt: skip
def test_what_comes_from_outside_is_escaped(made: str) -> None:
    assert "<script" not in made
    assert "&lt;script&gt;alert(&quot;&amp;&quot;)" in made


@given(st.floats(max_value=0.0, allow_nan=False), st.floats(max_value=0.0, allow_nan=False))
def test_the_less_likely_token_is_never_paler(one: float, other: float) -> None:
    low, high = (html.surprisal_style(log_prob) for log_prob in (min(one, other), max(one, other)))
    assert alpha(low) >= alpha(high)


def alpha(style: str) -> float:
    found = re.fullmatch(r"background-color: rgba\(224, 80, 32, ([\d.]+)\)", style)
    assert found is not None
    return float(found[1])


def test_certain_tokens_have_no_colour_and_impossible_ones_the_full_one() -> None:
    assert alpha(html.surprisal_style(0.0)) == 0.0
    assert alpha(html.surprisal_style(-html.FULL_NATS)) == 0.8
    assert alpha(html.surprisal_style(-math.inf)) == alpha(html.surprisal_style(math.nan)) == 0.8


def test_a_curve_needs_two_finite_numbers() -> None:
    assert html.line_html([1.0, math.nan], "loss") == ""
    assert html.line_html([2.0, 2.0], "loss").count("46.0") == 2
    assert 'points="2.0,46.0 120.0,24.0 238.0,2.0"' in html.line_html([1.0, 2.0, 3.0], "loss")


def test_a_share_beyond_its_range_fills_the_bar() -> None:
    assert 'value="1.0000"' in html.progress_html(1.5)
    assert 'value="0.0000"' in html.progress_html(-1.0)


def test_a_line_break_can_be_seen_and_a_token_without_text_too() -> None:
    assert html.visible("\n") == "&crarr;\n"
    assert html.visible("") == "&middot;"
