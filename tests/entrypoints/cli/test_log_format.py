"""With --log-format json, all of stderr is JSON lines: the log, a verb's own sentences, and the error that ends it."""

from __future__ import annotations

import json
import logging
import sys

import pytest

from slowllm.entrypoints.cli.log_format import JsonLines, log_to_stderr
from slowllm.errors import InputError
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


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(InputError, match="--log-format 'xml' is unknown; use one of text, json"):
        log_to_stderr(False, "xml")
