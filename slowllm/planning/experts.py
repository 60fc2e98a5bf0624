"""How many experts of a mixture does a sweep need, and how many of them are in memory? Pure arithmetic."""

from __future__ import annotations

import functools
import math

from slowllm.planning.job import ExpertSizes

# Routers favour some experts. The popularity of the i-th is taken as (i + E * OFFSET) ** -POWER, fitted to published
# counts of DeepSeek-V3 (8 of 256 experts): 76 of a block's experts at 16 tokens, 205 at 149, 248 at 256.
POWER = 1.3
OFFSET = 1 / 32


@functools.lru_cache(maxsize=64)
def _probabilities(num_experts: int, top_k: int) -> tuple[float, ...]:
    """Return for each expert, the most popular first, how likely it is among the `top_k` of a token."""
    weights = [(number + num_experts * OFFSET) ** -POWER for number in range(1, num_experts + 1)]

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
def distinct_experts(num_experts: int, top_k: int, num_tokens: int, num_kept: float = 0.0) -> float:
    """Return how many experts of a block some tokens are expected to need beside the most popular that are kept.

    Args:
        num_experts: of a block.
        top_k: that a token takes.
        num_tokens: that pass the block together.
        num_kept: experts of the block that are in memory, the most popular ones.
    """
    needed = [1 - (1 - chance) ** num_tokens for chance in _probabilities(num_experts, top_k)]
    absent = [1 - min(1.0, max(0.0, num_kept - place)) for place in range(num_experts)]
    return math.fsum(one * share for one, share in zip(needed, absent, strict=True))


def demand_bytes(experts: ExpertSizes, num_tokens: int, kept_units: int = 0) -> float:
    """Return the bytes of experts that one stop is expected to read for a sweep's tokens."""
    num_kept = kept_units / max(1, len(experts.stops))
    return experts.unit_bytes * distinct_experts(experts.num_experts, experts.top_k, num_tokens, num_kept)
