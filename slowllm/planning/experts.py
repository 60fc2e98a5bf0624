"""How many experts of a mixture does a sweep need, and how many of them are in memory? Pure arithmetic."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

from slowllm.planning.job import ExpertSizes

# Routers favour some experts. The popularity of the i-th is taken as (i + E * OFFSET) ** -POWER, fitted to published
# counts of DeepSeek-V3 (8 of 256 experts): 76 of a block's experts at 16 tokens, 205 at 149, 248 at 256.
POWER = 1.3
OFFSET = 1 / 32
# What was seen counts as much as what is assumed when each expert was chosen so many times on average: of few choices, those few
# experts that happened to be chosen would seem to be all that is ever needed.
ENOUGH_CHOICES = 4


def _assumed(num_experts: int) -> list[float]:
    """Return the popularity of each expert where nothing was seen, the most popular first, with the sum 1."""
    weights = [(number + num_experts * OFFSET) ** -POWER for number in range(1, num_experts + 1)]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def popularity_of(chosen: Sequence[Sequence[int]], num_sweeps: Sequence[int]) -> tuple[float, ...]:
    """Return how popular a block's experts are by what sweeps chose, the most popular first, on average over the blocks.

    A sweep of many tokens needs an expert once, however many of them choose it; so an expert's popularity is taken as the rate of
    a Poisson process that is seen in as many sweeps as the expert was.

    Args:
        chosen: for each block, in how many sweeps each of its experts was chosen; as many experts in all blocks.
        num_sweeps: that passed each of the blocks.
    Returns:
        numbers with the sum 1, one for each expert; none where nothing was seen.
    """
    curves, num_choices = [], 0
    for counts, sweeps in zip(chosen, num_sweeps, strict=True):
        # An expert that every sweep chose might have been missed by the next one.
        rates = sorted((-math.log1p(-count / (sweeps + 1)) for count in counts), reverse=True)
        if total := math.fsum(rates):
            curves.append([rate / total for rate in rates])
            num_choices += sum(counts)
    if not curves:
        return ()
    num_experts = len(curves[0])
    seen = num_choices / len(curves) / num_experts
    share = seen / (seen + ENOUGH_CHOICES)
    return tuple(
        share * math.fsum(places) / len(curves) + (1 - share) * assumed
        for places, assumed in zip(zip(*curves, strict=True), _assumed(num_experts), strict=True)
    )


@functools.lru_cache(maxsize=64)
def _probabilities(num_experts: int, top_k: int, popularity: tuple[float, ...]) -> tuple[float, ...]:
    """Return for each expert, the most popular first, how likely it is among the `top_k` of a token."""
    weights = popularity or _assumed(num_experts)

    def chosen(factor: float) -> list[float]:
        return [-math.expm1(-factor * weight) for weight in weights]

    low, high = 0.0, 1.0
    while math.fsum(chosen(high)) < min(top_k, num_experts - 1e-6) and high < 1e12:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if math.fsum(chosen(middle)) < top_k else (low, middle)
    return tuple(chosen(high))


@functools.lru_cache(maxsize=4096)
def distinct_experts(
    num_experts: int,
    top_k: int,
    num_tokens: int,
    num_kept: float = 0.0,
    popularity: tuple[float, ...] = (),
) -> float:
    """Return how many experts of a block some tokens are expected to need beside the most popular that are kept.

    Args:
        num_experts: of a block.
        top_k: that a token takes.
        num_tokens: that pass the block together.
        num_kept: experts of the block that are in memory, the most popular ones.
        popularity: of each expert, the most popular first, by `popularity_of`; assumed where there is none.
    """
    chances = _probabilities(num_experts, top_k, popularity)
    needed = [1 - (1 - chance) ** num_tokens for chance in chances]
    absent = [1 - min(1.0, max(0.0, num_kept - place)) for place in range(num_experts)]
    return math.fsum(one * share for one, share in zip(needed, absent, strict=True))


def demand_bytes(experts: ExpertSizes, num_tokens: int, kept_units: int = 0) -> float:
    """Return the bytes of experts that one stop is expected to read for a sweep's tokens."""
    num_kept = kept_units / max(1, len(experts.stops))
    distinct = distinct_experts(experts.num_experts, experts.top_k, num_tokens, num_kept, experts.popularity)
    return experts.unit_bytes * distinct
