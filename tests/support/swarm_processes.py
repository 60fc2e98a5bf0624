"""Start, stop, kill and freeze peers of a swarm on the loopback: real processes, at ports that the system chooses."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from tests.support.processes import PAID as MODEL_PAID
from tests.support.processes import Ended, Process, Processes

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
PATIENCE_SECONDS = 60
PAID = (*MODEL_PAID, "hivemind.dht.node", "hivemind.p2p")


def serve_arguments(model: Path, blocks: str, *options: object) -> list[object]:
    """Return the arguments of Python for a small server on the loopback; options given here win."""
    return [
        "-m", "slowllm", "serve", model, "--blocks", blocks, "--host-maddrs", LOOPBACK, "--no-relay", "--ram", "3GiB",
        "--dtype", "float32", "--attn-cache-tokens", "2000", "--max-batch-tokens", "512", *options,
    ]  # fmt: skip


def wait_for_end(pid: int) -> None:
    """Wait until a process of this machine, whoever started it, has ended."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        ready, _, _ = select.select([handle], [], [], PATIENCE_SECONDS)
        assert ready, f"process {pid} has not ended"
    finally:
        os.close(handle)


def _is_frozen(pid: int) -> bool:
    threads = Path(f"/proc/{pid}/task").iterdir()
    return all((thread / "stat").read_text().rpartition(")")[2].split()[0] == "T" for thread in threads)


@dataclass
class SwarmProcess:
    """One process that prints a line when it is ready.

    Attributes:
        process: that was started.
        line: what it printed first.
        has_ended: whether it was stopped or killed.
    """

    process: Process
    line: str
    has_ended: bool = False

    @property
    def address(self) -> str:
        """The multiaddress that `slowllm serve` or `slowllm dht` printed first."""
        return self.line.strip()

    @property
    def told(self) -> dict[str, Any]:
        """What a peer for tests says of itself: its `peer`, `addresses`, `pid` and `children`."""
        told: dict[str, Any] = json.loads(self.line)
        return told

    @property
    def children(self) -> list[int]:
        """The ids of the processes that it has started: libp2p's."""
        return [child.pid for child in psutil.Process(self.process.pid).children()]

    def wait_for(self, text: str) -> str:
        """Return the next line on standard output that has this text; lines before it are forgotten."""
        assert self.process.stdout is not None
        lines = iter(self.process.stdout.readline, "")
        found: list[str] = []
        reading = threading.Thread(
            target=lambda: found.extend(next(([x] for x in lines if text in x), [])), daemon=True
        )
        reading.start()
        reading.join(PATIENCE_SECONDS)
        assert found, f"process {self.process.pid} has not printed {text!r}"
        return found[0]

    def freeze(self, also_children: bool = False) -> None:
        """Stop it where it is; nobody is told. Its libp2p process goes on, unless `also_children`."""
        for pid in [self.process.pid, *(self.children if also_children else [])]:
            os.kill(pid, signal.SIGSTOP)
            # Its threads stop one by one, and the one that would answer may be the last.
            while not _is_frozen(pid):
                os.sched_yield()

    def thaw(self) -> None:
        """Let it go on after a freeze."""
        for pid in [*self.children, self.process.pid]:
            os.kill(pid, signal.SIGCONT)

    def stop(self) -> Ended:
        """Tell it to end, and wait."""
        self.has_ended = True
        return self.process.end(signal.SIGTERM)

    def leave(self) -> None:
        """Tell it to end when its sessions have gone elsewhere."""
        os.kill(self.process.pid, signal.SIGTERM)

    def wait(self) -> Ended:
        """Wait until it has ended by itself."""
        self.has_ended = True
        return self.process.wait()

    def kill(self) -> Ended:
        """End it as if the power were cut, and wait."""
        self.has_ended = True
        return self.process.end(signal.SIGKILL)


class SwarmProcesses:
    """What starts them, and ends all that are left with the context. hivemind's import is paid once."""

    def __init__(self) -> None:
        self._processes = Processes(paid=PAID)
        self._started: list[SwarmProcess] = []

    def __enter__(self) -> SwarmProcesses:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for started in self._started:
            if not started.has_ended and started.process.is_running():
                os.kill(started.process.pid, signal.SIGCONT)
                started.kill()
        self._processes.__exit__(kind, error, trace)

    def start(self, *arguments: object) -> SwarmProcess:
        """Start Python with these arguments and wait for its first line."""
        (started,) = self.start_all([arguments])
        return started

    def start_all(self, each: Iterable[Sequence[object]]) -> list[SwarmProcess]:
        """Start Python with each of these lists of arguments at the same time, and wait for the first line of all."""
        processes = [(list_, self._processes.start(*list_, stdout=subprocess.PIPE)) for list_ in each]
        return [self._started_when_ready(process, list_) for list_, process in processes]

    def _started_when_ready(self, process: Process, arguments: Sequence[object]) -> SwarmProcess:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], PATIENCE_SECONDS)
        line = process.stdout.readline() if ready else ""
        if not line:
            ended = process.end(signal.SIGKILL) if process.is_running() else process.wait()
            raise AssertionError(f"{arguments} ended without a line:\n{ended.stderr}")
        started = SwarmProcess(process, line)
        self._started.append(started)
        return started

    def serve(self, model: Path, blocks: str, *options: object) -> SwarmProcess:
        """Start `slowllm serve` on the loopback, and wait until it serves."""
        return self.start(*serve_arguments(model, blocks, *options))

    def run(self, *arguments: object) -> Ended:
        """Run Python with these arguments to its end."""
        return self._processes.run(*arguments)

    def peer(self, initial_peers: Sequence[str] = (), **options: Any) -> SwarmProcess:
        """Start a peer for tests, see `tests.support.swarm_peer`."""
        options = {"host_maddrs": [LOOPBACK], "initial_peers": list(initial_peers), **options}
        return self.start("-m", "tests.support.swarm_peer", json.dumps(options))
