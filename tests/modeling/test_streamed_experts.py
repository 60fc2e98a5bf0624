"""Experts that are read when a router asks for them: bits of transformers' `eager`, and no byte that nobody needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import slowllm
from slowllm.entrypoints.cost import cost_of, times_of
from slowllm.entrypoints.progress import line_of
from slowllm.errors import CheckpointError, PlanError
from slowllm.modeling import streamed_experts
from slowllm.modeling.expert_routing import ExpertSum
from slowllm.modeling.expert_units import cut_experts
from slowllm.modeling.streamed_experts import StreamedExperts
from slowllm.planning.job import Job
from slowllm.streaming.buffers import PAGE
from tests.support.families import MIXTURES, resident, save_tiny
from tests.support.native_checkpoints import fp8_settings, quantised, store_fp8, store_mxfp4
from tests.support.properties import num_examples
from tests.support.stores import make_store

IDS = torch.arange(5, 35).view(2, 15)


def streamed(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    options = {"granularity": "experts", "resident": False, **options}
    return slowllm.load(folder, dtype=str(dtype).removeprefix("torch."), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(MIXTURES))
def test_a_rider_alone_has_the_bits_of_eager(
    name: str, dtype: torch.dtype, tiny: Callable[..., Path]
) -> None:
    plain: Any = resident(tiny(name, dtype), dtype)
    with streamed(tiny(name, dtype), dtype, poison=True) as lm:
        with torch.no_grad():
            assert torch.equal(lm.model(IDS).logits, plain(IDS).logits)
            wanted = plain.generate(IDS, max_new_tokens=3, do_sample=False)
            assert torch.equal(lm.model.generate(IDS, max_new_tokens=3, do_sample=False), wanted)
        grads = []
        for model in (plain, lm.model):
            embedded = plain.get_input_embeddings()(IDS).detach().requires_grad_()
            model(inputs_embeds=embedded, labels=IDS).loss.backward()
            grads.append(embedded.grad)
        assert torch.equal(*grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(MIXTURES))
def test_riders_share_what_is_read_and_keep_their_bits(
    name: str, dtype: torch.dtype, tiny: Callable[..., Path]
) -> None:
    plain: Any = resident(tiny(name, dtype), dtype)
    texts = [IDS[:1, :4], IDS, IDS[1:, :9]]
    wanted = [plain(ids).logits for ids in texts]
    with streamed(tiny(name, dtype), dtype) as lm, torch.no_grad():
        found = lm.ride([lambda ids=ids: lm.model(ids).logits for ids in texts])
        assert all(map(torch.equal, found, wanted))
        stats = lm.experts.settings.stats
        assert stats.num_distinct < stats.num_wanted  # each was brought once for all who want it
        assert lm.experts.demand.num_asked == stats.num_distinct
        assert not stats.num_together
    if dtype == torch.bfloat16:
        return
    with streamed(tiny(name), exact=False) as lm, torch.no_grad():
        found = lm.ride([lambda ids=ids: lm.model(ids).logits for ids in texts])
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)
        assert lm.experts.settings.stats.num_together


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_riders_of_a_store_have_the_bits_of_each_alone(
    codec: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    make_store(tiny("mixtral", torch.bfloat16), tmp_path / "store", codec)
    texts = [IDS[:1, :4], IDS, IDS[1:, :9]]
    with streamed(tmp_path / "store", torch.bfloat16) as lm, torch.no_grad():
        alone = [lm.model(ids).logits for ids in texts]
        found = lm.ride([lambda ids=ids: lm.model(ids).logits for ids in texts])
    assert all(map(torch.equal, found, alone))


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_coded_experts_are_cut_and_decoded_once_for_all(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "fp8":
        save_tiny("deepseek-v3", tmp_path / "plain", torch.bfloat16)
        folder = quantised(tmp_path / "plain", tmp_path / kind, fp8_settings((8, 16)), store_fp8((8, 16)))
    else:
        save_tiny("gpt-oss", tmp_path / "plain", torch.bfloat16)
        folder = quantised(tmp_path / "plain", tmp_path / kind, {"quant_method": "mxfp4"}, store_mxfp4)
    plain: Any = resident(folder, torch.bfloat16)
    with streamed(folder, torch.bfloat16) as lm, torch.no_grad():
        decoded: list[tuple[int, int]] = []
        for codec in {type(u.coding and codec_class(u)) for unit in lm.layout.units for u in unit}:
            inner = codec.decode

            def decode(
                self: Any, parts: Any, out: Any, first: int, last: int, team: Any, inner: Any = inner
            ) -> None:
                decoded.append((first, last))
                inner(self, parts, out, first, last, team)

            monkeypatch.setattr(codec, "decode", decode)
        assert torch.equal(lm.model(IDS).logits, plain(IDS).logits)
        alone = len(decoded)
        before = lm.experts.settings.stats.num_distinct
        decoded.clear()
        found = lm.ride([lambda: lm.model(IDS).logits] * 3)
        assert all(torch.equal(one, plain(IDS).logits) for one in found)
        assert lm.experts.settings.stats.num_distinct == 2 * before
        if kind == "mxfp4":  # where nothing but experts is coded
            assert len(decoded) == alone


def codec_class(placement: Any) -> Any:
    from slowllm.storage.codecs.registry import codec_of

    return codec_of(placement.coding)


@num_examples(12)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=3), seed=st.integers(0, 2**16))
def test_every_wanted_expert_is_read_once_and_no_other(
    lengths: list[int], seed: int, tiny: Callable[..., Path]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randint(5, 200, (1, length), generator=generator) for length in lengths]
    with streamed(tiny("qwen3-moe")) as lm, torch.no_grad():
        lm.experts.forecast.ahead_of = lambda first, chosen: []  # nothing is read ahead of a router
        read: list[int] = []
        lm.experts.watch_reads(lambda stop: read.append(stop.stop))
        lm.ride([lambda ids=ids: lm.model(ids).logits for ids in texts])
        chosen = lm.experts.forecast.chosen
        assert set(chosen.tolist()) <= {0, 1}
        wanted = [unit for unit, count in enumerate(chosen) if count]
        assert sorted(read) == wanted
        num_bytes = sum(p.num_bytes for unit in wanted for p in lm.layout.units[unit])
        # Pages at the edges of tensors, which are small here.
        edges = 2 * PAGE * sum(len(p.runs) for unit in wanted for p in lm.layout.units[unit])
        assert num_bytes <= lm.experts.read_bytes <= num_bytes + edges


def test_where_nearly_all_are_needed_they_are_read_ahead(tiny: Callable[..., Path]) -> None:
    with streamed(tiny("mixtral")) as lm, torch.no_grad():
        forecast = lm.experts.forecast
        # In the first sweep by what the block before needed; all but the first block's, because no sweep may follow.
        lm.model(torch.randint(5, 200, (2, 60)))
        assert forecast.num_ahead == sum(len(experts.units) for experts in lm.layout.experts[1:])
        for _ in range(2):
            lm.model(torch.randint(5, 200, (2, 60)))
        assert forecast.num_ahead
        assert forecast.num_hit >= 0.75 * forecast.num_ahead


@pytest.mark.parametrize("exact", [True, False])
def test_an_expert_that_cannot_be_read_ends_those_who_need_it(
    exact: bool, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain: Any = resident(tiny("olmoe"))
    texts = [torch.tensor([[number]]) for number in range(5, 17)]
    wanted = [plain(ids).logits for ids in texts]
    with streamed(tiny("olmoe"), exact=exact) as lm, torch.no_grad():
        lm.model(texts[0])
        broken = int(
            lm.experts.forecast.chosen.nonzero()[0][-1]
        )  # an expert of the last block that the first text needs
        inner = lm.experts.demand.holding

        def holding(unit: int, upcoming: Any = ()) -> Any:
            if unit == broken:
                raise CheckpointError(f"unit {unit} cannot be read")
            return inner(unit, upcoming)

        monkeypatch.setattr(lm.experts.demand, "holding", holding)
        outcomes: list[Any] = []

        def job(ids: torch.Tensor) -> Any:
            try:
                return lm.model(ids).logits
            except CheckpointError as error:
                return str(error)

        outcomes = lm.ride([lambda ids=ids: job(ids) for ids in texts])
    failed = [number for number, outcome in enumerate(outcomes) if isinstance(outcome, str)]
    assert 0 in failed
    assert len(failed) < len(texts)
    assert all(outcomes[number] == f"unit {broken} cannot be read" for number in failed)
    for number, outcome in enumerate(outcomes):
        if number not in failed:
            torch.testing.assert_close(outcome, wanted[number], atol=0 if exact else 2e-4, rtol=0)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("name", "num_broken"), [("olmoe", 2), ("deepseek-v3", 4)])
def test_of_several_experts_that_fail_each_ends_those_who_need_it(
    name: str, exact: bool, num_broken: int, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain: Any = resident(tiny(name))
    texts = [torch.tensor([[number]]) for number in range(5, 21)]
    wanted = [plain(ids).logits for ids in texts]
    with streamed(tiny(name), exact=exact) as lm, torch.no_grad():
        first = sum(len(experts.units) for experts in lm.layout.experts[:-1])
        needed: list[set[int]] = []
        for ids in texts:
            before = lm.experts.forecast.chosen.copy()
            lm.model(ids)
            needed.append(set((lm.experts.forecast.chosen - before).nonzero()[0].tolist()))
        broken = set(range(first, first + num_broken))
        inner, failing = lm.experts.demand.holding, set(broken)

        def holding(unit: int, upcoming: Any = ()) -> Any:
            if unit in failing:
                raise CheckpointError(f"unit {unit} cannot be read")
            return inner(unit, upcoming)

        def job(ids: torch.Tensor) -> Any:
            try:
                return lm.model(ids).logits
            except CheckpointError as error:
                return str(error)

        monkeypatch.setattr(lm.experts.demand, "holding", holding)
        outcomes: list[Any] = lm.ride([lambda ids=ids: job(ids) for ids in texts])
    assert any(isinstance(outcome, str) for outcome in outcomes)
    assert not all(isinstance(outcome, str) for outcome in outcomes)
    for outcome, units, logits in zip(outcomes, needed, wanted, strict=True):
        if units & broken:
            assert outcome in {f"unit {unit} cannot be read" for unit in units & broken}
        else:
            torch.testing.assert_close(outcome, logits, atol=0 if exact else 2e-4, rtol=0)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("step", ["expert_outputs", "sum"])
def test_a_product_or_sum_that_fails_among_others_is_named(
    exact: bool, step: str, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    number = 0

    def once(inner: Any) -> Any:
        def call(*args: Any) -> Any:
            nonlocal number
            number += 1
            if number == 2:
                raise MemoryError("no memory for this")
            return inner(*args)

        return call

    with streamed(tiny("olmoe"), exact=exact) as lm, torch.no_grad():
        texts = [torch.tensor([[number]]) for number in range(5, 21)]

        def job(ids: torch.Tensor) -> str:
            try:
                return "" if lm.model(ids).logits.isfinite().all() else "wrong"
            except MemoryError as error:
                return str(error)

        if step == "sum":
            monkeypatch.setattr(ExpertSum, "_add", once(ExpertSum._add))
        else:
            monkeypatch.setattr(streamed_experts, "expert_outputs", once(streamed_experts.expert_outputs))
        outcomes = lm.ride([lambda ids=ids: job(ids) for ids in texts])
        assert set(outcomes) - {""} == {"no memory for this"}
        if exact or step == "expert_outputs":
            assert "" in outcomes
        monkeypatch.undo()
        assert not any(lm.ride([lambda ids=ids: job(ids) for ids in texts]))


def test_a_product_that_fails_ends_those_who_need_its_expert(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with streamed(tiny("olmoe")) as lm, torch.no_grad():
        lm.model(IDS[:1, :1])
        chosen = lm.experts.forecast.chosen.nonzero()[0]
        # The last one of its block that the text needs: behind it there is no other to be taken for it.
        broken = int(chosen[-1])
        inner = StreamedExperts._multiply

        def multiply(self: Any, parties: Any, number: int, weights: Any) -> None:
            if self._first + number == broken:
                raise MemoryError("no memory for this product")
            inner(self, parties, number, weights)

        monkeypatch.setattr(StreamedExperts, "_multiply", multiply)
        with pytest.raises(MemoryError, match="no memory for this product"):
            lm.model(IDS[:1, :1])
        monkeypatch.undo()
        assert lm.model(IDS[:1, :1]).logits.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index, weights: (index + 40, weights), "chose expert"),
        (lambda index, weights: (index, weights * float("nan")), "NaN"),
    ],
)
def test_a_router_that_makes_no_sense_is_refused_by_name(
    change: Any, message: str, tiny: Callable[..., Path]
) -> None:
    with streamed(tiny("mixtral")) as lm, torch.no_grad():
        experts = lm.model.model.layers[1].mlp.experts
        inner = type(experts).forward
        experts.forward = lambda hidden, index, weights: inner(experts, hidden, *change(index, weights))
        with pytest.raises(slowllm.SlowLLMError, match=rf"model\.layers\.1\.mlp\.experts.*{message}"):
            lm.model(IDS)


def test_a_budget_too_small_for_an_expert_is_refused_with_numbers(tiny: Callable[..., Path]) -> None:
    with pytest.raises(PlanError, match="the smallest that would do is"):
        streamed(tiny("mixtral"), ram="300MiB")


def test_the_matrices_of_all_experts_cover_the_parameter(tiny: Callable[..., Path]) -> None:
    with streamed(tiny("mixtral")) as lm:
        for experts in lm.layout.experts:
            for place, name in enumerate(experts.full_names):
                whole = lm.layout.placements[name]
                cut = list(cut_experts(whole))
                assert cut == [unit[place] for unit in experts.units]
                assert sum(one.num_bytes for one in cut) == whole.num_bytes
                runs = [(run.span.name, run.source, run.num_bytes) for one in cut for run in one.runs]
                assert sorted(runs) == sorted((r.span.name, r.source, r.num_bytes) for r in whole.runs)


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_a_parameter_of_all_experts_can_be_looked_at(name: str, tiny: Callable[..., Path]) -> None:
    plain: Any = resident(tiny(name))
    with streamed(tiny(name)) as lm:
        for key, value in plain.named_parameters():
            if ".layers.1." in key:
                assert torch.equal(lm.weights(key), value), key


def test_experts_that_stay_are_not_read_again_and_have_the_same_bits(tiny: Callable[..., Path]) -> None:
    plain: Any = resident(tiny("qwen3-moe"))
    with streamed(tiny("qwen3-moe"), resident=True) as lm, torch.no_grad():
        assert lm.plan.kept_units == len(lm.layout.units)
        assert torch.equal(lm.model(IDS).logits, plain(IDS).logits)
        before = lm.read_bytes
        assert torch.equal(lm.model(IDS).logits, plain(IDS).logits)
        assert lm.read_bytes == before
        assert lm.experts.kept.num_hits == lm.experts.forecast.chosen.sum() // 2


def test_what_is_said_of_a_model_names_experts_and_claims_no_maps(tiny: Callable[..., Path]) -> None:
    with streamed(tiny("mixtral"), resident=True) as lm, torch.no_grad():
        assert lm.plan.streams
        num_experts = len(lm.layout.units)
        assert f"4 of 4 stops and {num_experts} experts resident" in repr(lm)
        job = Job(num_tokens=30, longest=15, forward_only=True)
        assert f"4 of 4 stops and {num_experts} experts stay in memory" in line_of(lm, job, lm.plan.forecast)
        lm.model(IDS)
        assert times_of(lm, 1.0).startswith("read ")
        assert "mapped" not in cost_of(lm)
    with slowllm.load(tiny("mixtral"), granularity="blocks") as lm:
        assert not lm.plan.streams
        assert "all in memory" in repr(lm)
