"""Plans keep the budget to the byte, and sizes are read as they are written."""

from __future__ import annotations

import itertools
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slowllm.errors import InputError, PlanError
from slowllm.options import GIB, KIB, MIB, Options, format_binary, format_bytes, parse_bytes, parse_dtype
from slowllm.planning.budget import Budget
from slowllm.planning.forecast import reads_of
from slowllm.planning.host_plan import (
    MAX_RIDER_TOKENS,
    MAX_SWEEP_TOKENS,
    SLACK_BYTES,
    START_BYTES,
    advise,
    keep_decoded,
    keep_graph,
    least_bytes,
    make_plan,
    widen,
    working_bytes,
)
from slowllm.planning.job import Granularity, Job, Rates, Sizes, StopSize, with_smaller_weights
from slowllm.planning.plan import Plan
from slowllm.planning.resident_stops import choose_resident, spread
from tests.support.properties import num_examples

fuzz = num_examples(60)

num_bytes = st.integers(0, 6 * GIB) | st.integers(0, 10 * MIB)
budgets = st.integers(0, 100 * GIB) | st.integers(0, 2 * GIB)


@st.composite
def sizes(draw: st.DrawFn, granularity: Granularity = "blocks", uniform: bool = False) -> Sizes:
    def stop() -> StopSize:
        size = draw(num_bytes)
        return StopSize(size, draw(st.integers(size // 3, size)), float(size))

    num_stops = draw(st.integers(1, 130 if uniform else 30))
    stops = [stop()] * num_stops if uniform else [stop() for _ in range(num_stops)]
    return Sizes(
        granularity=granularity,
        stops=tuple(stops),
        kept_bytes=draw(num_bytes),
        block_token_bytes=draw(st.integers(1, 4 * MIB)),
        attention_token_bytes=draw(st.integers(0, 2 * KIB)),
        rider_token_bytes=draw(st.integers(1, 200 * KIB)),
        result_token_bytes=draw(st.integers(0, 4 * MIB)),
    )


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    longest = draw(st.integers(1, 2000))
    num_tokens = draw(st.none() | st.integers(longest, 200_000))
    packing = draw(st.none() | st.integers(1, 2000).flatmap(lambda n: st.just((n, 4 * n, 7))))
    num_passes = draw(st.just(1) | st.integers(1, 300))
    choices = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    return Job(num_tokens, longest, *choices, packing, num_passes)


def plan_of(sizes: Sizes, free_bytes: int, job: Job, keep_resident: bool = True) -> Plan:
    return make_plan(
        [sizes], free_bytes=free_bytes, total_bytes=free_bytes, job=job, keep_resident=keep_resident
    )


# Plans


@fuzz
@given(sizes=sizes(), more=budgets, job=jobs(), keep_resident=st.booleans())
def test_a_plan_keeps_the_budget_and_counts_everything(
    sizes: Sizes, more: int, job: Job, keep_resident: bool
) -> None:
    free = least_bytes(sizes, job, keep_resident) + more
    plan = plan_of(sizes, free, job, keep_resident)
    assert plan.peak_bytes <= free
    assert plan.resident_bytes == sum(sizes.stops[stop].num_bytes for stop in plan.resident)
    scratch = sizes.block_token_bytes + job.longest * sizes.attention_token_bytes
    assert plan.peak_bytes == (
        sizes.kept_bytes + SLACK_BYTES + plan.ring_bytes + plan.resident_bytes
        + plan.rider_tokens * scratch
        + plan.sweep_tokens * (sizes.rider_token_bytes + job.keeps_results * sizes.result_token_bytes)
    )  # fmt: skip
    if job.packing is not None:
        assert (plan.rider_tokens, plan.sweep_tokens, plan.padding_tokens) == job.packing
    else:
        assert job.longest <= plan.rider_tokens <= max(MAX_RIDER_TOKENS, job.longest)
        most = max(MAX_SWEEP_TOKENS * job.num_passes, plan.rider_tokens)
        assert plan.rider_tokens <= plan.sweep_tokens <= most
    if len(plan.resident) < len(sizes.stops):
        assert plan.ring_bytes >= sizes.smallest_ring_bytes
    if not keep_resident:
        assert not plan.resident


@fuzz
@given(sizes=sizes(), taken=num_bytes, job=jobs(), keep_resident=st.booleans())
def test_a_budget_is_refused_just_below_the_smallest(
    sizes: Sizes, taken: int, job: Job, keep_resident: bool
) -> None:
    job = replace(job, packing=None)
    enough = least_bytes(sizes, job, keep_resident)
    for free, works in ((enough, True), (enough - 1, False), (0, False), (-taken, False)):
        options = {"total_bytes": free + taken, "job": job, "keep_resident": keep_resident}
        if works:
            make_plan([sizes], free_bytes=free, **options)
            continue
        with pytest.raises(PlanError, match="is too small for this model: the smallest that would do is"):
            make_plan([sizes], free_bytes=free, **options)


@fuzz
@given(choices=st.tuples(sizes(), sizes("leaves")), taken=num_bytes, job=jobs(), part=st.floats(0, 1))
def test_the_budget_that_a_refusal_names_will_do(
    choices: tuple[Sizes, Sizes], taken: int, job: Job, part: float
) -> None:
    job = replace(job, packing=None)
    enough = min(least_bytes(sizes, job) for sizes in choices)
    free = min(int(enough * part), enough - 1)
    with pytest.raises(PlanError) as caught:
        make_plan(choices, free_bytes=free, total_bytes=free + taken, job=job)
    found = re.search(r"the smallest that would do is (\S+) ", str(caught.value))
    assert found is not None
    named = parse_bytes(found[1])
    make_plan(choices, free_bytes=named - taken, total_bytes=named, job=job)
    # And it is not far from the smallest: what processes differ by, rounded up to a MiB, then to three figures of GiB.
    assert named - taken - enough <= START_BYTES + MIB + GIB // 100


BLOCK = StopSize(5 * GIB, 2 * GIB, 5e9)
LEAF = StopSize(2 * GIB, 2 * GIB, 2e9)
BLOCKS = Sizes("blocks", (BLOCK,) * 70, GIB, 2 * MIB, 1024, 64 * KIB)
LEAVES = Sizes("leaves", (LEAF,) * 175, GIB, 2 * MIB, 1024, 256 * KIB)


def test_a_refusal_has_all_numbers() -> None:
    words = (
        r"^a budget of 4GiB is too small for this model: the smallest that would do is 8\.94GiB "
        r"\(512MiB for the process as it is, 1\.29GiB always in memory, 7GiB for the weights passing through, "
        r"136MiB for 64 tokens, and 24MiB by which processes differ from start to start\)$"
    )
    job = Job(num_tokens=1000, longest=64)
    with pytest.raises(PlanError, match=words):
        make_plan([BLOCKS], free_bytes=4 * GIB - 512 * MIB, total_bytes=4 * GIB, job=job)
    with pytest.raises(
        PlanError,
        match=r"for 900 tokens, as many as the longest sequence has, and 24MiB by which processes differ",
    ):
        make_plan([BLOCKS], free_bytes=GIB, total_bytes=GIB, job=Job(num_tokens=1000, longest=900))


@fuzz
@given(sizes=sizes(uniform=True), more=budgets, step=st.integers(0, 20 * GIB), job=jobs())
def test_more_memory_never_takes_more_time(sizes: Sizes, more: int, step: int, job: Job) -> None:
    job = replace(job, packing=None)
    free = least_bytes(sizes, job) + more
    before, after = plan_of(sizes, free, job), plan_of(sizes, free + step, job)
    # A model that fits altogether is mapped: nothing is read ahead in its first sweep.
    if bool(before.ring_bytes) == bool(after.ring_bytes):
        assert after.forecast.seconds <= before.forecast.seconds * (1 + 1e-9)


def test_blocks_are_cut_only_where_they_must_be_or_where_it_pays() -> None:
    def chosen(free_bytes: int, job: Job) -> str:
        return make_plan([BLOCKS, LEAVES], free_bytes=free_bytes, total_bytes=free_bytes, job=job).granularity

    few = Job(num_tokens=13, longest=13, forward_only=True)
    assert chosen(6 * GIB, few) == "leaves"
    assert chosen(6 * GIB, replace(few, forward_only=False)) == "leaves", "the only way there is"
    assert chosen(12 * GIB, few) == "blocks", "one sweep takes as long either way"
    many = Job(num_tokens=100_000, longest=64, forward_only=True)
    assert chosen(10 * GIB, many) == "leaves", "through a small ring, the disk pauses less often"
    assert chosen(10 * GIB, replace(many, forward_only=False)) == "blocks", "only these run backward"


def test_a_job_of_one_sweep_keeps_nothing_and_one_of_many_keeps_what_fits() -> None:
    one, many = Job(num_tokens=13, longest=13), Job(num_tokens=13, longest=13, repeated=True)
    assert not plan_of(BLOCKS, 30 * GIB, one).resident
    plan = plan_of(BLOCKS, 30 * GIB, many)
    assert 30 * GIB - plan.peak_bytes < BLOCK.num_bytes
    assert len(plan.resident) == 4


def test_a_job_of_many_passes_is_foretold_by_its_loads_and_passes() -> None:
    stops = tuple(StopSize(4 * GIB, GIB, 4e9) for _ in range(20))
    sizes = Sizes("blocks", stops, 0, 1000, 0, 1000)
    # 40 sequences of 50 tokens, 10 of which come one by one.
    job = Job(2000, 50, forward_only=True, num_passes=10)
    plan = plan_of(sizes, 40 * GIB, job)
    forecast, once = plan.forecast, plan_of(sizes, 40 * GIB, replace(job, num_passes=1)).forecast
    assert plan.sweep_tokens >= 2000
    assert forecast.num_sweeps == 10
    assert len(plan.resident) > 5, "a second pass reads again what is not kept"
    assert forecast.seconds == pytest.approx(forecast.first_seconds + 9 * forecast.later_seconds)
    assert once.num_sweeps == 1
    # Later passes compute 40 tokens instead of 2,000, and take the weights through the processor again.
    assert forecast.later_seconds < forecast.first_seconds - 1950 * 20 * 4e9 / Rates().compute * 0.9
    assert forecast.later_seconds >= forecast.read_bytes / Rates().disk


def test_what_passes_often_is_worth_larger_loads() -> None:
    stops = tuple(StopSize(4 * GIB, GIB, 4e9) for _ in range(20))
    sizes = Sizes("blocks", stops, 0, 1000, 0, 1000)
    job = Job(60_000, 50, forward_only=True, num_passes=10)
    plan = plan_of(sizes, 40 * GIB, job)
    assert plan.sweep_tokens > MAX_SWEEP_TOKENS
    assert plan.forecast.num_sweeps == 10 * -(-60_000 // plan.sweep_tokens)


@pytest.mark.parametrize("passes", [0, -1, 1.5])
def test_a_sequence_that_takes_no_sweeps_is_refused(passes: Any) -> None:
    with pytest.raises(InputError, match=f"a sequence cannot take {passes} sweeps"):
        Job(10, 5, num_passes=passes)


def test_many_tokens_get_a_ring_through_which_the_disk_works_all_the_time() -> None:
    few, many = Job(num_tokens=13, longest=13), Job(num_tokens=4096, longest=64)
    tight = least_bytes(BLOCKS, few)
    assert plan_of(BLOCKS, tight, few).ring_bytes == BLOCKS.smallest_ring_bytes
    # One block, twice what is read while it computes, and the gap at the ring's end.
    assert 7.8 * GIB < plan_of(BLOCKS, 20 * GIB, few).ring_bytes < 9 * GIB
    assert plan_of(BLOCKS, 20 * GIB, many).ring_bytes == 2 * BLOCK.num_bytes + BLOCK.largest_bytes


@pytest.mark.parametrize("tokens", [(None, 0), (None, 2.5), (3, 4), (-1, 1), ("x", 1)])
def test_a_job_of_no_tokens_is_refused(tokens: tuple[Any, Any]) -> None:
    with pytest.raises(InputError, match=r"cannot have"):
        Job(*tokens)


def test_a_small_job_rides_one_sweep_with_a_seat_to_spare() -> None:
    plan = plan_of(BLOCKS, 30 * GIB, Job(num_tokens=1500, longest=60))
    assert plan.forecast.num_sweeps == 1
    assert plan.sweep_tokens // plan.rider_tokens * plan.rider_tokens > 1500


@fuzz
@given(sizes=sizes(), job=jobs(), more=budgets)
def test_a_forecast_is_no_shorter_than_reading_or_computing(sizes: Sizes, job: Job, more: int) -> None:
    job = replace(job, packing=None)
    forecast = plan_of(sizes, least_bytes(sizes, job) + more, job).forecast
    slack = 1 + 1e-9
    assert forecast.later_seconds * slack >= forecast.compute_seconds
    # What the last stops' computing lets the disk read ahead belongs to the next sweep.
    ahead = sizes.smallest_ring_bytes + 2 * sizes.all_bytes
    assert forecast.first_seconds * slack >= sizes.all_bytes / Rates().disk
    assert forecast.later_seconds <= forecast.first_seconds * slack
    assert forecast.later_seconds >= (forecast.read_bytes - ahead) / Rates().disk


def test_advice_names_budgets_that_are_faster_the_last_of_which_holds_everything() -> None:
    job, rates = Job(num_tokens=20_000, longest=64, repeated=True), Rates(memory=1e12, compute=1e15)
    options = {"free_bytes": 30 * GIB, "total_bytes": 31 * GIB, "job": job, "rates": rates}
    plan = make_plan([BLOCKS], **options)
    larger = advise([BLOCKS], plan, **options)
    assert len(larger) >= 2
    seconds = [plan.forecast.seconds, *(s for _, s in larger)]
    assert all(after <= 0.9 * before for before, after in itertools.pairwise(seconds[:-1]))
    assert seconds[-1] < seconds[-2]
    for ram, expected in larger:
        found = make_plan([BLOCKS], **{**options, "free_bytes": ram - GIB, "total_bytes": ram})
        assert found.forecast.seconds == expected
    everything = larger[-1][0]
    assert make_plan([BLOCKS], **{**options, "free_bytes": everything - GIB}).ring_bytes == 0
    halved = make_plan([with_smaller_weights(BLOCKS, 0.5)], **options)
    assert halved.forecast.seconds < 0.6 * plan.forecast.seconds


# Which stops stay


@fuzz
@given(num_stops=st.integers(1, 150), size=st.integers(1, 100), room=st.integers(-10, 16_000))
def test_resident_stops_are_as_many_as_fit_at_even_distances(num_stops: int, size: int, room: int) -> None:
    chosen = sorted(spread([size] * num_stops, room))
    assert len(chosen) == min(max(room, 0) // size, num_stops)
    # Around the circle: from the last to the first of the next sweep as well.
    distances = {
        (after - stop - 1) % num_stops for stop, after in zip(chosen, chosen[1:] + chosen[:1], strict=True)
    }
    assert not distances or max(distances) - min(distances) <= 1
    assert all(0 <= stop < num_stops for stop in chosen)


@fuzz
@given(stop_bytes=st.lists(st.integers(0, 50), max_size=40), room=st.integers(-10, 1000))
def test_resident_stops_never_take_more_than_the_room(stop_bytes: list[int], room: int) -> None:
    chosen = spread(stop_bytes, room)
    kept = sum(stop_bytes[stop] for stop in chosen)
    assert kept <= max(room, 0)
    # And no stop that would fit is left out.
    assert all(not 0 < size <= room - kept for stop, size in enumerate(stop_bytes) if stop not in chosen)
    if sum(stop_bytes) <= room:
        assert len(chosen) == len(stop_bytes)


# What several models take


def test_a_budget_gives_no_more_than_it_has() -> None:
    budget = Budget(10 * GIB, used_bytes=GIB)
    budget.take(9 * GIB)
    assert budget.free_bytes == 0
    with pytest.raises(PlanError, match=r"^1B are needed but only 0B of the budget of 10GiB are left$"):
        budget.take(1)
    budget.give_back(2 * GIB)
    with pytest.raises(
        PlanError, match=r"^2\.01GiB are needed but only 2GiB of the budget of 10GiB are left$"
    ):
        budget.take(2 * GIB + 1)
    assert budget.free_bytes == 2 * GIB


def test_a_process_that_is_too_large_already_leaves_nothing() -> None:
    budget = Budget(GIB, used_bytes=2 * GIB)
    assert budget.free_bytes == -GIB
    with pytest.raises(PlanError, match=r"^1B are needed but only 0B of the budget of 1GiB are left$"):
        budget.take(1)


class Lingering(int):
    """A number whose difference takes so long that another thread can come between."""

    def __sub__(self, other: int) -> int:
        left = int(self) - other
        for _ in range(3000):
            pass
        return left


def test_a_budget_is_shared_by_threads() -> None:
    budget = Budget(Lingering(100), used_bytes=0)
    together = threading.Barrier(4)

    def work(_: int) -> int:
        taken = 0
        together.wait()
        for _ in range(100):
            try:
                budget.take(7)
            except PlanError:
                continue
            taken += 7
            assert budget.used_bytes <= 100
            if taken > 40:
                budget.give_back(taken)
                taken = 0
        return taken

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(work, range(4))) == budget.used_bytes
    finally:
        sys.setswitchinterval(interval)


# Sizes as people write them

WRITTEN = {
    "16GiB": 16 * GIB, "16gib": 16 * GIB, "16g": 16 * GIB, "16G": 16 * GIB, " 16 GiB ": 16 * GIB, "1.5G": 3 * GIB // 2,
    "500MB": 500_000_000, "500mb": 500_000_000, "8GB": 8_000_000_000, "2TB": 2 * 10**12, "1TiB": 1 << 40, "1k": 1024,
    "1kB": 1000, "1KiB": 1024, "12345": 12345, "12345B": 12345, "0.001kB": 1, "123456789012345678": 123456789012345678,
}  # fmt: skip


@pytest.mark.parametrize(("text", "meant"), WRITTEN.items())
def test_a_size_is_read(text: str, meant: int) -> None:
    assert parse_bytes(text) == meant


def test_a_plain_number_is_bytes() -> None:
    assert parse_bytes(9_007_199_254_740_993) == 9_007_199_254_740_993


NO_SIZE = [
    "",
    "GiB",
    "16 X",
    "16GiBB",
    "-1GiB",
    "+1G",
    "1e9",
    "1_000",
    "1,5G",
    ".5G",
    "5.G",
    "16 G iB",
    "٣GiB",
    "nan",
    "9" * 400,
]


@pytest.mark.parametrize("text", NO_SIZE)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(
        InputError, match=rf"{re.escape(repr(text))} is not a size; write it like 16GiB, 500MB or 8g"
    ):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["0", "0GiB", "0.0001B"])
def test_nothing_is_not_a_size(text: str) -> None:
    with pytest.raises(InputError, match=f"'{text}' is not a positive size"):
        parse_bytes(text)


@fuzz
@given(size=st.integers(1, 10**18) | st.integers(1, 64 * GIB) | st.integers(1, 10**7))
def test_a_size_as_we_write_it_is_read_as_at_least_as_much(size: int) -> None:
    read = parse_bytes(format_binary(size))
    assert size <= read
    assert read - size <= max(size // 100, 1) + 1


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0B"), (1023, "1023B"), (1024, "1KiB"), (1025, "1.01KiB"), (GIB - 1, "1024MiB"), (5 * GIB // 4, "1.25GiB"),
        (20_000 * GIB + 1, "20000.01GiB"), (10**7 * GIB, "10000000GiB"),
    ],
)  # fmt: skip
def test_binary_sizes_are_written_short(size: int, text: str) -> None:
    assert format_binary(size) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999.4, "999 B"), (1234, "1.23 kB"), (12_345, "12.3 kB"),
        (999_499, "999 kB"), (999_500, "1 MB"), (99_949_999, "99.9 MB"), (99_950_000, "100 MB"), (352e9, "352 GB"),
        (4.93e9, "4.93 GB"), (5e15, "5000 TB"), (-1234, "-1.23 kB"),
    ],
)  # fmt: skip
def test_decimal_sizes_have_three_figures(size: float, text: str) -> None:
    assert format_bytes(size) == text


# Options


@pytest.mark.parametrize(
    ("text", "name"),
    [("bf16", "bfloat16"), ("torch.float16", "float16"), ("FP32", "float32"), ("auto", "auto")],
)
def test_a_dtype_is_read(text: str, name: str) -> None:
    assert parse_dtype(text) == name


def test_options_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match=r"dtype 'int8' is unknown; use one of auto, fp32, float32, bf16"):
        parse_dtype("int8")
    with pytest.raises(InputError, match=r"dtype 'bf16' is unknown"):
        Options(dtype="bf16")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"device 'gpu' is unknown; use cpu, cuda, cuda:1, or several"):
        Options(device="gpu")
    with pytest.raises(InputError, match=r"device 'cuda,cuda:0' names a device twice"):
        Options(device="cuda,cuda:0")
    with pytest.raises(InputError, match=r"a vram budget is for a GPU; name one with device='cuda'"):
        Options(vram_bytes=1)


# Steps of tuning, which go up and down

TALL = Sizes(
    "blocks", (*[StopSize(GIB, GIB // 4, 1e9)] * 8, *[StopSize(GIB // 2, GIB // 2, 5e8)] * 2), MIB, KIB, 0, KIB,
    checkpoint_token_bytes=KIB, replay_token_bytes=KIB, num_head_stops=2,
)  # fmt: skip
STEP = Job(64, 16, repeated=True, keeps_results=False, turns=True)


def test_a_step_reads_blocks_twice_the_head_once_and_the_stop_where_it_begins_once() -> None:
    assert reads_of(TALL, STEP) == [1, 2, 2, 2, 2, 2, 2, 2, 1, 1]
    assert reads_of(TALL, replace(STEP, first_stop=6)) == [0, 0, 0, 0, 0, 0, 1, 2, 1, 1]
    assert reads_of(TALL, replace(STEP, turns=False)) == [1] * 10


def test_what_a_step_reads_twice_stays_first() -> None:
    # At even distances, and 7 is the block at which a step turns.
    for room, kept in ((1, {7}), (2, {4, 7}), (3, {3, 5, 7}), (7, {1, 2, 3, 4, 5, 6, 7})):
        assert choose_resident(TALL, STEP, room * GIB) == kept
    assert choose_resident(TALL, STEP, 8 * GIB) == {*range(1, 8), 8, 9}, "then half blocks of the head"


def test_blocks_below_the_tuned_ones_take_no_memory() -> None:
    job = replace(STEP, first_stop=7)
    plan = plan_of(TALL, 3 * GIB, job)
    assert plan.ring_bytes == 0
    assert plan.unused == frozenset(range(7))
    assert plan.resident_bytes == 2 * GIB
    assert plan.forecast.read_bytes == 0
    with pytest.raises(PlanError):
        plan_of(TALL, GIB, STEP)


def test_the_graph_is_kept_only_where_all_weights_stay_and_there_is_room() -> None:
    job = replace(STEP, first_stop=7)
    plan = plan_of(TALL, 3 * GIB, job)
    assert keep_graph(plan, [TALL], job, 3 * GIB).keeps_graph
    assert not keep_graph(plan, [TALL], job, plan.peak_bytes).keeps_graph
    assert not keep_graph(plan_of(TALL, 4 * GIB, STEP), [TALL], STEP, 100 * GIB).keeps_graph, (
        "some are streamed"
    )
    kept = keep_graph(plan, [TALL], job, 3 * GIB)
    assert kept.peak_bytes == plan.peak_bytes + plan.sweep_tokens * KIB


def test_decoded_stops_are_kept_only_for_several_riders_and_of_what_is_left() -> None:
    coded = replace(TALL, decoded_stop_bytes=MIB)
    plan = plan_of(coded, 3 * GIB, replace(STEP, num_tokens=5000, rider_tokens=100))
    assert plan.sweep_tokens > plan.rider_tokens
    kept = keep_decoded(plan, [coded], plan.peak_bytes + MIB)
    assert kept == replace(plan, decoded_bytes=MIB, peak_bytes=plan.peak_bytes + MIB)
    assert keep_decoded(plan, [coded], plan.peak_bytes + MIB - 1) == plan
    alone = replace(plan, rider_tokens=plan.sweep_tokens)
    assert keep_decoded(alone, [coded], 100 * GIB) == alone
    assert keep_decoded(plan, [TALL], 100 * GIB) == plan, "nothing is coded"


def test_given_micro_batches_are_not_changed() -> None:
    for tokens in (16, 100, 700):
        assert (
            plan_of(TALL, 5 * GIB, replace(STEP, num_tokens=5000, rider_tokens=tokens)).rider_tokens == tokens
        )


SESSION_SIZES = Sizes(
    "blocks", tuple(StopSize(1 << 20, 1 << 19, 1e6) for _ in range(8)), 1 << 20, 4096, 0, 1024, 2048
)


def session_plan(free_bytes: int) -> Plan:
    return make_plan([SESSION_SIZES], free_bytes=free_bytes, total_bytes=free_bytes)


def test_a_session_carries_more_tokens_where_there_is_room() -> None:
    plan = session_plan(1 << 33)
    wide = widen(plan, [SESSION_SIZES], 1 << 33)
    assert wide.sweep_tokens == MAX_SWEEP_TOKENS > plan.sweep_tokens
    assert wide.peak_bytes - plan.peak_bytes == (wide.sweep_tokens - plan.sweep_tokens) * (1024 + 2048)


@given(st.integers(0, 64 << 20))
def test_a_widened_plan_keeps_the_budget(more: int) -> None:
    free = (320 << 20) + more
    plan = session_plan(free)
    wide = widen(plan, [SESSION_SIZES], free)
    assert plan.sweep_tokens <= wide.sweep_tokens <= MAX_SWEEP_TOKENS
    assert wide.peak_bytes <= free


@fuzz
@given(sizes=sizes(), job=jobs(), held=st.integers(1, MIB))
def test_results_that_wait_to_be_written_take_memory(sizes: Sizes, job: Job, held: int) -> None:
    holding = replace(job, held_token_bytes=held)
    assert working_bytes(sizes, holding, 64, 640) == working_bytes(sizes, job, 64, 640) + 640 * held
    assert holding.covers(job)
    assert not job.covers(holding)
