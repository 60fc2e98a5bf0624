"""Scores: right against the resident model, and the same however lines are packed."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import slowllm
from slowllm.errors import InputError
from slowllm.inference import likelihood
from slowllm.inference.likelihood import Likelihood
from slowllm.inference.lines import Line, encode, score_lines
from slowllm.inference.text import prefix_id
from slowllm.planning.packing import pack
from slowllm.runtime.streamed_lm import StreamedLM
from tests.support.families import resident
from tests.support.paths import ROOT, TINY_BLOOM
from tests.support.properties import num_examples

LINES = [line for line in (ROOT / "sentences.txt").read_text().splitlines() if line]
# In fp32 a GEMM of other shape sums in another order; a line's log-likelihood is a few hundred nats.
PACKING_TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def lm() -> Any:
    with slowllm.load(TINY_BLOOM, dtype="fp32") as lm:
        yield lm


@pytest.fixture(scope="module")
def alone(lm: StreamedLM) -> dict[str, float]:
    """Each line's log-likelihood by plain transformers, one at a time, after BOS."""
    plain = resident(TINY_BLOOM)
    found = {}
    for text in LINES:
        ids = torch.tensor([[1, *lm.tokenizer(text)["input_ids"]]])
        with torch.no_grad():
            logits = plain(ids).logits.log_softmax(-1)
        found[text] = float(logits[0, :-1].gather(-1, ids[0, 1:, None]).double().sum())
    return found


def score(lm: StreamedLM, texts: list[str], prefix: int | None = 1) -> list[tuple[Line, Likelihood]]:
    lines = encode(lm, enumerate(texts, 1), max_tokens=500, truncate=False)
    return list(score_lines(lm, lines, prefix=prefix))


def test_scores_equal_the_resident_models(lm: StreamedLM, alone: dict[str, float]) -> None:
    for line, found in score(lm, LINES):
        assert found.log_likelihood == pytest.approx(alone[line.text], abs=PACKING_TOLERANCE)
        assert found.tokens == line.ids
        assert len(found.log_probs) == len(line.ids)


@num_examples(8)
@given(
    order=st.permutations(range(len(LINES))),
    rider_tokens=st.integers(8, 300),
    sweep_tokens=st.integers(8, 900),
)
def test_scores_do_not_depend_on_packing(
    lm: StreamedLM, alone: dict[str, float], order: list[int], rider_tokens: int, sweep_tokens: int
) -> None:
    whole = lm.plan
    lm.plan = dataclasses.replace(
        whole, rider_tokens=rider_tokens, sweep_tokens=max(sweep_tokens, rider_tokens)
    )
    try:
        found = score(lm, [LINES[index] for index in order])
    finally:
        lm.plan = whole
    assert [line.text for line, _ in found] == [LINES[index] for index in order]
    for line, scored in found:
        assert scored.log_likelihood == pytest.approx(alone[line.text], abs=PACKING_TOLERANCE)


@num_examples(200)
@given(lengths=st.lists(st.integers(1, 600), max_size=60), rider_tokens=st.integers(1, 2000))
def test_packing_takes_every_line_once_and_fills_no_rider_beyond_its_room(
    lengths: list[int], rider_tokens: int
) -> None:
    batches = pack(lengths, rider_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= rider_tokens


def test_without_a_prefix_the_first_token_is_unscored(lm: StreamedLM) -> None:
    text = "If an error is returned, the file is closed."
    ((_, with_prefix),), ((line, without),) = score(lm, [text]), score(lm, [text], prefix=None)
    assert len(without.log_probs) == len(with_prefix.log_probs) - 1
    ids = torch.tensor([line.ids])
    with torch.no_grad():
        logits = resident(TINY_BLOOM)(ids).logits.log_softmax(-1)
    wanted = logits[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
    assert torch.allclose(torch.tensor(without.log_probs), wanted, rtol=0, atol=1e-5)


def test_a_single_token_without_a_prefix_has_nothing_to_score(lm: StreamedLM) -> None:
    ((_, found),) = score(lm, ["a"], prefix=None)
    assert found.log_probs == ()
    assert found.log_likelihood == 0
    assert math.isnan(found.perplexity)


def test_all_lines_go_through_in_as_few_sweeps_as_the_plan_says(lm: StreamedLM) -> None:
    whole = lm.plan
    lm.plan = dataclasses.replace(whole, rider_tokens=1024, sweep_tokens=8192)
    before = lm.report.num_passages
    score(lm, [f"{number} {line}" for number in range(10) for line in LINES])  # about 5,000 tokens
    assert lm.report.num_passages - before == lm.num_stops
    lm.plan = dataclasses.replace(whole, rider_tokens=64, sweep_tokens=128)
    try:
        before = lm.report.num_passages
        words = list(itertools.islice(itertools.permutations(["the", "value", "is", "returned", "now"]), 48))
        found = score(lm, [" ".join(order) for order in words])
    finally:
        lm.plan = whole
    assert len({len(line.ids) for line, _ in found}) <= 2
    length = min(len(line.ids) for line, _ in found)
    tokens = 64 // length * length
    riders = math.ceil(48 / (64 // length))
    assert lm.report.num_passages - before == math.ceil(riders / (128 // tokens)) * lm.num_stops


def test_equal_lines_pass_once(lm: StreamedLM) -> None:
    before = lm._carousel.totals.num_passed
    whole = lm.plan
    lm.plan = dataclasses.replace(whole, rider_tokens=64, sweep_tokens=128)
    try:
        found = score(lm, ["The value is returned as it was given."] * 48 + ["The value is returned"])
    finally:
        lm.plan = whole
    assert lm._carousel.totals.num_passed - before == lm.num_stops
    assert len({scored.log_probs for _, scored in found[:48]}) == 1
    assert found[48][1].log_probs == found[0][1].log_probs[: len(found[48][1].log_probs)]


def test_lines_stream_through_without_being_drawn_all_at_once(lm: StreamedLM) -> None:
    drawn = 0

    def lines() -> Any:
        nonlocal drawn
        for number in range(4000):
            drawn += 1
            yield Line(number, "x", (10 + number, *range(10, 29)))

    whole = lm.plan
    lm.plan = dataclasses.replace(whole, rider_tokens=256, sweep_tokens=512)
    try:
        scores = score_lines(lm, lines(), prefix=1)
        first = [next(scores) for _ in range(3)]
        scores.close()
    finally:
        lm.plan = whole
    assert [line.number for line, _ in first] == [0, 1, 2]
    assert drawn < 200


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.long)])
def test_real_lines_are_likelier_than_their_words_shuffled(lm: StreamedLM, every: int) -> None:
    generator = torch.Generator().manual_seed(0)
    lines = (ROOT / "tests" / "data" / "heldout.txt").read_text().splitlines()[::every]
    assert len(lines) == 300 // every
    shuffled = []
    for line in lines:
        words = line.split()
        shuffled.append(" ".join(words[i] for i in torch.randperm(len(words), generator=generator).tolist()))
    scores = [scored.log_likelihood for _, scored in score(lm, lines + shuffled)]
    won = sum(real > fake for real, fake in zip(scores[: len(lines)], scores[len(lines) :], strict=True))
    assert won >= 0.95 * len(lines)


def test_the_embedded_models_are_as_small_and_as_laid_out_as_promised() -> None:
    import json

    from safetensors import safe_open

    sizes = {
        name: sum(file.stat().st_size for file in (ROOT / "weights" / name).glob("*.safetensors"))
        for name in ("tiny-bloom", "tiny-bloom-draft")
    }
    assert sizes["tiny-bloom"] <= 8_000_000
    assert sizes["tiny-bloom-draft"] <= 2_000_000
    assert json.loads((TINY_BLOOM / "config.json").read_text())["n_layer"] >= 8
    index = json.loads((TINY_BLOOM / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1
    assert "h.0.self_attention.query_key_value.weight" in index
    for file in set(index.values()):
        with safe_open(TINY_BLOOM / file, "pt") as shard:
            assert all(shard.get_slice(name).get_dtype() == "BF16" for name in list(shard.keys()))
    assert (
        len({file for name, file in index.items() if name.startswith("h.5.")}) == 2
    )  # a block across two shards
    tokenizers = [(ROOT / "weights" / name / "tokenizer.json").read_bytes() for name in sizes]
    assert tokenizers[0] == tokenizers[1]


@pytest.mark.parametrize(("bos", "eos", "wanted"), [(1, 2, 1), (None, 2, 2), (0, 2, 0)])
def test_the_prefix_is_bos_or_else_eos(bos: int | None, eos: int | None, wanted: int) -> None:
    tokenizer = type("Tokenizer", (), {"bos_token_id": bos, "eos_token_id": eos})
    assert prefix_id(tokenizer) == wanted


def test_a_tokenizer_without_bos_and_eos_is_refused() -> None:
    tokenizer = type("Tokenizer", (), {"bos_token_id": None, "eos_token_id": None})
    with pytest.raises(InputError, match=r"neither BOS nor EOS .* use --no-prefix"):
        prefix_id(tokenizer)


def test_a_line_over_the_limit_is_refused_or_cut(lm: StreamedLM) -> None:
    texts = [(1, "short"), (7, "this line is a good deal longer than the others")]
    with pytest.raises(InputError, match=r"line 7 has \d+ tokens but the limit is 4; use --truncate"):
        list(encode(lm, texts, max_tokens=4, truncate=False))
    lines = list(encode(lm, texts, max_tokens=4, truncate=True))
    assert [line.truncated for line in lines] == [False, True]
    assert len(lines[1].ids) == 4


def test_a_token_beyond_the_vocabulary_is_refused(lm: StreamedLM) -> None:
    config, whole = lm.model.config, lm.model.config.vocab_size
    config.vocab_size = 50
    try:
        with pytest.raises(InputError, match="beyond the model's vocabulary of 50"):
            list(encode(lm, [(1, "the compiler")], max_tokens=9, truncate=False))
    finally:
        config.vocab_size = whole


def test_safe_exp_overflows_to_infinity() -> None:
    assert likelihood.safe_exp(1.0) == math.e
    assert likelihood.safe_exp(1e9) == math.inf
    assert math.isnan(likelihood.safe_exp(math.nan))


@num_examples(200)
@given(
    lengths=st.lists(st.integers(1, 600), max_size=60),
    rider_tokens=st.integers(1, 2000),
    padding_tokens=st.integers(0, 500),
)
def test_padding_is_limited_where_it_costs_more_than_a_micro_batch(
    lengths: list[int], rider_tokens: int, padding_tokens: int
) -> None:
    batches = pack(lengths, rider_tokens, padding_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        widest = lengths[batch[0]]
        assert len(batch) * widest <= rider_tokens or len(batch) == 1
        assert sum(widest - lengths[index] for index in batch) <= padding_tokens


def test_a_job_of_small_micro_batches_rides_one_sweep(lm: StreamedLM) -> None:
    whole = lm.plan
    lm.plan = dataclasses.replace(whole, rider_tokens=512, sweep_tokens=512, padding_tokens=1)
    try:
        before = lm.report.num_passages
        score(lm, [" ".join(["value"] * n) for n in (2, 9, 17, 30, 41)])
    finally:
        lm.plan = whole
    assert lm.report.num_passages - before == lm.num_stops
