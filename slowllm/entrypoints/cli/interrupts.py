"""What Ctrl-C does: once ends after what is under way, twice ends at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

INTERRUPTED = 130
_FIRST = "slowllm: interrupted; ending after what is under way, and at once after another Ctrl-C\n"
_SECOND = "slowllm: ended at once\n"


@contextlib.contextmanager
def second_interrupt_ends_at_once() -> Iterator[None]:
    """Raise KeyboardInterrupt at the first SIGINT, as Python does, and end the process at the next one, with exit code 130.

    After the first one, a stop that is being computed is still waited for, and files are closed. The second one leaves what a
    kill leaves, from which the same command goes on as well. Does nothing where another handler was chosen, as for a
    job in the background of a shell, or outside of the main thread.
    """
    is_ours = threading.current_thread() is threading.main_thread()
    if not is_ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    # A child that was forked meanwhile hears of Ctrl-C from the terminal, and says nothing.
    process, num_heard = os.getpid(), 0

    def hear(number: int, frame: Any) -> None:
        nonlocal num_heard
        num_heard += 1
        if num_heard > 1:
            _say(process, _SECOND)
            os._exit(INTERRUPTED)
        _say(process, _FIRST)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _say(process: int, sentence: str) -> None:
    """Write a sentence to stderr from a signal's handler, which may have interrupted a write."""
    from slowllm.entrypoints.cli.log_format import JsonLines, writes_json

    if os.getpid() != process:
        return
    if writes_json():
        import logging

        record = logging.LogRecord(
            "slowllm", logging.WARNING, "", 0, sentence.strip().removeprefix("slowllm: "), None, None
        )
        sentence = JsonLines().format(record) + "\n"
    with contextlib.suppress(OSError, ValueError):
        # Not print: what it interrupted may hold the buffer of stderr.
        os.write(sys.stderr.fileno(), sentence.encode())
