"""How many tokens are drafted where each brings experts of its own."""

from __future__ import annotations

from typing import Any

from slowllm.inference.draft_trees import Costs, free_tokens, pays
from slowllm.planning.forecast import expert_seconds
from slowllm.planning.job import ExpertSizes, Rates, Sizes, StopSize

DEEPSEEK_V3 = Sizes(
    "experts", tuple(StopSize(400 << 20, 200 << 20, 8e8) for _ in range(61)), 1 << 30, 1000, 0, 1000, num_blocks=61,
    experts=ExpertSizes(frozenset(range(3, 61)), 256, 8, 44 << 20, 30 << 20, 88e6),
)  # fmt: skip


def costs_of_experts(disk: float, compute: float, kept_units: int = 0) -> Costs:
    rates = Rates(disk=disk, memory=20e9, compute=compute)
    return Costs(
        read=sum(stop.num_bytes for stop in DEEPSEEK_V3.stops) / rates.disk, weights=1.2, token=0.05,
        experts=lambda num_tokens: expert_seconds(DEEPSEEK_V3, num_tokens, kept_units, rates),
    )  # fmt: skip


def test_each_drafted_token_brings_experts_of_its_own() -> None:
    costs = costs_of_experts(3e9, 200e9)
    one, two, many = (costs.sweep_seconds(1, number) for number in (1, 2, 200))
    # Routers have favourites, so a second token does not read as much again.
    assert 1.2 * one < two < 1.9 * one
    assert many > 5 * one
    assert costs.sweep_seconds(4, 2) == costs.sweep_seconds(1, 8), (
        "riders share the experts of a sweep, and the disk is the limit"
    )
    # Where experts are in memory and the processor has time, more may be drafted.
    assert free_tokens(costs_of_experts(3e9, 2e12, 58 * 256), 1) > free_tokens(costs, 1)
    assert 1 <= free_tokens(costs, 1) < 6
    # Where computing is all and drafted tokens cost as much as others, none is drafted.
    slow = costs_of_experts(1e12, 2e9, 58 * 256)
    assert free_tokens(slow, 1) == 0
    # A second token for each sweep pays for itself at the disk's rate; a few percent more do not.
    alike: dict[str, Any] = {"num_riders": 1, "tree_tokens": 1, "draft_seconds": 0.0}
    assert pays(costs, **alike, tokens_per_pass=1.95)
    assert not pays(costs, **alike, tokens_per_pass=1.1)
