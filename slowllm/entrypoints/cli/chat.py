"""A conversation in a terminal: what was said, how it is put to the model, and how an answer is shown as it comes.

The keys and values of a conversation are not kept between its turns: while weights stream, a few hundred tokens of
history are computed in the time of one, because the disk takes longer than either.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, cast

from rich.cells import cell_len

from slowllm.entrypoints.cli.output import duration
from slowllm.errors import InputError, NonFiniteError
from slowllm.inference.generation import Prompt, Settings, generate, text_of
from slowllm.options import format_bytes
from slowllm.planning.device_plan import device_rates
from slowllm.planning.forecast import Forecast, Job, Rates, forecast_of
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.streaming.stops import Passage

HELP = """\
/reset      forget the conversation
/save FILE  write it to a file, as JSON
/help       this
/quit       leave, as Ctrl-D does
Ctrl-C stops an answer; what has come of it stays in the conversation."""
USER, ASSISTANT = "User:", "Assistant:"
# Stops of a small model pass faster than a terminal should be written to.
STATUS_SECONDS = 0.1
# Below this much room in the line nothing is shown behind the text.
LEAST_STATUS_CELLS = 12


class Conversation:
    """What was said, as messages in the order of their saying.

    Args:
        tokenizer: of the model, whose chat template is used where it has one.
        system: what the model is told before all, if anything.
    Attributes:
        messages: each a role and a content, as OpenAI's and transformers' are.
        has_template: whether the tokenizer has a chat template; else the model continues a plain transcript.
    """

    def __init__(self, tokenizer: Any, system: str | None = None) -> None:
        self._tokenizer, self._system = tokenizer, system
        self.has_template = bool(tokenizer.chat_template)
        self.messages: list[dict[str, str]] = []
        self.reset()

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end an answer: a transcript would go on with the next question."""
        return () if self.has_template else (f"\n{USER}",)

    def reset(self) -> None:
        """Forget all but the system's message."""
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def ask(self, text: str) -> None:
        """Add what the user says."""
        self.messages.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        """Add what the model answered; where nothing came, take the question back.

        Most templates refuse two questions in a row.
        """
        if text:
            self.messages.append({"role": "assistant", "content": text})
        else:
            self.messages.pop()

    def prompt_ids(self) -> tuple[int, ...]:
        """Return the token ids that the next answer is to continue.

        Raises:
            InputError: the chat template refuses the messages.
        """
        if not self.has_template:
            return tuple(self._tokenizer(self.transcript(), verbose=False)["input_ids"])
        try:
            found = self._tokenizer.apply_chat_template(
                self.messages, add_generation_prompt=True, tokenize=True, return_dict=True
            )
        except Exception as error:  # the template is a program, and raises what it likes
            raise InputError(f"the model's chat template refuses the conversation ({error})") from error
        return tuple(found["input_ids"])

    def transcript(self) -> str:
        """Return the conversation as plain text that ends where the next answer is to begin."""
        names = {"user": f"{USER} ", "assistant": f"{ASSISTANT} ", "system": ""}
        lines = [names[message["role"]] + message["content"] for message in self.messages]
        return "\n".join([*lines, ASSISTANT])

    def save(self, path: Path) -> None:
        """Write the messages to a new file, as JSON.

        Raises:
            InputError: the file is there already, or cannot be written.
        """
        try:
            with open(path.expanduser(), "x", encoding="utf-8") as file:
                json.dump({"messages": self.messages}, file, ensure_ascii=False, indent=1)
                file.write("\n")
        except FileExistsError as error:
            raise InputError(f"{path}: is there already; name another file") from error
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


class Incoming:
    """The text of an answer as its tokens come, without what may still turn out otherwise.

    Args:
        stop: strings that end the answer.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._text, self._num_shown = "", 0

    def add(self, text: str) -> str:
        """Take the whole text so far; return what of it is new and certain."""
        self._text = text.lstrip()
        # A token may end inside a letter, and a stop string may have begun.
        sure = len(self.text)
        for stop in self._stop:
            for length in range(1, len(stop)):
                if self.text.endswith(stop[:length]):
                    sure = min(sure, len(self.text) - length)
        return self._until(sure)

    def finish(self) -> str:
        """Return the text that was held back."""
        return self._until(len(self.text))

    def _until(self, end: int) -> str:
        new = self.text[self._num_shown : end]
        self._num_shown += len(new)
        return new

    @property
    def text(self) -> str:
        """All that came, without half a letter at its end, cut before a stop string."""
        text = self._text.rstrip("\N{REPLACEMENT CHARACTER}")
        ends = [text.find(stop) for stop in self._stop if stop in text]
        return text[: min(ends)] if ends else text


class Screen:
    """Text that grows, and on a terminal a status behind it, which vanishes when more text comes.

    Written to from several threads.
    """

    def __init__(self, file: IO[str]) -> None:
        self._file, self.is_terminal = file, file.isatty()
        self._lock = threading.Lock()
        self._column = self._num_status_cells = 0
        self._shown_at = 0.0

    def write(self, text: str) -> None:
        """Write text behind what is there, control characters made visible."""
        text = text.replace("\t", "    ")
        text = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
        with self._lock:
            self._wipe()
            self._file.write(text)
            self._file.flush()
            _, newline, last = text.rpartition("\n")
            self._column = (0 if newline else self._column) + cell_len(last)

    def line(self, text: str) -> None:
        """Write a line of its own."""
        self.end_line()
        self.write(text + "\n")

    def end_line(self) -> None:
        """Go to the next line, unless this one is empty."""
        self.write("\n" if self._column else "")

    def status(self, text: str) -> None:
        """Show a status, where there is a terminal and room in its line; never raises."""
        if not self.is_terminal or time.monotonic() - self._shown_at < STATUS_SECONDS:
            return
        with self._lock, contextlib.suppress(OSError, ValueError):  # the terminal may be gone
            self._shown_at = time.monotonic()
            self._wipe()
            width = os.get_terminal_size(self._file.fileno()).columns or 80  # 0: it does not know
            # One column less: a full line would go on in the next, from which there is no way back.
            room = width - self._column % width - 1
            if room >= LEAST_STATUS_CELLS:
                text = text[:room]
                self._file.write(f"\033[2m{text}\033[0m")
                self._file.flush()
                self._num_status_cells = cell_len(text)

    def end_status(self) -> None:
        """Take the status away."""
        with self._lock:
            self._wipe()
            self._file.flush()

    def _wipe(self) -> None:
        if self._num_status_cells:
            self._file.write(f"\033[{self._num_status_cells}D\033[K")
            self._num_status_cells = 0


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
    sizes = next(sizes for sizes in lm.choices if sizes.granularity == lm.plan.granularity)
    job = Job(num_tokens=1, longest=1, forward_only=True)
    rates = rates if lm.placed is None else device_rates(rates)
    return forecast_of(sizes, lm.resident, lm.plan.ring_bytes, 1, 1, job, rates)


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

    lm.on_passage = on_passage
    try:
        yield
    finally:
        lm.on_passage = None
