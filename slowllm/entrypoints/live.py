"""What is live on a terminal's last line, and makes way for the lines that are printed meanwhile."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any, Self, TextIO, cast

from rich.live import Live


class LiveLine:
    """A live display on stderr that is taken away while whole lines are written to stdout, if both are terminals.

    It comes back with the next `update`. Owns `sys.stdout` as long as the context lasts. Thread-safe.

    Args:
        live: transient, and without a redirection of stdout of its own.
    """

    def __init__(self, live: Live) -> None:
        self._live = live
        self._lock = threading.Lock()
        self._has_ended = False
        self._before: TextIO | None = None

    def __enter__(self) -> Self:
        if sys.stdout is not None and sys.stdout.isatty():
            self._before, sys.stdout = sys.stdout, cast(TextIO, _LinesAbove(sys.stdout, self.step_aside))
        self.update(lambda: None)
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._has_ended = True  # the carousel may report one more stop
            self._live.stop()
        if self._before is not None:
            above, sys.stdout = sys.stdout, self._before
            above.close()

    def update(self, change: Callable[[], None]) -> None:
        """Change what is shown, and show it."""
        with self._lock:
            if not self._has_ended:
                change()
                self._live.start(refresh=True)

    def step_aside(self, write: Callable[[], None]) -> None:
        """Take the display away, and write."""
        with self._lock:
            self._live.stop()
            write()


class _LinesAbove:
    """A text file that hands whole lines to `step_aside`; in all else it is `file`."""

    def __init__(self, file: TextIO, step_aside: Callable[[Callable[[], None]], None]) -> None:
        self._file, self._step_aside, self._rest = file, step_aside, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        """Write the lines that are complete; keep the rest."""
        lines, newline, self._rest = (self._rest + text).rpartition("\n")
        if newline:
            self._step_aside(lambda: self._put(lines + newline))
        return len(text)

    def flush(self) -> None:
        """Do nothing: every line is flushed as it is written."""

    def close(self) -> None:
        """Write the rest; the file itself stays open."""
        rest, self._rest = self._rest, ""
        if rest:
            self._put(rest)

    def _put(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()
