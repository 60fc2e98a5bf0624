"""`slowllm doctor`: what this machine is, which models it runs and how fast, and what to change first."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slowllm.entrypoints.cli import options
from slowllm.entrypoints.cli.runner import Runner
from slowllm.errors import InputError
from slowllm.options import format_binary, format_bytes

if TYPE_CHECKING:
    import torch

    from slowllm.planning.job import Job, Rates
    from slowllm.runtime.blueprint import Blueprint
    from slowllm.runtime.fit import Fit
    from slowllm.runtime.machine import Machine

# BoolQ's validation set has 3,270 questions, with passages of 108 tokens on average (Clark et al., 2019); the question, a
# template and an answer bring them to this.
NUM_QUESTIONS, QUESTION_TOKENS, LONGEST_QUESTION = 3270, 150, 512
# What is continued to measure a token.
WIDTH, NEW_TOKENS = 64, 64


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Folder, hub id or name of a known model; its weights need not be here.",
            show_default="twelve known models",
        ),
    ] = None,
    folder: Annotated[
        list[Path] | None,
        typer.Option(
            "--folder",
            help="Folder whose disk is measured, by a file of 768 MiB that is written there and removed, or by the checkpoint "
            "there; may be given several times.",
            show_default="the model's, if it has 4 GiB; else 2 GB/s are assumed",
        ),
    ] = None,
    ram: options.Ram = "auto",
    dtype: options.DType = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")] = False,
    verbose: options.Verbose = False,
) -> None:  # fmt: skip
    """Say what this machine is, and which models it runs how fast.

    Measures the processor and the disk under each --folder, and plans two jobs for a model, or for twelve known ones: BoolQ with
    one template (3,270 questions of about 150 tokens), and one text that is continued token by token. Says what to
    change first. Nothing is downloaded. The plans are those of `slowllm plan`.
    """
    options.log_to_stderr(verbose)
    for path in folder or ():
        if not path.expanduser().is_dir():
            raise InputError(f"{path}: no such folder to measure")
    runner = Runner(model, ram, "cpu", None, dtype, dry_run=True)
    runner.load_libraries()
    from slowllm.runtime.machine import folder_rate, this_machine
    from slowllm.runtime.memory import budget_bytes

    machine, ram_bytes = this_machine(), budget_bytes(ram)
    disks = [(str(path), *folder_rate(path.expanduser())) for path in folder or ()]
    fits = _fits(runner, model, disks, ram_bytes=ram_bytes, dtype=dtype)
    if as_json:
        print(json.dumps(_document(machine, disks, ram_bytes, fits)))
    else:
        _print(machine, disks, ram_bytes, fits)


def _fits(
    runner: Runner, model: str | None, disks: list[tuple[str, float, str]], *, ram_bytes: int, dtype: str
) -> list[Fit]:
    """Return how one model, or twelve, fit this machine; the disk that was measured under a model is added to the others."""
    import psutil

    from slowllm.runtime.blueprint import find_blueprint, known_blueprint
    from slowllm.runtime.fit import TWELVE, fit_of, fit_of_store
    from slowllm.storage.gguf_files import gguf_files
    from slowllm.storage.manifest import is_store

    if model is None:
        blueprints = [known_blueprint(name) for name in TWELVE]
    elif (blueprint := find_blueprint(model, None)) is not None:
        blueprints = [blueprint]
    elif is_store(runner.info.folder) or gguf_files(runner.info.folder):
        return [fit_of_store(runner.info, _jobs(), ram_bytes=ram_bytes, dtype=dtype)]
    else:
        found = find_blueprint(None, runner.info.folder)
        assert found is not None, "a config has a blueprint"
        blueprints = [replace(found, name=runner.info.name)]
        if not disks and runner.rates.disk_measured:
            disks.append((str(runner.info.folder), runner.rates.disk, "the checkpoint there"))
    rates_of = _rates_by_dtype(max((rate for _, rate, _ in disks), default=None))
    process_bytes = psutil.Process().memory_info().rss

    def planned(blueprint: Blueprint, *, asks_for_faster: bool) -> Fit:
        if sys.stderr.isatty():
            print(f"planning {blueprint.name}", file=sys.stderr)
        return fit_of(
            blueprint, _jobs(), ram_bytes=ram_bytes, process_bytes=process_bytes, dtype=dtype, rates_of=rates_of,
            asks_for_faster=asks_for_faster,
        )  # fmt: skip

    fits = [planned(blueprint, asks_for_faster=model is not None) for blueprint in blueprints]
    largest = max((number for number, fit in enumerate(fits) if fit.surveys), default=None)
    if model is None and largest is not None:
        # What to change is said for the largest model that runs here.
        fits[largest] = planned(blueprints[largest], asks_for_faster=True)
    return fits


def _jobs() -> tuple[Job, Job]:
    """Return the jobs that are planned for each model: BoolQ, and a text that is continued."""
    from slowllm.inference.generation import row_of
    from slowllm.inference.generation_types import Settings
    from slowllm.planning.job import Job

    boolq = Job(NUM_QUESTIONS * QUESTION_TOKENS, LONGEST_QUESTION, forward_only=True, keeps_results=False)
    length = WIDTH + NEW_TOKENS
    settings = Settings(max_new_tokens=NEW_TOKENS)
    return boolq, Job(
        length, length, forward_only=True, keeps_results=False, num_passes=NEW_TOKENS, rows=((row_of(WIDTH, settings), 1),)
    )  # fmt: skip


def _rates_by_dtype(disk: float | None) -> Callable[[torch.dtype], Rates]:
    """Return a function that measures the processor once for each dtype."""

    @functools.cache
    def rates_of(dtype: torch.dtype) -> Rates:
        from slowllm.runtime.rates import processor_rates

        rates = processor_rates(dtype)
        return rates if disk is None else replace(rates, disk=disk, disk_measured=True)

    return rates_of


def _document(
    machine: Machine, disks: Sequence[tuple[str, float, str]], ram_bytes: int, fits: Sequence[Fit]
) -> dict[str, Any]:
    return {
        "machine": {
            "system": machine.system, "processor": machine.processor, "num_cores": machine.num_cores,
            "num_physical_cores": machine.num_physical, "quota_cores": machine.quota_cores,
            "units": {dtype: list(flags) for dtype, flags in machine.units.items()},
            "ram_bytes": machine.ram_bytes, "available_bytes": machine.available_bytes,
            "limit_bytes": machine.limit.num_bytes, "is_container": machine.limit.is_container,
            "gpus": [{"device": gpu.device, "name": gpu.name, "total_bytes": gpu.total_bytes, "free_bytes": gpu.free_bytes} for gpu in machine.gpus],
            "versions": dict(machine.versions),
        },
        "disks": [{"folder": path, "bytes_per_second": rate, "read": how} for path, rate, how in disks],
        "ram_bytes": ram_bytes,
        "models": [_row(fit) for fit in fits],
    }  # fmt: skip


def _row(fit: Fit) -> dict[str, Any]:
    """Return what is said of a model; what a plan would say is null where there is none."""
    row: dict[str, Any] = {
        "model": fit.name, "weight_bytes": fit.weight_bytes, "compute_dtype": fit.dtype, "fits": bool(fit.surveys),
        "smallest_ram_bytes": fit.smallest_bytes, "sweep_seconds": None, "free_tokens": None, "token_seconds": None,
        "boolq_hours": None, "limited_by": None, "disk_measured": None, "processor_measured": None, "faster": [],
    }  # fmt: skip
    if fit.surveys:
        boolq, token = fit.surveys
        forecast = boolq.plan.forecast
        row |= {
            "sweep_seconds": forecast.later_seconds, "free_tokens": boolq.free_tokens,
            "token_seconds": token.plan.forecast.later_seconds, "boolq_hours": forecast.seconds / 3600,
            "limited_by": "disk" if forecast.read_seconds > forecast.compute_seconds else "processor",
            "disk_measured": boolq.rates.disk_measured, "processor_measured": boolq.rates.compute_measured,
            "faster": [{"change": what, "boolq_hours": seconds / 3600} for what, seconds in fit.faster],
        }  # fmt: skip
    return row


def _print(
    machine: Machine, disks: Sequence[tuple[str, float, str]], ram_bytes: int, fits: Sequence[Fit]
) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from slowllm.entrypoints.progress import duration

    facts = Table(box=None, pad_edge=False, show_header=False)
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for fact in _facts(machine, disks, ram_bytes):
        facts.add_row(*map(Text, fact))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("model", "weights", "fits", "smallest --ram", "sweep", "free tokens", "token", "BoolQ"):
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    for fit in fits:
        row = _row(fit)
        cells = ["-"] * 4
        if row["fits"]:
            cells = [
                duration(row["sweep_seconds"]), f"{row['free_tokens']:,}", duration(row["token_seconds"]),
                f"{row['boolq_hours']:.3g} h",
            ]  # fmt: skip
        table.add_row(
            *map(Text, (fit.name, format_bytes(fit.weight_bytes), "yes" if row["fits"] else "no", format_binary(fit.smallest_bytes), *cells))
        )  # fmt: skip
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(facts)
    console.print()
    console.print(table)
    console.print()
    for line in _advice(fits):
        print(line)


def _facts(
    machine: Machine, disks: Sequence[tuple[str, float, str]], ram_bytes: int
) -> list[tuple[str, str]]:
    physical = f", {machine.num_physical} physical" if machine.num_physical else ""
    quota = (
        f", of which the container allows {machine.quota_cores:g} at a time" if machine.quota_cores else ""
    )
    limit = (
        f", of which the container allows {format_binary(machine.limit.num_bytes)}"
        * machine.limit.is_container
    )
    rows = [
        ("system", machine.system),
        ("processor", f"{machine.processor}: {machine.num_cores} cores for this process{physical}{quota}"),
    ]
    for dtype, flags in machine.units.items():
        rows.append((f"{dtype} unit", ", ".join(flags) or "none"))
    rows.append(
        (
            "memory",
            f"{format_binary(machine.ram_bytes)}, {format_binary(machine.available_bytes)} free{limit}; planned with --ram {format_binary(ram_bytes)}",
        )
    )
    rows += [("disk", f"{path}: {format_bytes(rate)}/s ({how})") for path, rate, how in disks]
    rows += [] if disks else [("disk", "2 GB/s (assumed); measure one with --folder DIR")]
    rows += [
        (gpu.device, f"{gpu.name}, {format_binary(gpu.total_bytes)}, {format_binary(gpu.free_bytes)} free")
        for gpu in machine.gpus
    ]
    rows += [] if machine.gpus else [("GPU", "none that torch can use")]
    return [*rows, ("versions", ", ".join(f"{name} {version}" for name, version in machine.versions.items()))]


def _advice(fits: Sequence[Fit]) -> list[str]:
    """Return what to change first, in lines."""
    from slowllm.entrypoints.progress import duration

    lines = []
    for fit in fits:
        if fit.surveys and fit.faster:
            seconds = fit.surveys[0].plan.forecast.seconds
            (first, then), *others = fit.faster
            more = "".join(f"; {what}: {duration(after)}" for what, after in others)
            lines.append(
                f"change first, for BoolQ with {fit.name} ({duration(seconds)}): {first}: {duration(then)}{more}"
            )
    lacking = [fit for fit in fits if not fit.surveys]
    if lacking:
        least = min(lacking, key=lambda fit: fit.smallest_bytes)
        lines.append(f"{least.name} would run with --ram {format_binary(least.smallest_bytes)}")
    return lines or ["nothing that could be changed would save a twentieth of the time"]
