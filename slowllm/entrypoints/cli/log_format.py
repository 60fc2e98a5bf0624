"""How stderr is written: sentences for people or one JSON object a line for programs, all of it or warnings and errors only."""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import logging
import re
import sys
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Annotated, Any, Self, TextIO

import typer

from slowllm.errors import InputError

FORMATS = ("text", "json")
# How lines begin that --quiet does not leave out.
_NOTABLE = {"slowllm: ": logging.WARNING, "Error: ": logging.ERROR}


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


class StderrLines(io.TextIOBase):
    """A text file in the place of stderr, which writes whole lines to it as they should be. It is no terminal. Thread-safe.

    Args:
        file: stderr as it was.
    """

    def __init__(self, file: TextIO) -> None:
        self.file, self.is_json, self.is_quiet = file, False, False
        self._rest = ""
        self._lock = threading.RLock()

    def write(self, text: str) -> int:
        """Write the lines that are complete; keep the rest. A line that a carriage return ends counts as one."""
        with self._lock:
            *lines, self._rest = re.split("[\r\n]", self._rest + text)
            for line in filter(str.strip, lines):
                self._put(line)
        return len(text)

    def _put(self, line: str) -> None:
        level = next((level for start, level in _NOTABLE.items() if line.startswith(start)), logging.INFO)
        level = logging.WARNING if "Warning: " in line else level
        if not self.is_json:
            self._end(line, level)
            return
        for start in _NOTABLE:
            line = line.removeprefix(start)
        self.handle(logging.LogRecord("slowllm", level, "", 0, line, None, None))

    def handle(self, record: logging.LogRecord) -> None:
        """Write a record of the log."""
        formatter = JsonLines() if self.is_json else logging.Formatter("%(message)s")
        self._end(formatter.format(record), record.levelno)

    def _end(self, line: str, level: int) -> None:
        if level >= logging.WARNING or not self.is_quiet:
            # As `write_line`: what cannot be written is no reason to end what runs.
            with self._lock, contextlib.suppress(OSError):
                self.file.write(line + "\n")
                self.file.flush()

    def leave(self) -> None:
        """Write what is left of a line without an end."""
        if self._rest.strip():
            self.write("\n")

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """That of stderr."""
        return getattr(self.file, "encoding", None) or "utf-8"

    def fileno(self) -> int:
        """Return that of stderr."""
        return self.file.fileno()

    def flush(self) -> None:
        """Do nothing: every line is flushed as it is written."""

    def isatty(self) -> bool:
        """Return that it is no terminal, so that nothing moves or is coloured."""
        return False

    def writable(self) -> bool:
        """Return that it can be written."""
        return True


class Stderr:
    """Owns ``sys.stderr`` while the command line runs. What is written there stays as it is, until an option wants it otherwise."""

    def __init__(self) -> None:
        self._lines: StderrLines | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lines is not None:
            self._lines.leave()
            if sys.stderr is self._lines:
                sys.stderr = self._lines.file
            self._lines = None

    def _changed(self) -> StderrLines:
        if self._lines is None:
            self._lines = StderrLines(sys.stderr)
            sys.stderr = self._lines
        return self._lines

    def write_json(self) -> None:
        """Write a JSON object a line from now on."""
        self._changed().is_json = True

    def be_quiet(self) -> None:
        """Write warnings and errors only from now on."""
        self._changed().is_quiet = True

    @property
    def is_quiet(self) -> bool:
        """Whether warnings and errors only are written."""
        return self._lines is not None and self._lines.is_quiet

    def error(self, sentence: str) -> None:
        """Write the sentence with which the program ends."""
        if self._lines is not None and self._lines.is_json:
            self._lines.handle(logging.LogRecord("slowllm", logging.ERROR, "", 0, sentence, None, None))
        else:
            write_line(f"slowllm: {sentence}")

    def unexpected(self, error: BaseException) -> bool:
        """Write an error that nobody foresaw as a line of JSON; return whether lines are JSON."""
        if self._lines is None or not self._lines.is_json:
            return False
        info = (type(error), error, error.__traceback__)
        self._lines.handle(
            logging.LogRecord("slowllm", logging.CRITICAL, "", 0, "an unexpected error", None, info)
        )
        return True


class StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what stderr is at the time: while a bar is shown, to what prints above it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        if isinstance(sys.stderr, StderrLines):
            sys.stderr.handle(record)
            return
        self.stream = sys.stderr
        super().emit(record)


def writes_json() -> bool:
    """Return whether stderr is written as JSON lines."""
    return isinstance(sys.stderr, StderrLines) and sys.stderr.is_json


def _choose_quiet(context: typer.Context, quiet: bool) -> None:
    if quiet and isinstance(context.obj, Stderr) and not context.resilient_parsing:
        context.obj.be_quiet()


def _choose_format(context: typer.Context, log_format: str) -> None:
    if context.resilient_parsing:
        return
    if log_format not in FORMATS:
        raise InputError(f"--log-format {log_format!r} is unknown; use one of {', '.join(FORMATS)}")
    if log_format == "json" and isinstance(context.obj, Stderr):
        context.obj.write_json()


def _choose_json(context: typer.Context, log_json: bool) -> None:
    _choose_format(context, "json" if log_json else "text")


# Eager, so that what is wrong with another option is said as these want it.
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", help="Write only warnings and errors to stderr.", is_eager=True, expose_value=False,
        callback=_choose_quiet,
    ),
]  # fmt: skip
LogFormat = Annotated[
    str,
    typer.Option(
        "--log-format",
        help="How stderr is written: sentences, or a JSON object a line with time, level, logger and message.",
        metavar="|".join(FORMATS), is_eager=True, expose_value=False, callback=_choose_format,
    ),
]  # fmt: skip
LogJson = Annotated[
    bool,
    typer.Option(
        "--log-json", help="The same as --log-format json.", is_eager=True, expose_value=False, callback=_choose_json
    ),
]  # fmt: skip


def logging_options(quiet: Quiet = False, log_format: LogFormat = "text", log_json: LogJson = False) -> None:
    """Have the options that every verb has."""


def _level(number: int) -> str:
    # Not the record's own name for it, which libraries change.
    names = {logging.DEBUG: "debug", logging.INFO: "info", logging.WARNING: "warning", logging.ERROR: "error"}
    return names.get(number, "critical" if number > logging.ERROR else str(number))


def write_line(line: str) -> None:
    """Write a line on stderr, if that is possible."""
    # A disk that is full, or a reader who has left, is no reason to end what runs; `logging` goes on as well.
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def log_as_others() -> None:
    """With JSON lines, let hivemind log through the root logger, too; to be called by verbs that need it anyway."""
    if writes_json():
        from slowllm.swarm.network import log_as_others as swarm_logs_as_others

        swarm_logs_as_others()


def choose_early(stderr: Any, arguments: Sequence[str]) -> None:
    """Write JSON lines if the arguments ask for it, before they are parsed: what cannot be parsed is said so, too."""
    text = " ".join(arguments).replace("=", " ")
    if isinstance(stderr, Stderr) and re.search(r"(^| )--log-(json|format json)( |$)", text):
        stderr.write_json()
