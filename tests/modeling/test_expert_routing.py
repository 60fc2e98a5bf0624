"""Tokens come to experts in the order of transformers' own loop."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from slowllm.modeling.expert_routing import Routing


@given(
    num_experts=st.integers(1, 9),
    num_tokens=st.integers(0, 12),
    num_choices=st.integers(1, 4),
    seed=st.integers(0, 999),
)
def test_places_are_those_of_the_mask_of_transformers(
    num_experts: int, num_tokens: int, num_choices: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # With sentinels, and with tokens that choose an expert twice, as a table of experts by token may have it.
    index = torch.randint(num_experts + 1, (num_tokens, num_choices), generator=generator)
    routing = Routing(torch.zeros(num_tokens, 3), index, torch.ones(index.shape), num_experts)
    mask = torch.nn.functional.one_hot(index, num_experts + 1).permute(2, 1, 0)
    hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero().flatten().tolist()
    assert list(routing.experts) == [expert for expert in hit if expert < num_experts]
    for expert in routing.experts:
        choices, tokens = torch.where(mask[expert])
        assert torch.equal(routing.places(expert)[0], tokens)
        assert torch.equal(routing.places(expert)[1], choices)
