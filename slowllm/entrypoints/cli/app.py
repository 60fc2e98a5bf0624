"""The verbs of the command line: parse, call, print. Results go to stdout, progress and logs to stderr."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from slowllm.entrypoints.cli.batch import batch, chat
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
    read_lines,
)
from slowllm.entrypoints.cli.evaluate import eval_app
from slowllm.entrypoints.cli.generate import generate
from slowllm.entrypoints.cli.prepare import convert, verify
from slowllm.entrypoints.cli.score import score, yesno
from slowllm.entrypoints.cli.tune import tune
from slowllm.errors import InputError, SlowLLMError
from slowllm.malloc import keep_together
from slowllm.options import parse_dtype

app = typer.Typer(
    name="slowllm",
    help="Run, score and tune language models far larger than memory, by streaming their weights from disk.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        from slowllm.version import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.command()
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
    from slowllm.entrypoints.cli import output
    from slowllm.inference import scoring
    from slowllm.inference.lines import Lines, Totals, encode, job_of, opened_state, score_lines
    from slowllm.runtime import survey
    from slowllm.runtime.streamed_lm import load

    known = describe(model, prompt)
    limit = scoring.max_line_tokens(known) - prefix
    if max_tokens is not None and max_tokens > limit:
        raise InputError(f"--max-tokens {max_tokens} is more than the {limit} that this model takes")
    before = scoring.prefix_id(known.tokenizer, known.config.get_text_config().vocab_size) if prefix else None
    # All lines are looked at before the first byte of weights is read: a line too long is refused at once.
    lines = Lines(encode(known, texts, max_tokens=max_tokens or limit, truncate=truncate))
    if begun is not None and dtype == "auto":
        dtype = str(begun.get("dtype"))  # measured anew it might come out otherwise
    rates = survey.quick_rates(known.folder, parse_dtype(dtype))
    job = job_of(lines, before, rates, begun, known.num_virtual_tokens)
    with (
        load(
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
        totals = Totals()
        with (
            output.writer(lm, out, as_json=as_json, per_token=per_token) as write,
            output.progress(lm, job, kept),
        ):
            for score in score_lines(lm, lines, prefix=before, state=kept):
                write(score)
                totals.add(score)
        output.summarise(lm, totals, time.perf_counter() - started, lines.num_truncated)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="Folder or cached hub id of a checkpoint.")],
    ram: RamOption = "16GiB",
    device: DeviceOption = "cpu",
    vram: VramOption = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the whole job.", min=1, max=10**12)] = 1024,
    longest: Annotated[
        int | None,
        typer.Option(
            help="Tokens of the longest sequence.", min=1, show_default="512, or all of a smaller job"
        ),
    ] = None,
    gradients: Annotated[
        bool, typer.Option("--gradients", help="Plan steps of tuning, which go up the blocks and down again.")
    ] = False,
    dtype: DTypeOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    verbose: Verbose = False,
) -> None:
    """Say what a job would take on this machine, before it starts.

    Measures the disk under the model's folder and the processor on the model's first block (a few seconds), and
    prints what stays in memory, how many sweeps the job takes, how long that is, and what would make it faster. A
    job that does not fit the budget is refused with the smallest that would do.
    """
    log_to_stderr(verbose)
    memory = memory_of(ram, device, vram)
    parse_dtype(dtype)
    longest = min(tokens, 512) if longest is None else longest
    if longest > tokens:
        raise InputError(f"--longest {longest} is more than all {tokens} tokens of the job")

    from slowllm.entrypoints.cli import output
    from slowllm.inference import scoring
    from slowllm.planning.forecast import Job
    from slowllm.runtime import survey

    job = Job(
        num_tokens=tokens, longest=longest, forward_only=not gradients, keeps_results=False, turns=gradients
    )
    known = describe(model)
    if longest > scoring.max_line_tokens(known):
        raise InputError(
            f"--longest {longest} is more than the {scoring.max_line_tokens(known)} that this model takes"
        )
    found = survey.survey(known, ram=memory.ram, device=memory.device, vram=memory.vram, dtype=dtype, job=job)
    output.print_survey(found, as_json=as_json)


@app.command()
def download(
    repo: Annotated[str, typer.Argument(help="Hub id of a model, such as bigscience/bloom.")],
    revision: Annotated[str, typer.Option(help="Branch, tag or commit.")] = "main",
    to: Annotated[
        Path | None, typer.Option(help="Write to this folder.", show_default="the Hugging Face cache")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare the SHA-256 of LFS files with the hub's.")
    ] = True,
) -> None:
    """Fetch what streaming needs of a model on the hub, and print its folder.

    That is safetensors, tokenizer and configs; no pickles, no other copies of the weights. The space is checked
    first. After an interrupt, a crash or a lost connection the same command goes on where it was. Sizes are always
    compared with the hub's. Afterwards `slowllm forward --model REPO` finds the model in the cache; with --to, or a
    --revision other than main, give it the folder that is printed.

    For gated models log in with `hf auth login`, or set HF_TOKEN.
    """
    from slowllm.prepare.download import download as fetch

    typer.echo(fetch(repo, revision=revision, to=to, verify=verify))


app.command()(generate)
app.command()(batch)
app.command()(chat)
app.command()(score)
app.command()(yesno)
app.command()(tune)
app.command()(convert)
app.command()(verify)
app.add_typer(eval_app, name="eval")


def run() -> None:
    """Run the command line: one sentence and exit code 2 for what the user can mend.

    An interrupt exits with 130 and a closed pipe with 1, as click has it.
    """
    keep_together()
    try:
        app()
    except SlowLLMError as error:
        print(f"slowllm: {error}", file=sys.stderr)
        sys.exit(2)
