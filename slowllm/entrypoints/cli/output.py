"""What a person sees: scores as a table or JSON lines, the carousel's progress, and a summary.

Results go to stdout or a file, all else to stderr.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from slowllm.errors import InputError
from slowllm.files import part_of, replacing_alone


@contextlib.contextmanager
def json_writer(out: Path | None) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yield a function that writes one row as a JSON line: to a file, or to stdout.

    A file appears under its name only when it is complete; until then, and after an interrupt, its whole lines are
    in a file of that name with ``.part`` added.

    Raises:
        InputError: the file or stdout cannot be written.
    """
    partial = part_of(out) if out is not None else None
    num_good_bytes = 0
    try:
        with contextlib.ExitStack() as stack:
            file: IO[str] = sys.stdout
            if out is not None:
                file = io.TextIOWrapper(
                    stack.enter_context(replacing_alone(out, InputError)), encoding="utf-8"
                )
            elif isinstance(file, io.TextIOWrapper):
                file.reconfigure(encoding="utf-8")  # JSON lines are UTF-8 whatever the terminal speaks

            def write_line(row: Mapping[str, Any]) -> None:
                nonlocal num_good_bytes
                line = json.dumps(row, ensure_ascii=False) + "\n"
                file.write(line)
                file.flush()
                num_good_bytes += len(line.encode())

            yield write_line
    except BrokenPipeError:
        raise
    except OSError as error:
        where = "standard output"
        if partial is not None:
            where = str(out)
            with contextlib.suppress(OSError):  # the line that did not fit; the ones before it are whole
                os.truncate(partial, num_good_bytes)
        else:
            # Python would try once more to write what is in its buffer, and end with 120.
            with open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), sys.stdout.fileno())
        raise InputError(
            f"{where}: {error.strerror or error}"
            + (f"; the lines written so far are in {partial.name}" if num_good_bytes and partial else "")
        ) from error
    except KeyboardInterrupt:
        if partial is not None:
            print(f"slowllm: interrupted; the lines done so far are in {partial}", file=sys.stderr)
        raise


def printable(text: str) -> str:
    """Show control characters instead of sending them to the terminal."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; its last column, a text, takes what is left of the terminal."""
    clean = [
        [
            "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in cell)
            for cell in row
        ]
        for row in (header, *rows)
    ]
    widths = [max(len(row[column]) for row in clean) for column in range(len(header))]
    left = max(12, shutil.get_terminal_size().columns - sum(widths[:-1]) - 2 * len(widths[:-1]))
    for row in clean:
        numbers = [cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)]
        text = row[-1] if len(row[-1]) <= left else row[-1][: left - 1] + "\N{HORIZONTAL ELLIPSIS}"
        print("  ".join([*numbers, text]))
