"""How fast this machine is: the disk under a checkpoint, and the processor.

Knows files, matrices and, for `block_rates`, a loaded model. Rates vary from minute to minute; what is measured
here is for plans and forecasts, never for results.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from slowllm.options import parse_bytes, parse_dtype
from slowllm.planning.device_plan import device_rates, least_host_bytes
from slowllm.planning.forecast import forecast_of
from slowllm.planning.host_plan import Plan, advise, least_bytes, make_plan, with_smaller_weights
from slowllm.planning.job import Granularity, Job, Rates
from slowllm.runtime.description import ModelInfo
from slowllm.runtime.device_placement import DevicePlacement
from slowllm.runtime.load import open_model
from slowllm.runtime.rates import quick_rates
from slowllm.runtime.streamed_lm import StreamedLM


class _Enough(Exception):
    """Ends a forward pass after its first block."""


def block_rates(lm: StreamedLM, rates: Rates) -> Rates:
    """Return rates whose processor's part is measured on the model's own first block, once read.

    Args:
        lm: whose first block is read, and passed with a few tokens and with a whole micro-batch.
        rates: for the disk's part.
    """
    sizes = next(sizes for sizes in lm.choices if sizes.granularity == lm.plan.granularity)
    first = f"{lm.layout.blocks_name}.0."
    stops = [
        size
        for name, size in zip(lm.layout.modules, sizes.stops, strict=False)
        if f"{name}.".startswith(first)
    ]
    num_bytes, flops = sum(size.num_bytes for size in stops), sum(size.flops for size in stops)
    many, few = min(lm.plan.rider_tokens, 512), min(8, lm.plan.rider_tokens)
    _first_block_seconds(lm, few)  # read, and buffers touched
    few_seconds = _first_block_seconds(lm, few)
    rates = replace(rates, memory=num_bytes / few_seconds, measured=True)
    if many < 8 * few:  # no room for more tokens, or no more in the job: their rate hardly matters
        return rates
    many_seconds = _first_block_seconds(lm, many)
    if many_seconds <= few_seconds:  # too small a model to tell
        return rates
    return replace(rates, compute=many * flops / (many_seconds - few_seconds))


def _first_block_seconds(lm: StreamedLM, num_tokens: int) -> float:
    """Return how long a micro-batch of short sequences takes in the first block, waiting for the disk left out."""
    width = max(1, min(64, num_tokens))
    ids = torch.zeros(max(1, num_tokens // width), width, dtype=torch.int64)

    def enough(*_: Any) -> None:
        raise _Enough

    after = [*lm.layout.blocks, lm.model.get_output_embeddings()][1]
    hook = after.register_forward_pre_hook(enough)
    before, started = lm.report.wait_seconds, time.perf_counter()
    try:
        with torch.no_grad(), contextlib.suppress(_Enough):
            lm.model(ids, use_cache=False)
    finally:
        hook.remove()
    return time.perf_counter() - started - (lm.report.wait_seconds - before)


@dataclass(frozen=True)
class Survey:
    """What a job would take on this machine, and what would make it faster.

    Attributes:
        name: of the checkpoint.
        weight_bytes: that a sweep passes through.
        num_stops: of a sweep.
        dtype: compute dtype.
        ram_bytes: the budget.
        process_bytes: of it, what the process held before the model was opened.
        job: that was planned.
        rates: of this machine.
        plan: the choice.
        smallest_bytes: the smallest budget that would do.
        larger: budgets that would be faster, with the seconds that the job would then take.
        halved_seconds: what the job would take if weights had half the bytes.
        devices: of each GPU its name, the bytes that are taken there, and the stops that stay there.
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


def survey(
    known: ModelInfo,
    *,
    ram: str | int,
    device: str = "cpu",
    vram: str | int | None = None,
    dtype: str,
    job: Job,
    keep_resident: bool = True,
) -> Survey:
    """Measure the disk under a checkpoint and the processor, or a GPU, on its first block, and plan a job.

    Raises:
        PlanError: the job cannot run in the budget; the message names the smallest that would do.
    """
    rates = quick_rates(known.folder, parse_dtype(dtype))
    ram_bytes, process_bytes = parse_bytes(ram), psutil.Process().memory_info().rss
    granularity: Granularity | None = None if job.forward_only else "blocks"
    with open_model(
        StreamedLM,
        known,
        ram=ram,
        device=device,
        vram=vram,
        dtype=dtype,
        job=job,
        rates=rates,
        keep_resident=keep_resident,
        granularity=granularity,
    ) as lm:
        rates = block_rates(lm, rates if lm.placed is None else device_rates(rates))
        choices = lm.choices
        if lm.placed is not None:
            return _survey_on(lm, lm.placed, ram_bytes, process_bytes, job, rates)
        free_bytes = ram_bytes - process_bytes
        plan = make_plan(
            choices, free_bytes=free_bytes, total_bytes=ram_bytes, job=job, rates=rates,
            keep_resident=keep_resident,
        )  # fmt: skip
        larger = advise(choices, plan, free_bytes=free_bytes, total_bytes=ram_bytes, job=job, rates=rates)
        halved = make_plan(
            [with_smaller_weights(sizes, 0.5) for sizes in choices], free_bytes=free_bytes,
            total_bytes=ram_bytes, job=job, rates=rates, keep_resident=keep_resident,
        )  # fmt: skip
        return Survey(
            name=lm.name,
            weight_bytes=lm.weight_bytes,
            num_stops=lm.num_stops,
            dtype=str(lm.model.dtype).removeprefix("torch."),
            ram_bytes=ram_bytes,
            process_bytes=process_bytes,
            job=job,
            rates=rates,
            plan=plan,
            smallest_bytes=process_bytes + min(least_bytes(sizes, job, keep_resident) for sizes in choices),
            larger=tuple(larger),
            halved_seconds=halved.forecast.seconds,
        )


def _survey_on(
    lm: StreamedLM, placed: DevicePlacement, ram_bytes: int, process_bytes: int, job: Job, rates: Rates
) -> Survey:
    """Foretell a job by the plan that the model was opened with; larger budgets are not looked for."""
    sizes = next(sizes for sizes in lm.choices if sizes.granularity == lm.plan.granularity)
    half = with_smaller_weights(sizes, 0.5)
    forecast, halved = (
        forecast_of(
            s, lm.resident, lm.plan.ring_bytes, lm.plan.rider_tokens, lm.plan.sweep_tokens, job, rates
        )
        for s in (sizes, half)
    )
    homes, plan = placed.plan.homes, placed.plan
    return Survey(
        name=lm.name, weight_bytes=lm.weight_bytes, num_stops=lm.num_stops,
        dtype=str(lm.model.dtype).removeprefix("torch."), ram_bytes=ram_bytes, process_bytes=process_bytes, job=job,
        rates=rates, plan=replace(lm.plan, forecast=forecast),
        smallest_bytes=process_bytes + least_host_bytes(sizes, plan.sweep_tokens), larger=(),
        halved_seconds=halved.seconds,
        devices=tuple(
            (str(device), used, sum(homes[stop] == number for stop in plan.kept))
            for number, (device, used) in enumerate(zip(placed.torch_devices, plan.used_bytes, strict=True))
        ),
    )  # fmt: skip
