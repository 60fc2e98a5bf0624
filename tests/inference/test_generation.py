"""Continuations equal plain transformers' token for token, and take as many sweeps as they have tokens."""

from __future__ import annotations

import itertools
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer
from typer.testing import CliRunner

import slowllm
from slowllm.entrypoints.cli.app import app
from slowllm.errors import InputError, NonFiniteError, StateError
from slowllm.inference import generation
from slowllm.inference.continuation import text_of
from slowllm.inference.generation import generate
from slowllm.inference.generation_types import Prompt, Settings, encode_prompt
from slowllm.planning.packing import pack
from slowllm.runtime.state import State
from tests.support.cases import quick_and_long
from tests.support.families import resident, save_tiny, speaking
from tests.support.paths import TINY_BLOOM

PROMPTS = ((5, 9, 14, 30, 7), (40, 3, 77), (8,), (101, 55, 20, 61, 90, 33, 250))


@pytest.fixture(scope="session")
def plain_bloom() -> Any:
    return resident(TINY_BLOOM)


def by_transformers(model: Any, prompt: Prompt, **extra: Any) -> list[list[int]]:
    """Return the new tokens of plain transformers' generate for this prompt alone, up to EOS."""
    s = prompt.settings
    sampling = {"temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p} if s.do_sample else {}
    if s.seed is not None:
        torch.manual_seed(s.seed)
    ids = torch.tensor([prompt.ids])
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=s.max_new_tokens, num_beams=s.num_beams,
        min_new_tokens=s.min_new_tokens, num_return_sequences=s.num_return_sequences, do_sample=s.do_sample,
        repetition_penalty=s.repetition_penalty, **sampling, **extra,
    )  # fmt: skip
    ends = model.generation_config.eos_token_id
    rows = []
    for row in found[:, len(prompt.ids) :].tolist():
        stop = next((place for place, token in enumerate(row) if token == ends), len(row))
        rows.append(row[:stop])
    return rows


def num_sweeps(lm: slowllm.StreamedLM, before: int) -> float:
    return (lm.report.num_passages - before) / lm.num_stops


GREEDY = Settings(6)
KINDS = {
    "greedy": GREEDY,
    "beams": Settings(5, num_beams=3, num_return_sequences=2),
    "sampled": Settings(5, do_sample=True, temperature=0.8, top_k=40, top_p=0.95, seed=11),
    "several sampled": Settings(4, do_sample=True, num_return_sequences=3, seed=12),
    "penalty": Settings(6, repetition_penalty=1.7),
    "least": Settings(6, min_new_tokens=6),
}


@pytest.mark.parametrize(
    "family",
    quick_and_long(
        [
            "bloom", "llama-3-scaled-rope", "mixtral", "falcon-multi-query", "falcon-new-decoder", "gemma-2-soft-cap",
            "gemma-3-sliding", "opt", "gpt-j-tables-in-blocks", "mamba",
        ],
        quick=["bloom", "mixtral", "gemma-3-sliding", "mamba"],
    ),
)  # fmt: skip
def test_tokens_are_those_of_plain_transformers(
    family: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    folder = speaking(tiny(family), tmp_path / family)
    model = resident(folder)
    # transformers cannot reorder the beams of Mamba's state.
    kinds = [kind for name, kind in KINDS.items() if family != "mamba" or name != "beams"]
    prompts = [Prompt(ids, kind) for ids in PROMPTS for kind in kinds]
    with slowllm.load(folder, dtype="fp32", keep_resident=False, poison=True) as lm:
        found = list(generate(lm, prompts))
    for prompt, continuations in zip(prompts, found, strict=True):
        expected = by_transformers(model, prompt)
        assert [list(one.ids) for one in continuations] == expected, prompt
        assert len(continuations) == prompt.settings.num_return_sequences


def test_text_ends_before_a_stop_string(tiny_bloom: slowllm.StreamedLM, plain_bloom: Any) -> None:
    settings = Settings(16, stop=(" the", "of t"))
    texts = ["Returns the number of", "If value has", "The value of the", "Run the tests", "A reference must"]
    prompts = [encode_prompt(tiny_bloom, text, settings) for text in texts]
    found = [one for (one,) in generate(tiny_bloom, prompts)]
    assert {one.finish_reason for one in found} == {"stop"}
    for prompt, one in zip(prompts, found, strict=True):
        (expected,) = by_transformers(
            plain_bloom, prompt, stop_strings=list(settings.stop), tokenizer=tiny_bloom.tokenizer
        )
        assert list(one.ids) == expected
        whole = tiny_bloom.tokenizer.decode(one.ids)
        ends = [whole.find(stop) for stop in settings.stop if stop in whole]
        assert one.text == whole[: min(ends, default=len(whole))]
    assert any(" the" in tiny_bloom.tokenizer.decode(one.ids) for one in found), "one was cut"


def test_a_stop_string_that_begins_in_the_prompt_ends_nothing(tiny_bloom: slowllm.StreamedLM) -> None:
    text = "Returns the number of"
    ((free,),) = generate(tiny_bloom, [encode_prompt(tiny_bloom, text, Settings(4))])
    across = encode_prompt(tiny_bloom, text, Settings(4, stop=(f"of{free.text[:3]}", "number")))
    assert next(iter(generate(tiny_bloom, [across]))) == (free,)
    assert text_of(tiny_bloom, across, free.ids) == free.text
    inside = encode_prompt(tiny_bloom, text, Settings(4, stop=(free.text[1:4],)))
    ((ended,),) = generate(tiny_bloom, [inside])
    assert (ended.text, ended.finish_reason) == (free.text[:1], "stop")


def test_log_probs_are_the_models_own(tiny_bloom: slowllm.StreamedLM, plain_bloom: Any) -> None:
    for settings in (
        Settings(5, top_log_probs=2),
        Settings(5, do_sample=True, temperature=0.5, seed=1, num_return_sequences=2, top_log_probs=0),
        Settings(5, num_beams=3, num_return_sequences=3, top_log_probs=3),
        Settings(5, repetition_penalty=2.0, top_log_probs=1),
    ):
        prompts = [encode_prompt(tiny_bloom, text, settings) for text in ("Returns the", "Lines are split")]
        for prompt, continuations in zip(prompts, generate(tiny_bloom, prompts), strict=True):
            for one in continuations:
                assert one.log_probs is not None
                assert one.top_log_probs is not None
                logits = plain_bloom(torch.tensor([[*prompt.ids, *one.ids]])).logits[0].log_softmax(-1)
                for place, (token, value, top) in enumerate(
                    zip(one.ids, one.log_probs, one.top_log_probs, strict=True), len(prompt.ids) - 1
                ):
                    # In a batch, and with a cache, products round otherwise.
                    assert math.isclose(value, float(logits[place, token]), abs_tol=2e-4)
                    best = logits[place].topk(settings.top_log_probs or 0)
                    assert list(top) == best.indices.tolist()
                    assert torch.allclose(torch.tensor(list(top.values())), best.values, atol=2e-4)


def test_without_the_wish_there_are_no_log_probs(tiny_bloom: slowllm.StreamedLM) -> None:
    ((one,),) = generate(tiny_bloom, [Prompt((330, 420))])
    assert (one.log_probs, one.top_log_probs) == (None, None)


def load_for(prompts: list[Prompt], **options: Any) -> slowllm.StreamedLM:
    from slowllm.runtime.description import ModelInfo

    job = generation.job_of(ModelInfo(TINY_BLOOM), prompts)
    return slowllm.load(TINY_BLOOM, dtype="fp32", keep_resident=False, job=job, **options)


@pytest.mark.parametrize("kind", ["greedy", "sampled", "beams"])
def test_fifty_prompts_of_two_tokens_take_two_sweeps(kind: str) -> None:
    settings = {
        "greedy": Settings(2, min_new_tokens=2),
        "sampled": Settings(2, min_new_tokens=2, do_sample=True, seed=3),
        "beams": Settings(2, min_new_tokens=2, num_beams=2),
    }[kind]
    prompts = [Prompt(tuple(range(10, 12 + n % 9)), settings) for n in range(50)]
    with load_for(prompts) as lm:
        assert lm.plan.forecast.num_sweeps == 2
        found = list(generate(lm, prompts))
        assert num_sweeps(lm, 0) == 2
    assert [len(one.ids) for (one, *_) in found] == [2] * 50


def test_riders_that_end_make_room_for_those_that_wait(plain_bloom: Any) -> None:
    lengths = [2, 9, 3, 4, 2, 7, 2, 3]
    prompts = [
        Prompt((330 + n, 420), Settings(length, min_new_tokens=length)) for n, length in enumerate(lengths)
    ]
    job = slowllm.Job(num_tokens=64, longest=11, forward_only=True, packing=(11, 24, 64))
    with slowllm.load(TINY_BLOOM, dtype="fp32", keep_resident=False, job=job) as lm:
        found = list(generate(lm, prompts))
        # Loads that wait for their slowest would take 9 + 7 + 3.
        assert max(lengths) <= num_sweeps(lm, 0) <= 16
    assert [list(one.ids) for (one,) in found] == [by_transformers(plain_bloom, p)[0] for p in prompts]


def test_more_prompts_than_a_sweep_holds_are_continued_in_order() -> None:
    prompts = [Prompt((10 + n % 50, 20, 30 + n % 7), Settings(3)) for n in range(90)]
    job = slowllm.Job(num_tokens=200, longest=12, forward_only=True, packing=(24, 60, 64))
    drawn: list[int] = []

    def come() -> Iterator[Prompt]:
        for number, prompt in enumerate(prompts):
            drawn.append(number)
            yield prompt

    with slowllm.load(TINY_BLOOM, dtype="fp32", job=job) as lm:
        stream = generate(lm, come())
        first = next(stream)
        assert len(drawn) < 60, "prompts are drawn as riders leave"
        found = [first, *stream]
        alone = [next(generate(lm, [prompt])) for prompt in prompts[::17]]
    assert len(found) == 90
    assert found[::17] == alone


def test_tokens_are_told_as_they_come(tiny_bloom: slowllm.StreamedLM) -> None:
    prompts = [
        Prompt((330, 420), Settings(4, min_new_tokens=4)),
        Prompt((330, 421, 7), Settings(3, min_new_tokens=3, do_sample=True, seed=5, num_return_sequences=2)),
        Prompt((333,), Settings(3, num_beams=2)),
    ]
    told: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    found = list(
        generate(tiny_bloom, prompts, on_tokens=lambda n, i, ids: told.setdefault((n, i), []).append(ids))
    )
    for key in ((0, 0), (1, 0), (1, 1)):
        last = found[key[0]][key[1]].ids
        assert told[key] == [last[:length] for length in range(1, len(last) + 1)]
    assert len(told[2, 0]) == 3
    assert {number for number, _ in told} == {0, 1, 2}


def test_eos_is_not_among_the_tokens_and_nothing_is_told_after_it(tiny_bloom: slowllm.StreamedLM) -> None:
    prompts = [
        encode_prompt(tiny_bloom, text, Settings(12)) for text in ("Returns the number of", "The value")
    ]
    told: list[tuple[int, tuple[int, ...]]] = []
    (short,), (long,) = generate(tiny_bloom, prompts, on_tokens=lambda n, i, ids: told.append((n, ids)))
    assert (short.text, short.finish_reason) == (" bytes.", "stop")
    assert (len(long.ids), long.finish_reason) == (12, "length")
    assert [ids for number, ids in told if number == 0] == [short.ids[:1], short.ids, short.ids]


def test_the_checkpoints_own_sampling_settings_are_left_aside(tmp_path: Path) -> None:
    folder = tmp_path / "bloom"
    shutil.copytree(TINY_BLOOM, folder)
    own = {
        "do_sample": True, "temperature": 0.6, "top_p": 0.5, "min_p": 0.4, "repetition_penalty": 3.0, "num_beams": 2,
        "suppress_tokens": [1007], "no_repeat_ngram_size": 1, "max_length": 7, "eos_token_id": [2, 17],
    }  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(own))
    with slowllm.load(TINY_BLOOM, dtype="fp32") as lm:
        prompt = encode_prompt(lm, "Returns the number of", Settings(12)).ids
        ((plain,),) = generate(lm, [Prompt(prompt, Settings(12))])
    assert plain.text == " bytes."
    with slowllm.load(folder, dtype="fp32") as lm:
        ((one,),) = generate(lm, [Prompt(prompt, Settings(12))])
        assert (one.text, one.finish_reason) == (" bytes", "stop"), "its EOS tokens are not left aside"
        assert lm.model.generation_config.temperature == 0.6, "and the model itself is as it was"


def test_models_without_eos_or_padding_are_continued(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = speaking(tiny("llama-2"), tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        config[name] = None
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").unlink(missing_ok=True)
    settings = Settings(9, stop=("a",))
    with slowllm.load(folder, dtype="fp32") as lm:
        lm.tokenizer.eos_token = None
        found = [one for (one,) in generate(lm, [Prompt(ids, settings) for ids in PROMPTS])]
        alone = [next(generate(lm, [Prompt(ids, settings)]))[0] for ids in PROMPTS]
    assert found == alone
    assert all(one.finish_reason == ("stop" if len(one.ids) < 9 else "length") for one in found)


def test_what_fails_in_one_rider_costs_the_others_nothing(tiny_bloom: slowllm.StreamedLM) -> None:
    settings = [Settings(3, min_new_tokens=3, repetition_penalty=1 + n / 8) for n in range(4)]
    prompts = [Prompt((330, 420), one) for one in settings]

    def on_tokens(number: int, index: int, ids: tuple[int, ...]) -> None:
        if number == 1 and len(ids) == 2:
            raise ZeroDivisionError("in the second rider")

    found = []
    with pytest.raises(ZeroDivisionError, match="in the second rider"):  # noqa: PT012
        for continuations in generate(tiny_bloom, prompts, on_tokens=on_tokens):
            found.append(continuations)
    assert [len(continuations) for continuations in found] == [1, 0, 1, 1]
    assert all(len(one.ids) == 3 for continuations in found for one in continuations)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (Prompt(()), "prompt 2 is empty"),
        (Prompt((4096,)), "prompt 2: token 4096 is not one of the model's 4096"),
        (Prompt((5,) * 2047), "prompt 2 has 2,047 tokens and is to get 2 more, but the model takes 2048"),
        (Prompt((5,) * 900, Settings(2, num_beams=4)), "prompt 2 takes 3608 tokens .* was loaded for 1024"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(
    prompt: Prompt, message: str, tiny_bloom: slowllm.StreamedLM
) -> None:
    with pytest.raises(InputError, match=message):
        next(generate(tiny_bloom, [Prompt((5,)), prompt]))
    assert tiny_bloom.report.num_passages == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, not 0"),
        ({"num_beams": 1.5}, "num_beams must be a whole number"),
        ({"temperature": 0.0}, "temperature must be a number of at least 0.0001"),
        ({"temperature": math.nan}, "temperature must be a number of at least 0.0001"),
        ({"top_p": 1.5}, "top_p must lie above 0 and be at most 1"),
        ({"top_k": -1}, "top_k must be a whole number of at least 0"),
        ({"repetition_penalty": -1.0}, "repetition_penalty must be a number of at least 0.0001"),
        ({"min_new_tokens": 3}, "min_new_tokens 3 is more than 2"),
        ({"seed": 1 << 64}, r"seed must be less than 2\*\*64"),
        ({"stop": "end"}, "stop must be a list of strings, not the one string 'end'"),
        ({"stop": ("",)}, "a stop string must have at least one character"),
        ({"num_return_sequences": 2}, "2 continuations of a prompt need as many beams, or sampling"),
        ({"num_beams": 2, "num_return_sequences": 3, "do_sample": True}, "2 beams cannot give 3"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Settings(**values)


def test_no_prompts_are_no_job() -> None:
    from slowllm.runtime.description import ModelInfo

    with pytest.raises(InputError, match="there are no prompts to continue"):
        generation.job_of(ModelInfo(TINY_BLOOM), [])


def test_a_job_counts_what_is_held_and_how_often_it_passes() -> None:
    from slowllm.runtime.description import ModelInfo

    known = ModelInfo(TINY_BLOOM)
    prompts = [Prompt((5,) * 8, Settings(4)), Prompt((5,) * 6, Settings(4, num_beams=3))]
    job = generation.job_of(known, prompts)
    assert job.num_tokens == 12 + 3 * 10
    assert (job.longest, job.num_passes, job.keeps_results) == (30, 4, False)
    assert [(row.width, row.length, count) for row, count in job.rows] == [(8, 12, 1), (6, 10, 3)]
    assert job.most_logits(14, 12) == 3 * 2 + 3 * 6
    assert job.most_logits(26, 42) == 3 * 3 + 2 + 3 * 6 + 4
    # Tokens of one prompt at a time are drawn.
    sampled = [Prompt((5,) * 8, Settings(4, do_sample=True, num_return_sequences=rows)) for rows in (1, 5, 2)]
    job = generation.job_of(known, sampled)
    assert job.most_logits(1 << 20, 1 << 20) == 8 * (2 + 4) + 5 * generation.CHOICE_COPIES


@pytest.mark.parametrize("family", ["bloom", "llama-3-scaled-rope", "falcon-multi-query", "deepseek-v3"])
def test_no_more_is_held_than_the_plan_counts(family: str, tiny: Callable[..., Path]) -> None:
    with slowllm.load(tiny(family), dtype="fp32") as lm, torch.no_grad():
        cache = lm.model(torch.randint(5, 300, (3, 7)), use_cache=True).past_key_values
        tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        held = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
        (sizes,) = (sizes for sizes in lm.choices if sizes.granularity == lm.plan.granularity)
        logits = 4 * lm.layout.head.out_features
        assert held / 21 <= sizes.result_token_bytes - logits <= 8 * held / 21


def test_groups_have_equal_settings_and_fit(tiny_bloom: slowllm.StreamedLM) -> None:
    kinds = [
        Settings(4), Settings(4, num_beams=3), Settings(9), Settings(4, do_sample=True),
        Settings(2, num_beams=2, do_sample=True),
    ]  # fmt: skip
    prompts = [Prompt((5,) * (1 + n * 7 % 13), kinds[n % 5]) for n in range(40)]
    groups = generation._group(tiny_bloom, prompts, 40, 80, 64)
    assert sorted(n for group in groups for n in group) == list(range(40))
    for group in groups:
        settings = {prompts[n].settings for n in group}
        (one,) = settings
        width = max(len(prompts[n].ids) for n in group)
        assert len(group) == 1 or not (one.do_sample and one.num_beams > 1)
        assert len(group) == 1 or len(group) * one.num_rows * width <= 40
        assert len(group) == 1 or generation._held_tokens([prompts[n] for n in group]) <= 80
    assert len(groups) < 40
    recurrent: Any = SimpleNamespace(config=AutoConfig.for_model("mamba"), soft_prompt=None)
    equal = generation._group(recurrent, prompts, 40, 80, 64)
    assert all(len({len(prompts[n].ids) for n in group}) == 1 for group in equal)
    assert pack([3, 2], 6) == [[0, 1]]


def test_seeds_differ_within_a_micro_batch(tiny_bloom: slowllm.StreamedLM) -> None:
    prompts = [Prompt((5, 6, 7), Settings(4, do_sample=True, seed=seed)) for seed in (1, None, 3)]
    assert generation._group(tiny_bloom, prompts, 40, 80, 64) == [[0, 1, 2]]


def test_sampled_prompts_share_a_micro_batch_and_get_what_they_get_alone(
    tiny_bloom: slowllm.StreamedLM, plain_bloom: Any
) -> None:
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.3, "top_p": 0.9, "repetition_penalty": 1.4}
    kinds = [Settings(7, min_new_tokens=3, seed=seed, num_return_sequences=2, **options) for seed in range(8)]
    prompts = [Prompt(tuple(range(40, 41 + n)), kind) for n, kind in enumerate(kinds)]
    before = tiny_bloom.report.num_passages
    found = list(generate(tiny_bloom, prompts))
    assert num_sweeps(tiny_bloom, before) == 7
    assert [[list(one.ids) for one in of_prompt] for of_prompt in found] == [
        by_transformers(plain_bloom, prompt) for prompt in prompts
    ]


@pytest.mark.parametrize(
    "settings",
    [Settings(3), Settings(3, do_sample=True, seed=1, num_return_sequences=2), Settings(3, num_beams=2)],
    ids=["greedy", "sampled", "beams"],
)
def test_a_prompt_that_gives_nan_costs_its_micro_batch_nothing(settings: Settings, tmp_path: Path) -> None:
    save_tiny("llama-2", tmp_path / "model")
    folder = speaking(tmp_path / "model", tmp_path / "speaking")
    name, bad = "model.embed_tokens.weight", {77, 88}
    prompts = [Prompt(ids, settings) for ids in ((5, 6, 7), (5, 77, 8), (9, 10), (88,), (12, 13, 14))]
    with slowllm.load(folder, dtype="fp32") as lm:
        wanted = list(generate(lm, prompts))
        used = {token for found in wanted for one in found for token in one.ids}
        assert not used & bad
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            tensors[name][sorted(bad)] = torch.nan
            save_file(tensors, shard, {"format": "pt"})
    job = {"made": "for this test"}
    with slowllm.load(folder, dtype="fp32") as lm:
        for _ in range(2):  # and again, from what was saved
            with State(tmp_path / "state", job) as state:
                found = generate(lm, prompts, state=state)
                assert list(itertools.islice(found, 5)) == [wanted[0], (), wanted[2], (), wanted[4]]
                with pytest.raises(NonFiniteError, match="NaN"):
                    next(found)


def test_continuations_of_another_version_are_refused(tiny_bloom: slowllm.StreamedLM, tmp_path: Path) -> None:
    with State(tmp_path, {"made": "for this test"}) as state:
        state.finish(0, [[{"ids": [5]}]])
        with pytest.raises(StateError, match="saved by another version; name another folder"):
            list(generate(tiny_bloom, [Prompt((330,))], state=state))


def test_unseeded_prompts_draw_different_tokens_which_the_callers_seed_repeats(
    tiny_bloom: slowllm.StreamedLM,
) -> None:
    prompts = [Prompt((330, 420), Settings(8, do_sample=True, top_k=0))] * 4

    def draw() -> list[tuple[int, ...]]:
        return [one.ids for (one,) in generate(tiny_bloom, prompts)]

    torch.manual_seed(5)
    first = draw()
    assert len(set(first)) == 4
    assert draw() != first
    torch.manual_seed(5)
    assert draw() == first


def run(*arguments: str) -> list[dict[str, Any]]:
    done = CliRunner().invoke(app, ["generate", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_command_line_gives_rows_in_order(tmp_path: Path, plain_bloom: Any) -> None:
    file, out = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    file.write_text("Returns the number of\n\nThe value\nRun the tests with\n")
    run(
        "--prompts",
        str(file),
        "--max-new-tokens",
        "4",
        "--dtype",
        "fp32",
        "--out",
        str(out),
        "--log-probs",
        "2",
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["Returns the number of", "The value", "Run the tests with"]
    (one,) = rows[0]["continuations"]
    assert (one["text"], one["finish_reason"], one["num_tokens"]) == (" bytes.", "stop", 2)
    assert [token["token"] for token in one["tokens"]] == [" bytes", "."]
    assert [len(token["top"]) for token in one["tokens"]] == [2, 2]
    assert one["tokens"][0]["top"][0]["log_prob"] == one["tokens"][0]["log_prob"]
    tokenizer = AutoTokenizer.from_pretrained(TINY_BLOOM)
    ids = tuple(tokenizer("The value")["input_ids"])
    assert rows[1]["continuations"][0]["text"] == tokenizer.decode(
        by_transformers(plain_bloom, Prompt(ids, Settings(4)))[0]
    )


def test_every_option_reaches_the_model(plain_bloom: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY_BLOOM)
    ids = tuple(tokenizer("The value")["input_ids"])

    def check(settings: Settings, *arguments: str) -> None:
        (row,) = run("The value", "--dtype", "fp32", "--stream-all", "--max-new-tokens", "5", *arguments)
        found = [one["text"] for one in row["continuations"]]
        assert found == [tokenizer.decode(r) for r in by_transformers(plain_bloom, Prompt(ids, settings))]

    check(Settings(5))
    check(Settings(5, num_beams=3, num_return_sequences=2), "--beams", "3", "--num-sequences", "2")
    check(Settings(5, repetition_penalty=2.5), "--repetition-penalty", "2.5")
    check(
        Settings(5, do_sample=True, seed=4, temperature=1.5, top_k=20, top_p=0.9, num_return_sequences=2),
        "--sample", "--seed", "4", "--temperature", "1.5", "--top-k", "20", "--top-p", "0.9", "--num-sequences", "2",
    )  # fmt: skip
    check(Settings(5, do_sample=True, seed=0), "--sample")
    (row,) = run("The value", "--dtype", "fp32", "--max-new-tokens", "5", "--stop", "value", "--json")
    assert row["continuations"] == [{"text": " is the ", "finish_reason": "stop", "num_tokens": 3}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the prompts as arguments, or with --prompts FILE"),
        (["x", "--prompts", "y"], "give the prompts as arguments, or with --prompts FILE"),
        (["x", "--temperature", "0.5"], "--temperature needs --sample"),
        (["x", "--top-k", "5"], "--top-k needs --sample"),
        (["x", "--seed", "5"], "--seed needs --sample"),
        (["fine", ""], "prompt 2: a prompt is empty"),
        (["x", "--max-new-tokens", "2048"], "prompt 1 has 1 token and is to get 2048 more"),
        (["x", "--num-sequences", "2"], "need as many beams, or sampling"),
        (["--prompts", "/no/such/file"], "/no/such/file: No such file"),
    ],
)
def test_the_command_line_refuses_in_one_sentence(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CliRunner().invoke(app, ["generate", *arguments], catch_exceptions=False)


def test_a_failed_rider_is_named(tiny_bloom: slowllm.StreamedLM, caplog: pytest.LogCaptureFixture) -> None:
    def on_tokens(number: int, index: int, ids: tuple[int, ...]) -> None:
        raise ZeroDivisionError("of ours")

    with caplog.at_level(logging.WARNING), pytest.raises(ZeroDivisionError):
        list(generate(tiny_bloom, [Prompt((330, 420)), Prompt((330, 421))], on_tokens=on_tokens))
    assert "prompts 1, 2: no continuation: of ours" in caplog.text
