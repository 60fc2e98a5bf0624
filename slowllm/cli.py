"""The verbs of the command line: parse, call, print. Results go to stdout, progress and logs to stderr."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from slowllm.errors import InputError, SlowLLMError
from slowllm.heap import keep_together
from slowllm.options import parse_bytes, parse_dtype

app = typer.Typer(
    name="slowllm",
    help="Run and score language models far larger than memory, by streaming their weights from disk.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
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
    resident: Annotated[
        bool,
        typer.Option(
            "--resident/--stream-all", help="Keep blocks that fit the budget, or stream every block."
        ),
    ] = True,
    state: Annotated[
        Path | None,
        typer.Option(
            help="Keep what is done in this folder: the same command goes on after a crash or kill."
        ),
    ] = None,
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
    _log_to_stderr(verbose)
    texts = _read_lines(file)  # before the model is opened: an unreadable file should not cost a wait
    parse_bytes(ram)
    parse_dtype(dtype)
    if out is not None:
        out = _checked_output(out, file)
    begun = None
    if state is not None:
        from slowllm.state import read_job

        begun = read_job(state)

    import transformers

    transformers.logging.set_verbosity_error()
    from slowllm import console, measure, scoring
    from slowllm.model import Description, load

    known = Description(embedded_model() if model is None else model)
    limit = scoring.max_line_tokens(known) - prefix
    if max_tokens is not None and max_tokens > limit:
        raise InputError(f"--max-tokens {max_tokens} is more than the {limit} that this model takes")
    before = scoring.prefix_id(known.tokenizer, known.config.get_text_config().vocab_size) if prefix else None
    # All lines are looked at before the first byte of weights is read: a line too long is refused at once.
    lines = scoring.Lines(scoring.encode(known, texts, max_tokens=max_tokens or limit, truncate=truncate))
    if begun is not None and dtype == "auto":
        dtype = str(begun.get("dtype"))  # measured anew it might come out otherwise
    rates = measure.quick_rates(known.folder, parse_dtype(dtype))
    job = scoring.job_of(lines, before, rates, begun)
    with (
        load(known, ram=ram, dtype=dtype, keep_resident=resident, job=job, rates=rates) as lm,
        scoring.opened_state(state, lm, lines, before, save_every) as kept,
    ):
        started = time.perf_counter()
        totals = scoring.Totals()
        with (
            console.writer(lm, out, as_json=as_json, per_token=per_token) as write,
            console.progress(lm, job, kept),
        ):
            for score in scoring.score_lines(lm, lines, prefix=before, state=kept):
                write(score)
                totals.add(score)
        console.summarise(lm, totals, time.perf_counter() - started, lines.num_truncated)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="Folder or cached hub id of a checkpoint.")],
    ram: Annotated[str, typer.Option(help="Memory budget of the whole process.")] = "16GiB",
    tokens: Annotated[int, typer.Option(help="Tokens of the whole job.", min=1, max=10**12)] = 1024,
    longest: Annotated[
        int | None,
        typer.Option(
            help="Tokens of the longest sequence.", min=1, show_default="512, or all of a smaller job"
        ),
    ] = None,
    gradients: Annotated[
        bool, typer.Option("--gradients", help="Plan for tuning: whole blocks, which can run backward.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="Compute dtype: auto, bf16 or fp32.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    verbose: Verbose = False,
) -> None:
    """Say what a job would take on this machine, before it starts.

    Measures the disk under the model's folder and the processor on the model's first block (a few seconds), and
    prints what stays in memory, how many sweeps the job takes, how long that is, and what would make it faster. A
    job that does not fit the budget is refused with the smallest that would do.
    """
    _log_to_stderr(verbose)
    parse_bytes(ram)
    parse_dtype(dtype)
    longest = min(tokens, 512) if longest is None else longest
    if longest > tokens:
        raise InputError(f"--longest {longest} is more than all {tokens} tokens of the job")

    import transformers

    transformers.logging.set_verbosity_error()
    from slowllm import console, measure, scoring
    from slowllm.model import Description
    from slowllm.plan import Job

    job = Job(num_tokens=tokens, longest=longest, forward_only=not gradients, keeps_results=False)
    known = Description(model)
    if longest > scoring.max_line_tokens(known):
        raise InputError(
            f"--longest {longest} is more than the {scoring.max_line_tokens(known)} that this model takes"
        )
    found = measure.survey(known, ram=ram, dtype=dtype, job=job)
    console.print_survey(found, as_json=as_json)


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
    from slowllm.download import download as fetch

    typer.echo(fetch(repo, revision=revision, to=to, verify=verify))


def _checked_output(out: Path, file: str) -> Path:
    """Return the file to write, links followed, once it is known that nothing else is lost by it."""
    try:
        out = out.expanduser().resolve()
        if not out.parent.is_dir():
            raise InputError(f"{out.parent}: no such folder to write {out.name} to")
        if out.is_dir():
            raise InputError(f"{out}: is a folder; name a file")
        partial = out.with_name(out.name + ".part")
        for target in (out, partial):
            if target.exists() and not target.is_file():
                raise InputError(f"{target}: is no ordinary file; print with --json instead")
            if file != "-" and target.exists() and target.samefile(file):
                raise InputError(f"{target}: is the input; name another file")
    except (OSError, RuntimeError) as error:
        raise InputError(f"{out}: {getattr(error, 'strerror', None) or error}") from error
    return out


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


def _log_to_stderr(verbose: bool) -> None:
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    logging.getLogger("slowllm").setLevel(logging.INFO if verbose else logging.WARNING)


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
