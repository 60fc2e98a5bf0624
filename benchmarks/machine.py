"""What the machine can do: the disk's rate, the processor's rate, and caps on memory.

Measured in the same run as whatever is compared with it, because both vary.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from slowllm.checkpoint import Checkpoint, Placement, Run
from slowllm.reader import Reader, ring_bytes_of

PROBE_BYTES = 2 << 30


def drop_page_cache(folder: Path) -> None:
    """Have the kernel forget the cached pages of a folder's files."""
    for path in folder.iterdir():
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_bytes_per_second(folder: Path) -> float:
    """Return the rate of direct reads of a checkpoint's own bytes, into one kept buffer.

    About 2 GB are read in pieces of 128 MiB by the reader that the engine uses, so this is the best it can do.
    """
    with Checkpoint.open(folder) as checkpoint:
        spans = sorted(checkpoint.spans.values(), key=lambda span: -span.num_bytes)
        stops: list[list[Placement]] = []
        total = 0
        for span in spans:
            piece = 128 << 20
            for start in range(0, span.num_bytes - piece + 1, piece):
                run = Run(span, start, 0, piece)
                stops.append([Placement("probe", (piece,), torch.uint8, (run,))])
                total += piece
            if total >= PROBE_BYTES:
                break
        if not stops:  # a tiny checkpoint: whatever there is
            stops = [
                [Placement("probe", (span.num_bytes,), torch.uint8, (Run(span, 0, 0, span.num_bytes),))]
                for span in spans
                if span.num_bytes
            ]
            total = sum(stop[0].num_bytes for stop in stops)
        ring = 4 * max(ring_bytes_of(stop[0]) for stop in stops)
        reader = Reader(stops, ring_bytes=ring)
        try:
            with reader.visit(0, range(1, min(4, len(stops)))):
                pass  # the first touch of the buffer is paid here
            started = time.perf_counter()
            for number in range(len(stops)):
                with reader.visit(number, range(number + 1, len(stops))):
                    pass
            return (
                (total - stops[0][0].num_bytes) / (time.perf_counter() - started) if len(stops) > 1 else total
            )
        finally:
            reader.close()


def gemm_flops_per_second(num_tokens: int, width: int, dtype: torch.dtype = torch.bfloat16) -> float:
    """Return the rate of a product of `num_tokens` rows with a square matrix, the best of five."""
    a, b = torch.randn(num_tokens, width).to(dtype), torch.randn(width, width).to(dtype)
    best = min(_seconds(lambda: a @ b) for _ in range(6))
    return 2 * num_tokens * width * width / best


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def memory_cgroup(name: str, limit_bytes: int) -> Path | None:
    """Make a memory cgroup with a limit; return its folder, or None where that is not allowed."""
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
