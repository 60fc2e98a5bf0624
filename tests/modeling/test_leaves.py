"""Stops smaller than a block: the same bits, less memory, forward only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import slowllm
from slowllm.errors import ArchitectureError, InputError, PlanError, UnsupportedError
from slowllm.modeling import layout
from slowllm.planning.host_plan import least_bytes
from slowllm.planning.job import Job
from tests.support.families import VOCAB, family_cases, resident


@pytest.fixture(autouse=True)
def _every_leaf_is_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "MIN_LEAF_BYTES", 0)


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, VOCAB, shape, generator=generator) for shape in [(1, 7), (3, 13), (2, 30)]]


@pytest.mark.parametrize(("name", "dtype"), family_cases([torch.float32, torch.bfloat16]))
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
        assert len(lm.layout.modules) >= plain.config.get_text_config().num_hidden_layers
        rides = lm.ride([lambda ids=ids: lm.model(ids).logits for ids in batches()])
        for ids, logits in zip(batches(), rides, strict=True):
            assert torch.equal(logits, plain(ids).logits)
        tokens = lm.ride([lambda ids=ids: lm.model.generate(ids, **options) for ids in batches()])
        for ids, found in zip(batches(), tokens, strict=True):
            assert torch.equal(found, plain.generate(ids, **options))


def test_a_sweep_over_leaves_reads_each_once(tiny: Callable[..., Path]) -> None:
    with (
        slowllm.load(tiny("llama-2"), dtype="fp32", keep_resident=False, granularity="leaves") as lm,
        torch.no_grad(),
    ):
        # The order of use, not of definition: values are read before the product that mixes the heads.
        lm.model(batches()[0], use_cache=False)
        assert lm.report.num_passages == lm.num_stops
        # Rounded to whole pages, and no stop of the next sweep.
        assert lm.report.read_bytes < 1.3 * lm.weight_bytes + 4096 * 2 * lm.num_stops


def test_a_gradient_through_leaves_is_refused(tiny: Callable[..., Path]) -> None:
    with slowllm.load(tiny("llama-2"), dtype="fp32", keep_resident=False, granularity="leaves") as lm:
        inputs = lm.model.get_input_embeddings()(batches()[0]).detach().requires_grad_(True)
        with pytest.raises(UnsupportedError, match="streams blocks in parts, which cannot run backward"):
            lm.model(inputs_embeds=inputs)


def test_a_budget_smaller_than_a_block_streams_its_leaves(tiny: Callable[..., Path]) -> None:
    job = Job(num_tokens=64, longest=16, forward_only=True)
    with slowllm.load(tiny("llama-2"), dtype="fp32", keep_resident=False, job=job) as lm:
        assert len(lm.choices) == 2
    outside = 300 << 20
    enough = {
        sizes.granularity: outside + least_bytes(sizes, job, keep_resident=False) for sizes in lm.choices
    }
    assert enough["leaves"] < enough["blocks"]
    for ram, expected in (
        (enough["blocks"], "blocks"),
        (enough["blocks"] - 1, "leaves"),
        (enough["leaves"], "leaves"),
    ):
        budget = slowllm.Budget(ram, outside)
        with slowllm.load(tiny("llama-2"), ram=budget, dtype="fp32", keep_resident=False, job=job) as lm:
            assert lm.plan.granularity == expected
    with pytest.raises(PlanError, match="is too small for this model"):
        slowllm.load(
            tiny("llama-2"), ram=slowllm.Budget(enough["leaves"] - 1, outside), keep_resident=False, job=job
        )


def test_blocks_without_a_part_worth_a_stop_are_not_cut(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "MIN_LEAF_BYTES", 1 << 30)
    with slowllm.load(tiny("llama-2")) as lm:
        assert [sizes.granularity for sizes in lm.choices] == ["blocks"]
    with pytest.raises(ArchitectureError, match="its blocks have no part that is worth a stop"):
        slowllm.load(tiny("llama-2"), granularity="leaves")


def test_what_is_no_granularity_or_job_is_refused(tiny: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="granularity 'halves' is unknown"):
        slowllm.load(tiny("llama-2"), granularity="halves")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"job must be a slowllm\.Job, not str"):
        slowllm.load(tiny("llama-2"), job="scoring")  # type: ignore[arg-type]
