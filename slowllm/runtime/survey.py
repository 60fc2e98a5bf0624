"""Plan a job on this machine without doing it: measure the model's first block, and forecast the job.

Rates vary from minute to minute; measurements are for plans and forecasts, never for results.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from slowllm.errors import forward_errors
from slowllm.modeling.native.formats import format_name
from slowllm.modeling.parts import Part
from slowllm.options import AUTO, parse_bytes, parse_dtype
from slowllm.planning.budget import Budget
from slowllm.planning.device_plan import device_forecast, device_rates, least_host_bytes
from slowllm.planning.forecast import SweepCost, free_tokens, sweep_costs
from slowllm.planning.host_plan import advise, keep_decoded, least_bytes, make_plan, sizes_for
from slowllm.planning.job import WHOLE_BLOCKS, Job, Rates, Sizes, with_smaller_weights
from slowllm.planning.plan import Plan
from slowllm.runtime.blueprint import Blueprint, BlueprintSizes, measure_blueprint, stored_dtype_of
from slowllm.runtime.description import ModelInfo
from slowllm.runtime.device_placement import DevicePlacement
from slowllm.runtime.load import open_model
from slowllm.runtime.memory import memory_limit
from slowllm.runtime.rates import WORTH_MEASURING_BYTES, dtype_for, processor_rates, quick_rates
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.storage.gguf_files import gguf_files
from slowllm.storage.manifest import is_store, read_manifest
from slowllm.storage.spans import DTYPE_NAMES
from slowllm.streaming.call_context import call_context
from slowllm.streaming.way import StopAfterBlocks, StopForward


def block_rates(lm: StreamedLM, rates: Rates) -> Rates:
    """Return `rates` with memory and compute measured on the model's own first block, once it is read.

    The block is passed with a few tokens and with a whole micro-batch.
    """
    first = f"{lm.layout.blocks_name}.0."
    stops = [
        size
        for name, size in zip(lm.layout.modules, lm.sizes.stops, strict=False)
        if f"{name}.".startswith(first)
    ]
    num_bytes, flops = sum(size.num_bytes for size in stops), sum(size.flops for size in stops)
    many, few = min(lm.plan.rider_tokens, 512), min(8, lm.plan.rider_tokens)
    _first_block_seconds(lm, few)  # read, and buffers touched
    few_seconds = _first_block_seconds(lm, few)
    rates = replace(rates, memory=num_bytes / few_seconds, measured=True)
    # Where there is no room for more tokens, or the job has no more, their rate hardly matters.
    many_seconds = 0.0 if many < 8 * few else _first_block_seconds(lm, many)
    if lm.experts is not None:  # what a token that is no text needs is nothing to remember
        lm.experts.leave_out()
    if many_seconds <= few_seconds:  # too small a model to tell
        return rates
    return replace(rates, compute=many * flops / (many_seconds - few_seconds), compute_measured=True)


def _first_block_seconds(lm: StreamedLM, num_tokens: int) -> float:
    """Return how long a micro-batch of short sequences takes in the first block, without waiting for the disk."""
    width = max(1, min(64, num_tokens))
    ids = torch.zeros(max(1, num_tokens // width), width, dtype=torch.int64)
    before, started = lm.report.wait_seconds, time.perf_counter()
    way = StopAfterBlocks(1)
    with (
        forward_errors(lm.model),
        call_context(way=way),
        torch.no_grad(),
        contextlib.suppress(StopForward),
    ):
        lm.model(ids, use_cache=False)
    return time.perf_counter() - started - (lm.report.wait_seconds - before)


@dataclass(frozen=True)
class Survey:
    """The time and memory of a job on this machine, and what would make it faster.

    Attributes:
        name: of the checkpoint.
        weight_bytes: of one sweep.
        num_stops: of a sweep.
        dtype: compute dtype.
        ram_bytes: the budget.
        process_bytes: of it, what the process held before the model was opened.
        job: that was planned.
        rates: of this machine.
        plan: the plan for the job.
        smallest_bytes: the smallest budget that would do.
        larger: budgets that would be faster, with the seconds that the job would then take.
        halved_seconds: how long the job would take if weights had half the bytes.
        devices: for each GPU its name, the bytes that are taken there, and the number of stops that stay there.
        store: the kind of the store, or gguf; None where the model is neither.
        planned_from: what the sizes are taken from where the weights are not there, None where they are.
        free_tokens: that a sweep computes while its bytes are read; 0 where nothing is read, or on devices.
        native_format: the quantised format of the maker in which the weights are read as they are; None where they are plain,
            or were rounded again by a store.
        token_costs: where experts are read on demand, what a first token, a later one, and a sweep of the job take.
        knows_experts: whether it is known from earlier runs which experts are needed how often; else it is assumed.
    """

    name: str
    weight_bytes: int
    num_stops: int
    dtype: str
    ram_bytes: int
    process_bytes: int
    job: Job
    rates: Rates
    plan: Plan
    smallest_bytes: int
    larger: tuple[tuple[int, float], ...]
    halved_seconds: float
    devices: tuple[tuple[str, int, int], ...] = ()
    store: str | None = None
    planned_from: str | None = None
    free_tokens: int = 0
    native_format: str | None = None
    token_costs: tuple[SweepCost, ...] = ()
    knows_experts: bool = False

    @property
    def can_be_halved(self) -> bool:
        """Whether a store of 8 bits would have about half the bytes."""
        # A coded store has no more than three quarters of the bytes already.
        return self.store in (None, "bf16") and self.native_format is None


def survey(
    info: ModelInfo,
    *,
    ram: str | int,
    device: str = "cpu",
    vram: str | int | None = None,
    dtype: str,
    job: Job,
    keep_resident: bool = True,
    reserved_bytes: int = 0,
    part: Part | None = None,
) -> Survey:
    """Measure the disk under a checkpoint and the processor, or a GPU, on its first block, and plan a job.

    Args:
        info: of the checkpoint.
        ram: the budget, which may be that of another machine.
        device: as for `load`.
        vram: as for `load`.
        dtype: as for `load`.
        job: to be planned.
        keep_resident: whether stops that fit the budget stay in memory.
        reserved_bytes: of the budget, what the job holds beside this model.
        part: of the model that the job needs; None for the whole.
    Raises:
        PlanError: the job cannot run in the budget; the message names the smallest that would do.
    """
    rates = quick_rates(info.folder, parse_dtype(dtype))
    ram_bytes = _budget_bytes(ram)
    process_bytes = psutil.Process().memory_info().rss + reserved_bytes
    with open_model(
        StreamedLM, info, ram=Budget(ram_bytes, process_bytes), device=device, vram=vram, dtype=dtype, job=job, rates=rates,
        keep_resident=keep_resident, granularity=None if job.forward_only else WHOLE_BLOCKS, part=part,
    ) as lm:  # fmt: skip
        placement = lm.device_placement
        rates = rates if placement is None else device_rates(rates)
        if not lm.plan.unused:  # otherwise the first block is not there
            rates = block_rates(lm, rates)
        return Survey(
            name=lm.name, weight_bytes=lm.weight_bytes, num_stops=lm.num_stops,
            dtype=str(lm.model.dtype).removeprefix("torch."), ram_bytes=ram_bytes, process_bytes=process_bytes,
            job=job, rates=rates, store=_kind_of(info.folder),
            native_format=None if _is_rounded_again(info.folder) else format_name(info.config),
            knows_experts=any(one.experts is not None and bool(one.experts.popularity) for one in lm.choices),
            **(
                _planned(lm.choices, ram_bytes, process_bytes, job, rates, keep_resident)
                if placement is None
                else _planned_on(lm, placement, process_bytes, job, rates)
            ),
        )  # fmt: skip


def survey_blueprint(
    blueprint: Blueprint,
    *,
    ram: str | int,
    dtype: str,
    job: Job,
    keep_resident: bool = True,
    reserved_bytes: int = 0,
    rates: Rates | None = None,
    sizes: BlueprintSizes | None = None,
) -> Survey:
    """Plan a job of a model whose weights are not on this machine; the processor is measured, the disk assumed.

    Args:
        blueprint: of the model.
        ram: as for `survey`.
        dtype: as for `load`.
        job: to be planned.
        keep_resident: as for `survey`.
        reserved_bytes: as for `survey`.
        rates: of this machine, where they are known.
        sizes: of the model in this dtype, by `measure_blueprint`, where they are known.
    Raises:
        PlanError: as for `survey`.
        ArchitectureError: the model does not fit the carousel.
    """
    stored_dtype = stored_dtype_of(blueprint)
    compute_dtype = dtype_for(parse_dtype(dtype), DTYPE_NAMES[stored_dtype])
    sizes = sizes or measure_blueprint(blueprint, stored_dtype, compute_dtype, forward_only=job.forward_only)
    if rates is None:
        rates = processor_rates(compute_dtype) if sizes.weight_bytes >= WORTH_MEASURING_BYTES else Rates()
    ram_bytes, process_bytes = _budget_bytes(ram), psutil.Process().memory_info().rss + reserved_bytes
    planned = _planned(sizes.choices, ram_bytes, process_bytes, job, rates, keep_resident)
    return Survey(
        name=blueprint.name, weight_bytes=sizes.weight_bytes,
        num_stops=sizes.num_stops[planned["plan"].granularity], dtype=str(compute_dtype).removeprefix("torch."),
        ram_bytes=ram_bytes, process_bytes=process_bytes, job=job, rates=rates, planned_from=blueprint.source,
        native_format=format_name(blueprint.config), **planned,
    )  # fmt: skip


def _budget_bytes(ram: str | int) -> int:
    """Return the bytes of a budget, which may be that of another machine and is taken as it is."""
    return memory_limit().auto_bytes if ram == AUTO else parse_bytes(ram)


def smallest_budget(
    choices: Sequence[Sizes], job: Job, process_bytes: int, *, keep_resident: bool = True
) -> int:
    """Return the bytes of the smallest budget in which a job can run.

    Args:
        choices: sizes of the model cut into whole blocks, and into leaves where it can be.
        job: to be done.
        process_bytes: what the process holds before the model is opened.
        keep_resident: whether stops that fit the budget stay in memory.
    """
    return process_bytes + min(least_bytes(sizes, job, keep_resident) for sizes in choices)


def _kind_of(folder: Path) -> str | None:
    """Return the kind of a store, or gguf; None for another checkpoint, whose weights a store could make smaller."""
    if gguf_files(folder):
        return "gguf"
    return read_manifest(folder).store if is_store(folder) else None


def _is_rounded_again(folder: Path) -> bool:
    """Whether a folder is a store whose matrices are no longer in the format that its config.json names."""
    return is_store(folder) and read_manifest(folder).requantised


def _planned(
    choices: Sequence[Sizes],
    ram_bytes: int,
    process_bytes: int,
    job: Job,
    rates: Rates,
    keep_resident: bool,
) -> dict[str, Any]:
    """Plan a job by measured rates; return the attributes of a `Survey` that follow from the plan."""
    budget: dict[str, Any] = {"free_bytes": ram_bytes - process_bytes, "total_bytes": ram_bytes}
    plan = make_plan(choices, job=job, rates=rates, keep_resident=keep_resident, **budget)
    plan = keep_decoded(plan, choices, ram_bytes - process_bytes)
    halved_sizes = [with_smaller_weights(sizes, 0.5) for sizes in choices]
    halved = make_plan(halved_sizes, job=job, rates=rates, keep_resident=keep_resident, **budget)
    return {
        "plan": plan,
        "smallest_bytes": smallest_budget(choices, job, process_bytes, keep_resident=keep_resident),
        "free_tokens": free_tokens(
            sizes_for(plan, choices), plan.rider_tokens, plan.forecast.read_seconds, rates
        ),
        "larger": tuple(advise(choices, plan, job=job, rates=rates, **budget)),
        "halved_seconds": halved.forecast.seconds,
        "token_costs": sweep_costs(
            sizes_for(plan, choices),
            plan.resident,
            plan.ring_bytes,
            plan.kept_units,
            min(plan.sweep_tokens, job.planned_tokens),
            rates,
            is_only=plan.forecast.num_sweeps == 1,
        ),
    }


def _planned_on(
    lm: StreamedLM, placement: DevicePlacement, process_bytes: int, job: Job, rates: Rates
) -> dict[str, Any]:
    """Forecast a job on devices by the plan that the model was opened with, without larger budgets."""
    homes, plan = placement.plan.homes, placement.plan
    forecast, halved = (
        device_forecast(sizes, plan, lm.plan, job, rates)
        for sizes in (lm.sizes, with_smaller_weights(lm.sizes, 0.5))
    )
    return {
        "plan": replace(lm.plan, forecast=forecast),
        "smallest_bytes": process_bytes
        + min(least_host_bytes(sizes, plan.sweep_tokens) for sizes in lm.choices),
        "larger": (),
        "halved_seconds": halved.seconds,
        "devices": tuple(
            (str(device), used, sum(homes[stop] == number for stop in plan.kept))
            for number, (device, used) in enumerate(
                zip(placement.torch_devices, plan.used_bytes, strict=True)
            )
        ),
        "token_costs": sweep_costs(
            lm.sizes,
            lm.resident,
            lm.plan.ring_bytes,
            lm.plan.kept_units,
            min(plan.sweep_tokens, job.planned_tokens),
            rates,
            plan.kept,
            is_only=forecast.num_sweeps == 1,
        ),
    }
