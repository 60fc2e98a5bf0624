"""What a person sees: scores as a table or JSON lines, the carousel's progress, and a summary.

Results go to stdout or a file, all else to stderr.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from slowllm.errors import InputError
from slowllm.inference.lines import Score, Totals
from slowllm.inference.scoring import safe_exp
from slowllm.options import format_binary, format_bytes
from slowllm.planning.forecast import Forecast, Job
from slowllm.runtime.state import State
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.runtime.survey import Survey
from slowllm.streaming.stops import Passage

Write = Callable[[Score], None]


@contextlib.contextmanager
def writer(lm: StreamedLM, out: Path | None, *, as_json: bool, per_token: bool) -> Iterator[Write]:
    """Yield a function that writes one score: to a file, as JSON lines to stdout, or as a row of a table.

    A table is for a terminal; what is piped gets JSON lines, see `json_writer`.
    """
    if out is None and not as_json and sys.stdout.isatty():
        with _table(lm, per_token) as write:
            yield write
        return
    with json_writer(out) as write_row:
        yield lambda score: write_row(_row(lm, score, per_token))


@contextlib.contextmanager
def json_writer(out: Path | None) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yield a function that writes one row as a JSON line: to a file, or to stdout.

    A file appears under its name only when it is complete; until then, and after an interrupt, its whole lines are
    in a file of that name with ``.part`` added.

    Raises:
        InputError: the file or stdout cannot be written.
    """
    partial = out.with_name(out.name + ".part") if out is not None else None
    num_good_bytes = 0
    try:
        with contextlib.ExitStack() as stack:
            file: IO[str] = sys.stdout
            if partial is not None:
                file = stack.enter_context(_open_alone(partial))
            elif isinstance(file, io.TextIOWrapper):
                file.reconfigure(encoding="utf-8")  # JSON lines are UTF-8 whatever the terminal speaks

            def write_line(row: Mapping[str, Any]) -> None:
                nonlocal num_good_bytes
                line = json.dumps(row, ensure_ascii=False) + "\n"
                file.write(line)
                file.flush()
                num_good_bytes += len(line.encode())

            yield write_line
        if partial is not None and out is not None:
            os.replace(partial, out)
    except BrokenPipeError:
        raise
    except OSError as error:
        where = "standard output"
        if partial is not None:
            where = str(out)
            with contextlib.suppress(OSError):  # the line that did not fit; the ones before it are whole
                os.truncate(partial, num_good_bytes)
        else:
            # Python would try once more to write what is in its buffer, and end with 120.
            with open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), sys.stdout.fileno())
        raise InputError(
            f"{where}: {error.strerror or error}"
            + (f"; the lines written so far are in {partial.name}" if num_good_bytes and partial else "")
        ) from error
    except KeyboardInterrupt:
        if partial is not None:
            print(f"slowllm: interrupted; the lines done so far are in {partial}", file=sys.stderr)
        raise


def _open_alone(path: Path) -> IO[str]:
    """Open a file for writing that no other process is writing.

    Raises:
        InputError: one is.
    """
    file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (the caller closes it)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise InputError(f"{path}: another run is writing it") from error
    file.truncate(0)
    return file


@contextlib.contextmanager
def _table(lm: StreamedLM, per_token: bool) -> Iterator[Write]:
    console = Console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("line", "tokens", "log-likelihood", "mean NLL", "perplexity"):
        table.add_column(name, justify="right", no_wrap=True)
    # The text takes what is left, or rich would squeeze the numbers out to show more of it.
    table.add_column(
        "text", overflow="ellipsis", no_wrap=not per_token, max_width=max(12, console.width - 56)
    )

    def write(score: Score) -> None:
        text = score.line.text
        if per_token:
            pairs = [f"{t['token']!r} {_number(t['log_prob'])}" for t in _tokens(lm, score)]
            text = "  ".join(pairs)
        table.add_row(
            str(score.line.number), str(len(score.line.ids)), f"{score.log_likelihood:.3f}",
            _number(score.mean_nll), _number(score.perplexity), Text(_printable(text)),
        )  # fmt: skip

    try:
        yield write
    finally:
        console.print(table)


def _printable(text: str) -> str:
    """Show control characters instead of sending them to the terminal."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:,.3f}"


def _row(lm: StreamedLM, score: Score, per_token: bool) -> dict[str, Any]:
    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    row: dict[str, Any] = {
        "line": score.line.number,
        "text": score.line.text,
        "num_tokens": len(score.line.ids),
        "log_likelihood": score.log_likelihood,
        "mean_nll": finite(score.mean_nll),
        "perplexity": finite(score.perplexity),
    }
    if score.line.truncated:
        row["truncated"] = True
    if per_token:
        row["tokens"] = _tokens(lm, score)
    return row


def _tokens(lm: StreamedLM, score: Score) -> list[dict[str, Any]]:
    unscored = [None] * (len(score.line.ids) - len(score.log_probs))
    return [
        {"id": token, "token": lm.tokenizer.decode([token]), "log_prob": value}
        for token, value in zip(score.line.ids, [*unscored, *score.log_probs], strict=True)
    ]


@contextlib.contextmanager
def progress(lm: StreamedLM, job: Job, state: State | None = None) -> Iterator[None]:
    """Say what is about to be done, then show the carousel's way: stop, rate and the end expected."""
    console = Console(stderr=True)
    plan, forecast = lm.plan, lm.plan.forecast
    num_sweeps = forecast.num_sweeps
    held = "all of it fits in memory"
    if plan.ring_bytes:
        held = f"{len(lm.resident)} of {lm.num_stops} stops stay in memory"
    is_new = state is None or not state.num_resumed
    about = f", about {duration(forecast.seconds)}" if plan.ring_bytes and is_new else ""
    # A continuation may end before its last token.
    how_many = "about" if job.num_passes == 1 else "at most"
    resumed = f"; {state.num_resumed} micro-batches were done before" if state and state.num_resumed else ""
    console.print(
        f"{lm.name}: {format_bytes(lm.weight_bytes)} a sweep, {held}; {job.num_tokens:,} tokens with padding in "
        f"{'one sweep' if num_sweeps == 1 else f'{how_many} {num_sweeps} sweeps'}{about}{resumed}",
        style="dim",
        highlight=False,
    )
    bar = Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[stops]}  {task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
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

    lm.on_passage = on_passage
    try:
        with bar:
            yield
    finally:
        lm.on_passage = None


@contextlib.contextmanager
def steps(lm: StreamedLM, what: str) -> Iterator[None]:
    """Show where the carousel is while a step of tuning goes up and down; on a terminal only."""
    console = Console(stderr=True)
    before, started = lm.report, time.perf_counter()

    def on_passage(passage: Passage) -> None:
        num_bytes = lm.report.read_bytes - before.read_bytes
        rate = f", {format_bytes(num_bytes / (time.perf_counter() - started))}/s read" if num_bytes else ""
        status.update(f"{what}: stop {passage.stop + 1} of {lm.num_stops}, {passage.direction}{rate}")

    if not console.is_terminal:
        yield
        return
    with console.status(what) as status:
        lm.on_passage = on_passage
        try:
            yield
        finally:
            lm.on_passage = None


@contextlib.contextmanager
def byte_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that is told the bytes done and the bytes in all; they show on a terminal only."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[size]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task(what, total=None, size="")

    def tell(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total, size=f"{format_bytes(done)} of {format_bytes(total)}")

    with bar:
        yield tell


def duration(seconds: float) -> str:
    """Return a time as people say it: ``3.2 s``, ``14 min``, ``5.1 h``."""
    for unit, length in (("s", 1), ("min", 60)):
        if seconds < 99.5 * length:
            count = seconds / length
            return f"{count:.2g} {unit}" if count < 9.95 else f"{count:.0f} {unit}"
    return f"{seconds / 3600:.1f} h"


def summarise(lm: StreamedLM, totals: Totals, seconds: float, num_truncated: int) -> None:
    """Print what was done, and what it cost.

    Args:
        totals: of the scores.
        seconds: that the lines took.
        num_truncated: lines that were cut.
    """
    perplexity = safe_exp(-totals.log_likelihood / totals.num_scored) if totals.num_scored else math.nan
    report = lm.report
    disk = f"{format_bytes(lm.weight_bytes)} of weights mapped, nothing streamed"
    if lm.plan.ring_bytes:
        disk = f"read {format_bytes(report.read_bytes)} at {format_bytes(report.read_bytes / seconds)}/s"
    cut = f", {num_truncated} of them cut" if num_truncated else ""
    num_sweeps = report.num_passages / lm.num_stops
    print(
        f"{totals.num_lines} lines{cut}, {totals.num_scored} tokens scored in "
        f"{str(lm.model.dtype).removeprefix('torch.')}, corpus perplexity {_number(perplexity)}\n"
        f"{num_sweeps:.3g} sweep{'' if num_sweeps == 1 else 's'} in {seconds:.2f} s: {disk}, "
        f"waiting {report.wait_seconds:.2f} s, computing {report.compute_seconds:.2f} s, "
        f"peak RSS {format_bytes(report.peak_rss_bytes)}",
        file=sys.stderr,
    )


def print_survey(survey: Survey, *, as_json: bool) -> None:
    """Print a plan to stdout: as a table, or as one JSON document."""
    plan, forecast, rates, job = survey.plan, survey.plan.forecast, survey.rates, survey.job
    if as_json:
        document = {
            "model": survey.name,
            "weight_bytes": survey.weight_bytes,
            "num_stops": survey.num_stops,
            "compute_dtype": survey.dtype,
            "ram_bytes": survey.ram_bytes,
            "tokens": job.num_tokens,
            "longest": job.longest,
            "disk_bytes_per_second": rates.disk,
            "memory_bytes_per_second": rates.memory,
            "flops_per_second": rates.compute,
            "rates_measured": rates.measured,
            "stops": plan.granularity,
            "resident_stops": sorted(plan.resident),
            "resident_bytes": plan.resident_bytes,
            "ring_bytes": plan.ring_bytes,
            "rider_tokens": plan.rider_tokens,
            "sweep_tokens": plan.sweep_tokens,
            "num_sweeps": forecast.num_sweeps,
            "first_sweep_seconds": forecast.first_seconds,
            "later_sweep_seconds": forecast.later_seconds,
            "seconds": forecast.seconds,
            "peak_ram_bytes": survey.process_bytes + plan.peak_bytes,
            "smallest_ram_bytes": survey.smallest_bytes,
            "more_ram": [{"ram_bytes": ram, "seconds": seconds} for ram, seconds in survey.larger],
            "half_the_bytes_seconds": survey.halved_seconds,
        }
        if survey.devices:
            names = ("device", "vram_bytes", "num_stops")
            document["devices"] = [dict(zip(names, device, strict=True)) for device in survey.devices]
        print(json.dumps(document))
        return
    peak = survey.process_bytes + plan.peak_bytes
    how = "measured" if rates.measured else "assumed: so small a model is not worth measuring"
    rows = [
        ("model", f"{survey.name}: {format_bytes(survey.weight_bytes)} a sweep in {survey.num_stops} stops"),
        ("job", f"{job.num_tokens:,} tokens, sequences of up to {job.longest:,}, computed in {survey.dtype}"),
        (
            "this machine",
            f"disk {format_bytes(rates.disk)}/s, processor {rates.compute / 1e12:.3g} TFLOP/s ({how})",
        ),
        ("memory", f"{format_binary(peak)} at the peak, of {format_binary(survey.ram_bytes)}"),
    ]
    for name, num_bytes, num_stops in survey.devices:
        rows.append((name, f"{format_binary(num_bytes)} at the peak; {num_stops} stops stay there"))
    if plan.ring_bytes:
        what = "whole blocks" if plan.granularity == "blocks" else "parts of blocks (forward only)"
        rows += [
            ("streamed", f"{what} through a ring of {format_bytes(plan.ring_bytes)}"),
            (
                "resident",
                f"{len(plan.resident)} of {survey.num_stops} stops, {format_bytes(plan.resident_bytes)}, not read again",
            ),
        ]
    else:
        rows.append(("resident", "everything, mapped from the page cache"))
    rows += [
        ("micro-batch", f"{plan.rider_tokens:,} tokens; {plan.sweep_tokens:,} tokens a sweep"),
        ("time", _time_of(forecast)),
        ("limited by", "the disk" if forecast.read_seconds > forecast.compute_seconds else "the processor"),
    ]
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    for ram, seconds in survey.larger:
        table.add_row("faster", Text(f"--ram {format_binary(ram)}: {duration(seconds)}"))
    if survey.halved_seconds < 0.95 * forecast.seconds:
        table.add_row(
            "faster",
            Text(f"weights of half the bytes (a store of 8 bits): {duration(survey.halved_seconds)}"),
        )
    table.add_row("smallest", Text(f"--ram {format_binary(survey.smallest_bytes)} would do"))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _time_of(forecast: Forecast) -> str:
    if forecast.num_sweeps == 1:
        return f"{duration(forecast.seconds)} in one sweep"
    return (
        f"{duration(forecast.seconds)} in {forecast.num_sweeps} sweeps: the first {duration(forecast.first_seconds)}, "
        f"each later one {duration(forecast.later_seconds)}"
    )
