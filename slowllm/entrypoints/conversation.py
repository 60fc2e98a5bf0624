"""A conversation: turns to a prompt, and an answer to text as its tokens come."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slowllm.errors import InputError
from slowllm.inference.chat_templates import chat_ids
from slowllm.inference.text import encode_text

USER, ASSISTANT = "User:", "Assistant:"


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
            return encode_text(self._tokenizer, self.transcript())
        try:
            return chat_ids(self._tokenizer, self.messages)
        except Exception as error:  # the template is a program, and raises what it likes
            raise InputError(f"the model's chat template refuses the conversation ({error})") from error

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
