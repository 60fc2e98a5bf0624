"""`slowllm generate`: continue prompts, one sweep for each token of all of them."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slowllm.entrypoints.cli import inputs, options
from slowllm.entrypoints.cli.generate_work import GenerateWork, open_work, print_plan
from slowllm.entrypoints.cli.left_aside import name_settings_left_aside
from slowllm.entrypoints.cli.output import json_writer, print_tokens, printable, prints_text, token_rows
from slowllm.entrypoints.cli.runner import Runner
from slowllm.entrypoints.cli.swarm_options import SwarmChoice, takes_swarm
from slowllm.entrypoints.cost import cost_of
from slowllm.entrypoints.report.recorder import RunReport, reporting
from slowllm.entrypoints.report.results import PromptContinued
from slowllm.errors import InputError
from slowllm.files import read_lines

if TYPE_CHECKING:
    from slowllm.inference.generation_types import Continuation
    from slowllm.streaming.stops import Passage

# In place of a file's name, where prompts are arguments.
ARGUMENTS = ""


@takes_swarm
def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Texts to continue.", show_default=False)
    ] = None,
    file: Annotated[
        list[str] | None,
        typer.Option(
            "--prompts",
            help="Text file, one prompt a line; - reads standard input, as does giving no prompt at all. May be given "
            "several times.",
            show_default=False,
        ),
    ] = None,
    model: options.Model = None,
    ram: options.Ram = "auto",
    device: options.Device = "cpu",
    vram: options.Vram = None,
    dtype: options.DType = "auto",
    prompt: options.Prompt = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Maximum number of tokens of a continuation; each takes a sweep.", min=1)
    ] = 2,
    beams: Annotated[int, typer.Option(help="Number of beams of a beam search; 1 for none.", min=1)] = 1,
    sample: Annotated[
        bool, typer.Option("--sample", help="Sample the tokens instead of taking the most likely ones.")
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option(
            help="With --sample: seed; gives the tokens of plain transformers after torch.manual_seed.",
            min=0,
            show_default="0",
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="With --sample: sampling temperature.", show_default="1.0")
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            help="With --sample: sample from this many most likely tokens; 0 for all.", min=0, show_default="50"
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="With --sample: sample from the most likely tokens that have this share of the probability.",
            show_default="1.0",
        ),
    ] = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="Penalty on tokens that occurred before; 1 for none.")
    ] = 1.0,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="String that ends a continuation; may be given several times.", show_default=False),
    ] = None,
    num_sequences: Annotated[
        int, typer.Option(help="Number of continuations of each prompt, with --sample or --beams.", min=1)
    ] = 1,
    log_probs: Annotated[
        int | None,
        typer.Option(
            help="Also give each token's log-probability, and those of this many most likely tokens.", min=0
        ),
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(
            help="Speculative decoding, which gives the same tokens in fewer sweeps: lookup drafts from the prompt; "
            "otherwise a small model with the same tokenizer, which is kept in memory, drafts.",
            metavar="lookup|MODEL",
        ),
    ] = None,
    out: options.Out = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines instead of text.")] = False,
    resident: options.Resident = True,
    swarm: SwarmChoice = SwarmChoice(),  # noqa: B008 (frozen)
    state: options.State = None,
    overwrite: options.Overwrite = False,
    report: options.Report = None,
    exact: options.Exact = True,
    dry_run: options.DryRun = False,
    verbose: options.Verbose = False,
) -> None:  # fmt: skip
    """Continue prompts; each sweep adds a token to all of them.

    Takes the most likely tokens unless --sample or --beams says otherwise. Of the checkpoint's own generation settings
    only the end-of-text tokens are used. On a terminal, the tokens of a single prompt are shown as they come, and
    several prompts when each is complete; a pipe, --json and --out get JSON lines.
    """
    options.log_to_stderr(verbose)
    entries = _entries(prompts, file)
    runner = Runner(
        model, ram, device, vram, dtype, prompt=prompt, resident=resident, swarm=swarm, state=state, kind="generate",
        overwrite=overwrite, dry_run=dry_run, exact=exact,
    )  # fmt: skip
    out = runner.check_output(out, *(file or ()))
    report = runner.check_report(report, *(file or ()))
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    sampling: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if sampling and not sample:
        raise InputError(f"--{next(iter(sampling)).replace('_', '-')} needs --sample")
    if sample:
        sampling.setdefault("seed", 0)
    from slowllm.inference.generation_types import Settings, check_prompt, encode_prompt

    settings = Settings(
        max_new_tokens=max_new_tokens, num_beams=beams, num_return_sequences=num_sequences, do_sample=sample,
        repetition_penalty=repetition_penalty, stop=tuple(stop or ()),
        top_log_probs=log_probs, **sampling,
    )  # fmt: skip
    runner.load_libraries()
    # All prompts are checked before the first byte of weights is read.
    encoded = []
    for entry in entries:
        name = f"prompt {entry.number}" if entry.file == ARGUMENTS else entry.where
        try:
            encoded.append(encode_prompt(runner.info, entry.text, settings))
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        check_prompt(runner.info, encoded[-1], name)
    if dry_run:
        print_plan(runner, encoded, settings, draft, as_json)
        return
    name_settings_left_aside(runner.info)
    with (
        reporting(report, "slowllm generate") as told,
        open_work(runner, encoded, settings, draft) as work,
        told.watching(work.lm, work.job, work.state),
    ):
        started = time.perf_counter()
        # Tokens of a continuation that is taken from a state do not come one by one.
        is_shown = len(encoded) == 1 and settings.num_rows == 1 and prints_text(out, as_json)
        if is_shown and work.state is None:
            _show_one(work, entries[0].text, told)
        else:
            _write_all(work, [entry.text for entry in entries], out, as_json, told)
        work.summarise(time.perf_counter() - started)


def _entries(prompts: Sequence[str] | None, files: Sequence[str] | None) -> list[inputs.Entry]:
    """Return the prompts: of the command line, of files, or of standard input where nothing is named."""
    wanted = "give the prompts as arguments, or with --prompts FILE"
    if prompts and files:
        raise InputError(wanted)
    for text in prompts or ():
        with contextlib.suppress(OSError, ValueError):  # too long for a name, or no name at all
            if Path(text).is_file():
                inputs.warn(
                    f"{text} is a file, but its name is continued; --prompts {text} continues its lines"
                )
    if prompts:
        return [inputs.Entry(ARGUMENTS, number, text) for number, text in enumerate(prompts, 1)]
    if not files:
        if not inputs.has_piped_input():
            raise InputError(wanted)
        lines = read_lines("-", missing=f"has no non-empty line; {wanted}")
        return [inputs.Entry("-", number, text) for number, text in lines]
    for file in inputs.choose_files(files, None, ""):
        inputs.warn_of_parts(file, "continued", "`slowllm batch` answers requests in JSON Lines")
    return inputs.read_entries(files, None)


def _show_one(work: GenerateWork, text: str, told: RunReport) -> None:
    """Show the tokens of one prompt on the terminal as they come."""
    from slowllm.entrypoints.cli.screen import Screen
    from slowllm.entrypoints.conversation import Incoming
    from slowllm.entrypoints.progress import duration
    from slowllm.inference.continuation import text_of
    from slowllm.inference.generation_types import Prompt

    lm, forecast, (prompt,) = work.lm, work.lm.plan.forecast, work.prompts
    if forecast.is_measured and lm.swarm is None:
        print(
            f"{lm.name}: about {duration(forecast.first_seconds)} for the first token, "
            f"{duration(forecast.later_seconds)} for each later one",
            file=sys.stderr,
        )
    screen, incoming = Screen(sys.stdout), Incoming(prompt.settings.stop)
    screen.write(lm.tokenizer.decode(prompt.ids, skip_special_tokens=True))
    plain = Prompt(prompt.ids)  # without the stop strings, at which `Incoming` cuts the text
    has_begun = False

    def on_tokens(number: int, index: int, ids: tuple[int, ...]) -> None:
        nonlocal has_begun
        told.on_tokens(number, index, ids)
        text = text_of(lm, plain, ids)
        new = incoming.add(text)
        if (
            new and not has_begun
        ):  # `Incoming` strips the blanks before an answer; here they are part of the text
            new, has_begun = text[: -len(text.lstrip())] + new, True
        screen.write(new)

    def on_passage(passage: Passage) -> None:
        sweep = (lm.report.num_passages - 1) // lm.num_stops + 1
        place = f"sweep {sweep}, stop {passage.stop + 1} of {lm.num_stops}"
        screen.status(f" [{place if lm.swarm is None else cost_of(lm)}]")

    try:
        with lm.watching(on_passage):
            (continuations,) = work.run(on_tokens)
            screen.write(incoming.finish())
            told.add(PromptContinued(text, continuations))
    finally:
        screen.end_status()
        screen.end_line()
    for continuation in continuations:
        _print_tokens(lm.tokenizer, continuation)


def _write_all(
    work: GenerateWork, texts: Sequence[str], out: Path | None, as_json: bool, told: RunReport
) -> None:
    """Write every prompt with its continuations when it is complete."""
    from slowllm.entrypoints.progress import progress

    with contextlib.ExitStack() as stack:
        write = None if prints_text(out, as_json) else stack.enter_context(json_writer(out))
        count = stack.enter_context(progress(work.lm, work.job, work.state, noun="prompt", total=len(texts)))
        results = work.run(told.on_tokens if told else None)
        for text, continuations in zip(texts, results, strict=True):
            told.add(PromptContinued(text, continuations))
            count(sum(len(continuation.ids) for continuation in continuations))
            if write is not None:
                rows = [_row(work.lm.tokenizer, continuation) for continuation in continuations]
                write({"prompt": text, "continuations": rows})
                continue
            for continuation in continuations:
                print(printable(text + continuation.text, keep="\n"))
                _print_tokens(work.lm.tokenizer, continuation)


def _print_tokens(tokenizer: Any, continuation: Continuation) -> None:
    if rows := _row(tokenizer, continuation).get("tokens"):
        print_tokens("log-probability of each new token, and the likeliest in its place", rows)
        print()


def _row(tokenizer: Any, continuation: Continuation) -> dict[str, Any]:
    row: dict[str, Any] = {
        "text": continuation.text,
        "finish_reason": continuation.finish_reason,
        "num_tokens": len(continuation.ids),
    }
    if continuation.log_probs is not None and continuation.top_log_probs is not None:
        tokens = token_rows(tokenizer, continuation.ids, continuation.log_probs)
        row["tokens"] = [
            {**token, "top": token_rows(tokenizer, list(top), list(top.values()))}
            for token, top in zip(tokens, continuation.top_log_probs, strict=True)
        ]
    return row
