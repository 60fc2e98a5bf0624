"""Write text that grows to a terminal, with a status behind it."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import IO

from rich.cells import cell_len

from slowllm.entrypoints.cli.output import printable

# Interval between statuses: the stops of a small model pass faster than a terminal should be written to.
STATUS_SECONDS = 0.1
# With less room in the line no status is shown.
LEAST_STATUS_CELLS = 12


class Screen:
    """Text that grows, and on a terminal a status behind it, which is erased when more text comes.

    Thread-safe.
    """

    def __init__(self, file: IO[str]) -> None:
        self._file, self.is_terminal = file, file.isatty()
        self._lock = threading.Lock()
        self._column = self._num_status_cells = 0
        self._shown_at = 0.0

    def write(self, text: str) -> None:
        """Append text, with control characters replaced."""
        text = printable(text.replace("\t", "    "), keep="\n")
        with self._lock:
            self._wipe()
            self._file.write(text)
            self._file.flush()
            _, newline, last = text.rpartition("\n")
            self._column = (0 if newline else self._column) + cell_len(last)

    def line(self, text: str) -> None:
        """Write a line, on a new line of the terminal."""
        self.end_line()
        self.write(text + "\n")

    def end_line(self) -> None:
        """Begin a new line, unless this one is empty."""
        self.write("\n" if self._column else "")

    def status(self, text: str) -> None:
        """Show a status if this is a terminal and its line has room; never raises."""
        if not self.is_terminal or time.monotonic() - self._shown_at < STATUS_SECONDS:
            return
        with self._lock, contextlib.suppress(OSError, ValueError):  # the terminal may be gone
            self._shown_at = time.monotonic()
            self._wipe()
            width = (
                os.get_terminal_size(self._file.fileno()).columns or 80
            )  # 0: the terminal does not know its width
            # One column less: a full line would wrap into the next one, from which the cursor cannot move back.
            room = width - self._column % width - 1
            if room >= LEAST_STATUS_CELLS:
                text = text[:room]
                self._file.write(text if os.environ.get("NO_COLOR") else f"\033[2m{text}\033[0m")
                self._file.flush()
                self._num_status_cells = cell_len(text)

    def end_status(self) -> None:
        """Erase the status."""
        with self._lock:
            self._wipe()
            self._file.flush()

    def _wipe(self) -> None:
        if self._num_status_cells:
            self._file.write(f"\033[{self._num_status_cells}D\033[K")
            self._num_status_cells = 0
