"""`slowllm forward`: print the likelihood of every line of a text file."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slowllm.entrypoints.cli import options
from slowllm.entrypoints.cli.output import finite, json_writer, printable, prints_text, token_rows
from slowllm.entrypoints.cli.runner import Runner, sweeps_of
from slowllm.errors import InputError
from slowllm.files import read_lines
from slowllm.options import format_bytes

if TYPE_CHECKING:
    from slowllm.inference.likelihood import Likelihood
    from slowllm.inference.lines import Line, ScoreTotals
    from slowllm.runtime.streamed_lm import StreamedLM


def forward(
    file: Annotated[
        str, typer.Argument(help="Text file whose lines are scored, one by one; - reads standard input.")
    ],
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
    state: options.State = None,
    overwrite: options.Overwrite = False,
    save_every: Annotated[
        float,
        typer.Option(
            "--save-every", help="With --state: maximum number of seconds of work that a kill may cost.", min=0.0
        ),
    ] = 30.0,
    dry_run: options.DryRun = False,
    verbose: options.Verbose = False,
) -> None:  # fmt: skip
    """Print the likelihood of every non-empty line of a file.

    Log-likelihoods are in nats; the perplexity is exp of the mean negative log-likelihood of a token. A line longer
    than the limit is refused, unless --truncate cuts it. All lines are scored in as few sweeps over the weights as the
    budget allows.
    """
    options.log_to_stderr(verbose)
    texts = read_lines(file)  # before the model is opened: an unreadable file should not cost a wait
    runner = Runner(
        model, ram, device, vram, dtype, prompt=prompt, resident=resident, state=state, kind="forward",
        overwrite=overwrite, dry_run=dry_run,
    )  # fmt: skip
    out = runner.check_output(out, file)
    from slowllm.entrypoints.progress import progress
    from slowllm.inference.lines import Lines, ScoreTotals, describe, encode, job_of, score_lines
    from slowllm.inference.text import max_line_tokens, prefix_id

    info = runner.info
    limit = max_line_tokens(info) - prefix
    if max_tokens is not None and max_tokens > limit:
        raise InputError(f"--max-tokens {max_tokens} is more than the {limit} that this model takes")
    before = prefix_id(info.tokenizer, info.config.get_text_config().vocab_size) if prefix else None
    # All lines are checked before the first byte of weights is read: a line too long is refused at once.
    lines = Lines(encode(info, texts, max_tokens=max_tokens or limit, truncate=truncate))
    job = job_of(lines, before, runner.rates, runner.begun, info.num_virtual_tokens)
    if dry_run:
        runner.print_plan(job, as_json=as_json)
        return
    with runner.open(job) as lm, runner.resuming(lambda: describe(lm, lines, before), save_every) as saved:
        started = time.perf_counter()
        totals = ScoreTotals()
        with _writer(lm, out, as_json, per_token) as write, progress(lm, job, saved):
            for line, likelihood in score_lines(lm, lines, prefix=before, state=saved):
                write(line, likelihood)
                totals.add(likelihood)
        _summarise(lm, totals, time.perf_counter() - started, lines.num_truncated)


@contextlib.contextmanager
def _writer(
    lm: StreamedLM, out: Path | None, as_json: bool, per_token: bool
) -> Iterator[Callable[[Line, Likelihood], None]]:
    """Yield a function that writes the likelihood of one line: as a row of a table on a terminal, else as a JSON line."""
    if prints_text(out, as_json):
        with _table(lm, per_token) as write:
            yield write
        return
    with json_writer(out) as write_row:
        yield lambda line, likelihood: write_row(_row(lm, line, likelihood, per_token))


@contextlib.contextmanager
def _table(lm: StreamedLM, per_token: bool) -> Iterator[Callable[[Line, Likelihood], None]]:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("line", "tokens", "log-likelihood", "mean NLL", "perplexity"):
        table.add_column(name, justify="right", no_wrap=True)
    # The text gets the width that is left, or rich would squeeze the numbers to show more of it.
    table.add_column(
        "text", overflow="ellipsis", no_wrap=not per_token, max_width=max(12, console.width - 56)
    )

    def write(line: Line, likelihood: Likelihood) -> None:
        text = line.text
        if per_token:
            rows = _tokens(lm, line, likelihood)
            text = "  ".join(f"{row['token']!r} {_number(row['log_prob'])}" for row in rows)
        table.add_row(
            str(line.number), str(len(line.ids)), f"{likelihood.log_likelihood:.3f}",
            _number(likelihood.mean_nll), _number(likelihood.perplexity), Text(printable(text)),
        )  # fmt: skip

    try:
        yield write
    finally:
        console.print(table)


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
    report = lm.report
    disk = f"{format_bytes(lm.weight_bytes)} of weights mapped, nothing streamed"
    if lm.plan.ring_bytes:
        disk = f"read {format_bytes(report.read_bytes)} at {format_bytes(report.read_bytes / seconds)}/s"
    cut = f", {num_truncated} of them cut" if num_truncated else ""
    print(
        f"{totals.num_lines} lines{cut}, {totals.num_scored} tokens scored in "
        f"{str(lm.model.dtype).removeprefix('torch.')}, corpus perplexity {_number(totals.perplexity)}\n"
        f"{sweeps_of(lm)} in {seconds:.2f} s: {disk}, waiting {report.wait_seconds:.2f} s, "
        f"computing {report.compute_seconds:.2f} s, peak RSS {format_bytes(report.peak_rss_bytes)}",
        file=sys.stderr,
    )
