"""A row gets the numbers that it gets alone, whoever rides beside it: every family, score, generate, tune and drafts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

import slowllm
from slowllm.errors import InputError
from slowllm.inference import scoring, speculative
from slowllm.inference.generation_types import Settings
from slowllm.modeling.batching import batch_rule
from slowllm.planning.packing import pack
from tests.support.cases import quick_and_long
from tests.support.census import NotShrinkableError, save_toy
from tests.support.census import rows as rows_of_table
from tests.support.company import (
    TOLERANCE,
    deviations,
    generation_deviations,
    prompts_of,
    queries_of,
    score_deviations,
)
from tests.support.families import FAMILIES, VOCAB, family_cases, resident, speaking
from tests.support.paths import ROOT, TINY_BLOOM

Tiny = Callable[..., Path]

# As many positions as rows of `company` reach, so that they lie on both sides of the limit.
LIMIT = 16
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8,
    "long_factor": [1.0 + 4 * number for number in range(8)], "original_max_position_embeddings": LIMIT,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
STRETCHED = {
    "phi3-longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": LIMIT, "max_position_embeddings": 64}),
    "llama-longrope": ("llama", {"rope_parameters": LONGROPE, "max_position_embeddings": 64}),
    "llama-dynamic-ntk": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": LIMIT}),
    "qwen2-dynamic-ntk": ("qwen2", {"rope_parameters": DYNAMIC, "max_position_embeddings": LIMIT}),
}  # fmt: skip
# Their indexers choose among keys with equal scores, which a toy has many of, by the length of the batch.
TIES = {"axk2", "deepseek_v32", "dots3_note", "dots3_note_text", "glm_moe_dsa"}


def save_stretched(name: str, folder: Path) -> Path:
    """Save a family whose rotary table depends on length."""
    kind, changes = STRETCHED[name]
    config = {**FAMILIES["llama-2"][1], **changes}
    torch.manual_seed(0)
    model = make_model(kind, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY_BLOOM).save_pretrained(folder)
    return folder


def make_model(kind: str, config: dict[str, object]) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", family_cases())
def test_a_row_of_any_family_gets_what_it_gets_alone(name: str, tiny: Tiny, tmp_path: Path) -> None:
    assert not deviations(speaking(tiny(name), tmp_path / "model"), VOCAB)


@pytest.mark.parametrize("name", quick_and_long(STRETCHED, quick=["phi3-longrope", "llama-dynamic-ntk"]))
def test_a_rotary_table_is_chosen_for_each_row(name: str, tmp_path: Path) -> None:
    folder = save_stretched(name, tmp_path)
    lengths = (4, LIMIT - 3, LIMIT - 4, LIMIT, LIMIT + 9, LIMIT + 9, 2, 9)
    settings = Settings(6, top_log_probs=1)
    with slowllm.load(folder, dtype="fp32") as lm:
        assert not list(score_deviations(lm, queries_of(VOCAB, lengths)))
        assert not list(generation_deviations(lm, prompts_of(VOCAB, lengths, settings)))


def plain_score(plain: torch.nn.Module, query: scoring.Query) -> list[float]:
    with torch.no_grad():
        logits = plain(torch.tensor([query.ids])).logits[0].float().log_softmax(-1)
    first = len(query.context) - 1
    return [float(logits[first + place, token]) for place, token in enumerate(query.continuation)]


@pytest.mark.parametrize("name", quick_and_long(STRETCHED, quick=["llama-longrope", "qwen2-dynamic-ntk"]))
def test_stretched_rows_get_what_a_fresh_model_gives(name: str, tmp_path: Path) -> None:
    folder = save_stretched(name, tmp_path)
    queries = queries_of(VOCAB, (30, 4, LIMIT - 2, LIMIT - 1, 20, 18))
    with slowllm.load(folder, dtype="fp32", job=slowllm.Job(64, 64, repeated=True)) as lm:
        found = [list(one.log_probs) for one in scoring.score_queries(lm, queries)]
    for query, log_probs in zip(queries, found, strict=True):
        assert log_probs == pytest.approx(plain_score(resident(folder), query), abs=TOLERANCE)


def test_drafts_beyond_a_change_of_table_are_refused(tmp_path: Path) -> None:
    with slowllm.load(save_stretched("phi3-longrope", tmp_path), dtype="fp32") as lm:
        prompts = prompts_of(VOCAB, (4,), Settings(6))
        with pytest.raises(InputError, match="changes its rotary table beyond 16 tokens"):
            list(speculative.generate(lm, prompts, "lookup"))


def test_what_keeps_rows_apart_is_logged(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    with slowllm.load(tiny("mamba"), dtype="fp32") as lm, caplog.at_level(logging.INFO, logger="slowllm"):
        list(scoring.score_queries(lm, queries_of(VOCAB, (4,))))
    assert "mamba: prompts share a micro-batch only if they are equally long" in caplog.text


def test_rows_of_different_classes_are_packed_apart() -> None:
    lengths, classes = [5, 9, 4, 9, 5, 1], ["a", "b", "a", "a", "b", "b"]
    batches = pack(lengths, 100, classes=classes)
    assert sorted(index for batch in batches for index in batch) == list(range(6))
    assert sorted({classes[index] for index in batch} for batch in batches) == [{"a"}, {"b"}]
    assert all(batch == sorted(batch, key=lambda index: -lengths[index]) for batch in batches)


def test_no_family_of_full_attention_is_kept_apart() -> None:
    for name in ("bloom", "llama-2", "mixtral", "falcon-new-decoder", "gpt2", "qwen3", "gemma-3-sliding"):
        model_type, config = FAMILIES[name]
        rule = batch_rule(AutoConfig.for_model(model_type, **config))
        assert not rule.reasons(), name
        assert rule.may_share(rule.length_class(1000))


@pytest.mark.long
@pytest.mark.parametrize(
    "architecture",
    [n for n, v in rows_of_table((ROOT / "docs" / "families.md").read_text()).items() if v.kind == "equal"],
)
def test_a_row_of_any_architecture_gets_what_it_gets_alone(architecture: str, tmp_path: Path) -> None:
    if architecture in TIES:
        pytest.skip("a toy's indexer has ties")
    if architecture == "prophetnet":
        pytest.skip("transformers itself does not continue a prompt of several tokens")
    try:
        save_toy(architecture, tmp_path)
    except NotShrinkableError as error:
        pytest.skip(str(error))
    AutoTokenizer.from_pretrained(TINY_BLOOM).save_pretrained(tmp_path)
    assert not deviations(tmp_path, VOCAB)
