"""Call a function that runs a stranger's program, such as a template, in a child process with limits.

Jinja's sandbox keeps a template from files and from Python's insides, not from loops without end and texts of
gigabytes.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import threading
import warnings
import weakref
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from typing import Any, Generic, NoReturn, TypeVar

from slowllm.errors import InputError, SlowLLMError, first_line

A = TypeVar("A")
R = TypeVar("R")

MAX_SECONDS = 10
MAX_BYTES = 256 << 20


class BoundedCalls(Generic[A, R]):
    """A function whose calls run in a child process, one at a time, each at most `max_seconds` long.

    The child is forked at the first call, and again after a call that ended it. It ends with its owner, even where
    that is killed. What the function changes is not seen here.

    Args:
        function: whose argument and result can be pickled.
        max_seconds: of a call.
        max_bytes: that the child may allocate.
    """

    def __init__(
        self, function: Callable[[A], R], max_seconds: int = MAX_SECONDS, max_bytes: int = MAX_BYTES
    ) -> None:
        self._function, self._max_seconds, self._max_bytes = function, max_seconds, max_bytes
        self._lock = threading.Lock()
        self._child: tuple[ForkProcess, Connection] | None = None
        self._finalizer: Callable[[], Any] = lambda: None

    def __call__(self, argument: A, name: str = "it") -> R:
        """Return what the function returns.

        Args:
            argument: of the function.
            name: of the call, for an error.
        Raises:
            InputError: the call took too long, or too much memory.
            SlowLLMError: what the function raises; any other error comes as an InputError with its message.
        """
        with self._lock:
            is_returned, value = self._ask(argument, name)
        if is_returned:
            return value  # type: ignore[no-any-return]
        raise value

    def _ask(self, argument: A, name: str) -> tuple[bool, Any]:
        process, connection = self._child or self._fork()
        try:
            connection.send(argument)
            return connection.recv()  # type: ignore[no-any-return]
        except (EOFError, ConnectionError):
            process.join()
            self.close()
            if process.exitcode == -signal.SIGALRM:
                raise InputError(f"{name} takes longer than {self._max_seconds} s") from None
            raise InputError(
                f"{name} ended its process (exit code {process.exitcode}), or takes too much memory"
            ) from None
        except BaseException:  # an interrupt: the answer to this call must not be taken for that of the next
            self.close()
            raise

    def close(self) -> None:
        """End the child. Idempotent; a later call forks another."""
        self._finalizer()
        self._child = None

    def _fork(self) -> tuple[ForkProcess, Connection]:
        # The tokenizers library warns at a fork unless this is set; in the child it never tokenizes in parallel.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        context = get_context("fork")
        ours, theirs = context.Pipe()
        limits = self._max_seconds, self._max_bytes
        process = context.Process(target=_serve, args=(self._function, theirs, *limits), daemon=True)
        with warnings.catch_warnings():
            # Python 3.12 warns of locks that other threads may hold; rendering takes none of theirs.
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
        theirs.close()
        self._child = process, ours
        self._finalizer = weakref.finalize(self, _end, process, ours)
        return self._child


def _end(process: ForkProcess, connection: Connection) -> None:
    connection.close()
    process.kill()
    process.join()


def _serve(function: Callable[[Any], Any], connection: Connection, seconds: int, num_bytes: int) -> NoReturn:
    """Answer calls until the owner is gone."""
    # Locks of the owner's files, and its end of the pipe, must not outlive it here.
    os.closerange(3, connection.fileno())
    os.closerange(connection.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the child as well; the owner answers it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with contextlib.suppress(OSError, ValueError):  # where the system has no such limit, or a lower one
        with open("/proc/self/statm", encoding="ascii") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + num_bytes, resource.getrlimit(resource.RLIMIT_AS)[1]))
    while True:
        try:
            argument = connection.recv()
        except (EOFError, OSError):
            os._exit(0)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        answer: tuple[bool, Any]
        try:
            answer = True, function(argument)
        except MemoryError:
            answer = False, InputError(f"it needs more than {num_bytes >> 20} MiB of memory")
        except SlowLLMError as error:
            answer = False, error
        except BaseException as error:  # not the error itself: a stranger's class may not survive the way
            answer = False, InputError(first_line(error))
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            connection.send(answer)
        except OSError:
            os._exit(0)
        except Exception:  # what cannot be pickled
            connection.send((False, InputError(f"{type(answer[1]).__name__} cannot be handed on")))
