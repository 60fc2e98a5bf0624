"""What reaches the terminal."""

from __future__ import annotations

import io

from slowllm.entrypoints.cli.screen import Screen


def test_control_characters_do_not_reach_the_terminal() -> None:
    file = io.StringIO()
    Screen(file).write("a\033[31mb\tc\n")
    assert file.getvalue() == "a\N{REPLACEMENT CHARACTER}[31mb    c\n"
