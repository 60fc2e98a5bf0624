"""Processes for tests, forked from one that has paid for the imports.

What is started here is a process of its own, with its own files, environment, signals, limits and end. But `python
-m slowllm` takes most of its first five seconds to import torch and transformers, so it is forked from a server
that has imported what others wrote; what is slowllm's is imported in each process. What slowllm and transformers
find out once a process is paid for as well: which products are fast here, and how checkpoints are named. Where it
matters how a process comes to its libraries, or in which cgroup their memory is, a test starts Python itself.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

PAID = (
    "torch", "numpy", "psutil", "typer", "pydantic.type_adapter", "rich.console", "rich.progress", "rich.table",
    "safetensors.torch", "transformers.conversion_mapping", "transformers.generation.utils",
    "transformers.modeling_utils", "transformers.tokenization_utils_tokenizers",
    "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto",
    "transformers.models.bloom.modeling_bloom",
)  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """How a process ended, and what it wrote to where nothing else was named."""

    returncode: int
    stdout: str
    stderr: str


class Process:
    """A process that was started. Owns its files; ended by `wait`."""

    def __init__(self, told: socket.socket, stdout: IO[str] | None, stderr: IO[str] | None) -> None:
        self._told, self.stdout, self._stderr = told, stdout, stderr
        self.pid = int(told.recv(32))

    def is_running(self) -> bool:
        """Return whether it has not ended."""
        return not select.select([self._told], [], [], 0)[0]

    def wait(self) -> Ended:
        """Wait for its end, at most five minutes."""
        if not select.select([self._told], [], [], 300)[0]:
            os.kill(self.pid, signal.SIGKILL)
            raise TimeoutError(f"process {self.pid} has not ended")
        with self._told:
            code = os.waitstatus_to_exitcode(int(self._told.recv(32)))
        texts = []
        for file in (self.stdout, self._stderr):
            if file is None or file.closed:
                texts.append("")
                continue
            with file:
                if file.seekable():
                    file.seek(0)
                texts.append(file.read())
        return Ended(code, *texts)

    def end(self, number: int) -> Ended:
        """Send a signal, and wait for its end."""
        os.kill(self.pid, number)
        return self.wait()


class Processes:
    """The server. Started on first use, ended with the context.

    Args:
        paid: the modules whose import it pays for.
    """

    def __init__(self, paid: Sequence[str] = PAID) -> None:
        self._paid = paid
        self._socket: socket.socket | None = None
        self._server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        if self._socket is not None and self._server is not None:
            self._socket.close()
            self._server.wait()

    def run(self, *arguments: object, **options: Any) -> Ended:
        """Run Python with these arguments, which begin with -m or -c, to its end."""
        return self.start(*arguments, **options).wait()

    def start(
        self, *arguments: object, stdin: int | None = None, stdout: int | None = None, stderr: int | None = None,
        env: Mapping[str, str] | None = None, file_bytes: int | None = None,
    ) -> Process:  # fmt: skip
        """Start Python with these arguments, which begin with -m or -c, in this folder.

        Args:
            arguments: of Python.
            stdin: an open file; without one there is nothing to read.
            stdout: an open file, or `subprocess.PIPE` to read what is written as it comes.
            stderr: an open file.
            env: what is added to the environment. What a library reads as it is imported comes too late.
            file_bytes: the limit on the size of files.
        """
        if self._socket is None:
            self._socket, theirs = socket.socketpair()
            self._server = subprocess.Popen(
                [sys.executable, "-m", "tests.support.processes", str(theirs.fileno()), *self._paid],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
            theirs.close()
        told, tell = socket.socketpair()
        reading = written = errors = None
        with open(os.devnull) as nothing:
            if stdout == subprocess.PIPE:
                ours, stdout = os.pipe()
                reading = os.fdopen(ours)
            elif stdout is None:
                written = tempfile.TemporaryFile("w+")  # noqa: SIM115 (owned by the process)
            if stderr is None:
                errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
            files = [
                nothing.fileno() if stdin is None else stdin,
                written.fileno() if written is not None else stdout,
                errors.fileno() if errors is not None else stderr,
                tell.fileno(),
            ]
            request = [[str(argument) for argument in arguments], {**os.environ, **(env or {})}, file_bytes]
            data = json.dumps([os.getcwd(), *request]).encode()
            socket.send_fds(self._socket, [len(data).to_bytes(8, "little")], files)  # type: ignore[list-item]
            self._socket.sendall(data)
        if reading is not None and stdout is not None:
            os.close(stdout)
        tell.close()
        return Process(told, reading or written, errors)


def in_a_fork(work: Callable[[], Any]) -> Any:
    """Return what a function gives in a forked process, as JSON: this one must not begin threads, which have no forks."""
    reading, writing = os.pipe()
    if not (child := os.fork()):
        os.write(writing, json.dumps(work()).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        found = json.loads(answer.read())
    os.waitpid(child, 0)
    return found


def product_times() -> tuple[float, float]:
    """Return what `slowllm` measures to choose a compute dtype."""
    return importlib.import_module("slowllm.runtime.rates")._product_times()  # type: ignore[no-any-return]


def serve(requests: socket.socket, seconds: Sequence[float] | None) -> None:
    """Fork a process for each request; return in each of them when it has run.

    Args:
        requests: as `Processes` sends them.
        seconds: what `product_times` gave; None where the processes find out themselves.
    """
    while True:
        head, files, _, _ = socket.recv_fds(requests, 8, 4)
        if not head:
            return
        size, data = int.from_bytes(head, "little"), b""
        while len(data) < size:
            data += requests.recv(size - len(data))
        # Two forks: the first waits for the second and tells of its end; for the first nobody waits.
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            if not (child := os.fork()):
                requests.close()
                if seconds is not None:
                    # The same dtype for all, on however busy a machine: a test compares what several of them give.
                    importlib.import_module("slowllm.runtime.rates")._product_times = lambda: seconds
                become(files, *json.loads(data))
                return
            with socket.socket(fileno=files[3]) as tell:
                for file in files[:3]:
                    os.close(file)
                tell.send(f"{child:<32}".encode())
                tell.send(f"{os.waitpid(child, 0)[1]:<32}".encode())
            os._exit(0)
        for file in files:
            os.close(file)


def become(
    files: list[int], folder: str, arguments: list[str], environment: dict[str, str], file_bytes: int | None
) -> None:
    """Be the process that was asked for, to the end of its main module."""
    for number, file in enumerate(files[:3]):
        os.dup2(file, number)
    for file in files:
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # As Python opens them; a terminal is written to line by line.
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    kind, what, *rest = arguments
    sys.argv = [kind, *rest]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with whoever started it
    for name in sys.argv[2:]:
        importlib.import_module(name)
    measured = None
    if "transformers.conversion_mapping" in sys.argv:
        measured = in_a_fork(product_times)
        sys.modules["transformers.conversion_mapping"].get_checkpoint_conversion_mapping("legacy")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.freeze()  # or each process would copy the memory of all that was imported, only to look for garbage in it
    serve(socket.socket(fileno=int(sys.argv[1])), measured)
