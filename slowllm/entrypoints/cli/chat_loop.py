"""The loop of a conversation: read a question, show the answer as it comes, obey commands.

The keys and values of a conversation are not cached between its turns. While weights stream, a few hundred tokens of
history are computed in the time of one, because the disk takes longer than either.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from slowllm.entrypoints.cli.screen import Screen
from slowllm.entrypoints.conversation import ASSISTANT, USER, Conversation, Incoming
from slowllm.entrypoints.cost import cost_of
from slowllm.entrypoints.progress import duration
from slowllm.errors import InputError, NonFiniteError, counted
from slowllm.inference.continuation import text_of
from slowllm.inference.generation import generate
from slowllm.inference.generation_types import Prompt, Settings
from slowllm.options import format_bytes
from slowllm.planning.device_plan import device_forecast, device_rates
from slowllm.planning.forecast import Forecast, forecast_of
from slowllm.planning.job import Job, Rates
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.streaming.stops import Passage

HELP = """\
/reset      forget the conversation
/save FILE  write it to a file as JSON
/help       show this list
/quit       leave, as Ctrl-D does
Ctrl-C stops an answer; what has come of it stays in the conversation."""


def token_forecast(lm: StreamedLM, rates: Rates) -> Forecast:
    """Return how long the first sweep for one token takes, and a later one."""
    job = Job(num_tokens=1, longest=1, forward_only=True)
    if lm.device_placement is not None:
        plan = replace(lm.plan, rider_tokens=1, sweep_tokens=1)
        return device_forecast(lm.sizes, lm.device_placement.plan, plan, job, device_rates(rates))
    return forecast_of(lm.sizes, lm.resident, lm.plan.ring_bytes, 1, 1, job, rates, lm.plan.kept_units)


def converse(
    lm: StreamedLM, conversation: Conversation, settings: Settings, *, context: int, rates: Rates
) -> None:
    """Read questions and show answers until the input ends or the user leaves.

    Args:
        lm: a loaded model.
        conversation: the conversation to continue.
        settings: those of each answer; the seed is that of the first one, and later answers count up from it.
        context: maximum number of tokens of the conversation with the next answer.
        rates: those of the machine, for the forecast.
    """
    screen, forecast = Screen(sys.stdout), token_forecast(lm, rates)
    cost = "a sweep a token"
    if forecast.is_measured and lm.swarm is None:
        cost = (
            f"about {duration(forecast.later_seconds)} a token, the first {duration(forecast.first_seconds)}"
        )
    screen.line(
        f"{lm.name}, {format_bytes(lm.weight_bytes)}: {cost}. /help lists the commands, Ctrl-D leaves."
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
                screen.line(_run_command(conversation, question))
            elif question:
                _take_turn(lm, conversation, question, settings, context, screen, forecast)
                if settings.seed is not None:
                    settings = replace(settings, seed=settings.seed + 1)
        except (InputError, NonFiniteError) as error:
            screen.line(str(error))
        except KeyboardInterrupt:  # at the prompt, or a second one while the first was handled
            screen.end_status()
            screen.line("\nCtrl-D or /quit leaves.")


def _read_line(screen: Screen) -> str | None:
    """Return the next line of input, None at its end; on a terminal, with a prompt and readline's keys and history."""
    if not (screen.is_terminal and sys.stdin.isatty()):
        line = sys.stdin.readline()
        return line.strip() if line else None
    # Imported for its effect on input(), and only where there is a terminal, because it writes to it.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    try:
        return input("> ").strip()
    except EOFError:
        screen.write("\n")
        return None


def _run_command(conversation: Conversation, command: str) -> str:
    """Run a command, and return the message to show.

    Raises:
        InputError: there is no such command, or a file cannot be written.
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
    """Answer one question. An interrupt stops the answer, and what has come of it stays in the conversation.

    Raises:
        InputError: the conversation is too long, or the chat template refuses it; the question is removed again.
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
        plain = Prompt(ids)  # without the stop strings, at which `Incoming` cuts the text

        def on_tokens(_prompt: int, _continuation: int, so_far: tuple[int, ...]) -> None:
            screen.write(incoming.add(text_of(lm, plain, so_far)))

        with _status(lm, screen, forecast):
            # Closed in any case: otherwise its rider would continue an answer that nobody waits for.
            continuations = cast(Any, generate(lm, [Prompt(ids, settings)], on_tokens=on_tokens))
            with contextlib.closing(continuations):
                for continuation in itertools.chain.from_iterable(continuations):
                    screen.write(incoming.add(text_of(lm, plain, continuation.ids)) + incoming.finish())
                    if continuation.finish_reason == "length":
                        screen.line(f"(cut at {counted(settings.max_new_tokens, 'token')})")
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
    """Show how far the sweep for the next token is."""
    before = lm.report.num_passages

    def on_passage(passage: Passage) -> None:
        sweep = (lm.report.num_passages - before - 1) // lm.num_stops
        # Only the very first sweep reads what stays in memory.
        seconds = forecast.later_seconds if before or sweep else forecast.first_seconds
        about = f", about {duration(seconds)}" if forecast.is_measured else ""
        place = f"{about}: stop {passage.stop + 1}/{lm.num_stops}" if lm.swarm is None else f": {cost_of(lm)}"
        screen.status(f" token {sweep + 1}{place}")

    with lm.watching(on_passage):
        yield
