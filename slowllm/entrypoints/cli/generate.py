"""`slowllm generate`: continue prompts, one sweep for each token of all of them."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from slowllm.entrypoints.cli import inputs, options
from slowllm.entrypoints.cli.output import json_writer, print_tokens, printable, prints_text, token_rows
from slowllm.entrypoints.cli.left_aside import name_settings_left_aside
from slowllm.entrypoints.cli.runner import Runner
from slowllm.entrypoints.cli.swarm_options import SwarmChoice, takes_swarm
from slowllm.entrypoints.cost import cost_of
from slowllm.errors import InputError
from slowllm.files import read_lines

if TYPE_CHECKING:
    from slowllm.inference.generation_types import Continuation, OnTokens, Prompt, Settings
    from slowllm.inference.speculative_loop import Acceptance
    from slowllm.planning.job import Job, Rates
    from slowllm.runtime.state import State
    from slowllm.runtime.streamed_lm import StreamedLM
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
        overwrite=overwrite, dry_run=dry_run,
    )  # fmt: skip
    out = runner.check_output(out, *(file or ()))
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
        _print_plan(runner, encoded, settings, draft, as_json)
        return
    name_settings_left_aside(runner.info)
    with _open(runner, encoded, settings, draft) as work:
        started = time.perf_counter()
        # Tokens of a continuation that is taken from a state do not come one by one.
        is_shown = len(encoded) == 1 and settings.num_rows == 1 and prints_text(out, as_json)
        if is_shown and work.state is None:
            _show_one(work)
        else:
            _write_all(work, [entry.text for entry in entries], out, as_json)
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


@dataclass
class _Work:
    """The prompts of one call of the verb, the model that continues them, what drafts for it, and the job's state."""

    lm: StreamedLM
    prompts: Sequence[Prompt]
    job: Job
    rates: Rates
    draft: StreamedLM | Literal["lookup"] | None
    counts: Acceptance | None
    state: State | None

    def run(self, on_tokens: OnTokens | None = None) -> Iterator[tuple[Continuation, ...]]:
        """Yield the continuations of all prompts."""
        from slowllm.inference import generation, speculative

        if self.draft is None:
            return generation.generate(self.lm, self.prompts, on_tokens=on_tokens, state=self.state)
        return speculative.generate(
            self.lm, self.prompts, self.draft, rates=self.rates, counts=self.counts, on_tokens=on_tokens,
            state=self.state,
        )  # fmt: skip

    def summarise(self, seconds: float) -> None:
        """Print to stderr what it cost."""
        from slowllm.entrypoints.progress import duration

        line = f"{cost_of(self.lm)} in {duration(seconds)}"
        if (counts := self.counts) is not None:
            unit = "sweep" if self.lm.swarm is None else "pass"
            line += f"; {counts.tokens_per_pass:.2f} tokens a {unit} and continuation"
            if counts.num_drafted:
                line += f", {counts.num_accepted:,} of {counts.num_drafted:,} drafted tokens accepted"
            if counts.num_plain:
                line += f", nothing drafted in {counts.num_plain:,} of {counts.num_passes:,} passes"
        print(line, file=sys.stderr)


@contextlib.contextmanager
def _open(
    runner: Runner, prompts: Sequence[Prompt], settings: Settings, draft: str | None
) -> Iterator[_Work]:
    """Open the model, and the draft model if one is named, within one budget; and the job's state."""
    import psutil

    from slowllm.inference import generation, speculative
    from slowllm.inference.speculative_loop import Acceptance
    from slowllm.planning.budget import Budget
    from slowllm.runtime.description import ModelInfo
    from slowllm.runtime.memory import budget_bytes
    from slowllm.runtime.run_identity import batch_identity, digest_of

    info, rates = runner.info, runner.rates

    def opened_state(lm: StreamedLM, drafter: StreamedLM | str | None) -> State | None:
        def describe() -> dict[str, Any]:
            name = drafter if drafter is None or isinstance(drafter, str) else drafter.fingerprint()
            return batch_identity(
                "generate", lm,
                prompts=digest_of(prompt.ids for prompt in prompts),
                settings=asdict(settings),
                draft=name,
            )  # fmt: skip

        return stack.enter_context(runner.resuming(describe))

    with contextlib.ExitStack() as stack:
        budget = Budget(budget_bytes(runner.ram), psutil.Process().memory_info().rss)
        if draft is None:
            job = generation.job_of(info, prompts, rates, runner.begun)
            lm = stack.enter_context(runner.open(job, budget))
            yield _Work(lm, prompts, job, rates, None, None, opened_state(lm, None))
            return
        job = _speculative_job(runner, prompts, settings)
        drafter: StreamedLM | Literal["lookup"] = "lookup"
        if draft != "lookup":
            # First, because the streamed model takes all the memory that is left.
            drafter = stack.enter_context(
                speculative.load_draft(info, ModelInfo(draft), prompts, budget, runner.dtype)
            )
        lm = stack.enter_context(runner.open(job, budget))
        yield _Work(lm, prompts, job, rates, drafter, Acceptance(), opened_state(lm, drafter))


def _speculative_job(runner: Runner, prompts: Sequence[Prompt], settings: Settings) -> Job:
    """Return the job with drafts.

    Raises:
        InputError: nothing can be drafted with these settings or this model.
    """
    from slowllm.inference import speculative

    speculative.check_settings(settings)
    speculative.refuse_soft_prompt(runner.info)
    speculative.refuse_uncroppable(runner.info)
    return speculative.job_of(runner.info, prompts, runner.rates, runner.begun)


def _print_plan(
    runner: Runner, prompts: Sequence[Prompt], settings: Settings, draft: str | None, as_json: bool
) -> None:
    """Print the plan of the job; a draft model is opened for it, because it takes a part of the budget."""
    import psutil

    from slowllm.inference import generation, speculative
    from slowllm.planning.budget import Budget
    from slowllm.runtime.description import ModelInfo
    from slowllm.runtime.memory import budget_bytes

    if draft is None:
        runner.print_plan(
            generation.job_of(runner.info, prompts, runner.rates, runner.begun), as_json=as_json
        )
        return
    job, reserved_bytes = _speculative_job(runner, prompts, settings), 0
    if draft != "lookup":
        budget = Budget(budget_bytes(runner.ram), psutil.Process().memory_info().rss)
        with speculative.load_draft(runner.info, ModelInfo(draft), prompts, budget, runner.dtype) as drafter:
            reserved_bytes = drafter.plan.peak_bytes
    runner.print_plan(job, as_json=as_json, reserved_bytes=reserved_bytes)


def _show_one(work: _Work) -> None:
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
    finally:
        screen.end_status()
        screen.end_line()
    for continuation in continuations:
        _print_tokens(lm.tokenizer, continuation)


def _write_all(work: _Work, texts: Sequence[str], out: Path | None, as_json: bool) -> None:
    """Write every prompt with its continuations when it is complete."""
    from slowllm.entrypoints.progress import progress

    with contextlib.ExitStack() as stack:
        write = None if prints_text(out, as_json) else stack.enter_context(json_writer(out))
        count = stack.enter_context(progress(work.lm, work.job, work.state, noun="prompt", total=len(texts)))
        for text, continuations in zip(texts, work.run(), strict=True):
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
