"""How long a job takes on a machine, by a simple model of a sweep: while a stop computes, the disk fills the ring.

Pure arithmetic on sizes in bytes and rates; knows nothing of files, models or text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from slowllm.planning.job import Job, Rates, Sizes, StopSize, tokens_of
from slowllm.rounding import ceil_div

REPEATS = 10


@dataclass(frozen=True)
class Forecast:
    """How long a job takes by the plan.

    Attributes:
        num_sweeps: of the job.
        first_seconds: of the first sweep.
        later_seconds: of each sweep after it, on average.
        seconds: of the job.
        read_seconds: of a later sweep's bytes at the disk's rate.
        compute_seconds: of a later sweep's tokens, on weights already in memory.
        read_bytes: of a later sweep.
    """

    num_sweeps: int
    first_seconds: float
    later_seconds: float
    seconds: float
    read_seconds: float
    compute_seconds: float
    read_bytes: int


def compute_seconds(stop: StopSize, rates: Rates, rider: int, sweep: int) -> float:
    """Return how long a stop computes a sweep's tokens, in micro-batches of `rider` tokens."""
    # Each rider takes the weights through the processor once.
    passing_bytes = stop.num_bytes + stop.decoded_bytes
    return ceil_div(sweep, rider) * passing_bytes / rates.memory + sweep * stop.flops / rates.compute


def forecast_of(
    sizes: Sizes,
    resident: frozenset[int],
    ring_bytes: int,
    rider_tokens: int,
    sweep_tokens: int,
    job: Job,
    rates: Rates,
) -> Forecast:
    """Foretell a job's time: while a stop computes, the disk fills what is free in the ring, and no more."""
    total = tokens_of(job)
    sweep = min(sweep_tokens, total)
    num_riders, num_loads = -(-sweep // min(rider_tokens, sweep)), ceil_div(total, sweep)
    full = [compute_seconds(stop, rates, min(rider_tokens, sweep), sweep) for stop in sizes.stops]
    way = _way(sizes, job)
    first, later = _sweep_seconds(sizes, way, resident, ring_bytes, full, rates)
    # A load's later passes compute one token of each sequence, and each rider still takes the weights through.
    rows = max(num_riders, sweep // job.longest)
    one_each = [compute_seconds(stop, rates, ceil_div(rows, num_riders), rows) for stop in sizes.stops]
    _, short = _sweep_seconds(sizes, way, resident, ring_bytes, one_each, rates)
    reads = reads_of(sizes, job)
    read_bytes = sum(s.num_bytes * reads[n] for n, s in enumerate(sizes.stops) if n not in resident)
    computing = math.fsum(full[stop] * times for stop, times in way)
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
    )


def reads_of(sizes: Sizes, job: Job) -> list[int]:
    """Return how often a sweep among others reads each stop that is not kept.

    Where the sweep turns, at its lower end, the next one begins with the stop that is still there.
    """
    reads = [0] * len(sizes.stops)
    for stop, _ in _way(sizes, job):
        reads[stop] += 1
    if job.turns:
        reads[job.first_stop] -= 1
    return reads


def _way(sizes: Sizes, job: Job) -> list[tuple[int, float]]:
    """Return the stops of a sweep, each with the work there: 1 for a forward pass.

    Going down a block is computed again, and its gradient takes about as long; the head's is made on the way up.
    """
    if not job.turns:
        return [(stop, 1.0) for stop in range(job.first_stop, len(sizes.stops))]
    num_body = len(sizes.stops) - sizes.num_head_stops
    blocks = range(job.first_stop, num_body)
    up = [(stop, 1.0) for stop in blocks]
    return [
        *up,
        *((stop, 2.0) for stop in range(num_body, len(sizes.stops))),
        *((s, 2.0) for s in reversed(blocks)),
    ]


def _sweep_seconds(
    sizes: Sizes,
    way: Sequence[tuple[int, float]],
    resident: frozenset[int],
    ring_bytes: int,
    computing: Sequence[float],
    rates: Rates,
) -> tuple[float, float]:
    """Return the seconds of a first sweep and of a later one, each stop computing for so long."""
    ahead, seconds, last = 0.0, [0.0, 0.0], -1
    there: set[int] = set()
    for number in range(2):
        for index, times in way:
            stop, is_kept = sizes.stops[index], index in resident
            # A resident stop has room of its own and is read once.
            to_read = 0 if index in there or index == last else stop.num_bytes
            if is_kept:
                there.add(index)
            wait = max(0.0, to_read - ahead) / rates.disk
            room = ring_bytes - (0 if is_kept else stop.num_bytes)
            work = times * computing[index]
            ahead = min(max(room, 0), max(0.0, ahead - to_read) + work * rates.disk)
            seconds[number] += wait + work
            last = index
    return seconds[0], seconds[1]
