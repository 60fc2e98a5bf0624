"""How the verbs that run for days write on stderr: sentences for people, or one JSON object a line for programs."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from slowllm.entrypoints.cli import options
from slowllm.errors import InputError

FORMATS = ("text", "json")
LogFormat = Annotated[
    str,
    typer.Option(
        "--log-format",
        help="How stderr is written: sentences, or a JSON object a line with time, level, logger and message.",
        metavar="|".join(FORMATS),
    ),
]


class JsonLines(logging.Formatter):
    """Formats a record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, with the traceback under ``traceback`` where there is one."""
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        said = {
            "time": at.isoformat(timespec="milliseconds"), "level": _level(record.levelno), "logger": record.name,
            "message": record.getMessage(),
        }  # fmt: skip
        if record.exc_info:
            said["traceback"] = self.formatException(record.exc_info)
        return json.dumps(said)


def log_to_stderr(verbose: bool, log_format: str) -> Callable[[str], None]:
    """Log to stderr in a format; return what writes a verb's own sentences there in the same one.

    Raises:
        InputError: the format is none of `FORMATS`.
    """
    if log_format not in FORMATS:
        raise InputError(f"--log-format {log_format!r} is unknown; use one of {', '.join(FORMATS)}")
    options.log_to_stderr(verbose)
    if log_format == "text":
        return write_line
    with contextlib.suppress(ImportError):  # it is not installed, which the verb says
        from slowllm.swarm.network import log_as_others

        log_as_others()
    for handler in logging.getLogger().handlers:
        handler.setFormatter(JsonLines())
    return lambda sentence: write_line(_line(logging.INFO, sentence))


def as_logged(sentence: str) -> str | None:
    """Return the sentence of an error in the format of stderr; None where that is text."""
    if any(isinstance(handler.formatter, JsonLines) for handler in logging.getLogger().handlers):
        return _line(logging.ERROR, sentence)
    return None


def _level(number: int) -> str:
    # Not the record's own name for it, which libraries change.
    names = {logging.DEBUG: "debug", logging.INFO: "info", logging.WARNING: "warning", logging.ERROR: "error"}
    return names.get(number, "critical" if number > logging.ERROR else str(number))


def write_line(line: str) -> None:
    """Write a line on stderr, if that is possible."""
    # A disk that is full, or a reader who has left, is no reason to end what runs; `logging` goes on as well.
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def _line(level: int, sentence: str) -> str:
    record = logging.LogRecord("slowllm", level, "", 0, sentence, None, None)
    return JsonLines().format(record)
