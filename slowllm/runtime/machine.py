"""What this machine is: its cores and their matrix units, its memory, its GPUs, and the versions of what computes on it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from slowllm.errors import InputError
from slowllm.files import system_errors
from slowllm.runtime.memory import MemoryLimit, memory_limit
from slowllm.runtime.rates import PIECE_BYTES, WORTH_MEASURING_BYTES, read_rate
from slowllm.storage.manifest import open_checkpoint
from slowllm.storage.spans import Span

# What a processor's flags are called, as Linux lists them, and what they are for.
_UNITS = {
    "bf16": ("amx_bf16", "avx512_bf16", "avx_ne_convert", "svebf16", "bf16"),
    "int8": ("amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "asimddp"),
}
_PACKAGES = (
    "torch", "transformers", "safetensors", "huggingface_hub", "numpy", "numba", "peft", "lm_eval", "hivemind",
)  # fmt: skip
# Written and read again to measure a folder without a checkpoint.
PROBE_BYTES = 12 * PIECE_BYTES
_CPU_INFO, _CPU_MAX = Path("/proc/cpuinfo"), Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch can use: its name there, what it is, and its memory in bytes."""

    device: str
    name: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Machine:
    """This machine.

    Attributes:
        system: its operating system and Python.
        processor: what it is called, as far as the system knows.
        num_cores: that this process may use.
        num_physical: of the machine, without hyper-threads; None where the system does not say.
        quota_cores: that the container allows at a time; None for all.
        units: by dtype, the flags of the instructions that multiply it fast; without any, it is multiplied in fp32.
        ram_bytes: of the machine.
        available_bytes: that are free now.
        limit: what this process may take.
        gpus: that torch can use.
        versions: of packages; those that are not installed are absent.
    """

    system: str
    processor: str
    num_cores: int
    num_physical: int | None
    quota_cores: float | None
    units: Mapping[str, tuple[str, ...]]
    ram_bytes: int
    available_bytes: int
    limit: MemoryLimit
    gpus: tuple[Gpu, ...]
    versions: Mapping[str, str]


def this_machine() -> Machine:
    """Return what this machine is. Nothing is measured."""
    memory = psutil.virtual_memory()
    name, flags = _processor()
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return Machine(
        system=f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        processor=name,
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        num_physical=psutil.cpu_count(logical=False),
        quota_cores=_quota_cores(_CPU_MAX),
        units=units_of(flags),
        ram_bytes=memory.total,
        available_bytes=memory.available,
        limit=memory_limit(),
        gpus=_gpus(),
        versions=versions,
    )


def units_of(flags: frozenset[str]) -> dict[str, tuple[str, ...]]:
    """Return by dtype those of a processor's flags that stand for fast products."""
    return {dtype: tuple(flag for flag in names if flag in flags) for dtype, names in _UNITS.items()}


def _processor() -> tuple[str, frozenset[str]]:
    """Return the processor's name and flags."""
    name, flags = platform.processor() or platform.machine(), frozenset[str]()
    try:
        text = _CPU_INFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return name, flags  # no Linux
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        if key.strip().lower() in ("flags", "features"):
            return name, frozenset(value.split())
    return name, flags


def _quota_cores(path: Path) -> float | None:
    """Return the cores that a control group (v2) allows at a time; None without a limit."""
    try:
        quota, period = path.read_text(encoding="ascii").split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _gpus() -> tuple[Gpu, ...]:
    found = []
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        found.append(Gpu(f"cuda:{number}", torch.cuda.get_device_name(number), total, free))
    return tuple(found)


def folder_rate(folder: Path, probe_bytes: int = PROBE_BYTES) -> tuple[float, str]:
    """Measure direct reads from the disk under a folder.

    A checkpoint of 4 GiB or more in the folder is read in part. Otherwise a file is written there, read and removed.

    Args:
        folder: to be measured.
        probe_bytes: of that file.
    Returns:
        bytes a second, and in words what was read.
    Raises:
        InputError: there is no such folder, it cannot be written to, or has too little room.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder to measure")
    if (folder / "config.json").is_file():
        with open_checkpoint(folder, may_lack_shards=True) as checkpoint:
            spans = list(checkpoint.spans.values())
            if sum(span.num_bytes for span in spans) >= WORTH_MEASURING_BYTES:
                return read_rate(spans, 8 * PIECE_BYTES).bytes_per_second, "the checkpoint there"
    with system_errors(InputError, folder, "; --folder takes one in which a file can be written"):
        if psutil.disk_usage(str(folder)).free < 2 * probe_bytes:
            raise InputError(
                f"{folder}: has no room for a file of {2 * probe_bytes:,} bytes to measure the disk with"
            )
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".slowllm-") as file:
            piece = os.urandom(min(PIECE_BYTES, probe_bytes))  # what a file system cannot compress
            for _ in range(probe_bytes // len(piece)):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            num_bytes = len(piece) * (probe_bytes // len(piece))
            span = Span("probe", Path(file.name), "U8", (num_bytes,), 0, num_bytes)
            return read_rate([span], num_bytes).bytes_per_second, "a file written there"
