"""Which stops the carousel expects next, so that those are read ahead."""

from __future__ import annotations

import contextlib
import functools
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slowllm.streaming.call_context import call_context
from slowllm.streaming.carousel import Carousel
from slowllm.streaming.hints import Reach, expected_stops
from slowllm.streaming.stops import Direction
from tests.support.memory_stops import Make, MemoryStops, number, sweep
from tests.support.properties import num_examples

pytestmark = pytest.mark.usefixtures("hang_fails")

NUM_STOPS = 7


# The function


@dataclass
class Hints:
    """A visit that waits."""

    stop: int
    direction: Direction = "up"
    comes_back: bool = False
    comes_round: bool = False
    reach: Reach = field(default_factory=Reach)


stop_numbers, directions = st.integers(0, NUM_STOPS - 1), st.sampled_from(["up", "down"])
counts = st.none() | st.integers(1, NUM_STOPS)
reaches = st.builds(Reach, stop_numbers, counts, counts, st.booleans())
visits = st.builds(Hints, stop_numbers, directions, st.booleans(), st.booleans(), reaches)
forward_visits = st.builds(Hints, stop_numbers, reach=reaches)
# Places of a carousel, and what waits for it.
places = st.tuples(stop_numbers, directions, st.lists(visits, max_size=5), st.booleans())


@num_examples(200)
@given(place=places, seed=st.integers(0, 99))
def test_expected_stops_are_stops_each_once_whatever_the_order_of_visits(
    place: tuple[int, Direction, list[Hints], bool], seed: int
) -> None:
    stop, direction, waiting, has_jobs = place
    expected = expected_stops(stop, direction, NUM_STOPS, waiting, has_jobs=has_jobs)
    assert len(set(expected)) == len(expected)
    assert set(expected) <= set(range(NUM_STOPS))
    shuffled = random.Random(seed).sample(waiting, len(waiting))
    assert expected_stops(stop, direction, NUM_STOPS, shuffled, has_jobs=has_jobs) == expected


@num_examples(200)
@given(place=places)
def test_no_stop_is_expected_that_is_beyond_every_reach(
    place: tuple[int, Direction, list[Hints], bool],
) -> None:
    stop, direction, waiting, has_jobs = place
    expected = expected_stops(stop, direction, NUM_STOPS, waiting, has_jobs=has_jobs)
    highest = [count or NUM_STOPS for visit in waiting for count in (visit.reach.end, visit.reach.turn)]
    assert all(other < max([stop, *(highest or [NUM_STOPS])]) for other in expected)
    assert all(
        other >= min((visit.reach.first for visit in waiting), default=0)
        for other in expected
        if other < stop
    )


@num_examples(100)
@given(stop=stop_numbers, waiting=st.lists(forward_visits, min_size=1, max_size=5))
def test_one_sweep_up_is_expected_to_its_end_and_round_only_to_a_visit_below(
    stop: int, waiting: list[Hints]
) -> None:
    first = min(visit.reach.first for visit in waiting)
    end = max(visit.reach.end or NUM_STOPS for visit in waiting)
    below = list(range(first, stop)) if any(visit.stop < stop for visit in waiting) else []
    onward = list(range(stop + 1, end))
    assert expected_stops(stop, "up", NUM_STOPS, waiting, has_jobs=False) == onward + below
    assert expected_stops(stop, "up", NUM_STOPS, waiting, has_jobs=True) == onward + list(range(first, stop))
    waiting[0].comes_round = True
    assert expected_stops(stop, "up", NUM_STOPS, waiting, has_jobs=False) == onward + list(range(first, stop))


@pytest.mark.parametrize("stop", range(NUM_STOPS))
def test_a_pass_up_and_down_is_expected_to_its_end_and_back(stop: int) -> None:
    def expected(direction: Direction, **hints: int | bool) -> list[int]:
        visit = Hints(stop, direction, comes_back=direction == "up", reach=Reach(**hints))  # type: ignore[arg-type]
        return expected_stops(stop, direction, NUM_STOPS, [visit], has_jobs=False)

    up, below = list(range(stop + 1, NUM_STOPS)), list(reversed(range(stop)))
    # The way back passes this stop again; of those that it has passed on the way up, it is read only once.
    assert expected("up") == [*up, stop, *below]
    assert expected("up", turn=stop) == [*up, *below]
    assert expected("up", first=stop) == [*up, stop]
    assert expected("down", again=False) == below
    assert expected("down") == [*below, *(other for other in range(NUM_STOPS) if other not in below)]


def test_the_way_down_is_expected_where_a_visit_waits_for_it() -> None:
    waiting = [Hints(3, "up"), Hints(1, "down")]
    assert expected_stops(3, "up", NUM_STOPS, waiting, has_jobs=False) == [4, 5, 6, 3, 2, 1, 0]


# What a carousel says to its stops


def test_stops_are_expected_upwards_and_no_further_at_the_end_of_the_jobs(make: Make) -> None:
    carousel, stops = make(4)
    carousel.ride([lambda: sweep(carousel, 4)] * 2)
    assert stops.expected == [[1, 2, 3], [2, 3], [3], []]


def test_after_a_first_wrap_another_is_expected(make: Make) -> None:
    carousel, stops = make(4)
    carousel.ride([lambda: [sweep(carousel, 4) for _ in range(2)]])
    assert stops.expected == [[1, 2, 3], [2, 3], [3], [], [1, 2, 3], [2, 3, 0], [3, 0, 1], [0, 1, 2]]


def test_while_jobs_are_left_another_sweep_is_expected(make: Make) -> None:
    carousel, stops = make(3)
    carousel.ride([lambda: sweep(carousel, 3)] * 2, max_riders=1)
    assert stops.expected == [[1, 2], [2, 0], [0, 1], [1, 2], [2], []]


def test_whoever_waits_behind_is_expected(make: Make) -> None:
    carousel, stops = make(3)

    def job() -> None:
        carousel.visit(2, "up", number)
        carousel.visit(1, "up", number)

    carousel.ride([job, lambda: sweep(carousel, 3)])
    # At 0 nobody comes round yet. At 2 the second rider has still to pass, and the first is known to go on at 1.
    assert stops.visited == [0, 1, 2, 1]
    assert stops.expected[:3] == [[1, 2], [2], []]


def test_a_backward_pass_is_expected_before_it_begins(make: Make) -> None:
    carousel, stops = make(3)
    carousel.ride([lambda: sweep(carousel, 3, back=True)] * 2)
    assert stops.visited == [0, 1, 2, 1, 0]
    assert stops.expected == [[1, 2, 0], [2, 1, 0], [2, 1, 0], [0, 1, 2], [0, 1, 2]]


def test_stops_that_nobody_comes_to_are_not_expected(make: Make) -> None:
    carousel, stops = make(4)

    def short() -> None:
        with call_context(reach=Reach(end=2)):
            sweep(carousel, 2)

    carousel.ride([short, short])
    assert stops.expected == [[1], []]
    del stops.expected[:]
    carousel.ride([short, lambda: sweep(carousel, 4)])
    assert stops.expected[0] == [1, 2, 3], "one of them goes on"


@num_examples(50)
@given(sweeps=st.lists(st.tuples(st.integers(1, NUM_STOPS), st.booleans()), min_size=1, max_size=5))
def test_where_riders_say_how_far_they_go_the_next_stop_was_expected(sweeps: list[tuple[int, bool]]) -> None:
    stops = MemoryStops(NUM_STOPS)
    deepest = max(depth for depth, _ in sweeps)

    def job(depth: int, back: bool) -> None:
        with call_context(reach=Reach(end=depth, again=False)):
            sweep(carousel, depth, back=back)

    with contextlib.closing(Carousel(stops)) as carousel:
        carousel.ride([functools.partial(job, *each) for each in sweeps])
    assert all(after in expected for after, expected in zip(stops.visited[1:], stops.expected, strict=False))
    assert all(stop < deepest for expected in stops.expected for stop in expected)
