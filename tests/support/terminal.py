"""What stands on a terminal after what was written to it."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import termios

from tests.support.processes import Ended, Processes


def lines_on_screen(written: str) -> list[str]:
    """Return the lines of a wide terminal, without empty ones at its end: returns, new lines, and rich's ways of moving up and of erasing a line."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", written):
        if part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif part == "\x1b[1A":
            row -= 1
        elif part == "\x1b[2K":
            lines[row] = ""
        elif not part.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    while lines and not lines[-1]:
        lines.pop()
    return lines


def run_on_terminal(processes: Processes, *arguments: object, columns: int = 120) -> tuple[Ended, str]:
    """Run the command line on a terminal of its own; see `run_python_on_terminal`."""
    return run_python_on_terminal(processes, "-m", "slowllm", *arguments, columns=columns)


def run_python_on_terminal(processes: Processes, *arguments: object, columns: int = 120) -> tuple[Ended, str]:
    """Run Python on a terminal of its own; return how it ended, and all that was written to the terminal."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (30, columns))
    # Workers of pytest-xdist have a COLUMNS of their own, which would hide this terminal's.
    env = {"TERM": "xterm", "COLUMNS": str(columns)}
    started = processes.start(*arguments, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # which is how a terminal ends
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    return started.wait(), shown.decode()
