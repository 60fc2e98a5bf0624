"""Show the progress of a job on stderr."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from slowllm.options import format_bytes

if TYPE_CHECKING:
    from slowllm.planning.job import Job
    from slowllm.runtime.state import State
    from slowllm.runtime.streamed_lm import StreamedLM
    from slowllm.streaming.stops import Passage


@contextlib.contextmanager
def progress(lm: StreamedLM, job: Job, state: State | None = None) -> Iterator[None]:
    """Print what a job takes; on a terminal, then show sweep, stop, rate and the expected end."""
    console = Console(stderr=True)
    plan, forecast = lm.plan, lm.plan.forecast
    num_sweeps = forecast.num_sweeps
    held = "all of it fits in memory"
    if plan.ring_bytes:
        held = f"{len(lm.resident)} of {lm.num_stops} stops stay in memory"
    is_new = state is None or not state.num_resumed
    about = f", about {duration(forecast.seconds)}" if plan.ring_bytes and is_new else ""
    # Continuations may end before their last token.
    how_many = "about" if job.num_passes == 1 else "at most"
    resumed = f"; {state.num_resumed} micro-batches were done before" if state and state.num_resumed else ""
    console.print(
        f"{lm.name}: {format_bytes(lm.weight_bytes)} a sweep, {held}; {job.num_tokens:,} tokens with padding in "
        f"{'one sweep' if num_sweeps == 1 else f'{how_many} {num_sweeps} sweeps'}{about}{resumed}",
        style="dim",
        highlight=False,
    )
    bar = _bar("{task.fields[stops]}  {task.fields[rate]}", console)
    before, started = lm.report, time.perf_counter()
    total = num_sweeps * lm.num_stops
    task = bar.add_task("sweep 1", total=total, stops=f"stop 0/{lm.num_stops}", rate="")

    def on_passage(passage: Passage) -> None:
        report = lm.report
        done = report.num_passages - before.num_passages
        num_bytes = report.read_bytes - before.read_bytes
        bar.update(
            task,
            completed=done,
            total=max(total, done),
            description=f"sweep {(done - 1) // lm.num_stops + 1}",
            stops=f"stop {passage.stop + 1}/{lm.num_stops}",
            rate=f"{format_bytes(num_bytes / (time.perf_counter() - started))}/s" if num_bytes else "",
        )

    with lm.watching(on_passage), bar:
        yield


@contextlib.contextmanager
def steps(lm: StreamedLM, what: str) -> Iterator[None]:
    """Show the stop and direction of a tuning step's sweeps, on a terminal only."""
    console = Console(stderr=True)
    before, started = lm.report, time.perf_counter()

    def on_passage(passage: Passage) -> None:
        num_bytes = lm.report.read_bytes - before.read_bytes
        rate = f", {format_bytes(num_bytes / (time.perf_counter() - started))}/s read" if num_bytes else ""
        status.update(f"{what}: stop {passage.stop + 1} of {lm.num_stops}, {passage.direction}{rate}")

    if not console.is_terminal:
        yield
        return
    with console.status(what) as status, lm.watching(on_passage):
        yield


@contextlib.contextmanager
def byte_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that shows how many bytes of how many are done, on a terminal only."""
    bar = _bar("{task.fields[size]}", Console(stderr=True))
    task = bar.add_task(what, total=None, size="")

    def show(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total, size=f"{format_bytes(done)} of {format_bytes(total)}")

    with bar:
        yield show


def _bar(fields: str, console: Console) -> Progress:
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TextColumn(fields),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def duration(seconds: float) -> str:
    """Return a time in words: ``3.2 s``, ``14 min``, ``5.1 h``."""
    for unit, length in (("s", 1), ("min", 60)):
        if seconds < 99.5 * length:
            count = seconds / length
            return f"{count:.2g} {unit}" if count < 9.95 else f"{count:.0f} {unit}"
    return f"{seconds / 3600:.1f} h"
