"""Print a plan: as a table, or as one JSON document."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

from slowllm.entrypoints.progress import duration
from slowllm.errors import counted
from slowllm.options import format_binary, format_bytes

if TYPE_CHECKING:
    from slowllm.planning.forecast import Forecast, SweepCost
    from slowllm.runtime.survey import Survey


def print_survey(survey: Survey, *, as_json: bool) -> None:
    """Print a plan as a table, or as one JSON document."""
    if as_json:
        print(json.dumps(_document(survey)))
    else:
        _print_table(survey)


def _document(survey: Survey) -> dict[str, Any]:
    plan, forecast, rates, job = survey.plan, survey.plan.forecast, survey.rates, survey.job
    document: dict[str, Any] = {
        "model": survey.name,
        "weights_are_here": survey.planned_from is None,
        "weight_bytes": survey.weight_bytes,
        "num_stops": survey.num_stops,
        "compute_dtype": survey.dtype,
        "ram_bytes": survey.ram_bytes,
        "tokens": job.num_tokens,
        "longest": job.longest,
        "disk_bytes_per_second": rates.disk,
        "memory_bytes_per_second": rates.memory,
        "flops_per_second": rates.compute,
        "rates_measured": rates.disk_measured and rates.compute_measured,
        "disk_measured": rates.disk_measured,
        "processor_measured": rates.compute_measured,
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
        "expert_ring_bytes": plan.expert_ring_bytes,
        "kept_experts": plan.kept_units,
        "expert_use_seen": survey.knows_experts,
        "token_costs": [dataclasses.asdict(cost) for cost in survey.token_costs],
        "half_the_bytes_seconds": survey.halved_seconds,
        "native_format": survey.native_format,
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
    rows = [
        (
            "model",
            f"{survey.name}: {format_bytes(survey.weight_bytes)} a sweep in {counted(survey.num_stops, 'stop')}",
        ),
    ]
    if survey.planned_from is not None:
        rows.append(
            ("weights", f"not on this machine, or not all of them; planned from {survey.planned_from}")
        )
    is_store = survey.store not in (None, "gguf")
    if is_store:
        kept = (
            ""
            if survey.native_format is None
            else f"; what was quantised as {survey.native_format} is kept so"
        )
        rows.append(("format", f"{survey.store} store{kept}"))
    elif survey.native_format is not None:
        rows.append(("format", f"{survey.native_format}, read as it is"))
    rows += [
        (
            "job",
            f"{counted(job.num_tokens or 0, 'token')}, sequences of up to {job.longest:,}, computed in {survey.dtype}",
        ),
        (
            "this machine",
            f"disk {format_bytes(rates.disk)}/s ({_how(rates.disk_measured)}), processor "
            f"{rates.compute / 1e12:.3g} TFLOP/s ({_how(rates.compute_measured)})",
        ),
        ("memory", f"{format_binary(peak_bytes)} at the peak, of {format_binary(survey.ram_bytes)}"),
    ]
    for name, num_bytes, num_stops in survey.devices:
        rows.append((name, f"{format_binary(num_bytes)} at the peak; {counted(num_stops, 'stop')} there"))
    if plan.ring_bytes:
        rows.append(("streamed", f"{plan.streamed} through a ring of {format_bytes(plan.ring_bytes)}"))
    if plan.expert_ring_bytes:
        ring = format_bytes(plan.expert_ring_bytes)
        basis = "as earlier runs needed them" if survey.knows_experts else "as is assumed of any model"
        rows.append(("experts", f"read when a router asks for them, through a ring of {ring}; {basis}"))
    held = "everything, mapped from the page cache"
    if plan.streams:
        held = f"{plan.held(len(plan.resident), survey.num_stops)}, {format_bytes(plan.resident_bytes)}, not read again"
    rows.append(("resident", held))
    rows += [("a token", _cost_of(cost)) for cost in survey.token_costs]
    if plan.decoded_bytes:
        rows.append(
            ("decoded", f"once for all micro-batches at a stop, to {format_bytes(plan.decoded_bytes)}")
        )
    rows += [
        (
            "micro-batch",
            f"{counted(plan.rider_tokens, 'token')}; {counted(plan.sweep_tokens, 'token')} a sweep",
        ),
        ("time", _time_of(forecast)),
        ("limited by", "the disk" if forecast.read_seconds > forecast.compute_seconds else "the processor"),
    ]
    rows += [("faster", f"--ram {format_binary(ram)}: {duration(seconds)}") for ram, seconds in survey.larger]
    if survey.can_be_halved and survey.halved_seconds < 0.95 * forecast.seconds:
        rows.append(
            ("faster", f"weights of half the bytes (a store of 8 bits): {duration(survey.halved_seconds)}")
        )
    return [*rows, ("smallest", f"--ram {format_binary(survey.smallest_bytes)} would do")]


def _cost_of(cost: SweepCost) -> str:
    what = {(1, True): "the first", (1, False): "a later one"}.get(
        (cost.num_tokens, cost.is_first), f"{counted(cost.num_tokens, 'token')} in one sweep"
    )
    return f"{what}: {format_bytes(cost.read_bytes)}, {duration(cost.seconds)}"


def _how(is_measured: bool) -> str:
    return "measured" if is_measured else "assumed"


def _time_of(forecast: Forecast) -> str:
    if forecast.num_sweeps == 1:
        return f"{duration(forecast.seconds)} in one sweep"
    return (
        f"{duration(forecast.seconds)} in {forecast.num_sweeps} sweeps: the first {duration(forecast.first_seconds)}, "
        f"each later one {duration(forecast.later_seconds)}"
    )
