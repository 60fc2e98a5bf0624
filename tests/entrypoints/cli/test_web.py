"""`slowllm web` as its user meets it: one sentence for what is wrong, an address, and a quiet end."""

from __future__ import annotations

import importlib.util
import json
import signal
import socket
import subprocess
import urllib.request
from typing import Any

import pytest

from tests.support.command_line import refused, run
from tests.support.paths import ROOT, TINY_BLOOM
from tests.support.processes import Processes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/model"], "no/such/model"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid: is no address of this machine"),
        (["--port", "0", "--ram", "much"], "'much' is not a size"),
        (["--port", "0", "--vram", "1GiB"], "--vram is for a GPU"),
        (["--port", "0", "--context", "100000"], "a sequence of 100000 tokens is longer than the 2048"),
        (["--port", "0", "--max-tokens", "8", "--max-rows", "4", "--context", "9"], "8 tokens in all cannot hold"),
        (["--port", "0", "--ram", "1MiB"], "1MiB"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_in_one_sentence(
    arguments: list[str], message: str, monkeypatch: Any, capsys: Any
) -> None:
    assert message in refused(["web", *arguments], monkeypatch, capsys)


def test_a_port_in_use_is_refused_before_a_model_is_opened(monkeypatch: Any, capsys: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused(["web", "--port", port], monkeypatch, capsys)
    assert said.startswith(
        f"slowllm: --host 127.0.0.1 --port {port}: cannot be listened at (Address already in use)"
    )


def test_without_gradio_the_message_says_what_to_install(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install gradio" in refused(["web"], monkeypatch, capsys)


def test_a_dry_run_prints_the_plan(monkeypatch: Any, capsys: Any) -> None:
    assert run(["web", TINY_BLOOM, "--dry-run", "--max-tokens", "1024", "--ram", "3GiB"], monkeypatch) == 0
    shown = capsys.readouterr().out
    assert "tiny-bloom" in shown
    assert "1,024 tokens" in shown


# Says of every connection and look-up of a name where it goes.
WATCHED = """
import sys, json
def hook(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        where = arguments[1] if event == "socket.connect" else arguments[0]
        print("WENT " + json.dumps(str(where)), file=sys.stderr, flush=True)
sys.addaudithook(hook)
from slowllm import cli
cli.run()
"""


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_page_is_served_asks_nobody_and_ends_quietly(processes: Processes, number: int) -> None:
    pytest.importorskip("gradio", reason="the page is made with gradio")
    process = processes.start(
        "-c", WATCHED, "web", "--port", "0", "--ram", "3GiB", "--dtype", "fp32",
        stdout=subprocess.PIPE, env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    assert url.startswith("http://127.0.0.1:")
    with urllib.request.urlopen(url) as answer:
        text = answer.read().decode()
    assert "tiny-bloom" in text
    config = json.loads(urllib.request.urlopen(f"{url}config").read())
    assert config["analytics_enabled"] is False
    # A browser's tab that stays open does not keep it.
    with urllib.request.urlopen(f"{url}gradio_api/heartbeat/someone") as beat:
        assert b"ALIVE" in beat.readline()
        ended = process.end(number)
    assert ended.returncode == 0
    went = [line for line in ended.stderr.splitlines() if line.startswith("WENT ")]
    assert all("127.0.0.1" in line for line in went), went
    assert "Traceback" not in ended.stderr
    assert "ERROR" not in ended.stderr
