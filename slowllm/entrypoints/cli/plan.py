"""`slowllm plan`: say what a job takes on this machine before it starts."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slowllm.entrypoints.cli import options
from slowllm.entrypoints.cli.runner import Runner
from slowllm.entrypoints.progress import duration
from slowllm.errors import InputError, counted
from slowllm.options import format_binary, format_bytes
from slowllm.planning.job import Job

if TYPE_CHECKING:
    from slowllm.planning.forecast import Forecast
    from slowllm.runtime.survey import Survey


def plan(
    model: Annotated[
        str,
        typer.Argument(help="Folder of a checkpoint or store, or hub id of a model in the local cache."),
    ],
    ram: options.Ram = "auto",
    device: options.Device = "cpu",
    vram: options.Vram = None,
    tokens: Annotated[int, typer.Option(help="Number of tokens of the whole job.", min=1, max=10**12)] = 1024,
    longest: Annotated[
        int | None,
        typer.Option(
            help="Number of tokens of the longest sequence.", min=1, show_default="512, or all of a smaller job"
        ),
    ] = None,
    gradients: Annotated[
        bool,
        typer.Option(
            "--gradients", help="Plan steps of tuning, each of which is a sweep up the blocks and one down."
        ),
    ] = False,
    dtype: options.DType = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    verbose: options.Verbose = False,
) -> None:  # fmt: skip
    """Say what a job takes on this machine before it starts.

    Measures the disk under the model's folder, and the processor on the model's first block (a few seconds). Prints
    what stays in memory, how many sweeps the job takes, how long they take, and what would make the job faster. A job
    that does not fit the budget is refused with the smallest budget that suffices.
    """
    options.log_to_stderr(verbose)
    runner = Runner(model, ram, device, vram, dtype)
    longest = min(tokens, 512) if longest is None else longest
    if longest > tokens:
        raise InputError(f"--longest {longest} is more than all {tokens} tokens of the job")
    runner.load_libraries()
    from slowllm.inference.text import max_line_tokens
    from slowllm.runtime import survey

    job = Job(
        num_tokens=tokens, longest=longest, forward_only=not gradients, keeps_results=False, turns=gradients
    )
    if longest > (limit := max_line_tokens(runner.info)):
        raise InputError(f"--longest {longest} is more than the {limit} that this model takes")
    surveyed = survey.survey(runner.info, ram=ram, device=device, vram=vram, dtype=dtype, job=job)
    if as_json:
        print(json.dumps(_document(surveyed)))
    else:
        _print_table(surveyed)


def _document(survey: Survey) -> dict[str, Any]:
    plan, forecast, rates, job = survey.plan, survey.plan.forecast, survey.rates, survey.job
    document: dict[str, Any] = {
        "model": survey.name,
        "weight_bytes": survey.weight_bytes,
        "num_stops": survey.num_stops,
        "compute_dtype": survey.dtype,
        "ram_bytes": survey.ram_bytes,
        "tokens": job.num_tokens,
        "longest": job.longest,
        "disk_bytes_per_second": rates.disk,
        "memory_bytes_per_second": rates.memory,
        "flops_per_second": rates.compute,
        "rates_measured": rates.measured,
        "stops": plan.granularity,
        "resident_stops": sorted(plan.resident),
        "resident_bytes": plan.resident_bytes,
        "ring_bytes": plan.ring_bytes,
        "rider_tokens": plan.rider_tokens,
        "sweep_tokens": plan.sweep_tokens,
        "num_sweeps": forecast.num_sweeps,
        "first_sweep_seconds": forecast.first_seconds,
        "later_sweep_seconds": forecast.later_seconds,
        "seconds": forecast.seconds,
        "peak_ram_bytes": survey.process_bytes + plan.peak_bytes,
        "smallest_ram_bytes": survey.smallest_bytes,
        "more_ram": [{"ram_bytes": ram, "seconds": seconds} for ram, seconds in survey.larger],
        "half_the_bytes_seconds": survey.halved_seconds,
    }
    if survey.devices:
        names = ("device", "vram_bytes", "num_stops")
        document["devices"] = [dict(zip(names, device, strict=True)) for device in survey.devices]
    return document


def _print_table(survey: Survey) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for row in _rows(survey):
        table.add_row(*map(Text, row))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _rows(survey: Survey) -> list[tuple[str, str]]:
    plan, forecast, rates, job = survey.plan, survey.plan.forecast, survey.rates, survey.job
    peak_bytes = survey.process_bytes + plan.peak_bytes
    how = "measured" if rates.measured else "assumed: so small a model is not worth measuring"
    rows = [
        (
            "model",
            f"{survey.name}: {format_bytes(survey.weight_bytes)} a sweep in {counted(survey.num_stops, 'stop')}",
        ),
        (
            "job",
            f"{counted(job.num_tokens or 0, 'token')}, sequences of up to {job.longest:,}, computed in {survey.dtype}",
        ),
        (
            "this machine",
            f"disk {format_bytes(rates.disk)}/s, processor {rates.compute / 1e12:.3g} TFLOP/s ({how})",
        ),
        ("memory", f"{format_binary(peak_bytes)} at the peak, of {format_binary(survey.ram_bytes)}"),
    ]
    for name, num_bytes, num_stops in survey.devices:
        rows.append((name, f"{format_binary(num_bytes)} at the peak; {counted(num_stops, 'stop')} there"))
    if plan.ring_bytes:
        what = "whole blocks" if plan.granularity == "blocks" else "parts of blocks (forward only)"
        rows += [
            ("streamed", f"{what} through a ring of {format_bytes(plan.ring_bytes)}"),
            (
                "resident",
                f"{len(plan.resident)} of {counted(survey.num_stops, 'stop')}, {format_bytes(plan.resident_bytes)}, not read again",
            ),
        ]
    else:
        rows.append(("resident", "everything, mapped from the page cache"))
    rows += [
        (
            "micro-batch",
            f"{counted(plan.rider_tokens, 'token')}; {counted(plan.sweep_tokens, 'token')} a sweep",
        ),
        ("time", _time_of(forecast)),
        ("limited by", "the disk" if forecast.read_seconds > forecast.compute_seconds else "the processor"),
    ]
    rows += [("faster", f"--ram {format_binary(ram)}: {duration(seconds)}") for ram, seconds in survey.larger]
    if survey.halved_seconds < 0.95 * forecast.seconds:
        rows.append(
            ("faster", f"weights of half the bytes (a store of 8 bits): {duration(survey.halved_seconds)}")
        )
    return [*rows, ("smallest", f"--ram {format_binary(survey.smallest_bytes)} would do")]


def _time_of(forecast: Forecast) -> str:
    if forecast.num_sweeps == 1:
        return f"{duration(forecast.seconds)} in one sweep"
    return (
        f"{duration(forecast.seconds)} in {forecast.num_sweeps} sweeps: the first {duration(forecast.first_seconds)}, "
        f"each later one {duration(forecast.later_seconds)}"
    )
