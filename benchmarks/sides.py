"""Run each side of a benchmark in a process of its own, under one memory cap and on one checkpoint."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from benchmarks import machine
from benchmarks.make_checkpoint import GEOMETRIES, make_checkpoint
from benchmarks.native_weights import FORMATS
from benchmarks.report import add_report_option
from slowllm.options import format_bytes, parse_bytes
from slowllm.prepare.convert import convert

SIDE = "--side"


def parser(description: str | None, peers: Sequence[str] = ("accelerate",)) -> argparse.ArgumentParser:
    """Return a parser of the options that all benchmarks have."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--geometry", choices=sorted(GEOMETRIES), default="llama-70b")
    options.add_argument("--blocks", type=int, default=4, help="number of blocks of the checkpoint")
    options.add_argument("--ram", default="5GiB", help="slowllm's budget, and the cap on both sides")
    options.add_argument(
        "--repeat", type=int, default=3, help="number of runs of each side, whose median is reported"
    )
    options.add_argument("--peer", choices=peers, help="also measure this peer")
    options.add_argument(
        "--checkpoint", type=Path, help="folder of the checkpoint; written where it is missing"
    )
    add_report_option(options)
    return options


def add_format_option(options: argparse.ArgumentParser) -> None:
    """Add the option of how the checkpoint stores weights."""
    options.add_argument(
        "--format",
        choices=["native", *sorted(FORMATS)],
        default="bf16",
        help="how the checkpoint stores weights; native: as the model is published",
    )


def run(
    module: str, name: str, task: Mapping[str, Any], *, folder: Path, cgroup: Path | None, warm: bool = False
) -> dict[str, Any]:
    """Run one side of a benchmark and return its report.

    Args:
        module: name of the module of `benchmarks` that calls `serve`.
        name: name of the side.
        task: what the side does, as JSON.
        folder: the checkpoint's folder, whose files are dropped from the page cache first, or read into it.
        cgroup: the cgroup to run in.
        warm: whether the checkpoint is read into the page cache.
    """
    program = [sys.executable, "-m", f"benchmarks.{module}", SIDE, name]
    return run_program(program, task, folder=folder, cgroup=cgroup, warm=warm)


def run_program(
    program: Sequence[str],
    task: Mapping[str, Any],
    *,
    folder: Path,
    cgroup: Path | None,
    warm: bool = False,
) -> dict[str, Any]:
    """Run a program on a task in JSON, and return the JSON document in its last line; see `run`.

    Raises:
        SystemExit: it failed.
    """
    if warm:
        machine.read_all(folder)
    else:
        machine.drop_page_cache(folder)
    done = subprocess.run(
        [*program, json.dumps(task)],
        capture_output=True, text=True, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        preexec_fn=(lambda: machine.enter_cgroup(cgroup)) if cgroup else None,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{' '.join(program[-2:])} failed ({done.returncode}):\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def serve(runners: Mapping[str, Callable[[Any], dict[str, Any]]], kind: Callable[..., Any]) -> bool:
    """Run one side if the command line asks for it, and print its report with this process's peak RSS as JSON.

    Args:
        runners: the function of each side.
        kind: class of the task, whose fields the command line gives as JSON.
    Returns:
        whether the command line asked for a side.
    """
    if sys.argv[1:2] != [SIDE]:
        return False
    name, text = sys.argv[2:]
    print(json.dumps({**runners[name](kind(**json.loads(text))), "peak_rss_bytes": peak_rss_bytes()}))
    return True


def median(runs: Sequence[Mapping[str, Any]], key: str) -> float:
    """Return the median of a figure over several runs."""
    return float(statistics.median(run[key] for run in runs))


def peak_rss_bytes() -> int:
    """Return this program's peak RSS; getrusage would include the parent's from before the exec."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


@contextlib.contextmanager
def capped(ram: str | None) -> Iterator[Path | None]:
    """Yield a memory cgroup with this limit; None without a limit, or where none can be made."""
    if ram is None:
        yield None
        return
    cgroup = machine.memory_cgroup(f"slowllm-bench-{os.getpid()}", parse_bytes(ram))
    if cgroup is None:
        print("no memory cgroup can be made here; only --ram caps us, and nothing the peer", file=sys.stderr)
    try:
        yield cgroup
    finally:
        if cgroup is not None:
            machine.remove_cgroup(cgroup)


def checkpoint(folder: Path | None, geometry: str, blocks: int, storage: str = "bf16") -> Path:
    """Return the folder of a checkpoint of random weights, which is written where it is missing.

    Raises:
        SystemExit: the folder holds another checkpoint.
    """
    ending = "" if storage == "bf16" else f"-{storage}"
    folder = folder or Path("/var/tmp") / f"slowllm-{geometry}-{blocks}{ending}"
    if not (folder / "config.json").is_file():
        make_checkpoint(geometry, blocks, folder, storage=storage)
    config = AutoConfig.from_pretrained(folder)
    if config.num_hidden_layers != blocks or config.hidden_size != GEOMETRIES[geometry][2]["hidden_size"]:
        sys.exit(f"{folder} is not {blocks} blocks of {geometry}; name another --checkpoint")
    return folder


def store_of(folder: Path, store: str) -> Path:
    """Return the folder of a checkpoint's store, which is made beside the checkpoint where it is missing.

    Raises:
        SlowLLMError: the store cannot be made, or was made of another checkpoint.
    """
    out = folder.with_name(f"{folder.name}-{store}")
    started = time.perf_counter()
    done = convert(folder, out, store=store)
    seconds = time.perf_counter() - started
    rate = format_bytes(done.source_bytes / seconds)
    print(
        f"{store} store of {format_bytes(done.num_bytes)}: {seconds:.0f} s, {rate}/s of the source",
        file=sys.stderr,
    )
    return out
