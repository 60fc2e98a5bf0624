"""The likeliest tokens are those of a stable sort of whole logits, however the vocabulary is cut."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slowllm.modeling import online_top
from slowllm.modeling.online_top import OnlineTop
from tests.support.properties import num_examples


def wanted(logits: Tensor, num_top: int) -> tuple[Tensor, Tensor]:
    """Return ids and logits from the likeliest on, of equal ones the lower id first."""
    ordered = torch.sort(logits, stable=True, dim=-1, descending=True)
    return ordered.indices[:, :num_top], ordered.values[:, :num_top]


def found(logits: Tensor, num_top: int, width: int) -> tuple[Tensor, Tensor]:
    top = OnlineTop(len(logits), num_top, logits.device)
    for first in range(0, logits.shape[1], width):
        tile = logits[:, first : first + width].clone()
        top.add(tile, first, tile.amax(-1))
    top.normalize(torch.zeros(len(logits)))
    return top.ids, top.log_probs


@num_examples(40)
@given(

    seed=st.integers(0, 1 << 16), num_rows=st.integers(1, 9), vocabulary=st.integers(1, 60),
    num_top=st.integers(1, 60), width=st.integers(1, 70), num_values=st.integers(1, 40), rising=st.booleans(),
)  # fmt: skip
def test_equal_logits_are_ordered_by_their_ids(
    seed: int, num_rows: int, vocabulary: int, num_top: int, width: int, num_values: int, rising: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.cat(
        [torch.tensor([0.0, -0.0, -math.inf, -1e30, 3e38]), torch.randn(num_values, generator=generator)]
    )
    logits = values[torch.randint(len(values), (num_rows, vocabulary), generator=generator)]
    if rising:  # every tile brings new ones
        logits = logits.sort(-1).values
    num_top = min(num_top, vocabulary)
    ids, logits_found = found(logits, num_top, width)
    ids_wanted, logits_wanted = wanted(logits, num_top)
    assert torch.equal(ids, ids_wanted)
    assert torch.equal(logits_found, logits_wanted)


@pytest.mark.parametrize("width", [64, 150, 200, 400])
def test_groups_of_columns_are_looked_at_first(width: int) -> None:
    logits = torch.randn(70, 400, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    for changed in (logits, logits.sort(-1).values):
        ids, values = found(changed, 20, width)
        assert torch.equal(ids, wanted(changed, 20)[0])
        assert torch.equal(values, wanted(changed, 20)[1])


def test_rows_are_ordered_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online_top, "ROWS_AT_ONCE", 3)
    logits = torch.randn(10, 200, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    ids, values = found(logits, 20, 64)
    assert torch.equal(ids, wanted(logits, 20)[0])
    assert torch.equal(values, wanted(logits, 20)[1])
