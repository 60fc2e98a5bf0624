"""Wait for Ctrl-C or SIGTERM in verbs that run until they are told to end. Both must be blocked, before any thread begins."""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from slowllm.entrypoints.cli.interrupts import INTERRUPTED
from slowllm.entrypoints.cli.log_format import write_line

_LOOK_SECONDS = 0.2
END = (signal.SIGINT, signal.SIGTERM)


def has_been_told_to_end(seconds: float) -> bool:
    """Wait for one of the signals at most so long; return whether one has come."""
    found = signal.sigtimedwait(END, seconds)
    # CPython returns memory that it has not written when the process was stopped (Ctrl-Z) for longer than that, and goes on.
    return found is not None and found.si_signo in END


@contextlib.contextmanager
def may_end_while_starting() -> Iterator[None]:
    """Raise KeyboardInterrupt in the main thread at one of the signals, for the length of the context; end at once at the next.

    The error comes when the main thread runs Python again: what it waits for, such as a machine that is silent, may take its time.
    """
    started = threading.Event()

    def look() -> None:
        num_heard = 0
        while not started.is_set():
            if not has_been_told_to_end(_LOOK_SECONDS):
                continue
            num_heard += 1
            if num_heard > 1:
                os._exit(INTERRUPTED)
            write_line("slowllm: interrupted before it has started; the next signal ends it at once")
            _thread.interrupt_main()

    looking = threading.Thread(target=look, name="slowllm-signals", daemon=True)
    looking.start()
    try:
        yield
    finally:
        started.set()
        looking.join()
