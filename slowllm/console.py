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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from slowllm.errors import InputError
from slowllm.model import StreamedLM
from slowllm.options import format_bytes
from slowllm.scoring import Score, safe_exp
from slowllm.stops import Passage

Write = Callable[[Score], None]


@contextlib.contextmanager
def writer(lm: StreamedLM, out: Path | None, *, as_json: bool, per_token: bool) -> Iterator[Write]:
    """Yield a function that writes one score: to a file, as JSON lines to stdout, or as a row of a table.

    A table is for a terminal; what is piped gets JSON lines. A file appears under its name only when it is
    complete; until then, and after an interrupt, its whole lines are in a file of that name with ``.part`` added.

    Raises:
        InputError: the file or stdout cannot be written.
    """
    if out is None and not as_json and sys.stdout.isatty():
        with _table(lm, per_token) as write:
            yield write
        return
    partial = out.with_name(out.name + ".part") if out is not None else None
    num_good_bytes = 0
    try:
        with contextlib.ExitStack() as stack:
            file: IO[str] = sys.stdout
            if partial is not None:
                file = stack.enter_context(_open_alone(partial))
            elif isinstance(file, io.TextIOWrapper):
                file.reconfigure(encoding="utf-8")  # JSON lines are UTF-8 whatever the terminal speaks

            def write_line(score: Score) -> None:
                nonlocal num_good_bytes
                line = json.dumps(_row(lm, score, per_token), ensure_ascii=False) + "\n"
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
        raise InputError(
            f"{where}: {error.strerror or error}"
            + (f"; the lines written so far are in {partial.name}" if num_good_bytes and partial else "")
        ) from error
    except KeyboardInterrupt:
        if partial is not None:
            print(f"slowllm: interrupted; the lines scored so far are in {partial}", file=sys.stderr)
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
def progress(lm: StreamedLM, num_tokens: int) -> Iterator[None]:
    """Say what is about to be done, then show the carousel's way: stop, rate and the end expected."""
    console = Console(stderr=True)
    num_sweeps = max(1, -(-num_tokens // lm.plan.sweep_tokens))
    held = "all of it fits in memory"
    if lm.plan.ring_bytes:
        held = f"{len(lm.plan.resident)} of {lm.num_stops} stops stay in memory"
    console.print(
        f"{lm.name}: {format_bytes(lm.weight_bytes)} a sweep, {held}; "
        f"{num_tokens:,} tokens in {'one sweep' if num_sweeps == 1 else f'about {num_sweeps} sweeps'}",
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


def summarise(
    lm: StreamedLM, scores: Sequence[tuple[float, int]], seconds: float, num_truncated: int
) -> None:
    """Print what was done, and what it cost.

    Args:
        scores: log-likelihood and number of scored tokens of each line.
        seconds: that the lines took.
        num_truncated: lines that were cut.
    """
    num_scored = sum(count for _, count in scores)
    total = math.fsum(value for value, _ in scores)
    perplexity = safe_exp(-total / num_scored) if num_scored else math.nan
    report = lm.report
    disk = f"{format_bytes(lm.weight_bytes)} of weights mapped, nothing streamed"
    if report.read_bytes:
        disk = f"read {format_bytes(report.read_bytes)} at {format_bytes(report.read_bytes / seconds)}/s"
    cut = f", {num_truncated} of them cut" if num_truncated else ""
    num_sweeps = report.num_passages / lm.num_stops
    print(
        f"{len(scores)} lines{cut}, {num_scored} tokens scored, corpus perplexity {_number(perplexity)}\n"
        f"{num_sweeps:.3g} sweep{'' if num_sweeps == 1 else 's'} in {seconds:.2f} s: {disk}, "
        f"waiting {report.wait_seconds:.2f} s, computing {report.compute_seconds:.2f} s, "
        f"peak RSS {format_bytes(report.peak_rss_bytes)}",
        file=sys.stderr,
    )
