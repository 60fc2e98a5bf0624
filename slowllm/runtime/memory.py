"""How much memory this process may take: of the machine, and of the container that it runs in."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from slowllm.options import AUTO, format_binary, parse_bytes
from slowllm.planning.budget import Budget

log = logging.getLogger(__name__)

# What `auto` leaves of a machine to others: an eighth, within these bounds. In a container it leaves a twentieth.
MIN_RESERVE_BYTES, MAX_RESERVE_BYTES = 1 << 29, 1 << 32
_CGROUPS, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


@dataclass(frozen=True)
class MemoryLimit:
    """The memory that a process may take.

    Attributes:
        num_bytes: of the machine, or of the container where that has less.
        is_container: whether it is the container's.
    """

    num_bytes: int
    is_container: bool

    @property
    def auto_bytes(self) -> int:
        """The budget that is taken by default."""
        if self.is_container:
            return self.num_bytes - self.num_bytes // 20
        return self.num_bytes - min(max(self.num_bytes // 8, MIN_RESERVE_BYTES), MAX_RESERVE_BYTES)


def memory_limit() -> MemoryLimit:
    """Return the memory of this machine, or the limit of this process's control group (v1 or v2), if that is lower."""
    machine = psutil.virtual_memory().total
    container = min(_cgroup_limits(), default=machine)
    return MemoryLimit(min(machine, container), container < machine)


def budget_bytes(ram: str | int) -> int:
    """Return the bytes of a budget; one above the limit is lowered, with a warning.

    Args:
        ram: a size, or ``auto``.
    Raises:
        InputError: it is no size.
    """
    limit = memory_limit()
    if ram == AUTO:
        return limit.auto_bytes
    num_bytes = parse_bytes(ram)
    # The system rounds limits to pages.
    if num_bytes <= limit.num_bytes + (1 << 20):
        return min(num_bytes, limit.num_bytes)
    log.warning(
        "the budget is %s, but this %s has %s; %s are used", format_binary(num_bytes),
        "container" if limit.is_container else "machine", format_binary(limit.num_bytes),
        format_binary(limit.auto_bytes),
    )  # fmt: skip
    return limit.auto_bytes


def budget_of(ram: str | int, reserved_bytes: int = 0) -> Budget:
    """Return a budget of which this process has used what it holds now.

    Args:
        ram: a size, or ``auto``.
        reserved_bytes: that it will hold beside its models.
    """
    return Budget(budget_bytes(ram), psutil.Process().memory_info().rss + reserved_bytes)


def _cgroup_limits() -> Iterator[int]:
    """Yield the limits of this process's control groups and of those that they are in."""
    try:
        lines = _OWN_GROUPS.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return  # no Linux
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            roots, name = [_CGROUPS, _CGROUPS / "unified"], "memory.max"
        elif "memory" in controllers.split(","):
            roots, name = [_CGROUPS / "memory", _CGROUPS / controllers], "memory.limit_in_bytes"
        else:
            continue
        for root in roots:
            folder = root / path.lstrip("/")
            # In a container the path may be the host's, and its own group is mounted at the root.
            for group in (*(f for f in (folder, *folder.parents) if f.is_relative_to(root)), root):
                yield from _limit_in(group / name)


def _limit_in(path: Path) -> Iterator[int]:
    try:
        text = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return
    if text.isdigit():  # "max" is no limit
        yield int(text)
