"""Experts in memory are computed while others are read."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import slowllm
from slowllm.errors import CheckpointError
from slowllm.modeling import streamed_experts
from slowllm.modeling.expert_routing import ExpertSum
from slowllm.modeling.streamed_experts import StreamedExperts
from slowllm.planning.host_plan import make_plan
from tests.support.families import resident, save_tiny
from tests.support.properties import num_examples

NUM_EXPERTS = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("mixture")
    save_tiny("qwen3-moe", made, num_experts=NUM_EXPERTS, num_experts_per_tok=3)
    return made


def opened(folder: Path, monkeypatch: pytest.MonkeyPatch, kept: int, **options: Any) -> Any:
    """Open a model of which all stays in memory but `kept` experts of each block, as in a budget that has room for no more."""

    def plan(*args: Any, **kwargs: Any) -> Any:
        return replace(make_plan(*args, **kwargs), kept_units=3 * kept)

    monkeypatch.setattr("slowllm.runtime.load.make_plan", plan)
    lm = slowllm.load(folder, dtype="float32", granularity="experts", **options)
    assert len(lm.layout.experts) == 3
    return lm


def ids_of(seed: int, length: int = 1) -> torch.Tensor:
    return torch.randint(5, 300, (1, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("exact", [True, False])
def test_experts_in_memory_are_computed_while_the_others_are_read(
    exact: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain: Any = resident(folder)
    texts = [ids_of(1), ids_of(2), ids_of(3)]
    # A block's experts, in the order computed: (number, whether it was in memory to stay).
    computed: list[tuple[int, bool]] = []
    arrived: dict[int, threading.Event] = {unit: threading.Event() for unit in range(3 * NUM_EXPERTS)}
    inner_serve, inner_multiply = StreamedExperts._serve, StreamedExperts._multiply

    with opened(folder, monkeypatch, 6, exact=exact) as lm, torch.no_grad():
        lm.ride([lambda ids=ids: lm.model(ids) for ids in texts[:2]])
        kept = lm.experts.kept
        lm.experts.watch_reads(lambda read: arrived[read.stop].set())
        num_checked = 0

        def serve(self: Any, items: Any) -> Any:
            nonlocal num_checked
            computed.clear()
            union = {number for item in items for number in item.routing.experts}
            missing = [n for n in sorted(union) if not kept.is_kept(self._first + n)]
            wanted = [(n, True) for n in sorted(union.difference(missing))] + [(n, False) for n in missing]
            result = inner_serve(self, items)
            assert computed == wanted
            num_checked += bool(missing) and len(missing) < len(union) and missing[0] < max(union)
            return result

        def multiply(self: Any, parties: Any, number: int, weights: Any) -> None:
            is_kept = kept.is_kept(self._first + number)
            if not computed and is_kept:
                # Nothing has been computed of this block, and what is missing is being read: it arrives.
                union = {other for party in parties for other in party.routing.experts}
                missing = [n for n in sorted(union) if not kept.is_kept(self._first + n)]
                assert all(arrived[self._first + n].wait(60) for n in missing[:2])
            computed.append((number, is_kept))
            inner_multiply(self, parties, number, weights)

        monkeypatch.setattr(StreamedExperts, "_serve", serve)
        monkeypatch.setattr(StreamedExperts, "_multiply", multiply)
        found = lm.ride([lambda ids=ids: lm.model(ids).logits for ids in texts])
        assert num_checked == 3
    for ids, ours in zip(texts, found, strict=True):
        torch.testing.assert_close(ours, plain(ids).logits, atol=0 if exact else 2e-4, rtol=0)


def test_many_rows_are_computed_in_ascending_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most: list[int] = []
    inner = ExpertSum.add

    def add(self: Any, expert: int, outputs: torch.Tensor) -> None:
        inner(self, expert, outputs)
        most.append(sum(one.nbytes for one in self._kept.values()))

    monkeypatch.setattr(ExpertSum, "add", add)
    with opened(folder, monkeypatch, 6) as lm, torch.no_grad():
        lm.model(ids_of(1, 2))
        wanted = lm.model(ids_of(2, 40)).logits
        assert 0 < max(most) <= 40 * 3 * 64 * 4  # outputs waited
        most.clear()
        monkeypatch.setattr(streamed_experts, "MOST_WAITING_BYTES", 40 * 3 * 64 * 4 - 1)
        assert torch.equal(lm.model(ids_of(2, 40)).logits, wanted)
        assert max(most) == 0
        lm.model(ids_of(2, 39))
        assert max(most) > 0


@num_examples(6)
@given(seeds=st.lists(st.integers(0, 2**16), min_size=1, max_size=3), kept=st.integers(0, NUM_EXPERTS))
def test_bits_do_not_depend_on_what_is_in_memory(folder: Path, seeds: list[int], kept: int) -> None:
    plain: Any = resident(folder)
    texts = [ids_of(seed, 1 + seed % 5) for seed in seeds]
    with (
        pytest.MonkeyPatch.context() as patch,
        opened(folder, patch, kept, poison=True) as lm,
        torch.no_grad(),
    ):
        for _ in range(2):
            found = lm.ride([lambda ids=ids: lm.model(ids).logits for ids in texts])
            assert all(torch.equal(ours, plain(ids).logits) for ours, ids in zip(found, texts, strict=True))


def test_an_expert_that_cannot_be_read_ends_nobody_who_needs_only_those_in_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain: Any = resident(folder)
    texts = [ids_of(seed) for seed in range(6)]
    with opened(folder, monkeypatch, 3) as lm, torch.no_grad():
        lm.model(texts[0])  # whose experts are in memory from now on
        assert len(lm.experts.forecast.chosen.nonzero()[0]) == 9
        inner = lm.experts.demand.holding

        def holding(unit: int, upcoming: Any = ()) -> Any:
            if not lm.experts.kept.is_kept(unit):
                raise CheckpointError(f"unit {unit} cannot be read")
            return inner(unit, upcoming)

        monkeypatch.setattr(lm.experts.demand, "holding", holding)

        def job(ids: torch.Tensor) -> Any:
            try:
                return lm.model(ids).logits
            except CheckpointError as error:
                return str(error)

        outcomes = lm.ride([lambda ids=ids: job(ids) for ids in texts])
    assert torch.equal(outcomes[0], plain(texts[0]).logits)
    assert any(isinstance(outcome, str) for outcome in outcomes)
    for ids, outcome in zip(texts, outcomes, strict=True):
        assert isinstance(outcome, str) or torch.equal(outcome, plain(ids).logits)
