"""How many experts a sweep is expected to need, and what that costs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slowllm.errors import PlanError
from slowllm.planning.experts import ENOUGH_CHOICES, demand_bytes, distinct_experts, popularity_of
from slowllm.planning.forecast import sweep_costs
from slowllm.planning.host_plan import make_plan
from slowllm.planning.job import (
    ExpertSizes,
    Job,
    Rates,
    Sizes,
    StopSize,
    with_popularity,
    with_smaller_weights,
)
from slowllm.planning.plan import Plan

GIB = 1 << 30
EXPERTS = ExpertSizes(frozenset(range(1, 9)), 256, 8, 44 << 20, 30 << 20, 88e6)
SIZES = Sizes(
    "experts", tuple(StopSize(200 << 20, 50 << 20, 4e8) for _ in range(10)), 1 << 20, 1000, 0, 1000,
    num_blocks=9, num_head_stops=1, experts=EXPERTS,
)  # fmt: skip
WHOLE = replace(
    SIZES, granularity="blocks", experts=None,
    stops=tuple(StopSize((200 << 20) + 256 * (44 << 20), 30 << 20, 4e8 + 8 * 88e6) for _ in range(10)),
)  # fmt: skip


def test_one_token_needs_its_own_and_many_need_nearly_all() -> None:
    assert distinct_experts(256, 8, 1) == pytest.approx(8, rel=1e-6)
    # Published counts of DeepSeek-V3.
    assert distinct_experts(256, 8, 16) == pytest.approx(76, rel=0.05)
    assert distinct_experts(256, 8, 149) == pytest.approx(205, rel=0.05)
    assert distinct_experts(256, 8, 256) == pytest.approx(248, rel=0.05)
    assert distinct_experts(8, 2, 10_000) == pytest.approx(8, abs=1e-3)
    assert distinct_experts(4, 4, 1) == pytest.approx(4, abs=1e-3)
    counts = [distinct_experts(128, 4, tokens) for tokens in (1, 2, 8, 64, 512)]
    assert counts == sorted(counts)


def test_popular_ones_that_are_kept_are_hit_more_often_than_others() -> None:
    rest = distinct_experts(256, 8, 1, num_kept=64)
    assert rest < 8 * (1 - 64 / 256)
    assert distinct_experts(256, 8, 1, num_kept=256) == 0
    assert demand_bytes(EXPERTS, 1) == pytest.approx(8 * EXPERTS.unit_bytes)
    assert demand_bytes(EXPERTS, 1, kept_units=8 * 64) == pytest.approx(rest * EXPERTS.unit_bytes)


def test_a_block_that_does_not_fit_is_read_by_its_experts() -> None:
    job, budget = Job(num_tokens=64, longest=64, forward_only=True), 8 * GIB
    with pytest.raises(PlanError):
        make_plan([WHOLE], free_bytes=budget, total_bytes=budget, job=job)
    plan = make_plan([WHOLE, SIZES], free_bytes=budget, total_bytes=budget, job=job)
    assert plan.granularity == "experts"
    assert plan.peak_bytes <= budget
    assert plan.expert_ring_bytes >= EXPERTS.smallest_ring_bytes
    assert not plan.kept_units  # what is read once is not kept


def test_what_is_left_keeps_experts_for_the_next_sweeps() -> None:
    job = Job(num_tokens=64, longest=64, num_passes=8, forward_only=True)
    plans = [make_plan([SIZES], free_bytes=ram * GIB, total_bytes=ram * GIB, job=job) for ram in (5, 10, 20)]
    assert [plan.peak_bytes <= ram * GIB for plan, ram in zip(plans, (5, 10, 20), strict=True)] == [True] * 3
    kept = [plan.kept_units for plan in plans]
    assert kept == sorted(kept)
    assert kept[-1] > kept[0]
    assert plans[-1].forecast.later_seconds < plans[0].forecast.later_seconds


def test_where_everything_fits_blocks_stay_whole() -> None:
    everything = WHOLE.all_bytes + 4 * GIB
    for job in (Job(repeated=True), Job(num_tokens=64, longest=64, forward_only=True)):
        plan = make_plan([WHOLE, SIZES], free_bytes=everything, total_bytes=everything, job=job)
        assert plan.granularity == "blocks"
        assert not plan.streams


def test_where_everything_fits_coded_experts_are_decoded_for_all_riders_at_once() -> None:
    experts = replace(EXPERTS, decoded_bytes=2 * EXPERTS.unit_bytes)
    coded = replace(SIZES, experts=experts)
    stops = tuple(replace(stop, decoded_bytes=256 * experts.decoded_bytes) for stop in WHOLE.stops)
    whole = replace(WHOLE, stops=stops)
    everything = WHOLE.all_bytes + 8 * GIB
    for num_tokens, granularity in ((20_000, "experts"), (64, "blocks"), (None, "blocks")):
        job = Job(num_tokens=num_tokens, longest=64, forward_only=True)
        plan = make_plan([whole, coded], free_bytes=everything, total_bytes=everything, job=job)
        assert plan.granularity == granularity
    assert plan.peak_bytes <= everything


def test_the_costs_of_a_token_and_of_a_sweep() -> None:
    resident = frozenset(range(10))
    first, later, sweep = sweep_costs(SIZES, resident, 0, 0, 2048, Rates())
    dense = sum(stop.num_bytes for stop in SIZES.stops)
    token = 8 * 8 * EXPERTS.unit_bytes
    assert (first.num_tokens, later.num_tokens, sweep.num_tokens) == (1, 1, 2048)
    assert first.read_bytes == pytest.approx(dense + token, rel=1e-6)
    assert later.read_bytes == pytest.approx(token, rel=1e-6)
    assert sweep.read_bytes > 0.95 * EXPERTS.all_bytes
    assert later.seconds < first.seconds < sweep.seconds
    assert sweep_costs(WHOLE, frozenset(), 0, 0, 2048, Rates()) == ()


def test_the_smallest_budget_is_named_where_an_expert_does_not_fit() -> None:
    with pytest.raises(PlanError, match="the smallest that would do is"):
        make_plan([SIZES], free_bytes=300 << 20, total_bytes=300 << 20, job=Job(num_tokens=64, longest=64))


def chosen_by(weights: Sequence[float], top_k: int, num_sweeps: int, num_tokens: int) -> list[int]:
    """Return in how many of some sweeps, each of so many tokens, each expert was chosen."""
    draw, counts = random.Random(0), [0] * len(weights)
    for _ in range(num_sweeps):
        needed: set[int] = set()
        for _token in range(num_tokens):
            keys = [draw.random() ** (1 / weight) for weight in weights]  # Efraimidis and Spirakis, 2006
            needed |= set(sorted(range(len(weights)), key=lambda number: -keys[number])[:top_k])
        for number in needed:
            counts[number] += 1
    return counts


@pytest.mark.parametrize("num_tokens", [1, 6])
@pytest.mark.parametrize("power", [0.0, 2.0])
def test_what_sweeps_chose_tells_what_others_will_need(num_tokens: int, power: float) -> None:
    weights = [(number + 1) ** -power for number in range(32)]
    counts = chosen_by(weights, 2, 2000, num_tokens)
    popularity = popularity_of([counts], [2000])
    assert sum(popularity) == pytest.approx(1)
    assert list(popularity) == sorted(popularity, reverse=True)
    for other in (1, 4, 16):
        seen = sum(chosen_by(weights, 2, 100, other)) / 100
        assert distinct_experts(32, 2, other, popularity=popularity) == pytest.approx(seen, rel=0.12)
    # Of what a token needs, what stays has its share of the counts.
    if num_tokens == 1:
        hits = 1 - distinct_experts(32, 2, 1, 8, popularity) / 2
        assert hits == pytest.approx(sum(sorted(counts)[-8:]) / sum(counts), abs=0.06)


def test_of_few_choices_little_is_believed() -> None:
    one = popularity_of([[1, 1, *[0] * 30]], [1])
    assumed = distinct_experts(32, 2, 64)
    assert distinct_experts(32, 2, 64, popularity=one) == pytest.approx(assumed, rel=0.05)
    many = popularity_of([[900, 900, *[0] * 30]], [900])
    assert distinct_experts(32, 2, 64, popularity=many) < 0.6 * assumed
    assert popularity_of([], []) == popularity_of([[0, 0]], [5]) == ()


@given(
    st.lists(st.lists(st.integers(0, 1 << 30), min_size=5, max_size=5), min_size=1, max_size=3),
    st.integers(0, 9),
)
def test_any_counts_are_a_popularity(chosen: list[list[int]], more: int) -> None:
    found = popularity_of(chosen, [max(counts) + more for counts in chosen])
    if any(map(any, chosen)):
        assert sum(found) == pytest.approx(1)
        assert all(0 < one <= 1 for one in found)
        assert list(found) == sorted(found, reverse=True)
        assert distinct_experts(5, 2, 1, popularity=found) == pytest.approx(2, rel=1e-3)
    else:
        assert found == ()


def test_a_plan_knows_what_earlier_runs_chose() -> None:
    counts = [[ENOUGH_CHOICES * 100] * 64 + [0] * 192] * 8  # a quarter is always needed, and no other is
    known = with_popularity(SIZES, popularity_of(counts, [ENOUGH_CHOICES * 200] * 8))
    job = Job(num_tokens=64, longest=64, num_passes=64, forward_only=True)
    plans = [
        make_plan([sizes], free_bytes=40 * GIB, total_bytes=40 * GIB, job=job) for sizes in (SIZES, known)
    ]
    assert plans[0].kept_units == plans[1].kept_units > 8 * 64
    before, after = (plan.forecast for plan in plans)
    assert after.read_bytes < before.read_bytes / 4
    assert after.seconds < before.seconds
    assert with_smaller_weights(known, 0.5).experts.popularity == known.experts.popularity  # type: ignore[union-attr]
    assert with_popularity(SIZES, ()) is SIZES
    assert with_popularity(WHOLE, (0.5, 0.5)) is WHOLE


def test_routers_are_copied_where_nothing_but_experts_is_read_and_there_is_room() -> None:
    job, copies = Job(repeated=True, longest=64), 40 << 20

    def plan(budget: int, router_bytes: int, job: Job = job) -> Plan:
        sizes = replace(SIZES, experts=replace(EXPERTS, router_bytes=router_bytes))
        return make_plan([sizes], free_bytes=budget, total_bytes=budget, job=job)

    assert plan(8 * GIB, copies).router_bytes == copies
    assert plan(8 * GIB, copies).peak_bytes <= 8 * GIB
    kept = plan(8 * GIB, copies).kept_units, plan(8 * GIB, 0).kept_units
    assert plan(8 * GIB, copies).peak_bytes - plan(8 * GIB, 0).peak_bytes == copies - EXPERTS.unit_bytes * (
        kept[1] - kept[0]
    )
    assert plan(2 * GIB, copies).ring_bytes
    assert not plan(2 * GIB, copies).router_bytes  # other stops are read meanwhile
    assert not plan(8 * GIB, 8 * GIB).router_bytes
    once = Job(num_tokens=64, longest=64, forward_only=True)
    assert not plan(
        8 * GIB, copies, once
    ).router_bytes  # a second sweep, which it would be for, does not come
