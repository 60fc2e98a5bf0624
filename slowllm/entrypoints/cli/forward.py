"""`slowllm forward`: print the likelihood of every line of a text file."""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slowllm.entrypoints.cli import inputs, options
from slowllm.entrypoints.cli.output import (
    finite,
    json_writer,
    print_tokens,
    printable,
    prints_text,
    token_rows,
)
from slowllm.entrypoints.cli.runner import Runner
from slowllm.entrypoints.cli.swarm_options import SwarmChoice, takes_swarm
from slowllm.entrypoints.cost import cost_of, times_of
from slowllm.entrypoints.report.recorder import reporting
from slowllm.entrypoints.report.results import LineScored
from slowllm.errors import InputError, counted

if TYPE_CHECKING:
    from slowllm.inference.likelihood import Likelihood
    from slowllm.inference.lines import Line, ScoreTotals
    from slowllm.runtime.description import ModelInfo
    from slowllm.runtime.streamed_lm import StreamedLM

    Write = Callable[[inputs.Entry, Line, Likelihood], None]


@takes_swarm
def forward(
    files: Annotated[
        list[str] | None,
        typer.Argument(
            help="Text files whose lines are scored, one by one; - or nothing reads standard input.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    text: inputs.Texts = None,
    model: options.Model = None,
    ram: options.Ram = "auto",
    device: options.Device = "cpu",
    vram: options.Vram = None,
    dtype: options.DType = "auto",
    prompt: options.Prompt = None,
    out: options.Out = None,
    as_json: options.AsJson = False,
    per_token: options.PerToken = False,
    prefix: Annotated[
        bool,
        typer.Option(
            "--prefix/--no-prefix",
            help="Score a line's first token after BOS (or EOS where there is no BOS), or leave it unscored.",
        ),
    ] = True,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            help="Maximum number of tokens of a line, without the prefix.", min=1, show_default="the model's own"
        ),
    ] = None,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut longer lines instead of refusing them.")
    ] = False,
    resident: options.Resident = True,
    swarm: SwarmChoice = SwarmChoice(),  # noqa: B008 (frozen)
    state: options.State = None,
    overwrite: options.Overwrite = False,
    report: options.Report = None,
    save_every: Annotated[
        float,
        typer.Option(
            "--save-every", help="With --state: maximum number of seconds of work that a kill may cost.", min=0.0
        ),
    ] = 30.0,
    exact: options.Exact = True,
    dry_run: options.DryRun = False,
    verbose: options.Verbose = False,
) -> None:  # fmt: skip
    """Print the likelihood of every non-empty line of text files.

    Log-likelihoods are in nats; the perplexity is exp of the mean negative log-likelihood of a token. A line longer
    than the limit is refused, unless --truncate cuts it. All lines are scored in as few sweeps over the weights as the
    budget allows.
    """
    options.log_to_stderr(verbose)
    files = inputs.choose_files(files, text, "a file")
    for file in files:
        inputs.warn_of_parts(file, "scored", "`slowllm score` reads its parts: text, context, choices")
    entries = inputs.read_entries(files, text)
    runner = Runner(
        model, ram, device, vram, dtype, prompt=prompt, resident=resident, swarm=swarm, state=state, kind="forward",
        overwrite=overwrite, dry_run=dry_run, exact=exact,
    )  # fmt: skip
    out = runner.check_output(out, *files)
    report = runner.check_report(report, *files)
    runner.load_libraries()
    from slowllm.entrypoints.progress import progress
    from slowllm.inference.lines import Lines, ScoreTotals, describe, job_of, score_lines
    from slowllm.inference.text import max_line_tokens, prefix_id

    info = runner.info
    limit = max_line_tokens(info) - prefix
    if max_tokens is not None and max_tokens > limit:
        raise InputError(f"--max-tokens {max_tokens} is more than the {limit} that this model takes")
    before = prefix_id(info.tokenizer, info.config.get_text_config().vocab_size) if prefix else None
    # All lines are checked before the first byte of weights is read: a line too long is refused at once.
    lines = Lines(_encoded(info, entries, max_tokens or limit, truncate, before))
    job = job_of(lines, before, runner.rates, runner.begun, info.num_virtual_tokens)
    if dry_run:
        runner.print_plan(job, as_json=as_json)
        return
    with (
        reporting(report, "slowllm forward") as told,
        runner.open(job) as lm,
        runner.resuming(lambda: describe(lm, lines, before), save_every) as saved,
        told.watching(lm, job, saved),
    ):
        started = time.perf_counter()
        totals = ScoreTotals()
        with (
            _writer(lm, out, as_json, per_token, names_files=len(files) > 1) as write,
            progress(lm, job, saved, noun="line", total=len(entries)) as count,
        ):
            scored = score_lines(lm, lines, prefix=before, state=saved)
            for entry, (line, likelihood) in zip(entries, scored, strict=True):
                write(entry, line, likelihood)
                totals.add(likelihood)
                told.add(LineScored(_place(entry, len(files) > 1), line.text, line.ids, likelihood))
                count(len(line.ids))
        _summarise(lm, totals, time.perf_counter() - started, lines.num_truncated)


def _encoded(
    info: ModelInfo, entries: Sequence[inputs.Entry], max_tokens: int, truncate: bool, before: int | None
) -> Iterator[Line]:
    """Yield the token ids of all lines; what is wrong with one is said with its file."""
    from slowllm.inference.lines import encode

    for file, group in itertools.groupby(entries, lambda entry: entry.file):
        texts = ((entry.number, entry.text) for entry in group)
        try:
            yield from encode(info, texts, max_tokens=max_tokens, truncate=truncate, prefix=before)
        except InputError as error:
            raise InputError(f"{inputs.shown_name(file)}: {error}") from error


@contextlib.contextmanager
def _writer(
    lm: StreamedLM, out: Path | None, as_json: bool, per_token: bool, *, names_files: bool
) -> Iterator[Write]:
    """Yield a function that writes the likelihood of one line: as a row of a table on a terminal, else as a JSON line."""
    if prints_text(out, as_json):
        with _table(lm, per_token, names_files) as write:
            yield write
        return
    with json_writer(out) as write_row:

        def write_line(entry: inputs.Entry, line: Line, likelihood: Likelihood) -> None:
            file = {"file": entry.file} if names_files else {}
            write_row({**file, **_row(lm, line, likelihood, per_token)})

        yield write_line


@contextlib.contextmanager
def _table(lm: StreamedLM, per_token: bool, names_files: bool) -> Iterator[Write]:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("line", "tokens", "log-likelihood", "mean NLL", "perplexity"):
        table.add_column(name, justify="right", no_wrap=True)
    # The text gets the width that is left, or rich would squeeze the numbers to show more of it.
    table.add_column("text", overflow="ellipsis", no_wrap=True, max_width=max(12, console.width - 56))
    tokens: list[tuple[str, list[dict[str, Any]]]] = []

    def write(entry: inputs.Entry, line: Line, likelihood: Likelihood) -> None:
        number = _place(entry, names_files)
        table.add_row(
            number, str(len(line.ids)), f"{likelihood.log_likelihood:.3f}",
            _number(likelihood.mean_nll), _number(likelihood.perplexity), Text(printable(line.text)),
        )  # fmt: skip
        if per_token:
            tokens.append((f"line {number}", _tokens(lm, line, likelihood)))

    try:
        yield write
    finally:
        console.print(table)
        for title, rows in tokens:
            print_tokens(f"{title}: log-probability of each token", rows)


def _place(entry: inputs.Entry, names_file: bool) -> str:
    """Return what a line is called in a table."""
    return f"{entry.file}:{entry.number}" if names_file else str(entry.number)


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:,.3f}"


def _row(lm: StreamedLM, line: Line, likelihood: Likelihood, per_token: bool) -> dict[str, Any]:
    row: dict[str, Any] = {
        "line": line.number,
        "text": line.text,
        "num_tokens": len(line.ids),
        "log_likelihood": likelihood.log_likelihood,
        "mean_nll": finite(likelihood.mean_nll),
        "perplexity": finite(likelihood.perplexity),
    }
    if line.truncated:
        row["truncated"] = True
    if per_token:
        row["tokens"] = _tokens(lm, line, likelihood)
    return row


def _tokens(lm: StreamedLM, line: Line, likelihood: Likelihood) -> list[dict[str, Any]]:
    unscored = [None] * (len(line.ids) - len(likelihood.log_probs))
    return token_rows(lm.tokenizer, line.ids, [*unscored, *likelihood.log_probs])


def _summarise(lm: StreamedLM, totals: ScoreTotals, seconds: float, num_truncated: int) -> None:
    """Print to stderr what was scored, and what it cost."""
    cut = f", {num_truncated} of them cut" if num_truncated else ""
    print(
        f"{counted(totals.num_lines, 'line')}{cut}, {counted(totals.num_scored, 'token')} scored in "
        f"{str(lm.model.dtype).removeprefix('torch.')}, corpus perplexity {_number(totals.perplexity)}\n"
        f"{cost_of(lm)} in {seconds:.2f} s: {times_of(lm, seconds)}",
        file=sys.stderr,
    )
