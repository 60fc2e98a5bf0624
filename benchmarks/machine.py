"""What the machine can do: the disk's rate, the processor's rate, and caps on memory.

Measured in the same run as whatever is compared with it, because both vary.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from slowllm.checkpoint import Checkpoint, Placement, Run, Span
from slowllm.reader import Reader, ring_bytes_of

PROBE_BYTES = 2 << 30
PIECE_BYTES = 128 << 20
RING_PIECES = 4


def drop_page_cache(folder: Path) -> None:
    """Have the kernel forget the cached pages of a folder's files."""
    for path in folder.iterdir():
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(folder: Path) -> None:
    """Bring a folder's files into the page cache by reading them; advice alone may be ignored."""
    buffer = memoryview(bytearray(16 << 20))
    for path in folder.iterdir():
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


@dataclass(frozen=True)
class DiskRate:
    """What reading gives and costs.

    Attributes:
        bytes_per_second: of direct reads.
        core_seconds_per_gb: processor time of the process meanwhile, all threads, for 1e9 bytes.
    """

    bytes_per_second: float
    core_seconds_per_gb: float


def measure_disk(folder: Path) -> DiskRate:
    """Measure direct reads of a checkpoint's own bytes into one kept buffer.

    About 2 GB are read in pieces of 128 MiB by the reader that the engine uses, so this is the best it can do.
    """
    with Checkpoint.open(folder) as checkpoint:
        stops = _probe_stops(sorted(checkpoint.spans.values(), key=lambda span: -span.num_bytes))
        reader = Reader(stops, ring_bytes=RING_PIECES * max(ring_bytes_of(stop[0]) for stop in stops))
        try:
            first = min(RING_PIECES, len(stops) - 1)
            for number in range(first):
                with reader.visit(number):
                    pass  # the first touch of the buffer is paid here
            before = reader.stats.read_bytes
            started, core_started = time.perf_counter(), time.process_time()
            for number in range(first, len(stops)):
                with reader.visit(number, range(number + 1, len(stops))):
                    pass
            seconds, core_seconds = time.perf_counter() - started, time.process_time() - core_started
            num_bytes = reader.stats.read_bytes - before
            return DiskRate(num_bytes / seconds, core_seconds / num_bytes * 1e9)
        finally:
            reader.close()


def _probe_stops(spans: Sequence[Span]) -> list[list[Placement]]:
    """Cut the largest tensors into pieces: enough to fill the ring, and then to measure."""
    pieces: list[list[Placement]] = []
    for span in spans:
        for start in range(0, span.num_bytes - PIECE_BYTES + 1, PIECE_BYTES):
            if len(pieces) * PIECE_BYTES >= PROBE_BYTES + RING_PIECES * PIECE_BYTES:
                return pieces
            pieces.append(
                [Placement("probe", (PIECE_BYTES,), torch.uint8, (Run(span, start, 0, PIECE_BYTES),))]
            )
    return pieces or [  # a tiny checkpoint: whatever there is
        [Placement("probe", (span.num_bytes,), torch.uint8, (Run(span, 0, 0, span.num_bytes),))]
        for span in spans
        if span.num_bytes
    ]


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
