"""Measure the rates of the disk and the processor, and cap memory.

The rates are measured in the same run as the speeds that are compared with them, because both vary.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from slowllm.runtime.rates import DiskRate, disk_rate
from slowllm.storage.manifest import open_checkpoint

PROBE_BYTES = 2 << 30


def drop_page_cache(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for path in folder.iterdir():
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(folder: Path) -> None:
    """Read a folder's files into the page cache; the kernel may ignore mere advice."""
    buffer = memoryview(bytearray(16 << 20))
    for path in folder.iterdir():
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def measure_disk(folder: Path) -> DiskRate:
    """Measure direct reads of about 2 GB of a checkpoint with the engine's own reader."""
    with open_checkpoint(folder) as checkpoint:
        return disk_rate(checkpoint, PROBE_BYTES)


def gemm_flops_per_second(num_tokens: int, width: int, dtype: torch.dtype = torch.bfloat16) -> float:
    """Return the rate of a product of `num_tokens` rows with a square matrix, the best of six runs."""
    a, b = torch.randn(num_tokens, width).to(dtype), torch.randn(width, width).to(dtype)
    best = min(_seconds(lambda: a @ b) for _ in range(6))
    return 2 * num_tokens * width * width / best


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def memory_cgroup(name: str, limit_bytes: int) -> Path | None:
    """Make a memory cgroup with a limit; return its folder, or None where the machine does not allow one."""
    for root, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        folder = Path(root) / name
        try:
            folder.mkdir(exist_ok=True)
            (folder / limit).write_text(str(limit_bytes))
        except OSError:
            continue
        return folder
    return None


def enter_cgroup(folder: Path) -> None:
    """Move this process into a cgroup."""
    (folder / "cgroup.procs").write_text(str(os.getpid()))


def remove_cgroup(folder: Path) -> None:
    """Remove an empty cgroup."""
    folder.rmdir()
