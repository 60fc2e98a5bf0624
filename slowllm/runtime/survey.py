"""How fast this machine is: the disk under a checkpoint, and the processor.

Knows files, matrices and, for `block_rates`, a loaded model. Rates vary from minute to minute; what is measured
here is for plans and forecasts, never for results.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from slowllm.malloc import give_back
from slowllm.modeling.skeleton import choose_dtype
from slowllm.options import DTypeName, parse_bytes, parse_dtype
from slowllm.planning.device_plan import device_rates, least_host_bytes
from slowllm.planning.forecast import Granularity, Job, Rates, forecast_of
from slowllm.planning.host_plan import Plan, advise, least_bytes, make_plan, with_smaller_weights
from slowllm.runtime.device_placement import Placed
from slowllm.runtime.streamed_lm import Description, StreamedLM, load
from slowllm.storage.checkpoint import Checkpoint
from slowllm.storage.manifest import open_checkpoint
from slowllm.storage.spans import Placement, Run
from slowllm.streaming.reader import Reader, ring_bytes_of

PIECE_BYTES, RING_PIECES = 64 << 20, 4
# A checkpoint below this is read in a moment, and any rate will do.
WORTH_MEASURING_BYTES = 4 << 30
# Activations, norms and attention take some time beside the products: 1.2 times these for BLOOM without AMX, 1.6
# with it.
OTHER_WORK = 1.3
# Width of the matrix that is multiplied: smaller ones reach less of the processor's rate.
WIDTH = 8192


@dataclass(frozen=True)
class DiskRate:
    """What reading gives and costs.

    Attributes:
        bytes_per_second: of direct reads.
        core_seconds_per_gb: processor time of the process meanwhile, all threads, for 1e9 bytes.
    """

    bytes_per_second: float
    core_seconds_per_gb: float


def disk_rate(checkpoint: Checkpoint, num_bytes: int) -> DiskRate:
    """Measure direct reads of about so many bytes of a checkpoint's largest tensors, by the engine's own reader.

    The buffer's first touch is not counted, because the engine touches its buffers once. What the page cache
    holds of the files makes the rate too high.
    """
    pieces = itertools.islice(_pieces(checkpoint), num_bytes // PIECE_BYTES + RING_PIECES)
    stops = [[Placement("probe", (run.num_bytes,), torch.uint8, (run,))] for run in pieces]
    ring = RING_PIECES * max(ring_bytes_of(stop[0]) for stop in stops)
    with contextlib.closing(Reader(stops, ring_bytes=ring)) as reader:
        first = min(RING_PIECES, len(stops) - 1)
        for number in range(first):  # nothing is read ahead of these
            with reader.visit(number):
                pass
        before = reader.stats.read_bytes
        started, core_started = time.perf_counter(), time.process_time()
        for number in range(first, len(stops)):
            with reader.visit(number, range(number + 1, len(stops))):
                pass
        seconds, core_seconds = time.perf_counter() - started, time.process_time() - core_started
        read_bytes = reader.stats.read_bytes - before
    return DiskRate(read_bytes / seconds, core_seconds / read_bytes * 1e9)


def _pieces(checkpoint: Checkpoint) -> Iterator[Run]:
    """Cut the tensors of a checkpoint into pieces, the largest tensor first."""
    for span in sorted(checkpoint.spans.values(), key=lambda span: -span.num_bytes):
        piece = min(PIECE_BYTES, span.num_bytes)
        for start in range(0, span.num_bytes - piece + 1, piece) if piece else ():
            yield Run(span, start, 0, piece)


def quick_rates(folder: Path, dtype: DTypeName) -> Rates:
    """Return this machine's rates, measured in less than a second; assumed ones for a small checkpoint.

    Args:
        folder: of the checkpoint, whose own bytes are read.
        dtype: compute dtype.
    """
    with open_checkpoint(folder) as checkpoint:
        if sum(span.num_bytes for span in checkpoint.spans.values()) < WORTH_MEASURING_BYTES:
            return Rates()
        disk = disk_rate(checkpoint, 8 * PIECE_BYTES).bytes_per_second
        computed = choose_dtype(dtype, checkpoint)
    few, many = _product_seconds(1, computed), _product_seconds(512, computed)
    give_back()  # or the plan would count these matrices as the process's own
    weights = WIDTH * WIDTH
    return Rates(
        disk=disk,
        memory=weights * computed.itemsize / few,
        compute=2 * 512 * weights / many / OTHER_WORK,
        measured=True,
    )


def _product_seconds(rows: int, dtype: torch.dtype) -> float:
    a, b = torch.ones(rows, WIDTH, dtype=dtype), torch.ones(WIDTH, WIDTH, dtype=dtype)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        nn.functional.linear(a, b)
        best = min(best, time.perf_counter() - started)
    return best


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
    known: Description,
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
    with load(
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
    lm: StreamedLM, placed: Placed, ram_bytes: int, process_bytes: int, job: Job, rates: Rates
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
            for number, (device, used) in enumerate(zip(placed.devices, plan.used_bytes, strict=True))
        ),
    )  # fmt: skip
