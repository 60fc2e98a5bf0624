"""A conversation in a terminal: what was said, how it is put to the model, and how an answer is shown as it comes.

The keys and values of a conversation are not kept between its turns: while weights stream, a few hundred tokens of
history are computed in the time of one, because the disk takes longer than either.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from slowllm.entrypoints.cli.common import (
    DeviceOption,
    DTypeOption,
    ModelOption,
    RamOption,
    ResidentOption,
    Verbose,
    VramOption,
    describe,
    log_to_stderr,
    memory_of,
)
from slowllm.entrypoints.cli.screen import Screen
from slowllm.entrypoints.conversation import ASSISTANT, USER, Conversation, Incoming
from slowllm.entrypoints.progress import duration
from slowllm.errors import InputError, NonFiniteError
from slowllm.inference.continuation import text_of
from slowllm.inference.generation import generate
from slowllm.inference.generation_types import Prompt, Settings
from slowllm.options import format_bytes, parse_dtype
from slowllm.planning.device_plan import device_rates
from slowllm.planning.forecast import Forecast, forecast_of
from slowllm.planning.job import Job, Rates
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.streaming.stops import Passage

HELP = """\
/reset      forget the conversation
/save FILE  write it to a file, as JSON
/help       this
/quit       leave, as Ctrl-D does
Ctrl-C stops an answer; what has come of it stays in the conversation."""


def job_of(context: int, settings: Settings) -> Job:
    """Return what the plan must know of a conversation of at most `context` tokens."""
    return Job(
        num_tokens=context,
        longest=context,
        repeated=True,
        forward_only=True,
        keeps_results=True,
        num_passes=min(settings.max_new_tokens, context),
    )


def token_forecast(lm: StreamedLM, rates: Rates) -> Forecast:
    """Return how long a sweep of one token takes, the first and a later one."""
    job = Job(num_tokens=1, longest=1, forward_only=True)
    rates = rates if lm.device_placement is None else device_rates(rates)
    return forecast_of(lm.sizes, lm.resident, lm.plan.ring_bytes, 1, 1, job, rates)


def converse(
    lm: StreamedLM, conversation: Conversation, settings: Settings, *, context: int, rates: Rates
) -> None:
    """Read questions and show answers until the input ends or the user leaves.

    Args:
        lm: a loaded model.
        conversation: that is gone on with.
        settings: of each answer; its seed is that of the first one, and counts on.
        context: most tokens of the conversation with the next answer.
        rates: of the machine, for the forecast.
    """
    screen, forecast = Screen(sys.stdout), token_forecast(lm, rates)
    screen.line(
        f"{lm.name}, {format_bytes(lm.weight_bytes)}: about {duration(forecast.later_seconds)} a token, the first "
        f"{duration(forecast.first_seconds)}. /help lists the commands, Ctrl-D leaves."
    )
    if not conversation.has_template:
        screen.line(
            "This model's tokenizer has no chat template, so the model continues a plain transcript "
            f"({USER} ... {ASSISTANT})."
        )
    settings = replace(settings, stop=(*settings.stop, *conversation.stop))
    while True:
        try:
            question = _read_line(screen)
            if question is None or question == "/quit":
                return
            if question.startswith("/"):
                screen.line(_obey(conversation, question))
            elif question:
                _take_turn(lm, conversation, question, settings, context, screen, forecast)
                if settings.seed is not None:
                    settings = replace(settings, seed=settings.seed + 1)
        except (InputError, NonFiniteError) as error:
            screen.line(str(error))
        except KeyboardInterrupt:  # at the prompt, or a second one while the first was being heard
            screen.end_status()
            screen.line("\nCtrl-D or /quit leaves.")


def _read_line(screen: Screen) -> str | None:
    """Return the next line of input, None at its end; on a terminal with a prompt and readline's keys and history."""
    if not (screen.is_terminal and sys.stdin.isatty()):
        line = sys.stdin.readline()
        return line.strip() if line else None
    # Imported for what it does to input(), and only where there is a terminal, because it writes to it.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    try:
        return input("> ").strip()
    except EOFError:
        screen.write("\n")
        return None


def _obey(conversation: Conversation, command: str) -> str:
    """Do what a command says, and return what is to be said of it.

    Raises:
        InputError: a file cannot be written.
    """
    name, _, argument = command.partition(" ")
    argument = argument.strip()
    if name == "/reset" and not argument:
        conversation.reset()
        return "The conversation is forgotten."
    if name == "/save":
        if not argument:
            raise InputError("/save needs the name of a file")
        conversation.save(Path(argument))
        return f"{len(conversation.messages)} messages are in {argument}."
    if name == "/help":
        return HELP
    raise InputError(f"{command}: no such command; /help lists them")


def _take_turn(
    lm: StreamedLM,
    conversation: Conversation,
    question: str,
    settings: Settings,
    context: int,
    screen: Screen,
    forecast: Forecast,
) -> None:
    """Answer one question; an interrupt ends the answer, and what came of it stays.

    Raises:
        InputError: the conversation is too long, or the chat template refuses it; the question is taken back.
    """
    conversation.ask(question)
    incoming = Incoming(settings.stop)
    try:
        ids = conversation.prompt_ids()
        room = context - len(ids)
        if room < 1:
            raise InputError(
                f"the conversation has {len(ids):,} tokens with this question, and no more than {context:,} with the "
                "answer are taken; /reset begins a new one"
            )
        settings = replace(settings, max_new_tokens=min(settings.max_new_tokens, room))
        plain = Prompt(ids)  # whose text no stop string cuts

        def on_tokens(_prompt: int, _continuation: int, so_far: tuple[int, ...]) -> None:
            screen.write(incoming.add(text_of(lm, plain, so_far)))

        with _status(lm, screen, forecast):
            # Closed whatever happens: else its rider would go on with an answer that nobody waits for.
            found = cast(Any, generate(lm, [Prompt(ids, settings)], on_tokens=on_tokens))
            with contextlib.closing(found):
                for continuation in itertools.chain.from_iterable(found):
                    screen.write(incoming.add(text_of(lm, plain, continuation.ids)) + incoming.finish())
                    if continuation.finish_reason == "length":
                        screen.line(f"(cut at {settings.max_new_tokens} tokens)")
        if not incoming.text:
            screen.line("(the model ended at once; the question is taken back)")
    except KeyboardInterrupt:
        screen.write(incoming.finish())
        screen.line(
            "(stopped)" if incoming.text else "(stopped before anything came; the question is taken back)"
        )
    finally:
        screen.end_status()
        conversation.answer(incoming.text.strip())
    screen.end_line()


@contextlib.contextmanager
def _status(lm: StreamedLM, screen: Screen, forecast: Forecast) -> Iterator[None]:
    """Show how far the carousel is with the next token."""
    before = lm.report.num_passages

    def on_passage(passage: Passage) -> None:
        sweep = (lm.report.num_passages - before - 1) // lm.num_stops
        # What stays in memory is read by the first sweep of all.
        seconds = forecast.later_seconds if before or sweep else forecast.first_seconds
        screen.status(
            f" token {sweep + 1}, about {duration(seconds)}: stop {passage.stop + 1}/{lm.num_stops}"
        )

    with lm.watching(on_passage):
        yield


def chat(
    model: ModelOption = None,
    ram: RamOption = "16GiB",
    device: DeviceOption = "cpu",
    vram: VramOption = None,
    dtype: DTypeOption = "auto",
    system: Annotated[
        str | None, typer.Option("--system", help="What the model is told before the conversation.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.", min=1)] = 128,
    context: Annotated[
        int,
        typer.Option(
            help="Most tokens of the conversation with the next answer; memory is planned for them.", min=2
        ),
    ] = 1024,
    temperature: Annotated[
        float, typer.Option(help="Of sampling; 0 takes the likeliest token.", min=0.0)
    ] = 0.7,
    top_p: Annotated[float, typer.Option(help="Share of the probability drawn from.", max=1.0)] = 1.0,
    top_k: Annotated[int, typer.Option(help="Likeliest tokens drawn from; 0 for all.", min=0)] = 0,
    repetition_penalty: Annotated[float, typer.Option(help="1 for none.")] = 1.0,
    seed: Annotated[
        int | None, typer.Option(help="Of the first answer; those after it count on.", min=0)
    ] = None,
    resident: ResidentOption = True,
    verbose: Verbose = False,
) -> None:
    """Talk with a model in the terminal; each token of an answer takes a sweep.

    The time of a token is shown before the first. /help lists the commands; Ctrl-C stops an answer, what came of it
    stays in the conversation; Ctrl-D leaves. A model whose tokenizer has no chat template continues a plain
    transcript.
    """
    log_to_stderr(verbose)
    memory = memory_of(ram, device, vram)
    parse_dtype(dtype)
    from slowllm.entrypoints.conversation import Conversation
    from slowllm.inference.generation_types import Settings
    from slowllm.inference.text import max_line_tokens
    from slowllm.runtime.load import open_model
    from slowllm.runtime.rates import quick_rates
    from slowllm.runtime.streamed_lm import StreamedLM

    known = describe(model)
    sampling: dict[str, Any] = {}
    if temperature:
        sampling = {
            "do_sample": True,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "seed": seed,
        }
    settings = Settings(max_new_tokens=max_new_tokens, repetition_penalty=repetition_penalty, **sampling)
    context = min(context, max_line_tokens(known))
    conversation = Conversation(known.tokenizer, system)
    if system is not None and len(known.tokenizer(system, verbose=False)["input_ids"]) >= context:
        raise InputError(f"--system alone takes all {context} tokens of the conversation")
    rates = quick_rates(known.folder, parse_dtype(dtype))
    job = job_of(context, settings)
    with open_model(
        StreamedLM,
        known,
        ram=memory.ram,
        device=memory.device,
        vram=memory.vram,
        dtype=dtype,
        keep_resident=resident,
        job=job,
        rates=rates,
    ) as lm:
        converse(lm, conversation, settings, context=context, rates=rates)
