"""`slowllm plan`: say what a job takes on this machine before it starts, and before the model is downloaded."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slowllm.entrypoints.cli import options
from slowllm.entrypoints.cli.runner import Runner
from slowllm.entrypoints.cli.survey_output import print_survey
from slowllm.errors import CheckpointError, InputError
from slowllm.files import read_lines
from slowllm.options import parse_devices
from slowllm.planning.job import Job, Rates
from slowllm.rounding import ceil_div

if TYPE_CHECKING:
    from slowllm.inference.text import TextSide

DEFAULT_TOKENS = 1024
# For a text without a tokenizer. Vocabularies of 32,000 to 250,000 tokens make one of 3 to 5 bytes of European languages.
BYTES_PER_TOKEN = 3


def plan(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Folder of a checkpoint or store, hub id of a model in the local cache, or name of a known model, such as "
            "bigscience/bloom, whose weights need not be here.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="Plan from this config.json, or a folder with one, without any weights; an index beside it is used.",
            show_default=False,
        ),
    ] = None,
    ram: options.Ram = "auto",
    device: options.Device = "cpu",
    vram: options.Vram = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            help="Number of tokens of the whole job.", min=1, max=10**12, show_default=str(DEFAULT_TOKENS)
        ),
    ] = None,
    longest: Annotated[
        int | None,
        typer.Option(
            help="Number of tokens of the longest sequence.", min=1, show_default="512, or all of a smaller job"
        ),
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(
            "--file",
            help="Plan the scoring of this text file's lines, as `forward` does it, instead of --tokens and --longest.",
            show_default=False,
        ),
    ] = None,
    gradients: Annotated[
        bool,
        typer.Option(
            "--gradients", help="Plan steps of tuning, each of which is a sweep up the blocks and one down."
        ),
    ] = False,
    dtype: options.DType = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    verbose: options.Verbose = False,
) -> None:  # fmt: skip
    """Say what a job takes on this machine before it starts.

    Measures the disk under the model's folder, and the processor on the model's first block (a few seconds). Prints
    what stays in memory, how many sweeps the job takes, how long they take, and what would make the job faster. A job
    that does not fit the budget is refused with the smallest budget that suffices.

    The weights need not be there: a known model, a folder with a config.json only, or --config is planned from its
    shapes, with the processor measured and the disk's rate assumed. Nothing is downloaded.
    """
    options.log_to_stderr(verbose)
    if (model is None) == (config is None):
        raise InputError("give a model or --config, and not both")
    if file is not None and not (tokens is None and longest is None):
        raise InputError("--file says how many tokens there are; leave --tokens and --longest out")
    texts = None if file is None else read_lines(file)
    runner = Runner(model, ram, device, vram, dtype, dry_run=True)
    runner.load_libraries()
    from slowllm.runtime import survey
    from slowllm.runtime.blueprint import find_blueprint

    blueprint = find_blueprint(model, config)
    if blueprint is not None and parse_devices(device) != ("cpu",):
        raise InputError("a model without its weights is planned for the processor; leave --device out")
    side = runner.info if blueprint is None else blueprint
    if texts is None:
        job = _job_of_numbers(side, tokens, longest)
    else:
        job = _job_of_lines(side, texts, runner.rates if blueprint is None else Rates())
    if gradients:
        job = Job(job.num_tokens, job.longest, keeps_results=False, turns=True)
    if blueprint is None:
        surveyed = survey.survey(runner.info, ram=ram, device=device, vram=vram, dtype=dtype, job=job)
    else:
        surveyed = survey.survey_blueprint(blueprint, ram=ram, dtype=dtype, job=job)
    print_survey(surveyed, as_json=as_json)


def _job_of_numbers(side: TextSide, tokens: int | None, longest: int | None) -> Job:
    from slowllm.inference.text import max_line_tokens

    tokens = DEFAULT_TOKENS if tokens is None else tokens
    longest = min(tokens, 512) if longest is None else longest
    if longest > tokens:
        raise InputError(f"--longest {longest} is more than all {tokens} tokens of the job")
    if longest > (limit := max_line_tokens(side)):
        raise InputError(f"--longest {longest} is more than the {limit} that this model takes")
    return Job(num_tokens=tokens, longest=longest, forward_only=True, keeps_results=False)


def _job_of_lines(side: TextSide, texts: Sequence[tuple[int, str]], rates: Rates) -> Job:
    """Return the job of scoring the lines of a file; say on stderr how its tokens were counted."""
    from slowllm.inference.lines import Lines, encode, job_of
    from slowllm.inference.text import max_line_tokens, prefix_id

    limit = max_line_tokens(side) - 1
    try:
        tokenizer = side.tokenizer
    except CheckpointError:
        lengths = [min(limit, ceil_div(len(text.encode()), BYTES_PER_TOKEN)) + 1 for _, text in texts]
        if not lengths:
            raise InputError("there are no lines to score") from None
        print(
            f"about {sum(lengths):,} tokens in {len(lengths):,} lines: there is no tokenizer here, so a token is counted "
            f"for every {BYTES_PER_TOKEN} bytes of a line and one before it",
            file=sys.stderr,
        )
        return Job(sum(lengths), max(lengths), forward_only=True, keeps_results=False)
    before = prefix_id(tokenizer, side.config.get_text_config().vocab_size)
    lines = Lines(encode(side, texts, max_tokens=limit, truncate=True, prefix=before))
    cut = (
        f"; {lines.num_truncated} are longer than the model takes and counted as cut"
        if lines.num_truncated
        else ""
    )
    print(
        f"{lines.num_tokens:,} tokens in {len(lines):,} lines, by the model's tokenizer{cut}", file=sys.stderr
    )
    return job_of(lines, before, rates)
