"""A line that changes in a notebook's output: it needs IPython, which is there, and no widgets."""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable
from typing import Any, Self

from slowllm.html import escaped, progress_html

# Each change is a message to the browser, which does not need more of them.
SECONDS = 0.1


class NotebookBar:
    """A bar with facts in the output of the cell that makes it. Thread-safe; shows its last state when it ends.

    Args:
        in_words: says seconds in words.
        fields: as of `update`: a description, facts (counts and rates), and what is completed of a total.
    """

    def __init__(self, in_words: Callable[[float], str], **fields: Any) -> None:
        import IPython.display

        ipython: Any = IPython.display
        self._in_words = in_words
        self._fields: dict[str, Any] = {"description": "", "completed": 0, "total": None, "facts": ([], [])}
        self._fields |= fields
        self._lock, self._started, self._shown_at = threading.Lock(), time.monotonic(), time.monotonic()
        self._has_ended = False
        self._html = ipython.HTML
        # Which cell an output belongs to is a context variable, which the carousel's thread has not.
        self._context = contextvars.copy_context()
        self._handle = ipython.display(ipython.HTML(self._text()), display_id=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._has_ended = True  # the carousel may report one more stop
            self._show()

    def update(self, **fields: Any) -> None:
        """Change fields, and show them if the last change was some time ago."""
        with self._lock:
            self._fields |= fields
            if not self._has_ended and time.monotonic() - self._shown_at >= SECONDS:
                self._show()

    def _show(self) -> None:
        self._shown_at = time.monotonic()
        self._context.run(self._handle.update, self._html(self._text()))

    def _text(self) -> str:
        counts, rates = self._fields["facts"]
        completed, total = self._fields["completed"], self._fields["total"]
        seconds = time.monotonic() - self._started
        times = [f"{self._in_words(seconds)} elapsed"]
        if self._has_ended or not total:
            bar = ""
        else:
            bar = progress_html(completed / total) + " "
            times += (
                [f"{self._in_words(seconds * (total - completed) / completed)} left"] if completed else []
            )
        facts = ", ".join([*counts, *times, *rates])
        return f"<div>{bar}<b>{escaped(self._fields['description'])}</b> {escaped(facts)}</div>"
