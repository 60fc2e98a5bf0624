"""What is live on a terminal makes way for the lines that are printed meanwhile."""

from __future__ import annotations

import io
import json
import sys

import pytest
from rich.console import Console
from rich.live import Live
from rich.text import Text

from slowllm.entrypoints.live import LiveLine
from tests.support.processes import Processes
from tests.support.terminal import lines_on_screen, run_on_terminal


class Terminal(io.StringIO):
    """A terminal in memory, on which stdout and stderr are one."""

    def isatty(self) -> bool:
        return True


def test_lines_are_printed_above_what_is_live(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    live = Live(
        Text("sweep 1"), console=Console(file=terminal, force_terminal=True, width=80), transient=True, redirect_stdout=False,
        auto_refresh=False,
    )  # fmt: skip
    with LiveLine(live) as line:
        live.refresh()
        assert lines_on_screen(terminal.getvalue()) == ["sweep 1"]
        print("a", end="")
        print("b")
        assert lines_on_screen(terminal.getvalue()) == ["ab"], "a whole line, and what was live is away"
        line.update(lambda: live.update(Text("sweep 2"), refresh=True))
        live.refresh()
        assert lines_on_screen(terminal.getvalue()) == ["ab", "sweep 2"]
        print("c", end="")
    assert sys.stdout is terminal
    line.update(lambda: pytest.fail("it has ended"))
    assert lines_on_screen(terminal.getvalue()) == ["ab", "c"]


def test_stdout_elsewhere_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, elsewhere = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", elsewhere)
    console = Console(file=terminal, force_terminal=True, width=80)
    with LiveLine(Live(Text("sweep 1"), console=console, transient=True, redirect_stdout=False)):
        assert sys.stdout is elsewhere
        print("a")
    assert elsewhere.getvalue() == "a\n"
    assert "a" not in terminal.getvalue()


def test_a_terminal_shows_progress_and_whole_lines(processes: Processes) -> None:
    ended, written = run_on_terminal(
        processes, "generate", "The value is", "Return the", "--json", "--stream-all", "--max-new-tokens", 2, columns=160
    )  # fmt: skip
    assert ended.returncode == 0
    lines = [line for line in lines_on_screen(written) if line]
    assert lines[0] == "loading tiny-bloom"
    found = [json.loads(line) for line in lines if line.startswith("{")]
    assert [row["prompt"] for row in found] == ["The value is", "Return the"]
    assert not [line for line in lines if "stop" in line and "elapsed" in line], "the bar is gone"
    for fact in ("sweep 1 of 2", " of 11, 0 of 2 prompts, ", " elapsed"):
        assert fact in written
