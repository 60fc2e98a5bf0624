"""Stops come from two threads and in any number; sums count all of them, details only the last."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slowllm.entrypoints.report.timeline import Timeline
from slowllm.streaming.stops import Direction, Passage, StopRead


def told(timeline: Timeline, stops: list[int], direction: Direction = "up", start: float = 0.0) -> float:
    for stop in stops:
        timeline.on_passage(Passage(stop, direction, 1, 0.25, 0.5, start))
        start += 1.0
    return start


@given(st.integers(1, 5), st.integers(1, 8))
def test_sums_count_every_stop_and_details_the_last(num_sweeps: int, num_detailed: int) -> None:
    timeline, now = Timeline(3, num_detailed), 0.0
    for _ in range(num_sweeps):
        now = told(timeline, [0, 1, 2], start=now)
    timeline.finish()
    assert timeline.num_passages == 3 * num_sweeps
    assert timeline.num_sweeps == num_sweeps
    assert [stop.num_passages for stop in timeline.stops] == [num_sweeps] * 3
    assert timeline.stops[1].wait_seconds == 0.25 * num_sweeps
    assert len(timeline.passages) == min(num_detailed, 3 * num_sweeps)
    # The last sweep ends with its last stop; those before it when the next begins.
    assert timeline.sweep_seconds.points()[1] == [3.0] * (num_sweeps - 1) + [2.75]


def test_a_sweep_ends_where_the_carousel_turns() -> None:
    timeline = Timeline(3)
    now = told(timeline, [0, 1, 2])
    now = told(timeline, [1, 0], "down", now)
    told(timeline, [0, 1], "up", now)
    timeline.finish()
    assert timeline.num_sweeps == 3
    assert timeline.sweep_seconds.points() == ([1.0, 2.0, 3.0], [3.0, 2.0, 1.75])


def test_new_tokens_belong_to_the_sweep_before_them() -> None:
    timeline = Timeline(2)
    now = told(timeline, [0, 1])
    timeline.on_tokens(3)
    told(timeline, [0, 1], start=now)
    timeline.on_tokens(1)
    timeline.on_tokens(1)
    timeline.finish()
    assert timeline.sweep_tokens.points()[1] == [3.0, 2.0]
    assert timeline.num_new_tokens == 5


def test_reads_are_summed_for_their_stop() -> None:
    timeline = Timeline(2, num_detailed=1)
    timeline.on_read(StopRead(1, 2.0, 2.5, 100))
    timeline.on_read(StopRead(1, 3.0, 4.0, 50))
    sums = timeline.stops[1]
    assert (sums.num_reads, sums.read_seconds, sums.read_bytes) == (2, pytest.approx(1.5), 150)
    assert [read.read_bytes for read in timeline.reads] == [50]


def test_stops_that_are_told_late_begin_no_sweep() -> None:
    timeline = Timeline(3)
    for stop, began_at in ((0, 0.0), (1, 1.0), (2, 2.0), (1, 1.5), (0, 3.0), (1, 4.0), (2, 5.0)):
        timeline.on_passage(Passage(stop, "up", 1, 0.25, 0.5, began_at))
    timeline.finish()
    assert (timeline.num_sweeps, timeline.num_passages) == (2, 7)
    assert timeline.sweep_seconds.points()[1] == [3.0, 2.75]


def test_a_stop_that_is_told_after_its_results_is_waited_for() -> None:
    timeline, asked = Timeline(1), threading.Event()

    def tell() -> None:
        asked.wait()
        timeline.on_passage(Passage(0, "up", 1, 0.25, 0.5, 0.0))

    thread = threading.Thread(target=tell)
    thread.start()
    asked.set()
    timeline.wait_for(1)
    assert timeline.num_passages == 1
    thread.join()


def test_a_run_without_a_stop_has_no_sweep() -> None:
    timeline = Timeline(2)
    timeline.finish()
    assert (timeline.num_sweeps, timeline.sweep_seconds.points()) == (0, ([], []))
