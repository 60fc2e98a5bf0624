"""Show the progress of a job on stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.spinner import Spinner
from rich.text import Text

from slowllm.entrypoints.cost import cost_of
from slowllm.entrypoints.job_progress import Gauge, JobProgress
from slowllm.entrypoints.live import LiveLine
from slowllm.entrypoints.notebook import NotebookBar
from slowllm.errors import counted
from slowllm.options import format_binary, format_bytes
from slowllm.planning.forecast import num_passages

if TYPE_CHECKING:
    from slowllm.planning.forecast import Forecast
    from slowllm.planning.job import Job
    from slowllm.runtime.state import State
    from slowllm.runtime.streamed_lm import StreamedLM
    from slowllm.streaming.stops import Passage

# Called with each result of a job and the number of its new tokens, for their rate.
CountResult = Callable[[int], None]
# On a terminal narrower than this the bar is short.
WIDE_COLUMNS = 110


@contextlib.contextmanager
def progress(
    lm: StreamedLM,
    job: Job,
    state: State | None = None,
    *,
    noun: str = "",
    total: int = 0,
    forecast: Forecast | None = None,
    stops_a_sweep: int | None = None,
) -> Iterator[CountResult]:
    """Print what a job takes; on a terminal or in a notebook, then show sweep, stop, results, times and rates.

    Args:
        lm: opened for the job.
        job: what the plan was made for.
        state: in which an earlier process may have left results.
        noun: what a result is, in the singular; empty where none are counted.
        total: number of results.
        forecast: of the job; by default the plan's, which is that of the job that the model was opened for.
        stops_a_sweep: that the job visits in a sweep; by default all.
    """
    from slowllm.entrypoints.slow_sweeps import SlowSweeps

    console = Console(stderr=True)
    forecast = forecast or lm.plan.forecast
    is_new = state is None or not state.num_resumed
    console.print(
        line_of(lm, job, forecast, 0 if state is None else state.num_resumed),
        style="dim",
        highlight=False,
        markup=False,
        # A line that is cut at 80 columns would be two in a log.
        soft_wrap=not console.is_terminal,
    )
    gauge = Gauge(lm, forecast.num_sweeps, stops_a_sweep)
    num_results = num_new_tokens = 0

    def facts(at: JobProgress) -> tuple[list[str], list[str]]:
        # Of one sweep, all tokens pass every stop; of several, it is known how many came out.
        is_once = job.num_passes == 1 and lm.swarm is None
        num_tokens = (job.num_tokens or 0) * at.done / at.total if is_once else num_new_tokens
        counts = [f"stop {at.stop} of {at.num_stops}" if lm.swarm is None else cost_of(lm)]
        counts += [f"{num_results:,} of {counted(total, noun)}"] if noun else []
        rates = [f"{num_tokens / at.seconds:,.0f} tokens/s"] if num_tokens and is_new else []
        rates += [f"{format_bytes(at.read_bytes / at.seconds)}/s read"] if at.read_bytes else []
        return counts, rates

    def count(num_tokens: int) -> None:
        nonlocal num_results, num_new_tokens
        num_results += 1
        num_new_tokens += num_tokens

    is_local, start = lm.swarm is None, gauge.at(0)
    slow = SlowSweeps(stops_a_sweep or lm.num_stops, forecast, _warn, lambda: lm.report.read_bytes)
    title, end = (
        (f"sweep 1 of {start.num_sweeps}", start.total) if is_local else ("in the swarm", total or None)
    )
    with _bar(title, console, end, facts(start)) as update:

        def on_passage(passage: Passage) -> None:
            at = gauge.at(passage.stop + 1)
            if not is_local:
                update(completed=num_results, total=end, facts=facts(at))
                return
            update(
                completed=at.done,
                total=at.total,
                description=f"sweep {at.sweep} of {at.num_sweeps}",
                facts=facts(at),
            )
            slow.on_passage(passage)

        with lm.watching(on_passage):
            yield count
        # A notebook keeps what was shown last.
        update(facts=facts(gauge.at(stops_a_sweep or lm.num_stops)))


def line_of(lm: StreamedLM, job: Job, forecast: Forecast, num_resumed: int = 0) -> str:
    """Return what a job takes, in words.

    Args:
        lm: opened for it.
        job: whose tokens count.
        forecast: of the job.
        num_resumed: micro-batches that an earlier process has finished.
    """
    num_sweeps = forecast.num_sweeps
    held = "all of it fits in memory"
    if lm.plan.streams:
        held = f"{lm.plan.held(len(lm.resident), lm.num_stops)} stay in memory"
    is_known = lm.plan.streams and not num_resumed and forecast.is_measured
    about = f", about {duration(forecast.seconds)}" if is_known else ""
    # Continuations may end before their last token.
    how_many = "about" if job.num_passes == 1 else "at most"
    resumed = ""
    if num_resumed:
        how_many_done = counted(num_resumed, "micro-batch was", "micro-batches were")
        resumed = f"; {how_many_done} done before"
    takes = f" in {'one sweep' if num_sweeps == 1 else f'{how_many} {num_sweeps} sweeps'}{about}"
    weights = f"{format_bytes(lm.weight_bytes)} a sweep, {held}"
    if lm.swarm is not None:
        # What a sweep of the ends reads and takes says nothing about the blocks.
        takes, weights = "", f"{format_bytes(lm.weight_bytes)} of weights here, blocks in the swarm"
    return f"{lm.name}: {weights}; {counted(job.num_tokens or 0, 'token')} with padding{takes}{resumed}"


def line_of_steps(lm: StreamedLM, job: Job, what: str, peak_bytes: int) -> str:
    """Return what a phase of tuning takes, in words.

    Args:
        lm: opened for it.
        job: of a step, or of the pass through frozen blocks.
        what: the phase is, in words.
        peak_bytes: memory of the process.
    """
    plan, forecast = lm.plan, lm.plan.forecast
    held, about = "all that is used fits in memory", ""
    of_what = "weights" if lm.swarm is None else "weights here, blocks in the swarm"
    if plan.streams:
        num_used = lm.num_stops - len(plan.unused)
        held = f"{plan.held(len(lm.resident - plan.unused), num_used)} stay in memory"
    if job.turns:
        if plan.streams and forecast.is_measured:
            later = forecast.later_seconds * max(1, forecast.num_sweeps)
            about = (
                f"; about {duration(forecast.first_seconds)} for the first step and "
                f"{duration(later)} for each later one"
            )
        line = f"steps of up to {counted(job.num_tokens or 0, 'token')}{about}"
    else:
        if plan.streams and forecast.is_measured:
            about = f", about {duration(forecast.seconds)}"
        line = f"{what}: {counted(job.num_tokens or 0, 'token')}, once{about}"
    return f"{lm.name}: {format_bytes(lm.weight_bytes)} of {of_what}, {held}; {line}; at most {format_binary(peak_bytes)} of RAM"


def _warn(sentence: str) -> None:
    print(f"slowllm: {sentence}", file=sys.stderr)


@contextlib.contextmanager
def steps(lm: StreamedLM, job: Job, what: str) -> Iterator[None]:
    """Show the stop and direction of a tuning step's sweeps, on a terminal or in a notebook; explain slow ones anywhere.

    Args:
        lm: opened for the job.
        job: of a step, or of the pass through frozen blocks.
        what: it is, in words.
    """
    from slowllm.entrypoints.slow_sweeps import SlowSweeps

    console = Console(stderr=True)
    before, started = lm.report, time.perf_counter()
    slow = SlowSweeps(num_passages(lm.sizes, job), lm.plan.forecast, _warn, lambda: lm.report.read_bytes)
    with _spinner(what, console) as update:

        def on_passage(passage: Passage) -> None:
            seconds, num_bytes = time.perf_counter() - started, lm.report.read_bytes - before.read_bytes
            if lm.swarm is not None:
                update(cost_of(lm), "", seconds)
                return
            rate = f"{format_bytes(num_bytes / seconds)}/s read" if num_bytes else ""
            update(f"stop {passage.stop + 1} of {lm.num_stops}, {passage.direction}", rate, seconds)
            slow.on_passage(passage)

        with lm.watching(on_passage):
            yield


@contextlib.contextmanager
def _spinner(what: str, console: Console) -> Iterator[Callable[[str, str, float], None]]:
    """Show that something goes on; yield a function that says where it is, at what rate, and since when."""
    if console.is_jupyter:
        with NotebookBar(duration, description=what) as bar:
            yield lambda place, rate, _: bar.update(facts=([place], [rate] if rate else []))
        return
    if not _can_move(console):
        yield lambda *_: None
        return
    spinner = Spinner("dots", text=what)
    with LiveLine(
        Live(spinner, console=console, transient=True, redirect_stdout=False, refresh_per_second=12.5)
    ) as line:

        def update(place: str, rate: str, seconds: float) -> None:
            facts = ", ".join([place, *([rate] if rate else []), f"{duration(seconds)} elapsed"])
            line.update(lambda: spinner.update(text=f"{what}: {facts}"))

        yield update


@contextlib.contextmanager
def byte_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that shows how many bytes of how many are done, on a terminal only."""
    with _bar(what, Console(stderr=True), None, ([], [])) as update:
        yield lambda done, total: update(
            completed=done, total=total, facts=([f"{format_bytes(done)} of {format_bytes(total)}"], [])
        )


@contextlib.contextmanager
def _bar(
    what: str, console: Console, total: int | None, facts: tuple[list[str], list[str]]
) -> Iterator[Callable[..., None]]:
    """Show a bar on a terminal or in a notebook; yield a function that changes the fields of its task."""
    if console.is_jupyter:
        with NotebookBar(duration, description=what, total=total, facts=facts) as notebook_bar:
            yield notebook_bar.update
        return
    if not _can_move(console):
        yield lambda **_: None
        return
    bar = Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(20 if console.width >= WIDE_COLUMNS else 8),
        _Facts(console.width - len(what) - (24 if console.width >= WIDE_COLUMNS else 12)),
        console=console,
        transient=True,
        redirect_stdout=False,
    )
    task: TaskID = bar.add_task(what, total=total, facts=facts)
    with LiveLine(bar.live) as line:
        yield lambda **fields: line.update(lambda: bar.update(task, **fields))


def _can_move(console: Console) -> bool:
    return console.is_terminal and not console.is_dumb_terminal


class _Facts(ProgressColumn):
    """Counts, elapsed and remaining time, and rates of a task: as many of them, in this order, as there is room for."""

    def __init__(self, num_columns: int) -> None:
        super().__init__()
        self._num_columns = num_columns

    def render(self, task: Task) -> Text:
        """Return the text of the column."""
        counts, rates = task.fields["facts"]
        times = [f"{duration(task.elapsed or 0.0)} elapsed"]
        times += [f"{duration(task.time_remaining)} left"] if task.time_remaining is not None else []
        shown = ""
        for fact in (*counts, *times, *rates):
            if len(longer := f"{shown}, {fact}" if shown else fact) > self._num_columns:
                break
            shown = longer
        return Text(shown, no_wrap=True, overflow="ellipsis")


def duration(seconds: float) -> str:
    """Return a time in words: ``3.2 s``, ``14 min``, ``5.1 h``."""
    for unit, length in (("s", 1), ("min", 60)):
        if seconds < 99.5 * length:
            count = seconds / length
            return f"{count:.2g} {unit}" if count < 9.95 else f"{count:.0f} {unit}"
    return f"{seconds / 3600:.1f} h"
