"""Servers of a swarm for a benchmark: processes of `slowllm serve` on the loopback, as a user starts them.

With a delay, a proxy stands before each server, and its address is what the server announces, so that every connection goes
through it. Knows nothing of what is measured.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.delay_proxy import HOST

# A server first reads its blocks, and measures how fast it is.
END_SECONDS = 30


def launch(arguments: Sequence[object], log: Path, threads: int) -> subprocess.Popen[str]:
    """Start Python with these arguments, its standard error in a file and standard output in a pipe."""
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, stderr=file, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip


def free_ports(count: int) -> list[int]:
    """Return ports of the loopback at which nobody listens now."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((HOST, 0))
        return [int(one.getsockname()[1]) for one in sockets]


def spans_of(num_blocks: int, num_servers: int) -> list[tuple[int, int]]:
    """Return spans that cover the blocks, as equal as they can be."""
    bounds = [num_blocks * number // num_servers for number in range(num_servers + 1)]
    return list(itertools.pairwise(bounds))


@contextlib.contextmanager
def proxies(ports: Sequence[tuple[int, int]], delay_seconds: float, folder: Path) -> Iterator[None]:
    """Forward from the first port of each pair to the second, with a round trip of `delay_seconds` more."""
    arguments = ["-m", "benchmarks.delay_proxy", delay_seconds / 2, *(f"{a}:{b}" for a, b in ports)]
    process = launch(arguments, folder / "proxy.log", 1)
    try:
        first_line(process, folder / "proxy.log")
        yield
    finally:
        end(process)


@contextlib.contextmanager
def servers(
    model: Path, spans: Sequence[tuple[int, int]], options: Sequence[object], *, threads: int, delay_seconds: float, folder: Path
) -> Iterator[str]:  # fmt: skip
    """Serve spans of a model by a process for each; yield the address of the first one.

    Args:
        model: folder of the checkpoint.
        spans: first block, and the number after the last.
        options: of each `slowllm serve`.
        threads: with which each computes.
        delay_seconds: that a round trip to a server takes beside what it takes on the loopback; 0 for no proxies.
        folder: in which logs are written.
    Raises:
        SystemExit: a server ends before it serves.
    """
    ports = free_ports(2 * len(spans))
    inner, outer = ports[: len(spans)], ports[len(spans) :]
    started: list[subprocess.Popen[str]] = []
    with contextlib.ExitStack() as held:
        if delay_seconds:
            held.enter_context(proxies(list(zip(outer, inner, strict=True)), delay_seconds, folder))
        address = ""
        for (first, last), port, announced in zip(spans, inner, outer, strict=True):
            arguments: list[object] = [
                "-m", "slowllm", "serve", model, "--blocks", f"{first}:{last}", "--no-relay",
                "--host-maddrs", f"/ip4/{HOST}/tcp/{port}", *options,
            ]  # fmt: skip
            if delay_seconds:
                arguments += ["--announce-maddrs", f"/ip4/{HOST}/tcp/{announced}"]
            if address:
                arguments += ["--initial-peers", address]
            log = folder / f"server-{first}.log"
            started.append(launch(arguments, log, threads))
            held.callback(end, started[-1])
            if not address:  # the others join it
                address = first_line(started[0], log)
        for process, (first, _) in zip(started[1:], spans[1:], strict=True):
            first_line(process, folder / f"server-{first}.log")
        yield address


def first_line(process: subprocess.Popen[str], log: Path) -> str:
    """Return what a process prints first.

    Raises:
        SystemExit: it ends without a line.
    """
    assert process.stdout is not None, "it was started with a pipe"
    line = process.stdout.readline().strip()
    if not line:
        process.wait()
        sys.exit(f"a process of the swarm has ended:\n{log.read_text()[-2000:]}")
    return line


def end(process: subprocess.Popen[str]) -> None:
    """Tell a process to end, and wait; after `END_SECONDS` end it by force."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
