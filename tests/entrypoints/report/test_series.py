"""Sums in bounded memory: nothing is lost but detail, whatever comes and however much of it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slowllm.entrypoints.report.series import Calibration, Histogram, Series, equal_edges

numbers = st.floats(-1e6, 1e6)


@given(st.lists(numbers, max_size=300), st.integers(2, 9))
def test_a_curve_is_bounded_and_keeps_its_mean(values: list[float], max_points: int) -> None:
    series = Series(max_points)
    for place, value in enumerate(values):
        series.add(place, value)
    places, means = series.points()
    assert len(means) <= max_points
    assert series.num_values == len(values)
    assert places == sorted(places)
    if len(values) <= max_points:
        assert means == values
    # All points but the last stand for as many values.
    counts = [series.stride] * (len(means) - 1) + [len(values) - series.stride * (len(means) - 1)]
    if values:
        total = math.fsum(mean * count for mean, count in zip(means, counts, strict=True))
        assert total == pytest.approx(math.fsum(values), abs=1e-3)


def test_what_is_no_number_is_left_out_of_a_curve() -> None:
    series = Series()
    for value in (1.0, math.nan, math.inf, 3.0):
        series.add(0, value)
    assert series.points() == ([0.0, 0.0], [1.0, 3.0])


@given(st.lists(st.floats(allow_nan=False), max_size=100), st.integers(1, 30))
def test_every_value_is_in_one_bin(values: list[float], num_bins: int) -> None:
    found = Histogram(equal_edges(0.0, 20.0, num_bins))
    for value in values:
        found.add(value)
    assert sum(found.counts) == len(values)
    assert (found.edges[0], found.edges[-1], len(found.edges)) == (0.0, 20.0, num_bins + 1)
    if num_bins > 1:
        assert found.counts[-1] == sum(value >= found.edges[-2] for value in values)


def test_a_lower_edge_belongs_to_its_bin_and_no_number_to_none() -> None:
    found = Histogram([0.0, 1.0, 2.0])
    for value in (0.0, 1.0, 2.0, -5.0, 7.0, math.nan):
        found.add(value)
    assert found.counts == [2, 3]


def test_the_calibration_error_is_that_of_a_worked_example() -> None:
    found = Calibration(num_bins=10)
    # Three at 0.95 of which one is right; two at 0.55, both right.
    for confidence, is_correct in ((0.95, True), (0.95, False), (0.95, False), (0.55, True), (0.55, True)):
        found.add(confidence, is_correct)
    assert found.expected_error == pytest.approx(3 / 5 * (0.95 - 1 / 3) + 2 / 5 * (1 - 0.55))
    assert [one.num_answers for one in found.bins] == [0, 0, 0, 0, 0, 2, 0, 0, 0, 3]


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=100))
def test_the_calibration_error_is_a_share(answers: list[tuple[float, bool]]) -> None:
    found = Calibration()
    for confidence, is_correct in answers:
        found.add(confidence, is_correct)
    assert found.num_answers == len(answers)
    assert 0.0 <= found.expected_error <= 1.0
    for index, one in enumerate(found.bins):
        if one.num_answers:
            assert index / 10 - 1e-9 <= one.confidence <= (index + 1) / 10 + 1e-9


def test_answers_without_a_probability_are_left_out() -> None:
    found = Calibration()
    found.add(math.nan, True)
    found.add(1.0, True)
    assert (found.num_answers, found.expected_error) == (1, 0.0)
