"""`slowllm plan`."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from slowllm.entrypoints.cli.common import (
    DeviceOption,
    DTypeOption,
    RamOption,
    Verbose,
    VramOption,
    describe,
    log_to_stderr,
    memory_of,
)
from slowllm.entrypoints.progress import duration
from slowllm.errors import InputError
from slowllm.options import format_binary, format_bytes, parse_dtype
from slowllm.planning.forecast import Forecast
from slowllm.planning.job import Job
from slowllm.runtime.survey import Survey


def print_survey(survey: Survey, *, as_json: bool) -> None:
    """Print a plan to stdout: as a table, or as one JSON document."""
    plan, forecast, rates, job = survey.plan, survey.plan.forecast, survey.rates, survey.job
    if as_json:
        document = {
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
        print(json.dumps(document))
        return
    peak = survey.process_bytes + plan.peak_bytes
    how = "measured" if rates.measured else "assumed: so small a model is not worth measuring"
    rows = [
        ("model", f"{survey.name}: {format_bytes(survey.weight_bytes)} a sweep in {survey.num_stops} stops"),
        ("job", f"{job.num_tokens:,} tokens, sequences of up to {job.longest:,}, computed in {survey.dtype}"),
        (
            "this machine",
            f"disk {format_bytes(rates.disk)}/s, processor {rates.compute / 1e12:.3g} TFLOP/s ({how})",
        ),
        ("memory", f"{format_binary(peak)} at the peak, of {format_binary(survey.ram_bytes)}"),
    ]
    for name, num_bytes, num_stops in survey.devices:
        rows.append((name, f"{format_binary(num_bytes)} at the peak; {num_stops} stops stay there"))
    if plan.ring_bytes:
        what = "whole blocks" if plan.granularity == "blocks" else "parts of blocks (forward only)"
        rows += [
            ("streamed", f"{what} through a ring of {format_bytes(plan.ring_bytes)}"),
            (
                "resident",
                f"{len(plan.resident)} of {survey.num_stops} stops, {format_bytes(plan.resident_bytes)}, not read again",
            ),
        ]
    else:
        rows.append(("resident", "everything, mapped from the page cache"))
    rows += [
        ("micro-batch", f"{plan.rider_tokens:,} tokens; {plan.sweep_tokens:,} tokens a sweep"),
        ("time", _time_of(forecast)),
        ("limited by", "the disk" if forecast.read_seconds > forecast.compute_seconds else "the processor"),
    ]
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    for ram, seconds in survey.larger:
        table.add_row("faster", Text(f"--ram {format_binary(ram)}: {duration(seconds)}"))
    if survey.halved_seconds < 0.95 * forecast.seconds:
        table.add_row(
            "faster",
            Text(f"weights of half the bytes (a store of 8 bits): {duration(survey.halved_seconds)}"),
        )
    table.add_row("smallest", Text(f"--ram {format_binary(survey.smallest_bytes)} would do"))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _time_of(forecast: Forecast) -> str:
    if forecast.num_sweeps == 1:
        return f"{duration(forecast.seconds)} in one sweep"
    return (
        f"{duration(forecast.seconds)} in {forecast.num_sweeps} sweeps: the first {duration(forecast.first_seconds)}, "
        f"each later one {duration(forecast.later_seconds)}"
    )


def plan(
    model: Annotated[str, typer.Argument(help="Folder or cached hub id of a checkpoint.")],
    ram: RamOption = "16GiB",
    device: DeviceOption = "cpu",
    vram: VramOption = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the whole job.", min=1, max=10**12)] = 1024,
    longest: Annotated[
        int | None,
        typer.Option(
            help="Tokens of the longest sequence.", min=1, show_default="512, or all of a smaller job"
        ),
    ] = None,
    gradients: Annotated[
        bool, typer.Option("--gradients", help="Plan steps of tuning, which go up the blocks and down again.")
    ] = False,
    dtype: DTypeOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    verbose: Verbose = False,
) -> None:
    """Say what a job would take on this machine, before it starts.

    Measures the disk under the model's folder and the processor on the model's first block (a few seconds), and
    prints what stays in memory, how many sweeps the job takes, how long that is, and what would make it faster. A
    job that does not fit the budget is refused with the smallest that would do.
    """
    log_to_stderr(verbose)
    memory = memory_of(ram, device, vram)
    parse_dtype(dtype)
    longest = min(tokens, 512) if longest is None else longest
    if longest > tokens:
        raise InputError(f"--longest {longest} is more than all {tokens} tokens of the job")

    from slowllm.inference.text import max_line_tokens
    from slowllm.runtime import survey

    job = Job(
        num_tokens=tokens, longest=longest, forward_only=not gradients, keeps_results=False, turns=gradients
    )
    known = describe(model)
    if longest > max_line_tokens(known):
        raise InputError(
            f"--longest {longest} is more than the {max_line_tokens(known)} that this model takes"
        )
    found = survey.survey(known, ram=memory.ram, device=memory.device, vram=memory.vram, dtype=dtype, job=job)
    print_survey(found, as_json=as_json)
