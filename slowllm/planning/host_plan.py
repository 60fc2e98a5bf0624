"""Pure arithmetic: what stays resident, how large the ring is, how many tokens ride a sweep.

Knows sizes in bytes and rates; knows nothing of files, models or text. The plan is the candidate with the shortest
forecast among those that fit the budget.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from slowllm.errors import PlanError
from slowllm.options import MIB, format_binary
from slowllm.planning.forecast import compute_seconds, forecast_of, reads_of
from slowllm.planning.job import ExpertSizes, Job, Rates, Sizes
from slowllm.planning.plan import Plan
from slowllm.planning.resident_stops import choose_resident
from slowllm.rounding import ceil_div, round_up

# Fewer rows than this take as long as these: the weights pass through the processor either way.
MIN_RIDER_TOKENS = 64
# Beyond this a larger matrix product is no faster, and the scratch memory of a block grows with it.
MAX_RIDER_TOKENS = 1024
# A few times T*, the batch whose computing hides under the reading (about 1,000 tokens in bf16 on two cores with
# AMX): far above T* another sweep is free, and a result comes earlier.
MAX_SWEEP_TOKENS = 8192
# What the allocator, thread stacks and the interpreter take beyond what is counted here (measured: up to 250 MB).
SLACK_BYTES = 288 * MIB
# The size of a process differs by as much from one start to the next (measured: up to 17 MB).
START_BYTES = 24 * MIB
# Experts on their way while others are multiplied: enough for the reads in flight, and for a product that takes long.
EXPERTS_AHEAD_BYTES = 256 * MIB
# Stops smaller than a block must bring the time down to this share, or handing them over is not worth it.
LEAVES_GAIN = 0.95


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
        choices: sizes of the model cut into whole blocks, and into leaves where it can be.
        free_bytes: what this model may take.
        total_bytes: the whole budget, for the error message.
        job: what the model is opened for; by default a session of unknown size.
    Raises:
        PlanError: the job cannot run in the budget; the message names the smallest that would do.
    """
    job, rates = job or Job(repeated=True), rates or Rates()
    plans_of_each = [list(_candidates(sizes, job, rates, free_bytes, keep_resident)) for sizes in choices]
    best = [min(plans, key=lambda p: (p.forecast.seconds, p.peak_bytes)) for plans in plans_of_each if plans]
    if not best:
        raise PlanError(_refusal(choices, job, free_bytes, total_bytes, keep_resident))
    chosen = best[0]
    # Whole blocks are simpler, and leaves cannot run backward, so others are chosen only if blocks do not fit, or if others
    # are faster. Where all weights stay in memory there is nothing to gain, but that experts are decoded once for all riders.
    for other in best[1:]:
        if (chosen.streams or _shares_decoding(other, choices, job)) and is_worth_more(other, chosen, job):
            chosen = other
    return chosen


def is_worth_more(other: Plan, plan: Plan, job: Job) -> bool:
    """Return whether a plan with stops smaller than blocks is faster than one with larger stops by so much that it is worth it."""
    may_be = job.forward_only or (other.granularity != "leaves" and not job.turns)
    return may_be and other.forecast.seconds < LEAVES_GAIN * plan.forecast.seconds


def _shares_decoding(plan: Plan, choices: Sequence[Sizes], job: Job) -> bool:
    """Return whether several riders will want experts that have to be decoded, which each would do for itself in a whole block."""
    experts = sizes_for(plan, choices).experts
    is_coded = experts is not None and experts.decoded_bytes > 0
    return is_coded and job.num_tokens is not None and plan.sweep_tokens > plan.rider_tokens


def widen(plan: Plan, choices: Sequence[Sizes], free_bytes: int) -> Plan:
    """Let the sweeps of a session carry more tokens than were assumed, if the budget has room left for them."""
    sizes = sizes_for(plan, choices)
    token_bytes = sizes.waiting_token_bytes + plan.longest * sizes.waiting_attention_bytes
    token_bytes += _graph_token_bytes(plan, sizes) if plan.keeps_graph else 0
    if sizes.experts is not None:
        token_bytes += _replay_bytes(sizes, plan.longest)
    more = max(0, min((free_bytes - plan.peak_bytes) // token_bytes, MAX_SWEEP_TOKENS - plan.sweep_tokens))
    return replace(
        plan, sweep_tokens=plan.sweep_tokens + more, peak_bytes=plan.peak_bytes + more * token_bytes
    )


def keep_graph(plan: Plan, choices: Sequence[Sizes], job: Job, free_bytes: int) -> Plan:
    """Let autograd keep its graph over the blocks if sweeps turn, all weights stay in memory, and there is room for it."""
    more = plan.sweep_tokens * _graph_token_bytes(plan, sizes_for(plan, choices))
    if plan.streams or not job.turns or plan.peak_bytes + more > free_bytes:
        return plan
    return replace(plan, keeps_graph=True, peak_bytes=plan.peak_bytes + more)


def keep_decoded(plan: Plan, choices: Sequence[Sizes], free_bytes: int) -> Plan:
    """Let riders share the decoded matrices of a stop if more than one is expected, and what is left of the budget suffices."""
    more = sizes_for(plan, choices).decoded_stop_bytes
    if plan.sweep_tokens <= plan.rider_tokens or plan.peak_bytes + more > free_bytes:
        return plan
    return replace(plan, decoded_bytes=more, peak_bytes=plan.peak_bytes + more)


def sizes_for(plan: Plan, choices: Sequence[Sizes]) -> Sizes:
    """Return the sizes with the granularity of a plan."""
    return next(sizes for sizes in choices if sizes.granularity == plan.granularity)


def _graph_token_bytes(plan: Plan, sizes: Sizes) -> int:
    """Return the bytes that autograd keeps of a token over all blocks."""
    blocks = range(len(sizes.stops) - sizes.num_head_stops)
    num_blocks = sum(sizes.stops[block].num_bytes > 0 and block not in plan.unused for block in blocks)
    return num_blocks * _replay_bytes(sizes, plan.longest)


def _replay_bytes(sizes: Sizes, longest: int) -> int:
    """Return the bytes that autograd keeps of a token within a block, in a sequence of so many tokens."""
    return sizes.replay_token_bytes + longest * sizes.replay_attention_bytes


def least_rider_tokens(job: Job) -> int:
    """Return the tokens that a rider must be able to carry: the longest sequence, or the fewest that pay."""
    if job.packing is not None:
        # A request continues a sequence; what is before it lies in the cache.
        return job.packing[0] if job.serves else max(job.longest, job.packing[0])
    if job.rider_tokens is not None:
        return max(job.longest, job.rider_tokens)
    return max(job.longest, min(MIN_RIDER_TOKENS, job.planned_tokens))


def padding_worth(rates: Rates) -> int:
    """Return how many tokens of padding take as long as passing the weights through the processor once.

    A token takes about as many floating-point operations as the weights have bytes. The number is a power of two, so
    that a new measurement of the machine seldom changes how lines are packed, and with it their rounding.
    """
    return 1 << max(0, round(math.log2(rates.compute / rates.memory)))


def working_bytes(sizes: Sizes, job: Job, rider_tokens: int, sweep_tokens: int) -> int:
    """Return the memory of a sweep's riders, one of which computes, and of sessions."""
    waiting = sizes.rider_token_bytes + (sizes.result_token_bytes if job.keeps_results else 0)
    waiting += job.held_token_bytes + job.longest * sizes.waiting_attention_bytes
    scratch = sizes.scratch_bytes(rider_tokens, job.longest)
    if job.rows:
        waiting += sizes.cache_token_bytes
        num_logits = job.most_logits(rider_tokens, sweep_tokens)
        if sizes.returns_all_logits:
            num_logits += 2 * rider_tokens
        scratch += num_logits * sizes.logits_bytes
    if not job.forward_only:
        waiting += sizes.checkpoint_token_bytes
        # Riders that wait for experts on the way down each keep what autograd needs of the block.
        tokens = rider_tokens if sizes.experts is None else sweep_tokens
        scratch += tokens * _replay_bytes(sizes, job.longest)
    return scratch + sweep_tokens * waiting + session_bytes(sizes, job)


def session_bytes(sizes: Sizes, job: Job) -> int:
    """Return the memory of the caches of a server's sessions."""
    if not job.cache_tokens:
        return 0
    # A cache grows by a copy: of one layer of one session there are two for a moment.
    copied = ceil_div(min(job.longest, job.cache_tokens) * sizes.cache_token_bytes, sizes.num_blocks)
    return job.cache_tokens * sizes.cache_token_bytes + copied


def least_bytes(sizes: Sizes, job: Job, keep_resident: bool = True) -> int:
    """Return the smallest part of a budget in which the job can run."""
    weight_bytes = sizes.smallest_ring_bytes
    if keep_resident:  # a model smaller than the ring is kept
        weight_bytes = min(weight_bytes, _used_bytes(sizes, job) + sizes.passing_bytes)
    if sizes.experts is not None:
        weight_bytes += sizes.experts.smallest_ring_bytes
    return sizes.kept_bytes + SLACK_BYTES + weight_bytes + _least_working(sizes, job)


def _used_bytes(sizes: Sizes, job: Job) -> int:
    """Return the bytes of all stops that the job visits."""
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
    smallest = round_up(outside + least + START_BYTES, MIB)
    length = ", as many as the longest sequence has" if tokens == job.longest > MIN_RIDER_TOKENS else ""
    riders = f"{format_binary(working)} for {tokens} tokens{length}"
    if job.serves:
        assert job.packing is not None, "a server's requests have a size"
        held = session_bytes(sizes, job)
        riders = (
            f"{format_binary(held)} for {job.cache_tokens:,} tokens in the caches of sessions, {format_binary(working - held)} "
            f"for {job.packing[1]:,} tokens under way, {tokens:,} in a request, "
            f"{'forward only' if job.forward_only else 'with backward'}"
        )
    return (
        f"a budget of {format_binary(total_bytes)} is too small for this model: "
        f"the smallest that would do is {format_binary(smallest)} "
        f"({format_binary(outside)} for the process as it is, "
        f"{format_binary(fixed)} always in memory, {format_binary(least - fixed - working)} for the weights passing "
        f"through, {riders}, and {format_binary(START_BYTES)} by which "
        "processes differ from start to start)"
    )


def _candidates(sizes: Sizes, job: Job, rates: Rates, free_bytes: int, keep_resident: bool) -> Iterator[Plan]:
    """Yield the plans that fit the budget."""
    reads, used_bytes = reads_of(sizes, job), _used_bytes(sizes, job)
    unused = frozenset(stop for stop, count in enumerate(reads) if not count)
    padding = padding_worth(rates) if job.packing is None else job.packing[2]

    def plan(resident: frozenset[int], ring: int, rider: int, sweep: int, peak: int, repeats: bool) -> Plan:
        experts, kept_units, expert_ring, router_bytes = sizes.experts, 0, 0, 0
        if experts is not None:
            # Of what is left over, the ring comes first: the more experts are on their way, the better is the disk used.
            left = free_bytes - peak
            expert_ring = experts.smallest_ring_bytes + min(left * 9 // 10, _more_experts(experts))
            left -= expert_ring - experts.smallest_ring_bytes
            # Where more than experts is read, the disk has the next stop to read while a block computes.
            if repeats and not ring and experts.router_bytes <= left * 9 // 10:
                router_bytes = experts.router_bytes
                left -= router_bytes
            if keep_resident and repeats:
                kept_units = max(0, min(experts.num_units, left * 9 // 10 // experts.unit_bytes))
            peak += expert_ring - experts.smallest_ring_bytes + kept_units * experts.unit_bytes + router_bytes
        forecast = forecast_of(sizes, resident, ring, rider, sweep, job, rates, kept_units)
        resident_bytes = sum(sizes.stops[stop].num_bytes for stop in resident - unused)
        if experts is not None:
            resident_bytes += kept_units * experts.unit_bytes
        return Plan(
            sizes.granularity, resident, ring, rider, sweep, padding, peak, resident_bytes, forecast,
            job.longest, unused, expert_ring_bytes=expert_ring, kept_units=kept_units,
            router_bytes=router_bytes,
        )  # fmt: skip

    for rider, sweep in token_choices(job):
        taken = sizes.kept_bytes + SLACK_BYTES + working_bytes(sizes, job, rider, sweep)
        if sizes.experts is not None:
            taken += sizes.experts.smallest_ring_bytes
        # What is read once is not worth keeping.
        repeats = job.repeated or job.num_passes > 1 or job.planned_tokens > sweep or job.num_tokens is None
        everything = taken + used_bytes + sizes.passing_bytes
        if keep_resident and everything <= free_bytes:
            stops = frozenset(range(len(sizes.stops)))
            yield plan(stops, sizes.passing_bytes, rider, sweep, everything, repeats)
            continue
        for least_ring in _ring_choices(sizes, rates, rider, sweep):
            room = free_bytes - taken - least_ring
            if room < 0:
                continue
            resident = choose_resident(sizes, job, room) if keep_resident and repeats else frozenset()
            kept_bytes = sum(sizes.stops[stop].num_bytes for stop in resident)
            # A tensor that does not fit before the ring's end leaves a gap there, and computing takes longer
            # beside reading than alone, so the ring gets what is left over, as far as that helps.
            more = max(0, _comfortable_ring(sizes, rates, rider, sweep) - least_ring)
            # Nine tenths of it: an estimate that is too low should not use up the budget.
            ring = least_ring + min((room - kept_bytes) * 9 // 10, more)
            yield plan(resident, ring, rider, sweep, taken + ring + kept_bytes, repeats)


def _more_experts(experts: ExpertSizes) -> int:
    """Return the bytes by which a ring for experts should be larger than the smallest, to keep the disk busy."""
    return max(2 * experts.unit_bytes, min(8 * experts.unit_bytes, EXPERTS_AHEAD_BYTES))


def token_choices(job: Job) -> Iterator[tuple[int, int]]:
    """Yield the tokens of a micro-batch and of a sweep that a plan may choose from."""
    if job.packing is not None:
        yield job.packing[:2]
        return
    least, total = least_rider_tokens(job), job.planned_tokens
    most = max(least, min(MAX_RIDER_TOKENS, total))
    riders = {least, most} | {tokens for tokens in (128, 256, 512) if least < tokens < most}
    if job.rider_tokens is not None:
        riders = {least}
    for rider in sorted(riders):
        # One seat more than full micro-batches would need, because they are seldom full.
        seats = ceil_div(total, rider) + (1 if total > rider else 0)
        # Every load of riders takes all its passes: the more passes, the more tokens a load is worth.
        enough = max(rider, min(MAX_SWEEP_TOKENS * job.num_passes, seats * rider))
        sweep = rider
        while sweep < enough:
            yield rider, sweep
            sweep *= 4
        yield rider, enough


def _ring_choices(sizes: Sizes, rates: Rates, rider: int, sweep: int) -> set[int]:
    """Return the smallest ring, and one that keeps the disk busy all the time that a stop computes."""
    smallest = sizes.smallest_ring_bytes
    full = smallest
    for stop, following in zip(sizes.stops, (*sizes.stops[1:], sizes.stops[0]), strict=True):
        ahead = min(following.num_bytes, int(rates.disk * compute_seconds(stop, rates, rider, sweep)))
        full = max(full, stop.num_bytes + max(ahead, following.largest_bytes))
    return {smallest, full}


def _comfortable_ring(sizes: Sizes, rates: Rates, rider: int, sweep: int) -> int:
    """Return the size of a ring beyond which more does not help."""
    seconds = max(compute_seconds(stop, rates, rider, sweep) for stop in sizes.stops)
    largest = max(stop.num_bytes for stop in sizes.stops)
    gap = max(stop.largest_bytes for stop in sizes.stops)
    return largest + min(largest, 2 * int(rates.disk * seconds)) + gap


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
    better_budgets: list[tuple[int, float]] = []
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
            better_budgets.append((larger, better))
            seconds = better
    return better_budgets
