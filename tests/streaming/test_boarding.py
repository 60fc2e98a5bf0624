"""Seats by tokens: who boards together, who waits for an empty carousel, and how far the reader is told to look."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slowllm.planning.host_plan import MAX_SWEEP_TOKENS, Plan, make_plan, widen
from slowllm.planning.job import Sizes, StopSize
from slowllm.streaming.carousel import Carousel
from slowllm.streaming.hints import Reach, reach
from slowllm.streaming.riders import Sized
from tests.support.memory_stops import MemoryStops, results_of, sweep
from tests.support.properties import num_examples

NUM_STOPS = 4


@pytest.fixture
def carousel() -> Iterator[Carousel]:
    carousel = Carousel(MemoryStops(NUM_STOPS))
    yield carousel
    carousel.close()


class Aboard:
    """Counts the tokens that are aboard at once."""

    def __init__(self, carousel: Carousel) -> None:
        self.carousel, self.held, self.most = carousel, 0, 0
        self.seen: list[set[str]] = []
        self.names: set[str] = set()

    def job(self, name: str, num_tokens: int, *, starts_load: bool = False) -> Sized:
        def ride() -> str:
            self.held += num_tokens
            self.names.add(name)
            self.most = max(self.most, self.held)
            for stop in range(NUM_STOPS):
                self.carousel.visit(stop, "up", lambda weights: None)
                self.seen.append(set(self.names))
            self.held -= num_tokens
            self.names.remove(name)
            return name

        return Sized(ride, num_tokens, starts_load)


@num_examples(60)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=12))
def test_no_more_tokens_are_aboard_than_allowed_but_for_one_alone(sizes: list[int]) -> None:
    carousel = Carousel(MemoryStops(NUM_STOPS))
    try:
        aboard = Aboard(carousel)
        jobs = [aboard.job(str(number), size) for number, size in enumerate(sizes)]
        assert results_of(carousel.stream(jobs, 64, 10)) == [str(number) for number in range(len(sizes))]
    finally:
        carousel.close()
    assert aboard.most <= max(10, *sizes)


def test_small_jobs_fill_one_sweep(carousel: Carousel) -> None:
    aboard = Aboard(carousel)
    list(carousel.stream([aboard.job(str(n), 2) for n in range(10)], 64, 20))
    assert carousel.totals.num_passages == NUM_STOPS


def test_a_load_boards_when_those_before_it_have_left(carousel: Carousel) -> None:
    aboard = Aboard(carousel)
    jobs = [
        aboard.job("a", 1), aboard.job("b", 1),
        aboard.job("c", 1, starts_load=True), aboard.job("d", 1),
    ]  # fmt: skip
    assert results_of(carousel.stream(jobs, 64, 100)) == ["a", "b", "c", "d"]
    assert carousel.totals.num_passages == 2 * NUM_STOPS
    assert not any(names & {"a", "b"} and names & {"c", "d"} for names in aboard.seen)
    assert {"c", "d"} in aboard.seen


def test_the_reader_is_not_told_of_stops_that_nobody_comes_to() -> None:
    stops = MemoryStops(NUM_STOPS)
    carousel = Carousel(stops)
    try:

        def short() -> None:
            reach.set(Reach(end=2))
            for stop in range(2):
                carousel.visit(stop, "up", lambda weights: None)

        carousel.ride([short, short])
        assert stops.expected == [[1], []]
        del stops.expected[:]
        carousel.ride([short, lambda: sweep(carousel, NUM_STOPS)])
        assert stops.expected[0] == [1, 2, 3], "one of them goes on"
    finally:
        carousel.close()


SIZES = Sizes(
    "blocks", tuple(StopSize(1 << 20, 1 << 19, 1e6) for _ in range(8)), 1 << 20, 4096, 0, 1024, 2048
)


def session(free_bytes: int) -> Plan:
    return make_plan([SIZES], free_bytes=free_bytes, total_bytes=free_bytes)


def test_a_session_carries_more_tokens_where_there_is_room() -> None:
    plan = session(1 << 33)
    wide = widen(plan, [SIZES], 1 << 33)
    assert wide.sweep_tokens == MAX_SWEEP_TOKENS > plan.sweep_tokens
    assert wide.peak_bytes - plan.peak_bytes == (wide.sweep_tokens - plan.sweep_tokens) * (1024 + 2048)


@given(st.integers(0, 64 << 20))
def test_a_widened_plan_keeps_the_budget(more: int) -> None:
    free = (320 << 20) + more
    plan = session(free)
    wide = widen(plan, [SIZES], free)
    assert plan.sweep_tokens <= wide.sweep_tokens <= MAX_SWEEP_TOKENS
    assert wide.peak_bytes <= free
