"""Pure arithmetic for devices with memory of their own: what stays there, what stays in RAM, and what streams.

Knows sizes in bytes, rates and budgets; knows nothing of files, models or CUDA. There are two budgets. First each
device is planned: as many stops as fit stay on it, at even distances, and the others pass through a double buffer. Experts that
are read on demand pass through another one. The remaining stops are planned for RAM as without a device (`host_plan`), and so are
experts, but riders take no room there. How the model is cut is chosen last, by the forecasts of the plans that fit both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from slowllm.errors import PlanError
from slowllm.options import GIB, MIB, format_binary
from slowllm.planning.forecast import Forecast, forecast_of, reads_of
from slowllm.planning.host_plan import (
    MAX_SWEEP_TOKENS,
    SLACK_BYTES,
    is_worth_more,
    least_rider_tokens,
    make_plan,
    padding_worth,
    token_choices,
    working_bytes,
)
from slowllm.planning.job import Job, Rates, Sizes
from slowllm.planning.plan import Plan
from slowllm.planning.resident_stops import spread
from slowllm.rounding import round_up

# A double buffer: one slot is computed with while the next is filled.
NUM_SLOTS = 2
# Estimates, which nobody has measured: what CUDA's context, cuBLAS and torch's allocator take on a GPU beyond what is
# counted here, and what CUDA takes of the host's memory once its libraries are in use.
DEVICE_SLACK_BYTES, HOST_SLACK_BYTES = 768 * MIB, GIB // 2
# Memory on the host of one token of a waiting rider: its ids and masks.
HOST_TOKEN_BYTES = 64
# Rates of a GPU, which nobody has measured: bytes a second of its memory, operations a second, and bytes a second that are copied to
# it from RAM.
ASSUMED_MEMORY, ASSUMED_COMPUTE, ASSUMED_COPY = 3e11, 2e13, 1.2e10


@dataclass(frozen=True)
class DeviceBudget:
    """The name of a device, and the bytes that may be taken of its memory."""

    name: str
    num_bytes: int


@dataclass(frozen=True)
class DevicePlan:
    """How the memory of the devices is divided.

    Attributes:
        homes: the number of the device that computes each stop.
        kept: stops that stay on their device once they were copied.
        num_slots: on each device, through which its other stops pass.
        slot_bytes: of one slot on each device.
        num_expert_slots: on each device, through which experts pass that are read on demand.
        rider_tokens: of one micro-batch.
        sweep_tokens: of all riders of a sweep.
        used_bytes: of each device's budget.
        granularity: whether stops are blocks, with or without their experts, or leaves.
    """

    homes: tuple[int, ...]
    kept: frozenset[int]
    num_slots: tuple[int, ...]
    slot_bytes: tuple[int, ...]
    num_expert_slots: tuple[int, ...]
    rider_tokens: int
    sweep_tokens: int
    used_bytes: tuple[int, ...]
    granularity: str


def homes_of(blocks: Sequence[int], num_devices: int) -> tuple[int, ...]:
    """Return the number of each stop's device: devices take turns by blocks; the head is on the first.

    Args:
        blocks: the block of each stop, -1 for a chunk of the head.
        num_devices: at least one.
    """
    return tuple(0 if block < 0 else block % num_devices for block in blocks)


def device_rates(rates: Rates | None) -> Rates:
    """Return a machine's rates with those of a GPU in place of the processor's."""
    return replace(rates or Rates(), memory=ASSUMED_MEMORY, compute=ASSUMED_COMPUTE, copy=ASSUMED_COPY)


def plan_both(
    choices: Sequence[Sizes],
    blocks: Sequence[Sequence[int]],
    budgets: Sequence[DeviceBudget],
    *,
    free_bytes: int,
    total_bytes: int,
    job: Job | None = None,
    rates: Rates,
    keep_resident: bool = True,
) -> tuple[DevicePlan, Plan]:
    """Divide the memory of the devices, and then RAM, so that the job takes the least time.

    The arguments are those of `plan_devices` and `plan_host`.

    Raises:
        PlanError: the job cannot run on a device or in RAM; the message names the smallest budget that would do.
    """
    plans: list[tuple[DevicePlan, Plan]] = []
    refused: list[tuple[int, PlanError]] = []
    for devices in plan_devices(choices, blocks, budgets, job=job, rates=rates, keep_resident=keep_resident):
        sizes = next(sizes for sizes in choices if sizes.granularity == devices.granularity)
        try:
            plan = plan_host(
                sizes, devices, free_bytes=free_bytes, total_bytes=total_bytes, job=job, rates=rates,
                keep_resident=keep_resident,
            )  # fmt: skip
        except PlanError as error:
            refused.append((least_host_bytes(sizes, devices.sweep_tokens), error))
            continue
        plans.append((devices, plan))
    if not plans:
        raise min(refused, key=lambda pair: pair[0])[1]
    chosen = plans[0]
    for other in plans[1:]:
        # Where nothing passes through slots, all weights stay on the devices, and there is nothing to gain.
        if any(chosen[0].num_slots) and is_worth_more(other[1], chosen[1], job or Job(repeated=True)):
            chosen = other
    return chosen


def plan_devices(
    choices: Sequence[Sizes],
    blocks: Sequence[Sequence[int]],
    budgets: Sequence[DeviceBudget],
    *,
    job: Job | None = None,
    rates: Rates,
    keep_resident: bool = True,
) -> list[DevicePlan]:
    """Divide the devices' memory so that the job takes the least time; return a plan for each choice that fits.

    Args:
        choices: sizes of the model cut into whole blocks, into blocks without their experts and into leaves where it can be.
        blocks: for each choice, the block of each stop; see `homes_of`.
        rates: from `device_rates`.
    Raises:
        PlanError: the job cannot run on a device; the message names the smallest budget that would do.
    """
    planned_job = job or Job(repeated=True)
    usable = [
        (sizes, homes_of(stop_blocks, len(budgets)))
        for sizes, stop_blocks in zip(choices, blocks, strict=True)
    ]
    plans = []
    for sizes, homes in usable:
        candidates = list(_candidates(sizes, homes, budgets, planned_job, rates, keep_resident))
        if candidates:
            _, plan = min(candidates, key=lambda pair: (pair[0], sum(pair[1].used_bytes)))
            plans.append(plan if job is not None else _widened(plan, sizes, budgets))
    if not plans:
        raise PlanError(_refusal(usable, budgets, planned_job))
    return plans


def _candidates(
    sizes: Sizes,
    homes: Sequence[int],
    budgets: Sequence[DeviceBudget],
    job: Job,
    rates: Rates,
    keep_resident: bool,
) -> Iterator[tuple[float, DevicePlan]]:
    """Yield plans that fit, each with the seconds that the job would take."""
    expert_slots = [_num_expert_slots(sizes, homes, number) for number in range(len(budgets))]
    for rider, sweep in token_choices(job):
        working = DEVICE_SLACK_BYTES + sizes.kept_bytes + working_bytes(sizes, job, rider, sweep)
        fixed = [working + _expert_bytes(sizes, count) for count in expert_slots]
        parts = [
            _divide(_bytes_at(sizes, homes, number, job), budget.num_bytes - fixed[number], keep_resident)
            for number, budget in enumerate(budgets)
        ]
        shares = [part for part in parts if part is not None]
        if len(shares) < len(budgets):
            continue
        kept = frozenset().union(*(share.kept for share in shares))
        slots_bytes = sum(share.num_slots * share.slot_bytes for share in shares)
        forecast = forecast_of(sizes, kept, slots_bytes, rider, sweep, job, rates, on_devices=kept)
        used = tuple(own + share.used_bytes for own, share in zip(fixed, shares, strict=True))
        yield forecast.seconds, DevicePlan(
            tuple(homes), kept, tuple(share.num_slots for share in shares), tuple(share.slot_bytes for share in shares),
            tuple(expert_slots), rider, sweep, used, sizes.granularity,
        )  # fmt: skip


def _num_expert_slots(sizes: Sizes, homes: Sequence[int], device: int) -> int:
    """Return the slots of a device for experts that are read on demand; none where no block with experts is computed."""
    has_experts = sizes.experts is not None and any(homes[stop] == device for stop in sizes.experts.stops)
    return NUM_SLOTS if has_experts else 0


def _expert_bytes(sizes: Sizes, num_slots: int) -> int:
    return 0 if sizes.experts is None else num_slots * sizes.experts.unit_bytes


def _bytes_at(sizes: Sizes, homes: Sequence[int], device: int, job: Job) -> list[int]:
    """Return the bytes of the stops that are computed on a device and visited by the job, 0 for all others."""
    reads = reads_of(sizes, job)
    return [
        stop.num_bytes if homes[number] == device and reads[number] else 0
        for number, stop in enumerate(sizes.stops)
    ]


@dataclass(frozen=True)
class DeviceShare:
    """How one device's memory is divided: stops that stay, the slots, and the bytes of both."""

    kept: frozenset[int]
    num_slots: int
    slot_bytes: int
    used_bytes: int


def _divide(stop_bytes: Sequence[int], room_bytes: int, keep_resident: bool = True) -> DeviceShare | None:
    """Divide the room for weights on a device; None if it has no room for the largest stop."""
    total = sum(stop_bytes)
    if total <= room_bytes and (keep_resident or not total):
        return DeviceShare(frozenset(stop for stop, size in enumerate(stop_bytes) if size), 0, 0, total)
    largest = max(stop_bytes)
    # With one slot nothing is copied while the device computes, but the model can run.
    for num_slots in (NUM_SLOTS, 1):
        slots_bytes = num_slots * largest
        if slots_bytes > room_bytes:
            continue
        chosen = spread(stop_bytes, room_bytes - slots_bytes) if keep_resident else frozenset()
        kept = frozenset(stop for stop in chosen if stop_bytes[stop])
        return DeviceShare(kept, num_slots, largest, slots_bytes + sum(stop_bytes[stop] for stop in kept))
    return None


def _widened(plan: DevicePlan, sizes: Sizes, budgets: Sequence[DeviceBudget]) -> DevicePlan:
    """Let the sweeps of a session carry more tokens than were assumed, if there is room left for them."""
    token_bytes = sizes.waiting_token_bytes
    left = min(budget.num_bytes - used for budget, used in zip(budgets, plan.used_bytes, strict=True))
    more = max(0, min(left // token_bytes, MAX_SWEEP_TOKENS - plan.sweep_tokens))
    used = tuple(used + more * token_bytes for used in plan.used_bytes)
    return replace(plan, sweep_tokens=plan.sweep_tokens + more, used_bytes=used)


def _refusal(usable: Sequence[tuple[Sizes, Sequence[int]]], budgets: Sequence[DeviceBudget], job: Job) -> str:
    tokens = least_rider_tokens(job)
    sweep = tokens if job.packing is None else job.packing[1]

    def needs(sizes: Sizes, homes: Sequence[int]) -> list[tuple[int, int, int]]:
        working = working_bytes(sizes, job, tokens, sweep)
        weights = [
            max(_bytes_at(sizes, homes, number, job))
            + _expert_bytes(sizes, _num_expert_slots(sizes, homes, number))
            for number in range(len(budgets))
        ]
        return [(DEVICE_SLACK_BYTES + sizes.kept_bytes, num_bytes, working) for num_bytes in weights]

    def lacks(parts: Sequence[tuple[int, int, int]]) -> list[int]:
        return [sum(part) - budget.num_bytes for part, budget in zip(parts, budgets, strict=True)]

    best = min((needs(*pair) for pair in usable), key=lambda parts: max(lacks(parts)))
    missing = lacks(best)
    worst = missing.index(max(missing))
    fixed, weights, working = best[worst]
    smallest = round_up(fixed + weights + working, MIB)
    return (
        f"{format_binary(max(budgets[worst].num_bytes, 0))} on {budgets[worst].name} are too few for this model: the "
        f"smallest that would do is {format_binary(smallest)} ({format_binary(fixed)} always there, "
        f"{format_binary(weights)} for the weights passing through and {format_binary(working)} for {tokens} tokens)"
    )


def least_host_bytes(sizes: Sizes, sweep_tokens: int) -> int:
    """Return the smallest part of a budget of RAM through which stops and experts reach the devices."""
    ring_bytes = sizes.smallest_ring_bytes
    if sizes.experts is not None:
        ring_bytes += sizes.experts.smallest_ring_bytes
    return HOST_SLACK_BYTES + SLACK_BYTES + ring_bytes + sweep_tokens * HOST_TOKEN_BYTES


def plan_host(
    sizes: Sizes,
    devices: DevicePlan,
    *,
    free_bytes: int,
    total_bytes: int,
    job: Job | None = None,
    rates: Rates,
    keep_resident: bool = True,
) -> Plan:
    """Divide the RAM among the stops that do not stay on a device, and experts that are read on demand.

    Stops that stay there are read once and pass through the ring as well, so there is always a ring, and no copies of routers beside
    it, which would guess what the next block needs: hidden states are on the devices.

    The other arguments are those of `make_plan`, with `rates` from `device_rates`.

    Raises:
        PlanError: the stops do not fit through the budget.
    """
    job = job or Job(repeated=True)
    padding = padding_worth(rates) if job.packing is None else job.packing[2]
    # The caches of sessions are on the devices.
    packed = replace(job, packing=(devices.rider_tokens, devices.sweep_tokens, padding), cache_tokens=0)
    stops = tuple(
        replace(stop, num_bytes=0, largest_bytes=0) if number in devices.kept else stop
        for number, stop in enumerate(sizes.stops)
    )
    host = replace(
        sizes, stops=stops, kept_bytes=HOST_SLACK_BYTES, block_token_bytes=0,
        attention_token_bytes=0, rider_token_bytes=HOST_TOKEN_BYTES, result_token_bytes=0,
        checkpoint_token_bytes=0, replay_token_bytes=0, replay_attention_bytes=0,
        passing_bytes=sizes.smallest_ring_bytes,
    )  # fmt: skip
    plan = make_plan(
        [host], free_bytes=free_bytes, total_bytes=total_bytes, job=packed, rates=rates,
        keep_resident=keep_resident,
    )  # fmt: skip
    resident = plan.resident - devices.kept - plan.unused
    resident_bytes = sum(sizes.stops[stop].num_bytes for stop in resident)
    if sizes.experts is not None:
        resident_bytes += plan.kept_units * sizes.experts.unit_bytes
    plan = replace(plan, resident=resident, resident_bytes=resident_bytes, longest=job.longest)
    return replace(plan, forecast=device_forecast(sizes, devices, plan, job, rates))


def device_forecast(sizes: Sizes, devices: DevicePlan, plan: Plan, job: Job, rates: Rates) -> Forecast:
    """Return the expected times of a job by the plans of devices and RAM."""
    return forecast_of(
        sizes, plan.resident | devices.kept, plan.ring_bytes, plan.rider_tokens, plan.sweep_tokens, job, rates,
        plan.kept_units, devices.kept,
    )  # fmt: skip
