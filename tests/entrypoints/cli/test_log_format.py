"""With --log-format json, all of stderr is JSON lines: the log, a verb's own sentences, and the error that ends it."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import pytest

from slowllm.entrypoints.cli.log_format import JsonLines, Stderr, StderrHandler
from tests.support.command_line import refused, run
from tests.support.processes import Processes

NOBODY = "/ip4/127.0.0.1/tcp/9/p2p/QmbFTxrLH22v1EbhBqqeZSgDdQFCUVdXjQnrCvvGUVTJqn"


def test_a_record_is_one_line_of_json_with_its_traceback() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        record = logging.LogRecord("slowllm.x", logging.WARNING, "", 0, "it %s", ("broke",), sys.exc_info())
    line = JsonLines().format(record)
    assert "\n" not in line
    said = json.loads(line)
    assert (said["level"], said["logger"], said["message"]) == ("warning", "slowllm.x", "it broke")
    assert said["time"].endswith("+00:00")
    assert "ValueError: two\nlines" in said["traceback"]


@pytest.mark.long
def test_the_error_that_ends_a_verb_is_a_line_of_json(processes: Processes) -> None:
    ended = processes.run(
        "-m", "slowllm", "swarm", "status", "--initial-peers", NOBODY, "--log-format", "json"
    )
    assert ended.returncode == 2
    assert ended.stdout == ""
    (said,) = map(json.loads, ended.stderr.splitlines())
    assert (said["level"], said["logger"]) == ("error", "slowllm")
    assert "no initial peer can be joined" in said["message"]


def test_an_unknown_format_is_refused(monkeypatch: Any, capsys: Any) -> None:
    said = refused(["forward", "--text", "x", "--log-format", "xml"], monkeypatch, capsys)
    assert "--log-format 'xml' is unknown; use one of text, json" in said


@pytest.mark.parametrize("option", [["--log-format", "json"], ["--log-json"]])
def test_what_a_verb_says_and_its_error_are_lines_of_json(
    option: list[str], monkeypatch: Any, capsys: Any
) -> None:
    assert run(["forward", "--text", "The value is returned.", *option], monkeypatch) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["line"] == 1
    said = [json.loads(line) for line in captured.err.splitlines()]
    assert {one["level"] for one in said} == {"info"}
    assert said[0]["message"].startswith("tiny-bloom: ")
    assert "corpus perplexity" in said[1]["message"]
    assert run(["forward", "nowhere.txt", *option], monkeypatch) == 2
    (error,) = map(json.loads, capsys.readouterr().err.splitlines())
    assert error["level"] == "error"
    assert "nowhere.txt" in error["message"]
    assert run(["forward", *option, "--frobnicate"], monkeypatch) == 2
    assert [json.loads(line)["level"] for line in capsys.readouterr().err.splitlines()][-1] == "error"


def test_an_error_that_nobody_foresaw_is_one_line_of_json_with_its_traceback(
    monkeypatch: Any, capsys: Any
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("broken")

    monkeypatch.setattr("slowllm.entrypoints.cli.inputs.read_entries", broken)
    assert run(["forward", "--text", "x", "--log-json"], monkeypatch) == 1
    (said,) = map(json.loads, capsys.readouterr().err.splitlines())
    assert said["level"] == "critical"
    assert "ValueError: broken" in said["traceback"]
    with pytest.raises(ValueError, match="broken"):
        run(["forward", "--text", "x"], monkeypatch)


def test_quiet_leaves_warnings_and_errors(monkeypatch: Any, capsys: Any) -> None:
    assert run(["forward", "--text", "The value is returned.", "--quiet"], monkeypatch) == 0
    assert capsys.readouterr().err == ""
    assert "nowhere.txt" in refused(["forward", "nowhere.txt", "-q"], monkeypatch, capsys)
    assert run(["forward", "-q", "--frobnicate"], monkeypatch) == 2
    assert "Error: No such option: --frobnicate" in capsys.readouterr().err
    said = refused(["forward", "--text", "x", "-q", "-v"], monkeypatch, capsys)
    assert "--quiet and --verbose contradict each other; give one of them" in said


def test_stderr_is_as_it_was_afterwards(monkeypatch: Any, capsys: Any) -> None:
    before = sys.stderr
    run(["config", "--log-json"], monkeypatch)
    assert sys.stderr is before


def test_the_log_takes_the_format_of_stderr(monkeypatch: Any, capsys: Any) -> None:
    with Stderr() as stderr:
        stderr.write_json()
        handler = StderrHandler()
        handler.emit(logging.LogRecord("a.b", logging.INFO, "", 0, "said", None, None))
        stderr.be_quiet()
        handler.emit(logging.LogRecord("a.b", logging.INFO, "", 0, "unsaid", None, None))
        print("half", end="", file=sys.stderr)
        print("slowllm: interrupted\rnoise", file=sys.stderr)
        print("slowllm: last", end="", file=sys.stderr)
    said = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(one["level"], one["message"]) for one in said] == [("info", "said"), ("warning", "last")]
    assert said[0]["logger"] == "a.b"
