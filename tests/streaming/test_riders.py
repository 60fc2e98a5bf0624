"""Where the carousel goes next."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slowllm.streaming.riders import Course, Visit
from slowllm.streaming.stops import Direction
from tests.support.memory_stops import number
from tests.support.properties import num_examples

pytestmark = pytest.mark.usefixtures("hang_fails")


waiting = st.lists(
    st.tuples(st.integers(0, 5), st.sampled_from(["up", "down"])), min_size=1, max_size=8, unique=True
)


@num_examples(200)
@given(waiting=waiting, start=st.integers(0, 5), up=st.booleans(), loops=st.booleans())
def test_a_course_reaches_everybody_who_waits(
    waiting: list[tuple[int, Direction]], start: int, up: bool, loops: bool
) -> None:
    # One visitor may come back to its stop at once, for ever; the others are reached within a sweep up and down.
    course = Course()
    course.stop, course.direction = start, "up" if up else "down"
    visits = [Visit(stop, direction, number, None) for stop, direction in waiting]
    for index, visit in enumerate(visits):
        visit.key = (visit.stop, visit.direction, index)
    left = list(visits)
    for _ in range(24):
        course.move(left)
        here = [visit for visit in course.due(left) if visit.stop == course.stop]
        assert here, "the carousel goes where somebody is due"
        course.passed.update(visit.key for visit in here)
        left = [visit for visit in left if visit not in here or (loops and visit is visits[0])]
        if set(left) <= {visits[0]}:
            break
    assert set(left) <= {visits[0]}


@pytest.mark.parametrize(
    ("at", "waiting", "goes_to"),
    [
        ((-1, "up"), [(2, "up"), (0, "up"), (5, "up")], (0, "up")),
        ((2, "up"), [(5, "up"), (3, "up"), (1, "up")], (3, "up")),  # the nearest onward
        ((2, "up"), [(2, "down"), (3, "up")], (2, "up")),  # a visit here comes first
        ((2, "up"), [(4, "down"), (1, "up")], (4, "up")),
        ((5, "up"), [(1, "up"), (3, "up")], (1, "up")),  # round to the start
        ((5, "up"), [(1, "up"), (3, "down")], (3, "down")),  # down where a backward pass waits
        ((5, "down"), [(1, "down"), (3, "up")], (3, "down")),
        ((0, "down"), [(2, "up"), (4, "down")], (2, "up")),
    ],
)
def test_a_course_goes_onward_then_down_or_round(
    at: tuple[int, Direction], waiting: list[tuple[int, Direction]], goes_to: tuple[int, Direction]
) -> None:
    course = Course()
    course.stop, course.direction = at
    course.move([Visit(stop, direction, number, None) for stop, direction in waiting])
    assert (course.stop, course.direction) == goes_to
