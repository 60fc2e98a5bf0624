"""What verbs have in common that pass texts through a model and write a folder of shards: options, checks, the loop."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slowllm.entrypoints.cli import inputs
from slowllm.entrypoints.cli.runner import Runner
from slowllm.entrypoints.cost import cost_of, times_of
from slowllm.errors import InputError, counted
from slowllm.files import STATE_NAME, system_errors

if TYPE_CHECKING:
    from slowllm.inference.shard_files import Format
    from slowllm.inference.text_batches import TextPasses
    from slowllm.inference.text_files import Texts
    from slowllm.planning.job import Job
    from slowllm.runtime.state import State
    from slowllm.runtime.streamed_lm import StreamedLM

Files = Annotated[
    list[str] | None,
    typer.Argument(
        help="Files of texts: each line of a text file, or one column of JSON Lines, CSV or Parquet; - or nothing reads "
        "standard input.",
        metavar="FILE",
        show_default=False,
    ),
]
Column = Annotated[
    str, typer.Option("--column", help="Column of the texts in JSON Lines, CSV and Parquet.", metavar="NAME")
]
OutFolder = Annotated[
    Path | None,
    typer.Option(
        "--out",
        help="Folder to write the shards to, made if it is not there; after an interrupt or kill, the same command goes on.",
        metavar="DIR",
        show_default=False,
    ),
]
ShardFormat = Annotated[
    str,
    typer.Option("--format", help="Format of the shards.", metavar="parquet|safetensors"),
]
Prefix = Annotated[
    bool,
    typer.Option(
        "--prefix/--no-prefix", help="Put BOS (or EOS where there is no BOS) before every text, or nothing."
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        help="Maximum number of tokens of a text, without the prefix.", min=1, show_default="the model's own"
    ),
]
Truncate = Annotated[bool, typer.Option("--truncate", help="Cut longer texts instead of refusing them.")]
SaveEvery = Annotated[
    float,
    typer.Option("--save-every", help="Maximum number of seconds of work that a kill may cost.", min=0.0),
]


@dataclass(frozen=True)
class ShardJob:
    """Where texts come from, and where rows go.

    Attributes:
        files: as named.
        text: of --text.
        column: of files that have columns.
        out: folder of the shards.
        format: of the shards.
    """

    files: Sequence[str]
    text: Sequence[str]
    column: str
    out: Path
    format: Format

    @property
    def state(self) -> Path:
        """The folder of the job's state."""
        return self.out / STATE_NAME

    def check(self) -> None:
        """Refuse a folder that cannot be written, or has something else in it; see `check_folder`."""
        from slowllm.inference.shard_files import check_folder

        check_folder(self.out)

    def print_plan(self, runner: Runner, job: Job, *, as_json: bool) -> None:
        """Print the plan of a job instead of doing it."""
        from slowllm.inference.shard_files import COPIES, SHARD_BYTES

        runner.print_plan(job, as_json=as_json, reserved_bytes=COPIES * SHARD_BYTES)

    @contextlib.contextmanager
    def texts(self, runner: Runner, prefix: bool, max_tokens: int | None, truncate: bool) -> Iterator[Texts]:
        """Yield the texts as token ids, all of which are checked before the first byte of weights is read."""
        from slowllm.inference.text import max_line_tokens, prefix_id
        from slowllm.inference.text_files import TextFiles, Texts

        info = runner.info
        limit = max_line_tokens(info) - prefix
        if max_tokens is not None and max_tokens > limit:
            raise InputError(f"--max-tokens {max_tokens} is more than the {limit} that this model takes")
        before = prefix_id(info.tokenizer, info.config.get_text_config().vocab_size) if prefix else None
        with TextFiles(self.files, self.column, self.text, inputs.TEXTS_NAME) as files:
            yield Texts(info, files, max_tokens=max_tokens or limit, truncate=truncate, prefix=before)


def shard_job(
    files: list[str] | None, text: list[str] | None, column: str, out: Path | None, format: str
) -> ShardJob:
    """Return where texts come from and rows go, checked without loading anything heavy.

    Raises:
        InputError: there is nothing to read, or the folder cannot be written.
    """
    if format not in ("parquet", "safetensors"):
        raise InputError(f"--format {format!r} is unknown; use parquet or safetensors")
    if format == "parquet":
        inputs.check_installed("pyarrow")
    if out is None:
        raise InputError("give the folder to write to with --out DIR")
    named = inputs.choose_files(files, text, "a file")
    return ShardJob(
        named, text or (), column, out.expanduser(), "parquet" if format == "parquet" else "safetensors"
    )


def write_shards(
    runner: Runner,
    job: Job,
    where: ShardJob,
    texts: Texts,
    grows: Sequence[str],
    describe: Callable[[StreamedLM], Mapping[str, Any]],
    passes: Callable[[StreamedLM, State | None, int], TextPasses],
    save_seconds: float | None,
) -> None:
    """Open the model for a job, pass the texts through it, and write a row for each.

    Args:
        runner: of the verb, with the state folder of `where`.
        job: what the plan must know.
        where: the rows go.
        texts: all of them.
        grows: see `ShardWriter`.
        describe: returns what the rows depend on.
        passes: returns the passes, given the model, the state and how many texts are done.
        save_seconds: as for `State`.
    """
    import psutil

    from slowllm.entrypoints.progress import progress
    from slowllm.inference.shard_files import COPIES, SHARD_BYTES, ShardRow, ShardWriter
    from slowllm.planning.budget import Budget
    from slowllm.runtime.memory import budget_bytes

    budget = Budget(budget_bytes(runner.ram), psutil.Process().memory_info().rss + COPIES * SHARD_BYTES)
    with contextlib.ExitStack() as stack:
        lm = stack.enter_context(runner.open(job, budget))
        about = describe(lm)
        with system_errors(InputError, where.out):
            where.out.mkdir(exist_ok=True)
        state = stack.enter_context(runner.resuming(lambda: about, save_seconds))
        writer = ShardWriter(where.out, where.format, grows, about)
        if writer.num_done:
            print(f"{counted(writer.num_done, 'text')} are in {where.out} already", file=sys.stderr)
        started, num_done = time.perf_counter(), writer.num_done
        found = passes(lm, state, num_done)
        count = stack.enter_context(progress(lm, job, state, noun="text", total=texts.num_texts - num_done))
        for text, result in found:
            if writer.add(ShardRow(text.file, text.line.number, text.line.text, result)):
                found.forget(writer.num_done)
            count(len(text.ids))
        num_shards = writer.finish()
        found.forget(writer.num_done)
        seconds = time.perf_counter() - started
        cut = f", {texts.num_truncated} of them cut" if texts.num_truncated else ""
        print(
            f"{counted(writer.num_done, 'text')}{cut} in {counted(num_shards, 'shard')} of {where.out}\n"
            f"{cost_of(lm)} in {seconds:.2f} s: {times_of(lm, seconds)}",
            file=sys.stderr,
        )
