"""The verbs of the command line: parse, call, print. Results go to stdout, progress and logs to stderr."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from slowllm.errors import InputError, SlowLLMError
from slowllm.options import format_bytes, parse_bytes, parse_dtype

if TYPE_CHECKING:
    from slowllm.model import StreamedLM
    from slowllm.scoring import Score

app = typer.Typer(
    name="slowllm",
    help="Run and score language models far larger than memory, by streaming their weights from disk.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log what is chosen, and why.")]


@app.callback(invoke_without_command=True)
def _main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        from slowllm import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.command()
def forward(
    file: Annotated[str, typer.Argument(help="Text file, one line scored each; - reads standard input.")],
    model: Annotated[
        str | None,
        typer.Option(help="Folder or cached hub id of a checkpoint.", show_default="the embedded tiny-bloom"),
    ] = None,
    ram: Annotated[str, typer.Option(help="Memory budget of the whole process.")] = "16GiB",
    dtype: Annotated[str, typer.Option(help="Compute dtype: auto, bf16 or fp32.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Write JSON lines to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines instead of a table.")] = False,
    per_token: Annotated[bool, typer.Option(help="Also give every token and its log-probability.")] = False,
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
    truncate: Annotated[bool, typer.Option(help="Cut longer lines instead of refusing them.")] = False,
    resident: Annotated[
        bool,
        typer.Option(
            "--resident/--stream-all", help="Keep blocks that fit the budget, or stream every block."
        ),
    ] = True,
    verbose: Verbose = False,
) -> None:
    """Print the likelihood of every non-empty line of a file.

    Log-likelihoods are in nats; perplexity is exp of the mean negative log-likelihood of a token. A line longer
    than the limit is refused, unless --truncate cuts it. All lines go through in as few sweeps over the weights
    as the budget allows.
    """
    _log_to_stderr(verbose)
    texts = _read_lines(file)  # before the model is opened: an unreadable file should not cost a wait
    parse_bytes(ram)
    parse_dtype(dtype)
    if out is not None and not out.parent.is_dir():
        raise InputError(f"{out.parent}: no such folder to write {out.name} to")
    _quiet_transformers()
    from slowllm import load, scoring

    with load(model or embedded_model(), ram=ram, dtype=dtype, keep_resident=resident) as lm:
        limit = scoring.max_line_tokens(lm) - prefix
        if max_tokens is not None and max_tokens > limit:
            raise InputError(
                f"--max-tokens {max_tokens} is more than the {limit} that this model and budget take"
            )
        # All lines are looked at before the first byte of weights is read: a line too long is refused at once.
        lines = list(scoring.encode(lm, texts, max_tokens=max_tokens or limit, truncate=truncate))
        before = scoring.prefix_id(lm.tokenizer) if prefix else None
        num_tokens = sum(len(line.ids) + prefix for line in lines)
        with _progress(lm, num_tokens) as told, _writer(lm, out, as_json, per_token) as write:
            started = time.perf_counter()
            scores = []
            for score in scoring.score_lines(lm, lines, prefix=before):
                write(score)
                scores.append((score.log_likelihood, len(score.log_probs)))
            told(time.perf_counter() - started)
        _summarise(lm, scores, time.perf_counter() - started, sum(line.truncated for line in lines))


def embedded_model() -> Path:
    """Return the folder of the small BLOOM that comes with the package."""
    here = Path(__file__).resolve().parent
    for folder in (here / "weights" / "tiny-bloom", here.parent / "weights" / "tiny-bloom"):
        if folder.is_dir():
            return folder
    raise InputError("this installation has no embedded model; name one with --model")


def _read_lines(file: str) -> list[tuple[int, str]]:
    """Return the non-empty lines of a text file with their numbers."""
    name = "standard input" if file == "-" else file
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise InputError(f"{name}: {error.strerror or error}") from error
    lines = []
    # Not splitlines(): a form feed or a Unicode separator inside a line does not end it.
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            text = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise InputError(
                f"{name}: line {number} is not UTF-8 (byte {error.start + 1} is 0x{raw[error.start]:02x}); convert it first"
            ) from error
        if text:
            lines.append((number, text))
    if not lines:
        raise InputError(f"{name}: has no non-empty line")
    return lines


@contextlib.contextmanager
def _writer(lm: StreamedLM, out: Path | None, as_json: bool, per_token: bool) -> Iterator[Any]:
    """Yield a function that writes one score: to a file, as JSON lines on stdout, or as rows of a table.

    A file appears under its name only when it is complete; an interrupted one stays beside it, in whole lines.
    """
    if out is None and not as_json and sys.stdout.isatty():
        with _table(lm, per_token) as write:
            yield write
        return
    partial = out.with_name(out.name + ".part") if out is not None else None
    try:
        with contextlib.ExitStack() as stack:
            file: IO[str] = sys.stdout
            if partial is not None:
                file = stack.enter_context(open(partial, "w", encoding="utf-8"))

            def write(score: Score) -> None:
                # One write a line, flushed: an interrupt leaves whole lines.
                file.write(json.dumps(_row(lm, score, per_token), ensure_ascii=False) + "\n")
                file.flush()

            yield write
        if partial is not None and out is not None:
            os.replace(partial, out)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise InputError(
            f"{out or 'standard output'}: {error.strerror or error}; what was written so far is in {partial or 'the pipe'}"
        ) from error


@contextlib.contextmanager
def _table(lm: StreamedLM, per_token: bool) -> Iterator[Any]:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("line", "tokens", "log-likelihood", "mean NLL", "perplexity"):
        table.add_column(name, justify="right")
    table.add_column("text", overflow="ellipsis", no_wrap=not per_token)

    def write(score: Score) -> None:
        text = score.line.text
        if per_token:
            pairs = [f"{t['token']!r} {_number(t['log_prob'])}" for t in _tokens(lm, score)]
            text = "  ".join(pairs)
        table.add_row(
            str(score.line.number), str(len(score.line.ids)), f"{score.log_likelihood:.3f}",
            _number(score.mean_nll), _number(score.perplexity), _plain(text),
        )  # fmt: skip

    try:
        yield write
    finally:
        Console().print(table)


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)


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
def _progress(lm: StreamedLM, num_tokens: int) -> Iterator[Any]:
    """Show the carousel's way: stop, rate and the end expected. Say first what is about to be done."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    plan = lm.plan
    num_sweeps = max(1, -(-num_tokens // plan.sweep_tokens))
    console = Console(stderr=True)
    held = (
        f"{len(plan.resident)} of {lm.num_stops} stops in memory"
        if plan.ring_bytes
        else "all of it fits in memory"
    )
    console.print(
        f"[dim]{lm.folder.name}: {format_bytes(lm.weight_bytes)} a sweep, {held}; "
        f"{num_tokens:,} tokens in about {num_sweeps} sweep{'s' if num_sweeps > 1 else ''}[/dim]"
    )
    with Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} stops  {task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("sweep 1", total=num_sweeps * lm.num_stops, rate="")

        def on_passage(passage: Any) -> None:
            report = lm.report
            rate = report.read_bytes / max(time.perf_counter() - started, 1e-9)
            done = report.num_passages
            total = max(num_sweeps * lm.num_stops, done)
            progress.update(
                task,
                completed=done,
                total=total,
                description=f"sweep {(done - 1) // lm.num_stops + 1}",
                rate=f"{format_bytes(rate)}/s" if report.read_bytes else "",
            )

        started = time.perf_counter()
        lm.on_passage = on_passage
        try:
            yield lambda seconds: None
        finally:
            lm.on_passage = None


def _summarise(
    lm: StreamedLM, scores: Iterable[tuple[float, int]], seconds: float, num_truncated: int
) -> None:
    from slowllm.scoring import safe_exp

    pairs = list(scores)
    num_scored = sum(count for _, count in pairs)
    total = math.fsum(value for value, _ in pairs)
    perplexity = safe_exp(-total / num_scored) if num_scored else math.nan
    report = lm.report
    num_sweeps = report.num_passages / lm.num_stops
    if report.read_bytes:
        disk = f"read {format_bytes(report.read_bytes)} at {format_bytes(report.read_bytes / seconds)}/s"
    else:
        disk = f"{format_bytes(lm.weight_bytes)} of weights mapped, nothing streamed"
    cut = f", {num_truncated} of them cut" if num_truncated else ""
    print(
        f"{len(pairs)} lines{cut}, {num_scored} tokens scored, corpus perplexity {_number(perplexity)}\n"
        f"{num_sweeps:.3g} sweeps in {seconds:.2f} s: {disk}, waiting {report.wait_seconds:.2f} s, "
        f"computing {report.compute_seconds:.2f} s, peak RSS {format_bytes(report.peak_rss_bytes)}",
        file=sys.stderr,
    )


def _log_to_stderr(verbose: bool) -> None:
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    logging.getLogger("slowllm").setLevel(logging.INFO if verbose else logging.WARNING)


def _quiet_transformers() -> None:
    import transformers

    transformers.logging.set_verbosity_error()


def run() -> None:
    """Run the command line: one sentence and exit code 2 for what the user can mend, 130 for an interrupt."""
    try:
        app(standalone_mode=True)
    except SlowLLMError as error:
        print(f"slowllm: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        print("slowllm: interrupted; the lines printed so far are complete", file=sys.stderr)
        sys.exit(130)
