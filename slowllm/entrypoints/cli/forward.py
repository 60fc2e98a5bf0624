"""`slowllm forward`."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from slowllm.entrypoints.cli.common import (
    DeviceOption,
    DTypeOption,
    ModelOption,
    OutOption,
    PromptOption,
    RamOption,
    ResidentOption,
    StateOption,
    Verbose,
    VramOption,
    checked_output,
    describe,
    log_to_stderr,
    memory_of,
)
from slowllm.entrypoints.cli.output import json_writer, printable
from slowllm.errors import InputError
from slowllm.files import read_lines
from slowllm.inference.likelihood import Likelihood
from slowllm.inference.lines import Line, ScoreTotals
from slowllm.options import format_bytes, parse_dtype
from slowllm.runtime.streamed_lm import StreamedLM

Write = Callable[[Line, Likelihood], None]


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
        yield lambda line, likelihood: write_row(_row(lm, line, likelihood, per_token))


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

    def write(line: Line, likelihood: Likelihood) -> None:
        text = line.text
        if per_token:
            pairs = [f"{t['token']!r} {_number(t['log_prob'])}" for t in _tokens(lm, line, likelihood)]
            text = "  ".join(pairs)
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
    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

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
    return [
        {"id": token, "token": lm.tokenizer.decode([token]), "log_prob": value}
        for token, value in zip(line.ids, [*unscored, *likelihood.log_probs], strict=True)
    ]


def summarise(lm: StreamedLM, totals: ScoreTotals, seconds: float, num_truncated: int) -> None:
    """Print what was done, and what it cost.

    Args:
        totals: of the scores.
        seconds: that the lines took.
        num_truncated: lines that were cut.
    """
    report = lm.report
    disk = f"{format_bytes(lm.weight_bytes)} of weights mapped, nothing streamed"
    if lm.plan.ring_bytes:
        disk = f"read {format_bytes(report.read_bytes)} at {format_bytes(report.read_bytes / seconds)}/s"
    cut = f", {num_truncated} of them cut" if num_truncated else ""
    num_sweeps = report.num_passages / lm.num_stops
    print(
        f"{totals.num_lines} lines{cut}, {totals.num_scored} tokens scored in "
        f"{str(lm.model.dtype).removeprefix('torch.')}, corpus perplexity {_number(totals.perplexity)}\n"
        f"{num_sweeps:.3g} sweep{'' if num_sweeps == 1 else 's'} in {seconds:.2f} s: {disk}, "
        f"waiting {report.wait_seconds:.2f} s, computing {report.compute_seconds:.2f} s, "
        f"peak RSS {format_bytes(report.peak_rss_bytes)}",
        file=sys.stderr,
    )


def forward(
    file: Annotated[str, typer.Argument(help="Text file, one line scored each; - reads standard input.")],
    model: ModelOption = None,
    ram: RamOption = "16GiB",
    device: DeviceOption = "cpu",
    vram: VramOption = None,
    dtype: DTypeOption = "auto",
    prompt: PromptOption = None,
    out: OutOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines instead of a table.")] = False,
    per_token: Annotated[
        bool, typer.Option("--per-token", help="Also give every token and its log-probability.")
    ] = False,
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
            help="Longest line in tokens, prefix not counted.", min=1, show_default="the model's own"
        ),
    ] = None,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut longer lines instead of refusing them.")
    ] = False,
    resident: ResidentOption = True,
    state: StateOption = None,
    save_every: Annotated[
        float,
        typer.Option("--save-every", help="With --state: seconds of work that a kill may cost.", min=0.0),
    ] = 30.0,
    verbose: Verbose = False,
) -> None:
    """Print the likelihood of every non-empty line of a file.

    Log-likelihoods are in nats; perplexity is exp of the mean negative log-likelihood of a token. A line longer
    than the limit is refused, unless --truncate cuts it. All lines go through in as few sweeps over the weights
    as the budget allows.
    """
    log_to_stderr(verbose)
    texts = read_lines(file)  # before the model is opened: an unreadable file should not cost a wait
    memory = memory_of(ram, device, vram)
    parse_dtype(dtype)
    if out is not None:
        out = checked_output(out, file)
    begun = None
    if state is not None:
        from slowllm.runtime.state import read_job

        begun = read_job(state, "forward")
    from slowllm.entrypoints.progress import progress
    from slowllm.inference.lines import Lines, ScoreTotals, encode, job_of, opened_state, score_lines
    from slowllm.inference.text import max_line_tokens, prefix_id
    from slowllm.runtime.load import open_model
    from slowllm.runtime.rates import quick_rates
    from slowllm.runtime.streamed_lm import StreamedLM

    known = describe(model, prompt)
    limit = max_line_tokens(known) - prefix
    if max_tokens is not None and max_tokens > limit:
        raise InputError(f"--max-tokens {max_tokens} is more than the {limit} that this model takes")
    before = prefix_id(known.tokenizer, known.config.get_text_config().vocab_size) if prefix else None
    # All lines are looked at before the first byte of weights is read: a line too long is refused at once.
    lines = Lines(encode(known, texts, max_tokens=max_tokens or limit, truncate=truncate))
    if begun is not None and dtype == "auto":
        dtype = str(begun.get("dtype"))  # measured anew it might come out otherwise
    rates = quick_rates(known.folder, parse_dtype(dtype))
    job = job_of(lines, before, rates, begun, known.num_virtual_tokens)
    with (
        open_model(
            StreamedLM,
            known,
            ram=memory.ram,
            device=memory.device,
            vram=memory.vram,
            dtype=dtype,
            keep_resident=resident,
            job=job,
            rates=rates,
        ) as lm,
        opened_state(state, lm, lines, before, save_every) as kept,
    ):
        started = time.perf_counter()
        totals = ScoreTotals()
        with (
            writer(lm, out, as_json=as_json, per_token=per_token) as write,
            progress(lm, job, kept),
        ):
            for line, likelihood in score_lines(lm, lines, prefix=before, state=kept):
                write(line, likelihood)
                totals.add(likelihood)
        summarise(lm, totals, time.perf_counter() - started, lines.num_truncated)
