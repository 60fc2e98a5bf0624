"""A slow sweep is explained at its end, and each cause once."""

from __future__ import annotations

from collections.abc import Iterator

from slowllm.entrypoints.slow_sweeps import SlowSweeps
from slowllm.planning.forecast import Forecast
from slowllm.runtime.pressure import SystemTimes
from slowllm.streaming.stops import Passage

# Two stops of 10 GB each, 10 s a sweep, and 20 s the first.
MEASURED = Forecast(5, 20.0, 10.0, 60.0, 10.0, 1.0, 20 * 10**9, is_measured=True)
GUESSED = Forecast(5, 0.2, 0.1, 0.6, 0.1, 0.01, 20 * 10**9)


def said_of(forecast: Forecast, ends: list[SystemTimes], waits: float) -> list[tuple[int, str]]:
    """Let sweeps end at these moments; return what was said, each with the sweep after which it was."""
    times: Iterator[SystemTimes] = iter([SystemTimes(0.0, 0.0, 0.0), *ends])
    said: list[tuple[int, str]] = []
    number = 0
    slow = SlowSweeps(
        2, forecast, lambda sentence: said.append((number, sentence)), lambda: number * 20 * 10**9, lambda: next(times)
    )  # fmt: skip
    for number in range(1, len(ends) + 1):  # noqa: B007 (it is read by the lambdas)
        for stop in range(2):
            slow.on_passage(Passage(stop, "up", 1, waits / 2, 0.1))
    return said


def test_a_measured_forecast_says_what_to_expect() -> None:
    ends = [SystemTimes(at, 0.0, 0.0) for at in (21.0, 31.0, 51.0, 81.0)]
    ((number, sentence),) = said_of(MEASURED, ends, 15.0)
    assert number == 3
    assert sentence == (
        "the last sweep took 20 s instead of 10 s: the disk gives 1 GB/s, and gave 2 GB/s when it was measured"
    )


def test_without_one_the_sweeps_before_do() -> None:
    ends = [
        SystemTimes(at, 0.0, others) for at, others in ((50.0, 1e4), (60.0, 1e4), (70.0, 1e4), (110.0, 2e4))
    ]
    ((number, sentence),) = said_of(GUESSED, ends, 0.0)
    assert number == 4
    assert sentence.startswith("the last sweep took 40 s instead of 10 s: other processes use 250.0 of the ")


def test_each_cause_is_said_once() -> None:
    ends = [
        SystemTimes(20.0, 0.0, 0.0), SystemTimes(60.0, 30.0, 0.0), SystemTimes(100.0, 60.0, 0.0),
        SystemTimes(140.0, None, None),
    ]  # fmt: skip
    said = said_of(MEASURED, ends, 39.0)
    assert [number for number, _ in said] == [2, 4]
    assert "short of memory" in said[0][1]
    assert "the disk gives" in said[1][1]
