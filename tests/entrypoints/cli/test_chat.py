"""`slowllm chat` as a user meets it: a terminal with its keys, and one sentence for errors."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from slowllm.entrypoints.cli import app
from tests.support.command_line import run
from tests.support.paths import TINY_BLOOM
from tests.support.processes import Processes


def test_a_system_message_that_leaves_no_room_is_refused(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["slowllm", "chat", "--context", "20", "--system", "word " * 30])
    with pytest.raises(SystemExit, match="2"):
        app.run()
    assert "--system alone takes all 20 tokens" in capsys.readouterr().err


def test_the_embedded_model_says_that_it_is_a_toy(talkative: Path, monkeypatch: Any, capsys: Any) -> None:
    for model, is_toy in [([], True), (["--model", TINY_BLOOM], True), (["--model", talkative], False)]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("/quit\n"))
        assert run(["chat", *model], monkeypatch) == 0
        assert ("This is the embedded toy model" in capsys.readouterr().out) == is_toy


# Of the terminal on its standard input, this process becomes the one that Ctrl-C interrupts.
SLOWLY = """
import fcntl, os, sys, termios, time
from slowllm import cli
from slowllm.runtime import streamed_lm
report = streamed_lm._report_passage
def report_slowly(handle, passage):
    report(handle, passage)
    time.sleep(0.05)
streamed_lm._report_passage = report_slowly
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
cli.run()
"""


class Terminal:
    """A process in a terminal of its own."""

    def __init__(self, processes: Processes, *arguments: object) -> None:
        self.file, theirs = pty.openpty()
        env = {"TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
        self.process = processes.start(
            "-c", SLOWLY, *arguments, stdin=theirs, stdout=theirs, stderr=theirs, env=env
        )
        os.close(theirs)
        self.seen = ""

    def wait_for(self, text: str) -> str:
        """Return what was written since the last call, up to the text that is waited for."""
        deadline = time.monotonic() + 60
        while text not in self.seen:
            ready, _, _ = select.select([self.file], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{text!r} never came: {self.seen!r}"
            try:
                self.seen += os.read(self.file, 4096).decode(errors="replace")
            except OSError as error:  # the other end is closed
                raise AssertionError(f"it ended before {text!r} came: {self.seen!r}") from error
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def send(self, keys: str) -> None:
        os.write(self.file, keys.encode())

    def interrupt_typing(self, text: str) -> None:
        """Type, and press Ctrl-C once the prompt waits for more keys.

        CPython's readline looks for signals only where its `select` is interrupted: a Ctrl-C between the prompt and
        that call shows with the next key.
        """
        self.send(text)
        self.wait_for(text)
        state = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/stat")
        deadline = time.monotonic() + 60
        while state.read_text().rpartition(")")[2].split()[0] != "S":
            assert time.monotonic() < deadline, "the prompt never waited for keys"
            os.sched_yield()
        self.send("\x03")

    def close(self) -> int:
        """Wait for the end and return the exit code."""
        try:
            while os.read(self.file, 4096):
                pass
        except OSError:
            pass
        os.close(self.file)
        return self.process.wait().returncode


def test_a_terminal_stops_answers_keeps_what_came_and_leaves(
    talkative: Path, processes: Processes, tmp_path: Path
) -> None:
    terminal = Terminal(
        processes, "chat", "--model", talkative, "--dtype", "fp32", "--stream-all", "--max-new-tokens", "150",
        "--temperature", "0",
    )  # fmt: skip
    terminal.wait_for("Ctrl-D leaves.")
    terminal.wait_for("> ")
    terminal.send("The value\r")
    # A status behind the text tells of the stop; with the fourth token under way three have been shown.
    shown = terminal.wait_for("token 4")
    assert re.search(r"token 1: stop \d+/11", shown)
    terminal.send("\x03")
    assert "Traceback" not in terminal.wait_for("(stopped)")
    terminal.wait_for("> ")
    terminal.send(f"/save {tmp_path / 'first.json'}\r")
    terminal.wait_for("2 messages are in")
    messages = json.loads((tmp_path / "first.json").read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert 0 < len(messages[1]["content"].split()) < 20
    # The model answers again after an answer was stopped, with what came of it in its history.
    terminal.wait_for("> ")
    terminal.send("Another\r")
    terminal.wait_for("token 3")
    terminal.send("\x03")
    terminal.wait_for("(stopped)")
    terminal.wait_for("> ")
    terminal.send("/reset\r")
    terminal.wait_for("The conversation is forgotten.")
    terminal.wait_for("> ")
    # Stopped before the first token, the question is as if it had not been asked.
    terminal.send("The value\r")
    terminal.wait_for("token 1")
    terminal.send("\x03")
    terminal.wait_for("(stopped before anything came")
    terminal.wait_for("> ")
    terminal.send(f"/save {tmp_path / 'second.json'}\r")
    terminal.wait_for("0 messages are in")
    terminal.wait_for("> ")
    # At the prompt Ctrl-C only says how to leave; the arrow brings the last line back.
    terminal.interrupt_typing("half a line")
    terminal.wait_for("Ctrl-D or /quit leaves.")
    terminal.wait_for("> ")
    terminal.send("\x1b[A")
    terminal.wait_for("second.json")
    terminal.send("\x15\x04")
    assert terminal.close() == 0
