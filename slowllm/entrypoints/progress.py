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
from slowllm.entrypoints.live import LiveLine
from slowllm.errors import counted
from slowllm.options import format_bytes

if TYPE_CHECKING:
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
    lm: StreamedLM, job: Job, state: State | None = None, *, noun: str = "", total: int = 0
) -> Iterator[CountResult]:
    """Print what a job takes; on a terminal, then show sweep, stop, results, times and rates.

    Args:
        lm: opened for the job.
        job: what the plan was made for.
        state: in which an earlier process may have left results.
        noun: what a result is, in the singular; empty where none are counted.
        total: number of results.
    """
    from slowllm.entrypoints.slow_sweeps import SlowSweeps

    console = Console(stderr=True)
    plan, forecast = lm.plan, lm.plan.forecast
    num_sweeps = forecast.num_sweeps
    held = "all of it fits in memory"
    if plan.ring_bytes:
        held = f"{len(lm.resident)} of {counted(lm.num_stops, 'stop')} stay in memory"
    is_new = state is None or not state.num_resumed
    is_known = plan.ring_bytes and is_new and forecast.is_measured
    about = f", about {duration(forecast.seconds)}" if is_known else ""
    # Continuations may end before their last token.
    how_many = "about" if job.num_passes == 1 else "at most"
    resumed = ""
    if state is not None and state.num_resumed:
        how_many_done = counted(state.num_resumed, "micro-batch was", "micro-batches were")
        resumed = f"; {how_many_done} done before"
    takes = f" in {'one sweep' if num_sweeps == 1 else f'{how_many} {num_sweeps} sweeps'}{about}"
    weights = f"{format_bytes(lm.weight_bytes)} a sweep, {held}"
    if lm.swarm is not None:
        # What a sweep of the ends reads and takes says nothing about the blocks.
        takes, weights = "", f"{format_bytes(lm.weight_bytes)} of weights here, blocks in the swarm"
    console.print(
        f"{lm.name}: {weights}; {counted(job.num_tokens or 0, 'token')} with padding{takes}{resumed}",
        style="dim",
        highlight=False,
        # A line that is cut at 80 columns would be two in a log.
        soft_wrap=not console.is_terminal,
    )
    before, started = lm.report, time.perf_counter()
    num_results = num_new_tokens = 0
    num_planned = num_sweeps * lm.num_stops

    def facts(done: int, stop: int) -> tuple[list[str], list[str]]:
        seconds, num_bytes = time.perf_counter() - started, lm.report.read_bytes - before.read_bytes
        # Of one sweep, all tokens pass every stop; of several, it is known how many came out.
        is_once = job.num_passes == 1 and lm.swarm is None
        num_tokens = (job.num_tokens or 0) * done / num_planned if is_once else num_new_tokens
        counts = [f"stop {stop} of {lm.num_stops}" if lm.swarm is None else cost_of(lm)]
        counts += [f"{num_results:,} of {counted(total, noun)}"] if noun else []
        rates = [f"{num_tokens / seconds:,.0f} tokens/s"] if num_tokens and is_new else []
        rates += [f"{format_bytes(num_bytes / seconds)}/s read"] if num_bytes else []
        return counts, rates

    def count(num_tokens: int) -> None:
        nonlocal num_results, num_new_tokens
        num_results += 1
        num_new_tokens += num_tokens

    is_local = lm.swarm is None
    slow = SlowSweeps(lm.num_stops, forecast, _warn, lambda: lm.report.read_bytes)
    title, end = (f"sweep 1 of {num_sweeps}", num_planned) if is_local else ("in the swarm", total or None)
    with _bar(title, console, end, facts(0, 0)) as update:

        def on_passage(passage: Passage) -> None:
            done = lm.report.num_passages - before.num_passages
            if not is_local:
                update(completed=num_results, total=end, facts=facts(done, passage.stop + 1))
                return
            update(
                completed=done,
                total=max(num_planned, done),
                description=f"sweep {(done - 1) // lm.num_stops + 1} of {max(num_sweeps, (done - 1) // lm.num_stops + 1)}",
                facts=facts(done, passage.stop + 1),
            )
            slow.on_passage(passage)

        with lm.watching(on_passage):
            yield count


def _warn(sentence: str) -> None:
    print(f"slowllm: {sentence}", file=sys.stderr)


@contextlib.contextmanager
def steps(lm: StreamedLM, what: str) -> Iterator[None]:
    """Show the stop and direction of a tuning step's sweeps, on a terminal only."""
    console = Console(stderr=True)
    before, started = lm.report, time.perf_counter()
    if not _can_move(console):
        yield
        return
    spinner = Spinner("dots", text=what)
    with LiveLine(
        Live(spinner, console=console, transient=True, redirect_stdout=False, refresh_per_second=12.5)
    ) as line:

        def on_passage(passage: Passage) -> None:
            seconds, num_bytes = time.perf_counter() - started, lm.report.read_bytes - before.read_bytes
            rate = f", {format_bytes(num_bytes / seconds)}/s read" if num_bytes else ""
            place = f"stop {passage.stop + 1} of {lm.num_stops}, {passage.direction}{rate}"
            if lm.swarm is not None:
                place = cost_of(lm)
            text = f"{what}: {place}, {duration(seconds)} elapsed"
            line.update(lambda: spinner.update(text=text))

        with lm.watching(on_passage):
            yield


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
    """Show a bar on a terminal; yield a function that changes the fields of its task."""
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
