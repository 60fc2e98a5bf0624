"""What a verb reads: the files that are named, the texts of --text, or standard input; and what was probably meant.

Loads nothing heavy: whatever is wrong with an input is said before a model is opened.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import typer

from slowllm.errors import InputError
from slowllm.files import read_lines
from slowllm.tables import KIND_NAMES, kind_of, read_table

Texts = Annotated[
    list[str] | None,
    typer.Option(
        "--text", help="Text to take instead of a file; may be given several times.", show_default=False
    ),
]
# How files are told from texts in results and messages.
TEXTS_NAME = "--text"
# Optional packages and the extras of slowllm that they are in, by their modules.
OPTIONAL = {
    "datasets": ("datasets", "eval"), "jinja2": ("jinja2", "eval"), "yaml": ("pyyaml", "eval"),
    "lm_eval": ("lm-eval", "eval"), "peft": ("peft", "tune"), "pyarrow": ("pyarrow", "eval"),
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One text of an input.

    Attributes:
        file: as it was named, `TEXTS_NAME` for a text of the command line.
        number: of the line or row in it, or of the text, from 1.
        text: without the white space around it; a text of the command line as it is.
    """

    file: str
    number: int
    text: str

    @property
    def where(self) -> str:
        """What messages call it."""
        return (
            f"{TEXTS_NAME} {self.number}"
            if self.file == TEXTS_NAME
            else f"{shown_name(self.file)}: line {self.number}"
        )


def shown_name(file: str) -> str:
    """Return what messages call a file."""
    return "standard input" if file == "-" else file


def choose_files(files: Sequence[str] | None, texts: Sequence[str] | None, wanted: str) -> list[str]:
    """Return the files to read: those named, or standard input where nothing is named and it is no terminal.

    Args:
        files: named by the user.
        texts: of --text, which take their place.
        wanted: what the user should have given, for the message.
    Raises:
        InputError: there is nothing to read, files are given beside texts, or one is given twice.
    """
    if files and texts:
        raise InputError(f"give files or {TEXTS_NAME}, not both")
    if texts:
        return []
    if not files:
        if not has_piped_input():
            raise InputError(f"give {wanted}, or {TEXTS_NAME}, or pipe the lines into standard input")
        return ["-"]
    seen = set()
    for file in files:
        path = file if file == "-" else os.path.realpath(os.path.expanduser(file))
        if path in seen:
            raise InputError(f"{shown_name(file)}: is given twice")
        seen.add(path)
    return list(files)


def has_piped_input() -> bool:
    """Return whether standard input is something else than a terminal."""
    return sys.stdin is not None and not sys.stdin.isatty()


def read_entries(files: Sequence[str], texts: Sequence[str] | None) -> list[Entry]:
    """Return the texts of the command line, or the non-empty lines of all files.

    Raises:
        InputError: a file cannot be read, or a text is empty.
    """
    entries = []
    for number, text in enumerate(texts or (), 1):
        if not text.strip():
            raise InputError(f"{TEXTS_NAME} {number} is empty")
        entries.append(Entry(TEXTS_NAME, number, text))
    return entries + [Entry(file, number, text) for file in files for number, text in read_lines(file)]


def read_column(file: str, column: str) -> list[Entry]:
    """Return the texts in one column of a CSV or Parquet file.

    Raises:
        InputError: the file cannot be read, does not have the column, or has no text in a row of it.
    """
    entries = []
    for number, row in read_table(file, [column]):
        if not isinstance(text := row.get(column), str) or not text.strip():
            raise InputError(f"{file}: line {number} has no text in the column {column}")
        entries.append(Entry(file, number, text.strip()))
    return entries


def warn(sentence: str) -> None:
    """Print one line on stderr about something that is done as asked, but was probably not meant."""
    print(f"warning: {sentence}", file=sys.stderr)


def warn_of_parts(file: str, done: str, instead: str) -> None:
    """Warn of a file whose lines have parts, by its name, where every line is taken as one text.

    Args:
        file: as named by the user.
        done: what is done with its lines, such as ``scored``.
        instead: what reads such files.
    """
    if (kind := kind_of(file)) != "text":
        warn(f"{file} looks like {KIND_NAMES[kind]}, but each line is {done} as it stands; {instead}")


def check_installed(*modules: str) -> None:
    """Refuse to go on without optional packages, before what takes seconds is loaded.

    Raises:
        InputError: the module of one of them is not there; the message says what to install.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            package, extra = OPTIONAL[module]
            raise InputError(
                f"{package} is not installed; pip install {package}, or in a checkout pip install '.[{extra}]'"
            )
