"""Start, ask and end servers of OpenAI's requests: real processes on the loopback, at ports that the system chooses."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai

from tests.support.processes import Ended, Process, Processes


@dataclass
class ApiServer:
    """One that serves.

    Attributes:
        process: that was started.
        url: for clients, which ends in ``/v1``.
        has_ended: whether it was ended.
    """

    process: Process
    url: str
    has_ended: bool = False

    @property
    def address(self) -> tuple[str, int]:
        """The host and the port."""
        parts = httpx.URL(self.url)
        assert parts.port is not None
        return parts.host, parts.port

    def client(self, **options: Any) -> openai.OpenAI:
        """Return the official client, which asks once."""
        return openai.OpenAI(
            base_url=self.url, **{"api_key": "none", "max_retries": 0, "timeout": 120, **options}
        )

    def status(self) -> dict[str, Any]:
        """Return what it says of its health."""
        said: dict[str, Any] = httpx.get(self.url.removesuffix("v1") + "health", timeout=60).json()
        return said

    def metrics(self) -> dict[str, float]:
        """Return its metrics by their names with labels."""
        text = httpx.get(self.url.removesuffix("v1") + "metrics", timeout=60).text
        rows = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in rows}

    def process_signal(self, number: int) -> None:
        """Send a signal, and do not wait."""
        os.kill(self.process.pid, number)

    def wait(self) -> Ended:
        """Wait for its end."""
        self.has_ended = True
        return self.process.wait()

    def end(self, number: int = signal.SIGTERM) -> Ended:
        """Send a signal, and wait for its end."""
        self.has_ended = True
        return self.process.end(number)


@contextlib.contextmanager
def api_server(processes: Processes, model: Path, *options: object) -> Iterator[ApiServer]:
    """Serve a model for the length of a context; options given here win."""
    process = processes.start(
        "-m", "slowllm", "api", model, "--port", 0, "--ram", "3GiB", "--dtype", "fp32", *options, stdout=subprocess.PIPE
    )  # fmt: skip
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    if not url:
        raise AssertionError(process.wait().stderr)
    server = ApiServer(process, url)
    try:
        yield server
    finally:
        if not server.has_ended:
            server.end(signal.SIGTERM)
