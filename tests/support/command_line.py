"""Run the command line in the tests' own process."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from slowllm.entrypoints.cli import app


def run(arguments: list[Any], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run the command line in this process; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["slowllm", *map(str, arguments)])
    try:
        app.run()
    except SystemExit as leaving:
        return int(leaving.code or 0)
    return 0


def refused(arguments: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> str:
    """Run what must be refused: code 2, nothing on stdout, one sentence on stderr, which is returned."""
    assert run(arguments, monkeypatch) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("slowllm: ")]
    assert len(lines) == 1
    assert "Traceback" not in captured.err
    return lines[0]
