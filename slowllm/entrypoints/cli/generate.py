"""The verb `generate`: parse, call, print."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slowllm.entrypoints.cli.common import (
    DeviceOption,
    DTypeOption,
    Memory,
    ModelOption,
    OutOption,
    PromptOption,
    RamOption,
    ResidentOption,
    Verbose,
    VramOption,
    checked_output,
    describe,
    log_to_stderr,
    memory_of,
)
from slowllm.errors import InputError
from slowllm.files import read_lines
from slowllm.options import parse_bytes, parse_dtype

if TYPE_CHECKING:
    from slowllm.inference.generation_types import Continuation, Prompt, Settings
    from slowllm.inference.speculative_loop import Acceptance
    from slowllm.planning.job import Job, Rates
    from slowllm.runtime.description import ModelInfo
    from slowllm.runtime.streamed_lm import StreamedLM

LOOKUP = "lookup"


def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Texts to be continued.", show_default=False)
    ] = None,
    file: Annotated[
        str | None,
        typer.Option("--prompts", help="Text file, one prompt a line; - reads standard input."),
    ] = None,
    model: ModelOption = None,
    ram: RamOption = "16GiB",
    device: DeviceOption = "cpu",
    vram: VramOption = None,
    dtype: DTypeOption = "auto",
    prompt: PromptOption = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Most tokens of a continuation; each takes a sweep.", min=1)
    ] = 2,
    beams: Annotated[int, typer.Option(help="Beams of a beam search; 1 for none.", min=1)] = 1,
    sample: Annotated[
        bool, typer.Option("--sample", help="Draw tokens, instead of taking the likeliest.")
    ] = False,
    seed: Annotated[
        int,
        typer.Option(
            help="With --sample: the same tokens as plain transformers after torch.manual_seed.", min=0
        ),
    ] = 0,
    temperature: Annotated[float | None, typer.Option(help="With --sample.", show_default="1.0")] = None,
    top_k: Annotated[
        int | None,
        typer.Option(help="With --sample: likeliest tokens drawn from; 0 for all.", min=0, show_default="50"),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="With --sample: share of the probability drawn from.", show_default="1.0"),
    ] = None,
    repetition_penalty: Annotated[float, typer.Option(help="1 for none.")] = 1.0,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="String that ends a continuation; may be given again.", show_default=False),
    ] = None,
    num_sequences: Annotated[
        int, typer.Option(help="Continuations of each prompt, with --sample or --beams.", min=1)
    ] = 1,
    log_probs: Annotated[
        int | None,
        typer.Option(help="Also give each token's log-probability, and those of so many likeliest.", min=0),
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(
            help="Several tokens a sweep, the same ones: lookup drafts from the prompt, else a small model of the same "
            "tokenizer, which is held in memory.",
            metavar="lookup|MODEL",
        ),
    ] = None,
    out: OutOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines instead of text.")] = False,
    resident: ResidentOption = True,
    verbose: Verbose = False,
) -> None:
    """Continue prompts, one sweep over the weights for each token of all of them.

    Takes the likeliest tokens unless --sample or --beams says otherwise; the checkpoint's own generation settings
    are left aside, but for its end-of-text tokens. On a terminal, the tokens of a single prompt are shown as they
    come, those of several when each is complete; what is piped, or with --json or --out, is JSON lines.
    """
    log_to_stderr(verbose)
    if bool(prompts) == (file is not None):
        raise InputError("give the prompts as arguments, or with --prompts FILE")
    # Before the model is opened: an unreadable file should not cost a wait.
    texts = list(enumerate(prompts or [], 1)) if file is None else read_lines(file)
    memory = memory_of(ram, device, vram)
    parse_dtype(dtype)
    if out is not None:
        out = checked_output(out, "-" if file is None else file)
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    sampling: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if sampling and not sample:
        raise InputError(f"--{next(iter(sampling)).replace('_', '-')} needs --sample")
    from slowllm.inference import generation_types
    from slowllm.runtime.rates import quick_rates

    settings = generation_types.Settings(
        max_new_tokens=max_new_tokens, num_beams=beams, num_return_sequences=num_sequences, do_sample=sample,
        seed=seed if sample else None, repetition_penalty=repetition_penalty, stop=tuple(stop or ()),
        top_log_probs=log_probs, **sampling,
    )  # fmt: skip
    known = describe(model, prompt)
    # All prompts are looked at before the first byte of weights is read.
    encoded = []
    for number, text in texts:
        try:
            encoded.append(generation_types.encode_prompt(known, text, settings))
        except InputError as error:
            raise InputError(f"prompt {number}: {error}") from error
        generation_types.check_prompt(known, encoded[-1], f"prompt {number}")
    rates = quick_rates(known.folder, parse_dtype(dtype))
    with contextlib.ExitStack() as stack:
        work = _Work(known, encoded, settings, rates, draft, memory, dtype, resident, stack)
        started = time.perf_counter()
        if (
            len(encoded) == 1
            and settings.num_rows == 1
            and out is None
            and not as_json
            and sys.stdout.isatty()
        ):
            _show_one(work)
        else:
            _write_all(work, texts, out, as_json)
        work.summarise(time.perf_counter() - started)


class _Work:
    """The models of one call of the verb, and what they are to do."""

    def __init__(
        self,
        known: ModelInfo,
        prompts: Sequence[Prompt],
        settings: Settings,
        rates: Rates,
        draft: str | None,
        memory: Memory,
        dtype: str,
        resident: bool,
        stack: contextlib.ExitStack,
    ) -> None:
        import psutil

        from slowllm.inference import generation, speculative
        from slowllm.inference.speculative_loop import Acceptance
        from slowllm.planning.budget import Budget
        from slowllm.runtime.description import ModelInfo
        from slowllm.runtime.load import open_model
        from slowllm.runtime.streamed_lm import StreamedLM

        self.prompts, self.settings, self.rates = prompts, settings, rates
        self.counts: Acceptance | None = None
        self.job: Job = generation.job_of(known, prompts, rates)
        self._draft: Any = None
        budget = Budget(parse_bytes(memory.ram), psutil.Process().memory_info().rss)
        if draft is not None:
            speculative.check_settings(settings)
            speculative.refuse_soft_prompt(known)
            speculative.refuse_uncroppable(known)
            self.counts = Acceptance()
            self._draft = LOOKUP
            self.job = speculative.job_of(known, prompts, rates)
            if draft != LOOKUP:
                small = ModelInfo(draft)
                # First, because the model takes all the memory that is left.
                self._draft = stack.enter_context(
                    speculative.load_draft(known, small, prompts, budget, dtype)
                )
        self.lm: StreamedLM = stack.enter_context(
            open_model(
                StreamedLM,
                known,
                ram=budget,
                device=memory.device,
                vram=memory.vram,
                dtype=dtype,
                keep_resident=resident,
                job=self.job,
                rates=rates,
            )
        )

    def run(self, on_tokens: Any = None) -> Iterator[tuple[Continuation, ...]]:
        """Yield the continuations of all prompts."""
        from slowllm.inference import generation, speculative

        if self._draft is None:
            return generation.generate(self.lm, self.prompts, on_tokens=on_tokens)
        return speculative.generate(
            self.lm, self.prompts, self._draft, rates=self.rates, counts=self.counts, on_tokens=on_tokens
        )

    def summarise(self, seconds: float) -> None:
        """Say on stderr what it cost."""
        from slowllm.entrypoints.progress import duration

        num_sweeps = self.lm.report.num_passages / self.lm.num_stops
        line = f"{num_sweeps:.3g} sweep{'' if num_sweeps == 1 else 's'} in {duration(seconds)}"
        if self.counts is not None:
            line += f"; {self.counts.tokens_per_pass:.2f} tokens a sweep and continuation"
            if self.counts.num_drafted:
                line += (
                    f", {self.counts.num_accepted:,} of {self.counts.num_drafted:,} drafted tokens accepted"
                )
            if self.counts.num_plain:
                line += f", nothing drafted in {self.counts.num_plain:,} of {self.counts.num_passes:,} passes"
        print(line, file=sys.stderr)


def _show_one(work: _Work) -> None:
    """Show the tokens of one prompt on the terminal as they come."""
    from slowllm.entrypoints.cli.screen import Screen
    from slowllm.entrypoints.conversation import Incoming
    from slowllm.entrypoints.progress import duration
    from slowllm.inference.continuation import text_of
    from slowllm.inference.generation_types import Prompt
    from slowllm.streaming.stops import Passage

    lm, forecast, (prompt,) = work.lm, work.lm.plan.forecast, work.prompts
    print(
        f"{lm.name}: about {duration(forecast.first_seconds)} for the first token, "
        f"{duration(forecast.later_seconds)} for each later one",
        file=sys.stderr,
    )
    screen, incoming = Screen(sys.stdout), Incoming(prompt.settings.stop)
    screen.write(lm.tokenizer.decode(prompt.ids, skip_special_tokens=True))
    plain, begun = Prompt(prompt.ids), False  # whose text no stop string cuts: `Incoming` does

    def on_tokens(number: int, index: int, ids: tuple[int, ...]) -> None:
        nonlocal begun
        text = text_of(lm, plain, ids)
        new = incoming.add(text)
        if new and not begun:  # `Incoming` takes off the blanks before an answer
            new, begun = text[: -len(text.lstrip())] + new, True
        screen.write(new)

    def on_passage(passage: Passage) -> None:
        sweep = (lm.report.num_passages - 1) // lm.num_stops + 1
        screen.status(f" [sweep {sweep}, stop {passage.stop + 1} of {lm.num_stops}]")

    try:
        with lm.watching(on_passage):
            for _ in work.run(on_tokens):
                screen.write(incoming.finish())
    finally:
        screen.end_status()
        screen.end_line()


def _write_all(work: _Work, texts: Sequence[tuple[int, str]], out: Path | None, as_json: bool) -> None:
    """Write every prompt with its continuations when it is complete."""
    from slowllm.entrypoints.cli import output
    from slowllm.entrypoints.progress import progress

    as_text = out is None and not as_json and sys.stdout.isatty()
    with contextlib.ExitStack() as stack:
        write = None if as_text else stack.enter_context(output.json_writer(out))
        stack.enter_context(progress(work.lm, work.job))
        for (_, text), found in zip(texts, work.run(), strict=True):
            if write is not None:
                write(_row(work.lm, text, found))
                continue
            for one in found:
                print(_printable(text + one.text))


def _printable(text: str) -> str:
    return "".join(
        letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in text
    )


def _row(lm: StreamedLM, text: str, found: Sequence[Continuation]) -> dict[str, Any]:
    return {"prompt": text, "continuations": [_continuation(lm, one) for one in found]}


def _continuation(lm: StreamedLM, one: Continuation) -> dict[str, Any]:
    row: dict[str, Any] = {
        "text": one.text,
        "finish_reason": one.finish_reason,
        "num_tokens": len(one.ids),
    }
    if one.log_probs is not None and one.top_log_probs is not None:
        row["tokens"] = [
            {
                "id": token,
                "token": lm.tokenizer.decode([token]),
                "log_prob": value,
                "top": [
                    {"id": other, "token": lm.tokenizer.decode([other]), "log_prob": best}
                    for other, best in top.items()
                ],
            }
            for token, value, top in zip(one.ids, one.log_probs, one.top_log_probs, strict=True)
        ]
    return row
