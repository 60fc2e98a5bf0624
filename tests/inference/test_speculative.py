"""Drafts change how many tokens a sweep gives, never which."""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers.cache_utils import DynamicLayer
from typer.testing import CliRunner

import slowllm
from slowllm.entrypoints.cli.app import app
from slowllm.errors import InputError
from slowllm.inference import generation, speculative
from slowllm.inference.branching_cache import BranchingLayer
from slowllm.inference.draft_trees import Costs, Node, choose_tree, free_tokens, paths_of, pays
from slowllm.inference.generation import generate
from slowllm.inference.generation_types import Prompt, Settings, encode_prompt
from slowllm.inference.ngram_cache import NgramCache
from slowllm.inference.speculative_loop import Acceptance
from slowllm.planning.budget import Budget
from slowllm.planning.job import Rates
from slowllm.runtime.description import ModelInfo
from tests.support.cases import quick_and_long
from tests.support.families import speaking
from tests.support.paths import ROOT, TINY_BLOOM

DRAFT = ROOT / "weights" / "tiny-bloom-draft"
HELD_OUT = (ROOT / "tests" / "data" / "heldout.txt").read_text().splitlines()


@pytest.fixture(scope="module")
def small() -> Iterator[slowllm.StreamedLM]:
    with slowllm.load(DRAFT, dtype="fp32") as lm:
        yield lm


def begun(lm: Any, settings: Settings, *, every: int, words: int = 2) -> list[Prompt]:
    """Return the first words of held-out lines."""
    return [encode_prompt(lm, " ".join(line.split()[:words]), settings) for line in HELD_OUT[::every]]


@pytest.mark.long
def test_a_sweep_gives_four_tokens_of_text_never_seen(
    tiny_bloom: slowllm.StreamedLM, small: slowllm.StreamedLM
) -> None:
    # Of all 300 lines: 4.2. What follows is 13 tokens on average, and what was drafted beyond its end is lost.
    prompts = begun(tiny_bloom, Settings(64), every=25)
    plain = list(generate(tiny_bloom, prompts))
    before, counts, found = tiny_bloom.report.num_passages, Acceptance(), []
    for prompt in prompts:  # one at a time: sweeps that prompts share would count for all of them
        found += speculative.generate(tiny_bloom, [prompt], small, counts=counts)
    assert found == plain
    num_sweeps = (tiny_bloom.report.num_passages - before) / tiny_bloom.num_stops
    num_tokens = sum(len(one.ids) + (one.finish_reason == "stop") for (one,) in plain)
    assert num_tokens / num_sweeps >= 4
    assert (counts.num_tokens, counts.num_passes) == (num_tokens, num_sweeps)
    assert counts.tokens_per_pass == num_tokens / num_sweeps
    # A pass gives what was accepted and one token more, unless the text ended there.
    assert 0 <= counts.num_accepted + counts.num_passes - num_tokens <= len(prompts)
    assert counts.num_accepted < counts.num_drafted


def test_prompts_share_the_sweeps(tiny_bloom: slowllm.StreamedLM, small: slowllm.StreamedLM) -> None:
    prompts = begun(tiny_bloom, Settings(24), every=75)
    plain, counts = list(generate(tiny_bloom, prompts)), Acceptance()
    before = tiny_bloom.report.num_passages
    assert list(speculative.generate(tiny_bloom, prompts, small, counts=counts)) == plain
    num_sweeps = (tiny_bloom.report.num_passages - before) / tiny_bloom.num_stops
    assert num_sweeps < counts.num_passes / 2
    assert num_sweeps < 24 / 2


def test_settings_go_with_drafts(tiny_bloom: slowllm.StreamedLM, small: slowllm.StreamedLM) -> None:
    kinds = [
        Settings(12, repetition_penalty=1.6),
        Settings(9, min_new_tokens=9),
        Settings(16, stop=(" the", "s.")),
        Settings(8, top_log_probs=2),
        Settings(1),
    ]
    prompts = [encode_prompt(tiny_bloom, "Returns the number of", kind) for kind in kinds]
    told: dict[int, list[tuple[int, ...]]] = {}
    plain = list(generate(tiny_bloom, prompts))
    found = list(
        speculative.generate(
            tiny_bloom, prompts, small, on_tokens=lambda n, _, ids: told.setdefault(n, []).append(ids)
        )
    )
    for (a,), (b,) in zip(plain, found, strict=True):
        assert replace(a, log_probs=None, top_log_probs=None, eos=None) == replace(
            b, log_probs=None, top_log_probs=None, eos=None
        )
    (a,), (b,) = plain[3], found[3]
    assert torch.allclose(torch.tensor(a.log_probs), torch.tensor(b.log_probs), atol=2e-4)
    assert [list(top) for top in a.top_log_probs or ()] == [list(top) for top in b.top_log_probs or ()]
    for number, ((one,), steps) in enumerate(zip(found, map(told.get, range(5)), strict=True)):
        assert steps is not None, number
        assert steps[-1] == one.ids
        assert all(long[: len(short)] == short for short, long in itertools.pairwise(steps))


@pytest.mark.parametrize(
    "family",
    quick_and_long(
        ["llama-3-scaled-rope", "mixtral", "falcon-multi-query", "opt", "gpt2", "deepseek-v3"],
        quick=["llama-3-scaled-rope", "gpt2", "deepseek-v3"],
    ),
)
def test_other_families_take_drafts(family: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = speaking(tiny(family), tmp_path / family)
    prompts = [Prompt(ids, Settings(10, min_new_tokens=10)) for ids in ((5, 9, 14, 30, 7), (40, 3, 77), (8,))]
    with slowllm.load(folder, dtype="fp32", keep_resident=False, poison=True) as lm:
        plain = list(generate(lm, prompts))
        counts = Acceptance()
        with slowllm.load(folder, dtype="fp32") as same:
            assert list(speculative.generate(lm, prompts, same, counts=counts)) == plain
        # Itself; but all tokens are about as likely here, so that a path of several is hardly worth its place.
        assert counts.tokens_per_pass > 1.8
        assert list(speculative.generate(lm, prompts, "lookup")) == plain


def test_look_up_drafts_from_the_prompt(tiny_bloom: slowllm.StreamedLM) -> None:
    text = "The value is the value of the value of the value of the"
    ((free,),) = generate(tiny_bloom, [encode_prompt(tiny_bloom, text, Settings(12))])
    settings = Settings(12, stop=(free.text[-9:],), min_new_tokens=12, top_log_probs=0)
    prompts = [encode_prompt(tiny_bloom, text, one) for one in (settings, replace(settings, stop=()))]
    plain, counts = list(generate(tiny_bloom, prompts)), Acceptance()
    found = list(speculative.generate(tiny_bloom, prompts, "lookup", counts=counts))
    for (a,), (b,) in zip(plain, found, strict=True):
        assert (a.ids, a.text, a.finish_reason) == (b.ids, b.text, b.finish_reason)
        assert torch.allclose(torch.tensor(a.log_probs), torch.tensor(b.log_probs), atol=2e-4)
    assert plain[0][0].finish_reason == "stop"
    assert counts.tokens_per_pass > 1.2
    assert counts.num_tokens == sum(len(one.ids) for (one,) in plain)


COSTS = Costs(read=100.0, weights=5.0, token=0.05)


def test_drafting_stops_where_it_does_not_pay() -> None:
    def with_riders(number: int, seconds: float = 2.0, rate: float = 3.0) -> bool:
        return pays(
            COSTS, num_riders=number, tree_tokens=free_tokens(COSTS, number), tokens_per_pass=rate,
            draft_seconds=seconds,
        )  # fmt: skip

    assert with_riders(1)
    assert with_riders(10)
    assert not with_riders(1, seconds=250.0)
    assert not with_riders(1, rate=1.0)
    assert with_riders(8, seconds=20.0)
    assert not with_riders(12, seconds=20.0), "each rider's draft is paid for, and the reading is shared"


@given(
    read=st.floats(0, 1e3), weights=st.floats(1e-3, 50), token=st.floats(1e-4, 1),
    riders=st.integers(1, 200), rate=st.floats(1, 10), seconds=st.floats(0, 50),
)  # fmt: skip
def test_trees_shrink_with_riders_and_drafts_never_pay_for_nothing(
    read: float, weights: float, token: float, riders: int, rate: float, seconds: float
) -> None:
    costs = Costs(read, weights, token)
    tokens = free_tokens(costs, riders)
    assert 1 <= free_tokens(costs, riders + 1) <= tokens
    alike: dict[str, Any] = {"num_riders": riders, "tree_tokens": tokens}
    assert not pays(costs, **alike, tokens_per_pass=1.0, draft_seconds=seconds)
    if pays(costs, **alike, tokens_per_pass=rate, draft_seconds=seconds):
        assert pays(costs, **alike, tokens_per_pass=rate + 1, draft_seconds=seconds)
        assert pays(costs, **alike, tokens_per_pass=rate, draft_seconds=seconds / 2)


@pytest.mark.parametrize("slow", [True, False])
def test_the_choice_is_made_by_what_was_measured_and_said_once(
    slow: bool,
    tiny_bloom: slowllm.StreamedLM,
    small: slowllm.StreamedLM,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # A disk that takes a millisecond a sweep, which no draft is worth; or an hour.
    rates = Rates(disk=tiny_bloom.weight_bytes * (1e3 if slow else 1 / 3600), measured=True)
    prompts = begun(tiny_bloom, Settings(6), every=60)
    plain, counts = list(generate(tiny_bloom, prompts)), Acceptance()
    with caplog.at_level(logging.INFO, logger="slowllm.inference.speculative_loop"):
        assert list(speculative.generate(tiny_bloom, prompts, small, rates=rates, counts=counts)) == plain
    said = [record.message for record in caplog.records if record.message.startswith("drafting is")]
    assert len(said) == 1
    assert said[0].startswith(
        "drafting is off: 5 riders, 2.0 tokens a sweep expected" if slow else "drafting is on"
    )
    if slow:
        assert (counts.num_drafted, counts.num_plain) == (0, counts.num_passes)
        assert counts.tokens_per_pass == 1
    else:
        assert counts.tokens_per_pass > 1.5


@st.composite
def trees(draw: st.DrawFn) -> list[Node]:
    nodes: list[Node] = []
    for number in range(draw(st.integers(0, 40))):
        parent = draw(st.integers(-1, number - 1))
        above = nodes[parent] if parent >= 0 else Node(0, -1, 0, 0.0)
        nodes.append(Node(number, parent, above.depth + 1, above.log_prob - draw(st.floats(0.01, 3))))
    return nodes


@given(nodes=trees(), num_tokens=st.integers(1, 120), before=st.integers(1, 9), rows=st.integers(1, 12))
def test_a_chosen_tree_fits_and_hangs_together(
    nodes: list[Node], num_tokens: int, before: int, rows: int
) -> None:
    chosen = choose_tree(nodes, num_tokens, before, rows)
    for number, node in enumerate(chosen):
        assert node.parent < number
        assert node.depth == (chosen[node.parent].depth + 1 if node.parent >= 0 else 1)
        old = nodes[node.token]
        assert (old.parent == -1) == (node.parent == -1)
        assert node.parent == -1 or chosen[node.parent].token == old.parent
    paths = paths_of(chosen)
    assert {n for path in paths for n in path} == set(range(len(chosen)))
    assert len(paths) <= rows
    assert len(paths) * (before + max(map(len, paths))) - before <= num_tokens
    assert bool(chosen) == bool(nodes), "a row with one more token is always allowed"
    expected = sum(math.exp(node.log_prob) for node in chosen)
    # At least as good as following the likeliest from the root.
    best, at = 0.0, -1
    while children := [n for n, node in enumerate(nodes) if node.parent == at]:
        at = max(children, key=lambda n: nodes[n].log_prob)
        best += math.exp(nodes[at].log_prob)
    if num_tokens >= len(nodes):
        assert expected >= best - 1e-9


def test_rows_fan_out_from_one_and_one_goes_on() -> None:
    torch.manual_seed(0)
    ours, plain = BranchingLayer(), DynamicLayer()

    def new(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(rows, 2, length, 4), torch.randn(rows, 2, length, 4)

    first = new(1, 5)
    assert torch.equal(ours.update(*first)[0], plain.update(*first)[0])
    ours.accept(0, 3)
    plain.crop(-2)
    plain.batch_repeat_interleave(4)
    more = new(4, 2)
    for found, expected in zip(ours.update(*more), plain.update(*more), strict=True):
        assert torch.equal(found, expected)
    assert ours.get_seq_length() == plain.get_seq_length() == 5
    rows = torch.tensor([2, 2, 0])
    ours.select(rows)
    plain.batch_select_indices(rows)
    more = new(3, 1)
    for found, expected in zip(ours.update(*more), plain.update(*more), strict=True):
        assert torch.equal(found, expected)
    ours.accept(2, 2)
    assert ours.get_seq_length() == 5
    assert torch.equal(ours.keys, plain.keys[2:3, :, :5])
    assert ours.keys.untyped_storage().nbytes() == 2 * 5 * 4 * 4, "the other rows are let go"


def test_what_was_said_is_likelier_to_be_said_again() -> None:
    ngrams, even = NgramCache(), torch.full((1, 8), 1 / 8).log()
    logits = torch.full((1, 8), -20.0)
    logits[0, 5] = 20.0
    ngrams.update([(7, 1, 2)], logits)
    after_two, after_three = (ngrams.blend([context], even).exp()[0] for context in ((9, 1, 2), (7, 1, 2)))
    assert torch.isclose(after_two.sum(), torch.tensor(1.0))
    assert after_three[5] > after_two[5] > 1 / 8 > after_two[4]
    assert torch.equal(ngrams.blend([(1, 2, 3)], even), even)


def test_a_draft_of_another_vocabulary_is_refused(
    tiny_bloom: slowllm.StreamedLM, tmp_path: Path, tiny: Callable[..., Path]
) -> None:
    folder = speaking(tiny("bloom"), tmp_path / "other")
    file = folder / "tokenizer.json"
    table = json.loads(file.read_text())
    vocabulary = table["model"]["vocab"]
    a, b = sorted(vocabulary, key=vocabulary.__getitem__)[300:302]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    file.write_text(json.dumps(table))
    message = "the draft model has another vocabulary: 4096 tokens, of which 4094 are the same as of the model's 4096"
    with slowllm.load(folder, dtype="fp32") as other, pytest.raises(InputError, match=message):
        speculative.generate(tiny_bloom, [Prompt((5,))], other)
    with pytest.raises(InputError, match="another vocabulary"):
        CliRunner().invoke(app, ["generate", "x", "--draft", str(folder)], catch_exceptions=False)


@pytest.mark.parametrize(
    ("family", "cache"), [("mamba", "LinearAttentionLayer"), ("gemma-3-sliding", "DynamicSlidingWindowLayer")]
)
def test_caches_that_cannot_take_back_are_refused(
    family: str, cache: str, tiny: Callable[..., Path], small: slowllm.StreamedLM
) -> None:
    with (
        slowllm.load(tiny(family), dtype="fp32") as lm,
        pytest.raises(
            InputError, match=rf"its cache \(.*{cache}\) cannot take back tokens, so it works without"
        ),
    ):
        speculative.generate(lm, [Prompt((5,))], "lookup")


def test_a_model_that_takes_no_cache_is_refused(tiny: Callable[..., Path]) -> None:
    with (
        slowllm.load(tiny("openai-gpt"), dtype="fp32") as lm,
        pytest.raises(InputError, match="openai-gpt: takes no cache, so it works without --draft only"),
    ):
        speculative.generate(lm, [Prompt((5,))], "lookup")


@pytest.mark.parametrize(
    "settings",
    [Settings(do_sample=True), Settings(num_beams=2), Settings(num_beams=2, num_return_sequences=2)],
)
def test_drafts_are_for_greedy_decoding(settings: Settings, tiny_bloom: slowllm.StreamedLM) -> None:
    with pytest.raises(InputError, match="a draft only goes with greedy decoding"):
        speculative.generate(tiny_bloom, [Prompt((5,), settings)], "lookup")


def test_a_draft_is_a_model_or_the_prompt(tiny_bloom: slowllm.StreamedLM) -> None:
    with pytest.raises(InputError, match="a draft is a loaded model or 'lookup', not 'look'"):
        speculative.generate(tiny_bloom, [Prompt((5,))], "look")  # type: ignore[arg-type]


def test_a_draft_that_does_not_stay_in_memory_is_refused(tiny_bloom: slowllm.StreamedLM) -> None:
    with (
        slowllm.load(DRAFT, dtype="fp32", keep_resident=False) as streamed,
        pytest.raises(InputError, match="tiny-bloom-draft: a draft model must stay in memory altogether"),
    ):
        speculative.generate(tiny_bloom, [Prompt((5,))], streamed)
    full = Budget(1 << 30, (1 << 30) - 1000)
    with pytest.raises(InputError, match="draft model tiny-bloom-draft: a budget of 1GiB is too small"):
        speculative.load_draft(tiny_bloom, ModelInfo(DRAFT), [Prompt((5,))], full, "fp32")


def test_a_draft_takes_its_part_of_the_budget(tiny_bloom: slowllm.StreamedLM) -> None:
    budget = Budget(4 << 30, 0)
    with speculative.load_draft(tiny_bloom, ModelInfo(DRAFT), [Prompt((5,))], budget, "fp32") as lm:
        assert budget.used_bytes == lm.plan.peak_bytes >= lm.weight_bytes
    assert budget.used_bytes == 0


def test_a_job_with_drafts_has_room_for_trees(tiny_bloom: slowllm.StreamedLM) -> None:
    prompts = [Prompt((5,) * 6, Settings(4))] * 3
    plain, job = (module.job_of(tiny_bloom, prompts) for module in (generation, speculative))
    assert job.num_tokens >= plain.num_tokens + 3 * 100
    assert job.num_passes == plain.num_passes


@pytest.mark.parametrize("draft", [pytest.param("lookup", marks=pytest.mark.long), str(DRAFT)])
def test_the_command_line_drafts(draft: str) -> None:
    arguments = ["generate", "Returns the number of", "The value", "--max-new-tokens", "8", "--dtype", "fp32"]
    plain, drafted = (
        CliRunner().invoke(app, [*arguments, *more], catch_exceptions=False)
        for more in ([], ["--draft", draft])
    )
    assert (plain.exit_code, drafted.exit_code) == (0, 0)
    assert drafted.stdout == plain.stdout
    assert "tokens a sweep and continuation" in drafted.stderr
    assert ("drafted tokens accepted" in drafted.stderr) == (draft != "lookup")


def test_the_draft_speaks_the_models_tokens() -> None:
    ours, theirs = (AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (TINY_BLOOM, DRAFT))
    assert ours == theirs


def test_a_draft_of_too_few_positions_is_refused(
    tiny_bloom: slowllm.StreamedLM, small: slowllm.StreamedLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small.config, "max_position_embeddings", 8, raising=False)
    prompts = [Prompt((5, 6, 7), Settings(6))]
    with pytest.raises(
        InputError, match="a draft of 8 positions cannot follow a prompt and its continuation of 9"
    ):
        list(speculative.generate(tiny_bloom, prompts, small))
