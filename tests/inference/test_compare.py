"""Two models side by side: figures of whole logits, whatever the loads; one budget; intervals that a seed repeats."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import slowllm
from slowllm.errors import InputError, PlanError
from slowllm.inference.compare import Compared, Share, _loads, check_pair, check_texts, compare_texts, divide
from slowllm.inference.comparison_totals import ComparisonTotals
from slowllm.inference.lines import Line
from slowllm.inference.text_files import Text, TextFiles, Texts
from slowllm.modeling.compared_heads import Divergence, Predictions
from slowllm.planning.budget import Budget
from slowllm.planning.packing import pack
from slowllm.runtime.description import ModelInfo
from tests.support.families import VOCAB, resident
from tests.support.paths import TINY_BLOOM
from tests.support.properties import num_examples

Tiny = Callable[..., Path]
# Rows of a micro-batch are summed in another order than a row alone.
TOLERANCE = 1e-5


def texts_of(lengths: list[int], vocabulary: int = VOCAB) -> list[Text]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for number, length in enumerate(lengths, 1):
        ids = tuple(torch.randint(5, vocabulary, (length,), generator=generator).tolist())
        found.append(Text("a", Line(number, "", ids), ids))
    return found


@pytest.mark.parametrize("sweep_tokens", [16, pytest.param(1000, marks=pytest.mark.long)])
def test_figures_are_those_of_whole_logits(sweep_tokens: int, tiny: Tiny) -> None:
    texts, names = texts_of([5, 12, 1, 9, 2, 7]), ("bloom", "llama-2")
    with slowllm.load(tiny(names[0]), dtype="fp32") as a, slowllm.load(tiny(names[1]), dtype="fp32") as b:
        for lm in (a, b):
            lm.plan = dataclasses.replace(lm.plan, rider_tokens=16, sweep_tokens=sweep_tokens)
        found = list(compare_texts(a, b, texts))
    assert [one.text for one in found] == texts
    plain = [resident(tiny(name)) for name in names]
    totals = ComparisonTotals(3)
    every, agreeing, losses = [], [], []
    for one in found:
        ids = torch.tensor([one.text.ids])
        with torch.no_grad():
            ours, theirs = (model(ids).logits[0, :-1].double().log_softmax(-1) for model in plain)
        kl = (ours.exp() * (ours - theirs)).sum(-1)
        assert len(one.divergence.kl) == len(kl)
        assert (one.divergence.kl - kl).abs().max() <= TOLERANCE if len(kl) else True
        every.append(kl)
        agreeing.append(ours.argmax(-1) == theirs.argmax(-1))
        losses.append(-theirs.gather(-1, ids[0, 1:, None])[:, 0])
        own = totals.add(one)
        assert own.num_places == len(kl)
        assert own.kl == pytest.approx(float(kl.mean()), abs=TOLERANCE, nan_ok=True)
    summary, kl = totals.summary(), torch.cat(every)
    assert summary.num_texts == len(texts)
    assert summary.num_places == len(kl)
    assert summary.kl.value == pytest.approx(float(kl.mean()), abs=TOLERANCE)
    assert summary.agreement.value == pytest.approx(float(torch.cat(agreeing).double().mean()))
    assert summary.perplexity_b.value == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-4)
    assert dict(summary.quantiles)[0.5] == pytest.approx(float(kl.quantile(0.5)), abs=TOLERANCE)
    assert dict(summary.quantiles)[1.0] == pytest.approx(float(kl.max()), abs=TOLERANCE)
    worst = kl.topk(3)
    assert [place.kl for place in totals.worst] == pytest.approx(worst.values.tolist(), abs=TOLERANCE)
    place = totals.worst[0]
    number = next(n for n, text in enumerate(texts) if text is place.text)
    assert float(every[number][place.position - 1]) == float(worst.values[0])


@pytest.mark.long
def test_a_store_is_compared_with_its_checkpoint(embedded: Callable[[str], Path]) -> None:
    texts, means = texts_of([9, 4, 13], 1000), {}
    for store in ("lossless", "int8"):
        with slowllm.load(TINY_BLOOM, dtype="bf16") as a, slowllm.load(embedded(store), dtype="bf16") as b:
            totals = ComparisonTotals(0)
            for one in compare_texts(a, b, texts):
                totals.add(one)
        means[store] = totals.summary().kl.value
    assert means["lossless"] == 0.0
    assert 0.0 < means["int8"] < 0.1


@num_examples(30)
@given(lengths=st.lists(st.integers(1, 40), max_size=30), sweep_tokens=st.integers(8, 200))
def test_a_load_is_no_more_than_a_sweep_carries(lengths: list[int], sweep_tokens: int) -> None:
    texts = texts_of(lengths)

    def packed(load: Any) -> list[list[int]]:
        return pack([max(1, len(text.ids) - 1) for text in load], 32, 8)

    found = list(_loads(texts, packed, sweep_tokens))
    assert [text for load in found for text in load] == texts
    for load in found:
        own = sum(len(batch) * max(len(load[n].ids) - 1 for n in batch) for batch in packed(load))
        assert len(load) == 1 or own <= sweep_tokens


def compared(text: Text, kl: list[float], nll: float) -> Compared:
    count = len(kl)
    side = Predictions(torch.full((count,), -nll), torch.arange(count), torch.zeros(count))
    return Compared(text, Divergence(torch.tensor(kl), side, side))


def test_intervals_are_repeated_by_their_seed_and_hold_the_value() -> None:
    totals = ComparisonTotals(2)
    for number, text in enumerate(texts_of([4] * 40)):
        totals.add(compared(text, [0.1 * number] * 3, 1.0 + number / 40))
    one, again, other = totals.summary(3), totals.summary(3), totals.summary(4)
    assert one == again
    assert one.kl != other.kl
    for found in (one.kl, one.perplexity_a):
        assert found.low < found.value < found.high
    # A and B have the same losses: their ratio is sure.
    assert (one.perplexity_ratio.low, one.perplexity_ratio.value, one.perplexity_ratio.high) == (
        1.0,
        1.0,
        1.0,
    )
    # Of equal ones the first.
    assert [(place.text.line.number, place.position) for place in totals.worst] == [(40, 1), (40, 2)]


def test_texts_without_places_have_no_figures() -> None:
    totals = ComparisonTotals(2)
    own = totals.add(compared(texts_of([1])[0], [], 0.0))
    assert math.isnan(own.perplexity_a)
    assert math.isnan(own.perplexity_b)
    assert math.isnan(own.kl)
    assert math.isnan(totals.summary().kl.value)
    assert totals.worst == []


def test_a_budget_is_divided_by_what_each_needs() -> None:
    budget = Budget(1000, 100)
    assert divide(budget, Share(200, 30), Share(100, 10)) == 200 + 600 * 3 // 4
    with pytest.raises(PlanError, match="is too small for both models: the smallest that would do is"):
        divide(budget, Share(500, 30), Share(500, 10))


class _Tokenizer:
    def __init__(self, vocabulary: dict[str, int]) -> None:
        self._vocabulary = vocabulary

    def get_vocab(self) -> dict[str, int]:
        return self._vocabulary


class _Side:
    def __init__(self, vocabulary: dict[str, int]) -> None:
        self.tokenizer = _Tokenizer(vocabulary)


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    ours: Any = _Side({"a": 0, "b": 1})
    theirs: Any = _Side({"a": 0, "c": 1, "b": 2})
    check_pair(ours, ours)
    with pytest.raises(InputError, match="different tokenizers, of 2 and 3 tokens, of which 1 are the same"):
        check_pair(ours, theirs)
    (tmp_path / "a.txt").write_text("one two\n")
    info = ModelInfo(str(TINY_BLOOM))
    with TextFiles([str(tmp_path / "a.txt")]) as files:
        one, other = (Texts(info, files, max_tokens=9, truncate=False, prefix=prefix) for prefix in (1, 2))
    check_texts(one, one)
    with pytest.raises(InputError, match="have one vocabulary, but make different tokens of these texts"):
        check_texts(one, other)
