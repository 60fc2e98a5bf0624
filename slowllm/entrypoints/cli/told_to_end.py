"""Wait for Ctrl-C or SIGTERM in verbs that run until they are told to end. Both must be blocked, before any thread begins."""

from __future__ import annotations

import signal

END = (signal.SIGINT, signal.SIGTERM)


def has_been_told_to_end(seconds: float) -> bool:
    """Wait for one of the signals at most so long; return whether one has come."""
    found = signal.sigtimedwait(END, seconds)
    # CPython returns memory that it has not written when the process was stopped (Ctrl-Z) for longer than that, and goes on.
    return found is not None and found.si_signo in END
