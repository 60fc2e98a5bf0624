"""What reaches the terminal."""

from __future__ import annotations

import io
import os

import pytest

from slowllm.entrypoints.cli.screen import Screen


def test_control_characters_do_not_reach_the_terminal() -> None:
    file = io.StringIO()
    Screen(file).write("a\033[31mb\tc\n")
    assert file.getvalue() == "a\N{REPLACEMENT CHARACTER}[31mb    c\n"


def test_a_status_is_plain_where_no_colour_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

        def fileno(self) -> int:
            return 0

    monkeypatch.setattr("os.get_terminal_size", lambda _: os.terminal_size((80, 24)))
    for value, expected in (("", "\033[2mstop 1\033[0m"), ("1", "stop 1")):
        monkeypatch.setenv("NO_COLOR", value)
        file = Terminal()
        Screen(file).status("stop 1")
        assert file.getvalue() == expected
