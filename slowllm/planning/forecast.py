"""How long a job takes on a machine, by a simple model of a sweep: while a stop computes, the disk fills the ring.

Pure arithmetic on sizes in bytes and rates; knows nothing of files, models or text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from slowllm.planning.experts import demand_bytes, distinct_experts
from slowllm.planning.job import Job, Rates, Sizes, StopSize
from slowllm.rounding import ceil_div

# Steps of a repeated job (tuning) over which its time is averaged, the first one with its cold reads among them.
REPEATS = 10


@dataclass(frozen=True)
class Forecast:
    """The expected times of a job.

    Attributes:
        num_sweeps: of the job.
        first_seconds: of the first sweep.
        later_seconds: of each sweep after it, on average.
        seconds: of the job.
        read_seconds: of a later sweep's bytes at the disk's rate.
        compute_seconds: of a later sweep's tokens, on weights already in memory.
        read_bytes: of a later sweep.
        is_measured: whether the rates of disk and processor are measured. By assumed ones, a small model would be said to
            take a hundredth of its time.
    """

    num_sweeps: int
    first_seconds: float
    later_seconds: float
    seconds: float
    read_seconds: float
    compute_seconds: float
    read_bytes: int
    is_measured: bool = False


def compute_seconds(stop: StopSize, rates: Rates, rider: int, sweep: int) -> float:
    """Return how long a stop computes a sweep's tokens, in micro-batches of `rider` tokens."""
    # Each rider takes the weights through the processor once.
    passing_bytes = stop.num_bytes + stop.decoded_bytes
    return ceil_div(sweep, rider) * passing_bytes / rates.memory + sweep * stop.flops / rates.compute


def free_tokens(sizes: Sizes, rider_tokens: int, read_seconds: float, rates: Rates) -> int:
    """Return how many tokens a sweep computes in the time that its bytes take to be read.

    Args:
        sizes: of the stops.
        rider_tokens: of a micro-batch.
        read_seconds: of a sweep's bytes.
        rates: of the machine.
    Returns:
        whole micro-batches, and where not even one is free as many tokens as one holds in the time; 0 if nothing is read.
    """

    def seconds(num_tokens: int) -> float:
        rider = min(rider_tokens, num_tokens)
        return math.fsum(
            compute_seconds(stop, rates, rider, num_tokens) + _unit_seconds(sizes, number, num_tokens, rates)
            for number, stop in enumerate(sizes.stops)
        )

    if not read_seconds or seconds(1) > read_seconds:
        return 0
    unit = rider_tokens if seconds(rider_tokens) <= read_seconds else 1
    low, high = 1, 2  # `low` units are free
    while seconds(high * unit) <= read_seconds:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if seconds(middle * unit) <= read_seconds else (low, middle)
    return low * unit


def forecast_of(
    sizes: Sizes,
    resident: frozenset[int],
    ring_bytes: int,
    rider_tokens: int,
    sweep_tokens: int,
    job: Job,
    rates: Rates,
    kept_units: int = 0,
    on_devices: frozenset[int] = frozenset(),
) -> Forecast:
    """Return the expected times of a job that keeps the stops `resident` and streams the others through a ring.

    Args:
        kept_units: experts that stay in memory, where each is read on demand.
        on_devices: of the resident stops, those that stay on a device; the others are copied there in every sweep.
    """
    total = job.planned_tokens
    num_loads = ceil_div(total, min(sweep_tokens, total))
    # The last one is seldom full; what all of them have is shared out evenly.
    sweep = ceil_div(total, num_loads)
    rider = min(rider_tokens, sweep)
    num_riders = ceil_div(sweep, rider)
    course = _course(sizes, job)
    demand = _demand(sizes, sweep, kept_units)
    full = _computing(sizes, rider, sweep, rates, on_devices)
    first, later = _sweep_seconds(
        sizes, course, resident, ring_bytes, full, rates, demand, _demand(sizes, sweep, 0)
    )
    # A load's later passes compute one token of each sequence, and each rider still takes the weights through.
    rows = max(num_riders, sweep // job.longest)
    one_each = _computing(sizes, ceil_div(rows, num_riders), rows, rates, on_devices)
    short_demand = _demand(sizes, rows, kept_units)
    _, short = _sweep_seconds(
        sizes, course, resident, ring_bytes, one_each, rates, short_demand, short_demand
    )
    reads = reads_of(sizes, job)
    read_bytes = sum(s.num_bytes * reads[n] for n, s in enumerate(sizes.stops) if n not in resident)
    # On the way down experts are brought for the outputs, and again for the gradients.
    read_bytes += int(sum(demand.get(stop, 0.0) * work for stop, work in course))
    computing = math.fsum(full[stop] * work for stop, work in course)
    times = REPEATS if job.repeated else 1
    num_full, num_short = times * num_loads - 1, times * num_loads * (job.num_passes - 1)
    seconds = first + num_full * later + num_short * short
    if num_short:
        later = (num_full * later + num_short * short) / (num_full + num_short)
        computing = (num_full * computing + num_short * math.fsum(one_each)) / (num_full + num_short)
    return Forecast(
        num_sweeps=num_loads * job.num_passes,
        first_seconds=first,
        later_seconds=later,
        seconds=seconds / times,
        read_seconds=read_bytes / rates.disk,
        compute_seconds=computing,
        read_bytes=read_bytes,
        is_measured=rates.disk_measured and rates.compute_measured,
    )


def _computing(sizes: Sizes, rider: int, sweep: int, rates: Rates, on_devices: frozenset[int]) -> list[float]:
    """Return how long each stop computes a sweep's tokens; while it does, the next one is copied to its device."""
    return [
        max(
            compute_seconds(stop, rates, rider, sweep),
            0.0 if number in on_devices else stop.num_bytes / rates.copy,
        )
        + _unit_seconds(sizes, number, sweep, rates)
        for number, stop in enumerate(sizes.stops)
    ]


def _demand(sizes: Sizes, num_tokens: int, kept_units: int) -> dict[int, float]:
    """Return the bytes of experts that stops are expected to read for a sweep's tokens."""
    if sizes.experts is None:
        return {}
    num_bytes = demand_bytes(sizes.experts, num_tokens, kept_units)
    return dict.fromkeys(sizes.experts.stops, num_bytes)


def _unit_seconds(sizes: Sizes, stop: int, num_tokens: int, rates: Rates) -> float:
    """Return how long a stop's experts take to compute a sweep's tokens, each expert once for all riders.

    While one is computed, the next is copied to its device.
    """
    experts = sizes.experts
    if experts is None or stop not in experts.stops:
        return 0.0
    distinct = distinct_experts(experts.num_experts, experts.top_k, num_tokens, popularity=experts.popularity)
    passing_bytes = distinct * (experts.unit_bytes + experts.decoded_bytes)
    computing = passing_bytes / rates.memory + num_tokens * experts.top_k * experts.unit_flops / rates.compute
    return max(computing, distinct * experts.unit_bytes / rates.copy)


def expert_seconds(sizes: Sizes, num_tokens: int, kept_units: int, rates: Rates) -> tuple[float, float]:
    """Return how long a sweep's tokens are expected to take with the experts of all blocks: to read them, and to compute.

    Args:
        sizes: of a model whose experts are read on demand; others take no time here.
        num_tokens: of the sweep.
        kept_units: experts that stay in memory.
        rates: of the machine.
    """
    computing = math.fsum(_unit_seconds(sizes, stop, num_tokens, rates) for stop in range(len(sizes.stops)))
    return sum(_demand(sizes, num_tokens, kept_units).values()) / rates.disk, computing


def reads_of(sizes: Sizes, job: Job) -> list[int]:
    """Return how often a sweep among others reads each stop that is not kept.

    Where the sweep turns, at its lower end, the next one begins with the stop that is still in memory.
    """
    reads = [0] * len(sizes.stops)
    for stop, _ in _course(sizes, job):
        reads[stop] += 1
    if job.turns:
        reads[job.first_stop] -= 1
    return reads


def num_passages(sizes: Sizes, job: Job) -> int:
    """Return how many stops a sweep serves: where it turns, those of the way down are counted again."""
    return len(_course(sizes, job))


def _course(sizes: Sizes, job: Job) -> list[tuple[int, float]]:
    """Return the stops of a sweep in order, each with the work there: 1 for a forward pass.

    On the way down a block is recomputed, and its gradient takes about as long; the head's is made on the way up.
    """
    if not job.turns:
        return [(stop, 1.0) for stop in range(job.first_stop, len(sizes.stops))]
    num_body = len(sizes.stops) - sizes.num_head_stops
    blocks = range(job.first_stop, num_body)
    head = [(stop, 2.0) for stop in range(num_body, len(sizes.stops))]
    return [*((stop, 1.0) for stop in blocks), *head, *((stop, 2.0) for stop in reversed(blocks))]


def _sweep_seconds(
    sizes: Sizes,
    course: Sequence[tuple[int, float]],
    resident: frozenset[int],
    ring_bytes: int,
    computing: Sequence[float],
    rates: Rates,
    demand: Mapping[int, float],
    first_demand: Mapping[int, float],
) -> tuple[float, float]:
    """Return the seconds of a first sweep and of a later one, from the seconds that each stop computes.

    Args:
        demand: bytes that a stop reads once its router has chosen, in a later sweep.
        first_demand: in the first.
    """
    prefetched, seconds, last = 0.0, [0.0, 0.0], -1
    in_memory: set[int] = set()
    for sweep in range(2):
        for index, times in course:
            stop, is_resident = sizes.stops[index], index in resident
            # A resident stop has room of its own and is read once.
            to_read = 0 if index in in_memory or index == last else stop.num_bytes
            if is_resident:
                in_memory.add(index)
            wait = max(0.0, to_read - prefetched) / rates.disk
            room = ring_bytes - (0 if is_resident else stop.num_bytes)
            work = times * computing[index]
            # A router's choice is read while the experts before it are multiplied.
            asked = times * (first_demand if sweep == 0 else demand).get(index, 0.0) / rates.disk
            wait, work = wait + asked, max(0.0, work - asked)
            prefetched = min(max(room, 0), max(0.0, prefetched - to_read) + work * rates.disk)
            seconds[sweep] += wait + work
            last = index
    return seconds[0], seconds[1]


@dataclass(frozen=True)
class SweepCost:
    """What a sweep takes where experts are read on demand.

    Attributes:
        num_tokens: of the sweep.
        is_first: whether nothing is in memory before it.
        read_bytes: that it is expected to read.
        seconds: that it takes.
    """

    num_tokens: int
    is_first: bool
    read_bytes: int
    seconds: float


def sweep_costs(
    sizes: Sizes,
    resident: frozenset[int],
    ring_bytes: int,
    kept_units: int,
    sweep_tokens: int,
    rates: Rates,
    on_devices: frozenset[int] = frozenset(),
    *,
    is_only: bool = False,
) -> tuple[SweepCost, ...]:
    """Return what a first token takes, a later one, and a sweep of the job; nothing where blocks are read whole.

    Args:
        sizes, resident, ring_bytes, kept_units, on_devices: as for `forecast_of`.
        sweep_tokens: of the job's sweeps.
        rates: of the machine.
        is_only: whether the job has one sweep, which finds nothing in memory.
    """
    if sizes.experts is None:
        return ()
    everything = sum(stop.num_bytes for stop in sizes.stops)
    kept_bytes = sum(sizes.stops[stop].num_bytes for stop in resident)
    costs = []
    for tokens, is_first in ((1, True), (1, False), (max(2, sweep_tokens), is_only)):
        job = Job(num_tokens=tokens, longest=tokens, repeated=True, forward_only=True)
        forecast = forecast_of(
            sizes, resident, ring_bytes, tokens, tokens, job, rates, kept_units, on_devices
        )
        demand = sum(_demand(sizes, tokens, 0 if is_first else kept_units).values())
        num_bytes = (everything if is_first else everything - kept_bytes) + int(demand)
        seconds = forecast.first_seconds if is_first else forecast.later_seconds
        costs.append(SweepCost(tokens, is_first, num_bytes, seconds))
    return tuple(costs)
