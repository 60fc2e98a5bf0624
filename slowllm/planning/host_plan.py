"""Pure arithmetic: what stays resident, how large the ring is, how many tokens ride a sweep.

Knows sizes in bytes and rates; knows nothing of files, models or text. The plan is the candidate with the shortest
forecast among those that fit the budget. `Budget` alone keeps state: what
several models of one process have taken from the bytes allowed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from slowllm.errors import PlanError
from slowllm.options import MIB, format_binary
from slowllm.planning.forecast import Forecast, compute_seconds, forecast_of, reads_of
from slowllm.planning.job import ASSUMED_LENGTH, Granularity, Job, Rates, Sizes, tokens_of
from slowllm.rounding import ceil_div

# Fewer rows than this take as long as these: the weights pass through the processor either way.
MIN_RIDER_TOKENS = 64


# Beyond this a larger matrix product is no faster, and the scratch memory of a block grows with it.
MAX_RIDER_TOKENS = 1024


# A few times T*, the batch whose computing hides under the reading (about 1,000 tokens in bf16 on two cores with
# AMX): far above T* another sweep is free, and a result comes earlier.
MAX_SWEEP_TOKENS = 8192


# What the allocator, thread stacks and the interpreter take beyond what is counted here (measured: up to 250 MB).
SLACK_BYTES = 288 * MIB


# Stops smaller than a block must save this much of the time, or their handing over is not worth it.
LEAVES_GAIN = 0.95


@dataclass(frozen=True)
class Plan:
    """How a model is held.

    Attributes:
        granularity: what a stop is.
        resident: stops that stay in memory, spread evenly.
        ring_bytes: of the ring through which the others stream; 0 where all stay.
        rider_tokens: tokens of one micro-batch, padding included.
        sweep_tokens: tokens of all riders of one sweep.
        padding_tokens: of padding in a micro-batch that take as long as another micro-batch would.
        peak_bytes: what the model takes of the budget.
        resident_bytes: of it, the stops that stay.
        forecast: how long the job takes.
        longest: tokens of the longest sequence that memory is planned for.
        unused: stops that the job never comes to.
        keeps_graph: whether autograd keeps what the blocks have computed, instead of having it computed again on the
            way down: all weights stay, and there is room.
    """

    granularity: Granularity
    resident: frozenset[int]
    ring_bytes: int
    rider_tokens: int
    sweep_tokens: int
    padding_tokens: int
    peak_bytes: int
    resident_bytes: int
    forecast: Forecast
    longest: int = ASSUMED_LENGTH
    unused: frozenset[int] = frozenset()
    keeps_graph: bool = False


def make_plan(
    choices: Sequence[Sizes],
    *,
    free_bytes: int,
    total_bytes: int,
    job: Job | None = None,
    rates: Rates | None = None,
    keep_resident: bool = True,
) -> Plan:
    """Divide the budget so that the job takes the least time.

    Args:
        choices: the model cut into whole blocks, and into leaves where it can be.
        free_bytes: what this model may take.
        total_bytes: the whole budget, for the error's numbers.
        job: what it is for.
        rates: of the machine.
        keep_resident: whether stops may stay in memory.
    Raises:
        PlanError: the job cannot run in the budget; the message names the smallest that would do.
    """
    job, rates = job or Job(repeated=True), rates or Rates()
    plans = [
        [_planned(c, job, rates) for c in _candidates(s, job, rates, free_bytes, keep_resident)]
        for s in choices
    ]
    best = [min(found, key=lambda p: (p.forecast.seconds, p.peak_bytes)) for found in plans if found]
    if not best:
        raise PlanError(_refusal(choices, job, free_bytes, total_bytes, keep_resident))
    chosen = best[0]
    # Whole blocks can run backward as well, so leaves are for when they must be, or when they pay.
    for other in best[1:]:
        if job.forward_only and other.forecast.seconds < LEAVES_GAIN * chosen.forecast.seconds:
            chosen = other
    return chosen


def widen(plan: Plan, choices: Sequence[Sizes], free_bytes: int) -> Plan:
    """Let a session's sweeps carry more tokens than were assumed, where the budget has room left for them.

    Args:
        plan: of a job of unknown size.
        choices: that it was made from.
        free_bytes: as for `make_plan`.
    """
    sizes = next(sizes for sizes in choices if sizes.granularity == plan.granularity)
    held = sizes.rider_token_bytes + sizes.result_token_bytes + sizes.checkpoint_token_bytes
    if plan.keeps_graph:
        held += _graph_bytes(plan, sizes)
    more = (free_bytes - plan.peak_bytes) // held
    more = max(0, min(more, MAX_SWEEP_TOKENS - plan.sweep_tokens))
    return replace(plan, sweep_tokens=plan.sweep_tokens + more, peak_bytes=plan.peak_bytes + more * held)


def keep_graph(plan: Plan, choices: Sequence[Sizes], job: Job, free_bytes: int) -> Plan:
    """Let autograd keep its graph over the blocks, where all weights stay in memory and there is room for it.

    Args:
        plan: of a job that turns.
        choices: that it was made from.
        job: that it is for.
        free_bytes: as for `make_plan`.
    """
    sizes = next(sizes for sizes in choices if sizes.granularity == plan.granularity)
    more = plan.sweep_tokens * _graph_bytes(plan, sizes)
    if plan.ring_bytes or not job.turns or plan.peak_bytes + more > free_bytes:
        return plan
    return replace(plan, keeps_graph=True, peak_bytes=plan.peak_bytes + more)


def _graph_bytes(plan: Plan, sizes: Sizes) -> int:
    """Return what autograd keeps of a token over all blocks."""
    num_blocks = len(sizes.stops) - sizes.num_head_stops - len(plan.unused)
    return num_blocks * (sizes.replay_token_bytes + plan.longest * sizes.replay_attention_bytes)


@dataclass(frozen=True)
class _Candidate:
    sizes: Sizes
    resident: frozenset[int]
    ring_bytes: int
    rider_tokens: int
    sweep_tokens: int
    used_bytes: int


def least_rider_tokens(job: Job) -> int:
    """Return the tokens that a rider must be able to carry: the longest sequence, and no fewer than pay."""
    if job.packing is not None:
        return max(job.longest, job.packing[0])
    if job.rider_tokens is not None:
        return max(job.longest, job.rider_tokens)
    return max(job.longest, min(MIN_RIDER_TOKENS, tokens_of(job)))


def padding_worth(rates: Rates) -> int:
    """Return how many tokens of padding take as long as the weights' way through the processor for one micro-batch.

    A token takes about as many floating-point operations as the weights have bytes. A power of two, so that lines
    are seldom packed otherwise, and rounded otherwise, when the machine is measured again.
    """
    return 1 << max(0, round(math.log2(rates.compute / rates.memory)))


def working_bytes(sizes: Sizes, job: Job, rider_tokens: int, sweep_tokens: int) -> int:
    """Return the memory of a sweep's riders, one of which computes."""
    held = sizes.rider_token_bytes
    held += sizes.result_token_bytes if job.keeps_results else 0
    held += 0 if job.forward_only else sizes.checkpoint_token_bytes
    scratch = scratch_bytes(sizes, rider_tokens, job.longest)
    if not job.forward_only:
        scratch += rider_tokens * (sizes.replay_token_bytes + job.longest * sizes.replay_attention_bytes)
    return scratch + sweep_tokens * held


def scratch_bytes(sizes: Sizes, num_tokens: int, longest: int) -> int:
    """Return the memory that a block takes to compute a micro-batch with sequences of up to `longest` tokens."""
    return num_tokens * (sizes.block_token_bytes + longest * sizes.attention_token_bytes)


def least_bytes(sizes: Sizes, job: Job, keep_resident: bool = True) -> int:
    """Return the smallest part of a budget in which the job can run."""
    # A model smaller than the ring is better kept than streamed.
    through = sizes.smallest_ring_bytes
    if keep_resident:
        through = min(through, _used_bytes(sizes, job))
    return sizes.kept_bytes + SLACK_BYTES + through + _least_working(sizes, job)


def _used_bytes(sizes: Sizes, job: Job) -> int:
    reads = reads_of(sizes, job)
    return sum(stop.num_bytes for stop, count in zip(sizes.stops, reads, strict=True) if count)


def _least_working(sizes: Sizes, job: Job) -> int:
    tokens = least_rider_tokens(job)
    return working_bytes(sizes, job, tokens, tokens if job.packing is None else job.packing[1])


def _refusal(
    choices: Sequence[Sizes], job: Job, free_bytes: int, total_bytes: int, keep_resident: bool
) -> str:
    sizes = min(choices, key=lambda s: least_bytes(s, job, keep_resident))
    tokens, outside = least_rider_tokens(job), total_bytes - free_bytes
    working, fixed = _least_working(sizes, job), sizes.kept_bytes + SLACK_BYTES
    least = least_bytes(sizes, job, keep_resident)
    smallest = -(-(outside + least) // MIB) * MIB
    length = ", as many as the longest sequence has" if tokens == job.longest > MIN_RIDER_TOKENS else ""
    return (
        f"a budget of {format_binary(total_bytes)} is too small for this model: "
        f"the smallest that would do is {format_binary(smallest)} "
        f"({format_binary(outside)} for the process as it is, "
        f"{format_binary(fixed)} always in memory, {format_binary(least - fixed - working)} for the weights passing "
        f"through and {format_binary(working)} for {tokens} tokens{length})"
    )


def _candidates(
    sizes: Sizes, job: Job, rates: Rates, free_bytes: int, keep_resident: bool
) -> Iterator[_Candidate]:
    fixed = sizes.kept_bytes + SLACK_BYTES
    for rider, sweep in token_choices(job):
        used = fixed + working_bytes(sizes, job, rider, sweep)
        everything = _used_bytes(sizes, job)
        if keep_resident and used + everything <= free_bytes:
            every_stop = frozenset(range(len(sizes.stops)))
            yield _Candidate(sizes, every_stop, 0, rider, sweep, used + everything)
            continue
        for least_ring in _ring_choices(sizes, rates, rider, sweep):
            room = free_bytes - used - least_ring
            if room < 0:
                continue
            # What is read once is not worth keeping.
            repeats = job.repeated or job.num_passes > 1 or tokens_of(job) > sweep or job.num_tokens is None
            again = keep_resident and repeats
            resident = choose_resident(sizes, job, room) if again else frozenset()
            kept = sum(sizes.stops[stop].num_bytes for stop in resident)
            # A tensor that does not fit before the ring's end leaves a gap there, and computing takes longer
            # beside reading than alone: what is left over goes into the ring, as far as that helps.
            more = max(0, _comfortable_ring(sizes, rates, rider, sweep) - least_ring)
            # Nine tenths of it: an estimate that is too low should not use up the budget.
            ring = least_ring + min((room - kept) * 9 // 10, more)
            yield _Candidate(sizes, resident, ring, rider, sweep, used + ring + kept)


def token_choices(job: Job) -> Iterator[tuple[int, int]]:
    """Yield what a plan may choose from: tokens of a micro-batch and of a sweep."""
    if job.packing is not None:
        yield job.packing[:2]
        return
    least, total = least_rider_tokens(job), tokens_of(job)
    most = max(least, min(MAX_RIDER_TOKENS, total))
    riders = {least, most} | {tokens for tokens in (128, 256, 512) if least < tokens < most}
    if job.rider_tokens is not None:
        riders = {least}
    for rider in sorted(riders):
        # Micro-batches are seldom full: a seat more than would do if they were.
        seats = ceil_div(total, rider) + (1 if total > rider else 0)
        # Every load of riders takes all its passes, so the more of them, the more tokens a load is worth.
        enough = max(rider, min(MAX_SWEEP_TOKENS * job.num_passes, seats * rider))
        sweep = rider
        while sweep < enough:
            yield rider, sweep
            sweep *= 4
        yield rider, enough


def _ring_choices(sizes: Sizes, rates: Rates, rider: int, sweep: int) -> set[int]:
    """Return the smallest ring, and one that lets the disk work all the time that a stop computes."""
    smallest = sizes.smallest_ring_bytes
    full = smallest
    for stop, following in zip(sizes.stops, (*sizes.stops[1:], sizes.stops[0]), strict=True):
        ahead = min(following.num_bytes, int(rates.disk * compute_seconds(stop, rates, rider, sweep)))
        full = max(full, stop.num_bytes + max(ahead, following.largest_bytes))
    return {smallest, full}


def _comfortable_ring(sizes: Sizes, rates: Rates, rider: int, sweep: int) -> int:
    seconds = max(compute_seconds(stop, rates, rider, sweep) for stop in sizes.stops)
    largest = max(stop.num_bytes for stop in sizes.stops)
    gap = max(stop.largest_bytes for stop in sizes.stops)
    return largest + min(largest, 2 * int(rates.disk * seconds)) + gap


def _planned(candidate: _Candidate, job: Job, rates: Rates) -> Plan:
    forecast = forecast_of(
        candidate.sizes, candidate.resident, candidate.ring_bytes, candidate.rider_tokens,
        candidate.sweep_tokens, job, rates,
    )  # fmt: skip
    reads = reads_of(candidate.sizes, job)
    unused = frozenset(stop for stop, count in enumerate(reads) if not count)
    resident_bytes = sum(candidate.sizes.stops[stop].num_bytes for stop in candidate.resident - unused)
    return Plan(
        candidate.sizes.granularity, candidate.resident, candidate.ring_bytes, candidate.rider_tokens,
        candidate.sweep_tokens, padding_worth(rates) if job.packing is None else job.packing[2],
        candidate.used_bytes, resident_bytes, forecast, job.longest, unused,
    )  # fmt: skip


def choose_resident(sizes: Sizes, job: Job, room_bytes: int) -> frozenset[int]:
    """Choose the stops that stay, from those that a sweep comes to: what it would read twice first."""
    reads = reads_of(sizes, job)
    chosen: frozenset[int] = frozenset()
    for count in sorted(set(reads) - {0}, reverse=True):
        num_bytes = [s.num_bytes if reads[n] == count else 0 for n, s in enumerate(sizes.stops)]
        kept = sum(sizes.stops[stop].num_bytes for stop in chosen)
        chosen |= {stop for stop in spread(num_bytes, room_bytes - kept) if num_bytes[stop]}
    return chosen


def spread(stop_bytes: Sequence[int], room_bytes: int) -> frozenset[int]:
    """Choose as many stops as fit in `room_bytes`, at even distances.

    A fixed set, because an LRU would evict each stop just before it is needed again; spread evenly, so that the
    reader gains on the computation at every one of them.
    """
    total = sum(stop_bytes)
    if total <= room_bytes:
        return frozenset(range(len(stop_bytes)))
    # Twice, because what is left over at the end would crowd the stops at the beginning.
    chosen = set(_even(stop_bytes, sum(stop_bytes[stop] for stop in _even(stop_bytes, room_bytes))))
    kept = sum(stop_bytes[stop] for stop in chosen)
    # Stops differ in size, and what is left may hold another.
    for stop in sorted(range(len(stop_bytes)), key=lambda stop: -stop_bytes[stop]):
        if stop not in chosen and 0 < stop_bytes[stop] <= room_bytes - kept:
            chosen.add(stop)
            kept += stop_bytes[stop]
    return frozenset(chosen)


def _even(stop_bytes: Sequence[int], room_bytes: int) -> Iterator[int]:
    """Yield stops of at most `room_bytes`: each brings its share of the room, and stays where enough has come."""
    total, share = sum(stop_bytes), 0
    for stop, num_bytes in enumerate(stop_bytes):
        share += num_bytes * max(room_bytes, 0)
        if 0 < num_bytes * total <= share:
            share -= num_bytes * total
            yield stop


def advise(
    choices: Sequence[Sizes],
    plan: Plan,
    *,
    free_bytes: int,
    total_bytes: int,
    job: Job,
    rates: Rates,
) -> list[tuple[int, float]]:
    """Return larger budgets that would make the job faster, each with the seconds that it would then take.

    Each saves a tenth at least; one that holds every weight, half of that.
    """
    found: list[tuple[int, float]] = []
    seconds = plan.forecast.seconds
    everything = min(
        total_bytes - free_bytes + s.kept_bytes + SLACK_BYTES + s.all_bytes
        + working_bytes(s, job, plan.rider_tokens, plan.sweep_tokens)
        for s in choices
    )  # fmt: skip

    def seconds_in(ram: int) -> float:
        free = free_bytes + ram - total_bytes
        plan = make_plan(choices, free_bytes=free, total_bytes=ram, job=job, rates=rates)
        return plan.forecast.seconds

    steps = [int(total_bytes * factor) for factor in (1.25, 1.5, 2, 3, 4, 6, 8)]
    for larger, worth in [*((step, 0.9) for step in steps if step < everything), (everything, 0.95)]:
        if larger > total_bytes and (better := seconds_in(larger)) <= worth * seconds:
            found.append((larger, better))
            seconds = better
    return found


def with_smaller_weights(sizes: Sizes, factor: float) -> Sizes:
    """Return what a model would need whose weights took `factor` of the bytes on disk and in memory."""
    stops = tuple(
        replace(s, num_bytes=int(s.num_bytes * factor), largest_bytes=int(s.largest_bytes * factor))
        for s in sizes.stops
    )
    return replace(sizes, stops=stops)
