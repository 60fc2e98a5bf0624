"""Stops smaller than a block: the same bits, less memory, forward only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import slowllm
from slowllm import layout
from tests.families import FAMILIES, VOCAB, resident


@pytest.fixture(autouse=True)
def _every_leaf_is_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "MIN_LEAF_BYTES", 0)


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, VOCAB, shape, generator=generator) for shape in [(1, 7), (3, 13), (2, 30)]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_leaves_give_the_bits_of_the_resident_model(
    name: str, dtype: torch.dtype, tiny: Callable[..., Path]
) -> None:
    folder = tiny(name, dtype)
    plain = resident(folder, dtype)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with (
        slowllm.load(folder, dtype=str(dtype), keep_resident=False, granularity="leaves", poison=True) as lm,
        torch.no_grad(),
    ):
        assert lm.plan.granularity == "leaves"
        assert len(lm.layout.modules) >= plain.config.num_hidden_layers
        rides = lm.ride([lambda ids=ids: lm.model(ids).logits for ids in batches()])
        for ids, logits in zip(batches(), rides, strict=True):
            assert torch.equal(logits, plain(ids).logits)
        tokens = lm.ride([lambda ids=ids: lm.model.generate(ids, **options) for ids in batches()])
        for ids, found in zip(batches(), tokens, strict=True):
            assert torch.equal(found, plain.generate(ids, **options))
