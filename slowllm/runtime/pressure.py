"""What the rest of the system does: how long tasks waited for memory, and how many cores others used."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

_MEMORY = Path("/proc/pressure/memory")


@dataclass(frozen=True)
class SystemTimes:
    """Sums since the system began, in seconds; differences of two of them are of use.

    Attributes:
        at: the time.
        memory_stall: in which some task waited for memory; None where the system does not say.
        others: of all cores, that other processes used; None where the system does not say.
    """

    at: float
    memory_stall: float | None
    others: float | None


def system_times(memory: Path = _MEMORY) -> SystemTimes:
    """Return the sums of this moment."""
    return SystemTimes(time.monotonic(), _memory_stall(memory), _others())


def _memory_stall(path: Path) -> float | None:
    try:
        found = re.search(r"^some .*total=(\d+)", path.read_text(encoding="ascii"), re.MULTILINE)
    except (OSError, ValueError):
        return None  # no Linux, or one without pressure stall information
    return None if found is None else int(found[1]) / 1e6


def _others() -> float | None:
    times = psutil.cpu_times()
    busy = sum(times) - times.idle - getattr(times, "iowait", 0.0)
    # Of virtual machines, counted in `user` already.
    busy -= getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
    own = os.times()
    return busy - own.user - own.system
