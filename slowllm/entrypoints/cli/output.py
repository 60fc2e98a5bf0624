"""How verbs write their results: JSON lines to a file or to stdout, or a table on a terminal."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from slowllm.errors import InputError
from slowllm.files import part_of, replacing_alone

# As --out: standard output, in JSON lines.
STDOUT = Path("-")


def prints_text(out: Path | None, as_json: bool) -> bool:
    """Return whether results are text for a person: they go to a terminal, and JSON was not asked for."""
    return out is None and not as_json and sys.stdout.isatty()


@contextlib.contextmanager
def json_writer(out: Path | None) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yield a function that writes one row as a JSON line: to a file, or to stdout (None, or `STDOUT`).

    A file gets its name only when it is complete. Until then, and after an interrupt, its complete lines are in a file
    of that name with ``.part`` appended, from which `Runner.resuming` lets the same command go on.

    Raises:
        InputError: the file or stdout cannot be written.
    """
    out = None if out == STDOUT else out
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
                file.reconfigure(encoding="utf-8")  # JSON lines are UTF-8, whatever the locale's encoding

            def write_line(row: Mapping[str, Any]) -> None:
                nonlocal num_good_bytes
                line = json.dumps(row, ensure_ascii=False) + "\n"
                # While a bar is shown on the same terminal, stdout is another object, which makes it give way.
                target = sys.stdout if out is None else file
                target.write(line)
                target.flush()
                num_good_bytes += len(line.encode())

            yield write_line
    except BrokenPipeError:
        raise
    except OSError as error:
        where = "standard output"
        if partial is not None:
            where = str(out)
            with contextlib.suppress(OSError):  # cut off the line that did not fit
                os.truncate(partial, num_good_bytes)
        else:
            # At exit Python would flush stdout's buffer again, fail, and exit with 120.
            with open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), sys.stdout.fileno())
        raise InputError(
            f"{where}: {error.strerror or error}"
            + (f"; the lines written so far are in {partial.name}" if num_good_bytes and partial else "")
        ) from error
    except KeyboardInterrupt:
        if partial is not None:
            print(
                f"slowllm: interrupted; the lines done so far are in {partial}, and the same command goes on from there",
                file=sys.stderr,
            )
        raise


def printable(text: str, keep: str = "") -> str:
    """Replace control characters, but for those of `keep`, so that they do not reach the terminal."""
    return "".join(
        letter if letter.isprintable() or letter in keep else "\N{REPLACEMENT CHARACTER}" for letter in text
    )


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; its last column, a text, gets the width that is left on the terminal."""
    clean = [[printable(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in clean) for column in range(len(header) - 1)]
    left = max(12, shutil.get_terminal_size().columns - sum(widths) - 2 * len(widths))
    for *cells, text in clean:
        shown = text if len(text) <= left else text[: left - 1] + "\N{HORIZONTAL ELLIPSIS}"
        print("  ".join([*(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)), shown]))


def finite(value: float) -> float | None:
    """Return a number, None where it is NaN or infinite, which JSON cannot have."""
    return value if math.isfinite(value) else None


def print_tokens(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the tokens of `token_rows` below a title, one a line: log-probability, text, and the likeliest ones, if any."""
    print(f"\n{printable(title)}")
    cells = [
        (
            _log_prob(row),
            repr(row["token"]),
            *(f"{top['token']!r} {_log_prob(top)}" for top in row.get("top", ())),
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*(cell[:2] for cell in cells), strict=True)]
    for log_prob, token, *tops in cells:
        likeliest = "  ".join(tops)
        print(printable(f"  {log_prob:>{widths[0]}}  {token:<{widths[1]}}  {likeliest}".rstrip()))


def _log_prob(row: Mapping[str, Any]) -> str:
    return "-" if row["log_prob"] is None else f"{row['log_prob']:.3f}"


def token_rows(tokenizer: Any, ids: Sequence[int], log_probs: Sequence[float | None]) -> list[dict[str, Any]]:
    """Return each token's id, text and log-probability, as JSON lines have them."""
    return [
        {"id": token, "token": tokenizer.decode([token]), "log_prob": log_prob}
        for token, log_prob in zip(ids, log_probs, strict=True)
    ]
