"""Soft prompts are tuned on a streamed model as on a resident one; trials, kills and frozen blocks change no number."""

from __future__ import annotations

import contextlib
import json
import math
import random
import re
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache
from typer.testing import CliRunner

import slowllm
from slowllm.entrypoints.api_tune import tune
from slowllm.entrypoints.cli.app import app
from slowllm.errors import InputError, PlanError, SlowLLMError, StateError, TuningError
from slowllm.modeling import soft_prompt_files
from slowllm.modeling.blocks import find_blocks
from slowllm.runtime.description import ModelInfo
from slowllm.streaming.hints import Reach
from slowllm.tuning import session
from slowllm.tuning.examples import Example, Task, make_task, read_rows
from slowllm.tuning.initialization import starts_of
from slowllm.tuning.passes import learn_rider
from slowllm.tuning.recipe import Recipe
from slowllm.tuning.rows import NumberedExample
from slowllm.tuning.session import RunOptions
from slowllm.tuning.trial import Trial
from slowllm.tuning.tune import tune_tasks
from tests.support.cases import crossed, quick_and_long
from tests.support.families import VOCAB
from tests.support.paths import ROOT, TINY_BLOOM
from tests.support.processes import Processes
from tests.support.properties import num_examples

Tiny = Callable[..., Path]
KINDS = ["shallow", "deep", "prefix"]
FAMILIES = ["bloom", "llama-3-scaled-rope", "mixtral", "falcon-new-decoder"]
# In the quick run each family once, and each kind of prompt.
every_family_and_kind = pytest.mark.parametrize(
    ("name", "kind"),
    crossed(
        FAMILIES,
        KINDS,
        quick=[
            *zip(FAMILIES, ["deep", "shallow", "prefix", "deep"], strict=True),
            ("bloom", "prefix"),
        ],
    ),
)
LENGTH = 3
EXACT = 1e-6  # relative to the norm: sums in another order


def examples(count: int, low: int = 4, high: int = 9, seed: int = 0) -> tuple[Example, ...]:
    generator = torch.Generator().manual_seed(seed)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, VOCAB, (n,), generator=generator).tolist())

    lengths = torch.randint(low, high, (count,), generator=generator).tolist()
    return tuple(Example(f"example {n}", ids(length - 2), ids(1 + n % 3)) for n, length in enumerate(lengths))


def resident(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return (
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager")
        .eval()
        .requires_grad_(False)
    )


def moved(trial: Trial) -> Trial:
    """Away from the beginning, where a deep prompt's vectors are all zero."""
    generator = torch.Generator().manual_seed(9)
    for value in trial.values.values():
        value.data += 0.1 * torch.randn(value.shape, generator=generator)
    return trial


def resident_gradients(model: Any, trial: Trial, chosen: Sequence[Example]) -> dict[str, torch.Tensor]:
    """By transformers and autograd alone, one example at a time: mean over all tokens of the answers."""
    leaves = trial.leaves()
    prompt = trial.prompt(leaves)
    total = sum(len(e.answer) for e in chosen)
    loss = torch.zeros(())
    for example in chosen:
        ids, mask = torch.tensor([example.ids]), torch.ones(1, LENGTH + len(example.ids))
        first = len(example.context) - 1
        if prompt.kind == "prefix":
            cache = DynamicCache(config=model.config)
            for block, pair in enumerate(prompt.pairs):
                cache.update(pair[:1].to(model.dtype), pair[1:].to(model.dtype), block)
            logits = model(ids, past_key_values=cache, attention_mask=mask).logits[0]
        else:
            hooks = []
            for block, vector in zip(find_blocks(model)[1], prompt.vectors, strict=False):

                def add(module: Any, args: Any, kwargs: Any, vector: Any = vector) -> Any:
                    hidden = args[0] if args else kwargs["hidden_states"]
                    added = F.pad(vector.to(hidden.dtype), (0, 0, 0, hidden.shape[1] - LENGTH))
                    hidden = hidden + added
                    return (
                        ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
                    )

                hooks.append(block.register_forward_pre_hook(add, with_kwargs=True))
            assert prompt.embeddings is not None
            text = model.get_input_embeddings()(ids)
            whole = torch.cat([prompt.embeddings[None].to(text.dtype), text], 1)
            logits = model(inputs_embeds=whole, attention_mask=mask, use_cache=False).logits[0, LENGTH:]
            for hook in hooks:
                hook.remove()
        wanted = torch.tensor(example.answer)
        loss = loss + F.cross_entropy(logits[first:].float(), wanted, reduction="sum")
    return dict(zip(leaves, torch.autograd.grad(loss / total, list(leaves.values())), strict=True))


def streamed_gradients(
    lm: slowllm.StreamedLM, trial: Trial, chosen: Sequence[Example], split: Sequence[Sequence[int]]
) -> dict[str, torch.Tensor]:
    total = sum(len(e.answer) for e in chosen)
    jobs = [
        lambda part=part: learn_rider(
            lm, trial, [NumberedExample(chosen[n], n) for n in part], total, None, Reach()
        )
        for part in split
    ]
    found = lm.ride(jobs)
    return {name: sum(one.gradients[name] for one in found) for name in trial.values}


def trial_of(lm: slowllm.StreamedLM, kind: str) -> Trial:
    recipe = Recipe(kind=kind, num_tokens=LENGTH)  # type: ignore[arg-type]
    (start,) = starts_of(lm, [recipe], 0)
    return moved(Trial("t", Task("t", examples(5)), recipe, start))


@every_family_and_kind
def test_gradients_equal_the_resident_models_for_any_split_into_riders(
    name: str, kind: str, tiny: Tiny
) -> None:
    chosen = examples(5)
    with slowllm.load(tiny(name), dtype="fp32", keep_resident=False, poison=True) as lm:
        trial = trial_of(lm, kind)
        wanted = resident_gradients(resident(tiny(name)), trial, chosen)
        for split in ([[0, 1, 2, 3, 4]], [[0, 3], [4, 1], [2]], [[n] for n in range(5)]):
            found = streamed_gradients(lm, trial, chosen, split)
            for key, value in wanted.items():
                assert value.norm() > 0
                assert (found[key] - value).norm() <= EXACT * value.norm()


@every_family_and_kind
def test_bf16_gradients_are_as_good_as_the_resident_models(name: str, kind: str, tiny: Tiny) -> None:
    chosen = examples(5)
    with slowllm.load(tiny(name), dtype="bf16", keep_resident=False, poison=True) as lm:
        trial = trial_of(lm, kind)
        exact = resident_gradients(resident(tiny(name)), trial, chosen)
        plain = resident_gradients(resident(tiny(name), torch.bfloat16), trial, chosen)
        found = streamed_gradients(lm, trial, chosen, [[0, 1], [2, 3, 4]])
    for key, value in exact.items():
        noise = (plain[key] - value).norm()
        assert noise > 0
        assert (found[key] - value).norm() <= 2 * noise


def corpus() -> list[str]:
    lines = (ROOT / "tests" / "data" / "heldout.txt").read_text().splitlines()
    return [line for line in lines if line.strip()]


def ordered(lines: Sequence[str], seed: int = 0) -> list[dict[str, str]]:
    """Sentences, and the same words in another order."""
    shuffler = random.Random(seed)
    rows = []
    for line in lines:
        words = line.split()
        shuffler.shuffle(words)
        rows += [{"prompt": line, "label": " yes"}, {"prompt": " ".join(words), "label": " no"}]
    return rows


@pytest.mark.long
def test_a_prompt_learns_to_tell_sentences_from_shuffled_ones() -> None:
    lines = corpus()
    (tuned,) = tune(
        TINY_BLOOM, ordered(lines[:220]), ordered(lines[240:]), labels=[" yes", " no"],
        kind="prefix", learning_rate=0.1, num_steps=40, batch_size=12, eval_every=40, dtype="fp32",
    )  # fmt: skip
    judged = [record["accuracy"] for record in tuned.records if "accuracy" in record]
    assert judged[0] <= 0.6, "chance is 0.5"
    assert judged[-1] >= 0.9, "on sentences that were not learned"


TASK = Task("t", examples(10, seed=3), examples(4, seed=4))
QUICK = {"num_tokens": LENGTH, "num_steps": 4, "batch_size": 4, "eval_every": 2}


def run(
    folder: Path, recipes: Sequence[Recipe], tasks: Sequence[Task] = (TASK,), **options: Any
) -> list[Any]:
    options = {"dtype": "fp32", "keep_resident": False, **options}
    return tune_tasks(ModelInfo(folder), tasks, recipes, RunOptions(**options))


def learn(lm: slowllm.StreamedLM, trial: Trial) -> float:
    """Make one update by hand; return its loss."""
    batch = [NumberedExample(trial.task.train[n], n) for n in trial.batch()]
    total = sum(len(row.example.answer) for row in batch)
    (learned,) = lm.ride([lambda: learn_rider(lm, trial, batch, total, None, Reach())])
    trial.learn(learned.loss, learned.gradients, VOCAB)
    return learned.loss


def curve(tuned: Any) -> list[tuple[Any, ...]]:
    keys = ("step", "loss", "grad_norm", "validation_loss", "learning_rate", "num_tokens")
    return [tuple(record.get(key) for key in keys) for record in tuned.records]


@pytest.mark.parametrize("kind", quick_and_long(KINDS, quick=["prefix"]))
def test_trials_of_one_run_come_out_as_alone(kind: str, tiny: Tiny) -> None:
    recipes = [
        Recipe(kind=kind, learning_rate=lr, seed=seed, **QUICK) for lr in (0.1, 0.01) for seed in (0, 1)
    ]  # type: ignore[arg-type]
    tasks = [TASK, Task("other", examples(7, seed=8))]
    together = run(tiny("bloom"), recipes, tasks)
    assert len({one.name for one in together}) == 8
    alone = [run(tiny("bloom"), [recipe], [task])[0] for task in tasks for recipe in recipes]
    for one, other in zip(together, alone, strict=True):
        assert curve(one) == curve(other)
        assert one.prompt.digest() == other.prompt.digest()
    assert len({one.prompt.digest() for one in together}) == 8


def test_steps_of_several_trials_share_their_sweeps(tiny: Tiny) -> None:
    passages = []

    def watch(lm: Any, *_: Any) -> None:
        seen: list[tuple[int, str]] = []
        passages.append(seen)
        watchers.enter_context(lm.watching(lambda passage: seen.append((passage.stop, passage.direction))))

    task = Task("t", examples(8))
    recipes = [Recipe(num_tokens=LENGTH, num_steps=3, batch_size=8, seed=seed) for seed in range(3)]
    with contextlib.ExitStack() as watchers:
        run(tiny("bloom"), recipes, [task], on_open=watch)
    up, down = [(0, "up"), (1, "up"), (2, "up"), (3, "up")], [(2, "down"), (1, "down"), (0, "down")]
    # A step begins where the last one ended, where the carousel may have stayed.
    seen = [passage for passage in passages[0] if passage != (0, "up")]
    once = [passage for n, passage in enumerate(seen) if passage != seen[n - 1]]
    assert once == (up[1:] + down) * 3


def test_a_step_reads_the_blocks_twice_and_the_head_and_the_turns_once(tiny: Tiny) -> None:
    task = Task("t", examples(6))
    sizes: list[int] = []

    def watch(lm: Any, *_: Any) -> None:
        sizes.extend(sum(p.num_bytes for p in stop) for stop in lm.layout.stops)

    (tuned,) = run(
        tiny("bloom"), [Recipe(num_tokens=LENGTH, num_steps=4, batch_size=6)], [task], on_open=watch
    )
    steps = [record["read_bytes"] for record in tuned.records]
    (first, middle, last), head = sizes[:3], sizes[3]
    # What is read ahead of a step's end counts for the step in which it is read.
    assert sum(steps) <= first + 4 * (middle + last + head + last + middle)
    assert sum(steps) >= first + 4 * (middle + last + head + middle)


@pytest.mark.parametrize("kind", quick_and_long(KINDS, quick=["deep"]))
def test_a_graph_that_is_kept_gives_the_numbers_of_a_replay(kind: str, tiny: Tiny) -> None:
    directions: list[set[str]] = []

    def watch(lm: Any, *_: Any) -> None:
        seen: set[str] = set()
        directions.append(seen)
        watchers.enter_context(lm.watching(lambda passage: seen.add(passage.direction)))

    recipe = Recipe(kind=kind, **QUICK)  # type: ignore[arg-type]
    with contextlib.ExitStack() as watchers:
        (kept,) = run(tiny("mixtral"), [recipe], keep_resident=True, on_open=watch)
        (replayed,) = run(tiny("mixtral"), [recipe], on_open=watch)
    assert directions == [{"up"}, {"up", "down"}]
    assert curve(kept) == curve(replayed)
    assert kept.prompt.digest() == replayed.prompt.digest()


@pytest.mark.parametrize(
    ("name", "where", "kind"),
    crossed(
        ["bloom", "llama-3-scaled-rope"],
        ["memory", "file"],
        ["deep", "prefix"],
        quick=[
            ("bloom", "memory", "prefix"),
            ("bloom", "file", "deep"),
            ("llama-3-scaled-rope", "file", "prefix"),
        ],
    ),
)
def test_frozen_blocks_are_passed_once_and_changes_no_number(
    name: str, where: str, kind: str, tiny: Tiny, tmp_path: Path
) -> None:
    stops: dict[str, list[int]] = {}

    def watch(lm: Any, job: Any, what: str, *_: Any) -> None:
        stops[what] = []
        watchers.enter_context(lm.watching(lambda passage: stops[what].append(passage.stop)))

    recipe = Recipe(kind=kind, top=1, **QUICK)  # type: ignore[arg-type]
    folder = tiny(name)
    state = tmp_path if where == "file" else None
    with contextlib.ExitStack() as watchers:
        (tuned,) = run(folder, [recipe], on_open=watch, state=state)
    assert set(stops["steps"]) == {2, 3}, "the top block and the head"
    assert [stop for stop in stops["the frozen blocks"] if stop > 1] in ([], [2]), (
        "a prefix begins at every block"
    )
    # Without frozen blocks: the same recipe by hand, every block passed.
    assert tuned.records[-1]["validation_loss"] < tuned.records[0]["validation_loss"]
    with slowllm.load(folder, dtype="fp32", keep_resident=False, poison=True) as lm:
        (start,) = starts_of(lm, [recipe], 2)
        trial = Trial("t", TASK, recipe, start)
        losses = []
        while trial.batch():
            losses.append(learn(lm, trial))
    assert [record["loss"] for record in tuned.records if "loss" in record] == pytest.approx(losses, rel=1e-5)


def test_a_prompt_tuned_here_works_in_plain_peft(tiny: Tiny, tmp_path: Path) -> None:
    for kind in ("shallow", "prefix"):
        run(tiny("llama-3-scaled-rope"), [Recipe(kind=kind, **QUICK)], out=tmp_path / kind)  # type: ignore[arg-type]
        ids = torch.randint(5, VOCAB, (2, 6), generator=torch.Generator().manual_seed(2))
        adapted = peft.PeftModel.from_pretrained(resident(tiny("llama-3-scaled-rope")), str(tmp_path / kind))
        wanted = adapted(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -6:]
        with slowllm.load(tiny("llama-3-scaled-rope"), dtype="fp32", prompt=tmp_path / kind) as lm:
            prompt = lm.soft_prompt
            assert prompt is not None
            whole = torch.tensor([[*prompt.virtual_ids, *row] for row in ids.tolist()])
            with torch.no_grad(), prompt.applied(lm.model, whole, torch.ones_like(whole)) as inputs:
                found = lm.model(**inputs).logits[:, -6:]
        assert torch.allclose(found, wanted, atol=1e-5)


# Failures


def test_a_bad_example_is_named_and_the_last_good_prompt_is_kept(tiny: Tiny, tmp_path: Path) -> None:
    # One token's embedding is damaged, so only texts with that token come to nothing.
    source = tiny("llama-2")
    folder = tmp_path / "model"
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            for name in tensors:
                if "embed_tokens" in name:
                    tensors[name][77] = math.nan
            save_file(tensors, folder / path.name, {"format": "pt"})
        else:
            (folder / path.name).write_bytes(path.read_bytes())
    good = examples(6, seed=1)
    assert not any(77 in example.ids for example in good)
    bad = Example("example with 77", (9, 77, 5), (8,))
    recipe = Recipe(num_tokens=LENGTH, num_steps=7, batch_size=1, learning_rate=0.01)
    with pytest.raises(TuningError, match=r"t: step \d: example with 77: .*NaN") as caught:
        run(folder, [recipe], [Task("t", (*good, bad))], out=tmp_path / "out")
    step = int(str(caught.value).partition("step ")[2].partition(":")[0])
    kept, _ = soft_prompt_files.load_prompt(tmp_path / "out")
    # The same updates by hand, up to the one that failed.
    with slowllm.load(folder, dtype="fp32") as lm:
        (start,) = starts_of(lm, [recipe], 0)
        trial = Trial("t", Task("t", (*good, bad)), recipe, start)
        while trial.step < step - 1:
            learn(lm, trial)
    assert kept.digest() == trial.result.digest()
    log = json.loads((tmp_path / "out" / "slowllm.json").read_text())
    assert log["steps"] == step - 1
    assert "example with 77" in log["failure"]


def test_a_learning_rate_that_diverges_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        TuningError, match=r"data: step \d+: the loss has grown from .* lower the learning rate"
    ) as caught:
        tune(
            TINY_BLOOM, corpus()[:8], out=tmp_path, kind="prefix", learning_rate=1e5, schedule="constant", dtype="fp32",
            num_steps=30,
        )  # fmt: skip
    assert "\n" not in str(caught.value)
    kept, about = soft_prompt_files.load_prompt(tmp_path)
    assert max(float(pair.abs().max()) for pair in kept.pairs) < 1e4, "the prompt from before it grew"
    assert about["failure"] is not None


@pytest.mark.long
def test_one_trial_that_fails_leaves_the_others_alone() -> None:
    recipes = [
        Recipe(kind="prefix", learning_rate=rate, num_steps=8, schedule="constant") for rate in (0.05, 1e5)
    ]
    both = tune(TINY_BLOOM, corpus()[:8], recipes=recipes, dtype="fp32")
    assert [one.failure is None for one in both] == [True, False]
    (alone,) = tune(TINY_BLOOM, corpus()[:8], recipes=recipes[0], dtype="fp32")
    assert curve(both[0]) == curve(alone)


def test_a_budget_too_small_for_a_step_is_refused(tiny: Tiny) -> None:
    with pytest.raises(PlanError, match="the smallest that would do is"):
        run(tiny("bloom"), [Recipe(**QUICK)], ram="700MiB")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "lora"}, "kind 'lora' is unknown"),
        ({"init": "zeros"}, "init 'zeros' is unknown"),
        ({"init": "text"}, "init_text goes with"),
        ({"top": 1}, "top goes with a deep prompt or a prefix"),
        ({"kind": "deep", "top": 99}, "top 99 is more than the model's 10 blocks"),
        ({"num_tokens": 0}, "num_tokens must be a whole number of at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"learning_rate": 1e38}, "learning_rate must be above 0 and at most 1e"),
        ({"learning_rate": math.nan}, "learning_rate must be a number"),
        ({"warmup_steps": 100}, "leave none of the 100 steps"),
        ({"schedule": "wild"}, "schedule 'wild' is unknown"),
        ({"num_layers": 3}, "no such setting: num_layers"),
        ({"seed": 1 << 63}, "seed must be less than"),
        ({"labels": [0, 1]}, "a label must be a text, not 0"),
        ({"labels": "yes"}, "labels must be a list of words, not the word .yes."),
        ({"labels": [" yes", ""]}, "a label is empty"),
        ({"labels": [" yes", " \ud800"]}, "a label cannot be encoded as UTF-8"),
        ({"init": "text", "init_text": 5}, "init_text must be a text, not 5"),
        ({"init": "text", "init_text": "\ud800"}, "init_text cannot be encoded"),
        ({"num_epochs": 1, "warmup_steps": 9}, "leave none of the"),
        ({"recipes": [None]}, "recipes must be one slowllm.Recipe"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tune(TINY_BLOOM, ["The value is returned."], **settings)


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [
        ([], (), "data: has no examples"),
        ([""], (), "example 1: is empty"),
        (["fine", "  "], (), "example 2: is empty"),
        ([{"prompt": "a", "answer": ""}], (), "example 1: has an empty answer"),
        ([{"prompt": "a"}], (), "example 1: has no answer"),
        ([{"answer": "a"}], (), "example 1: has no prompt"),
        ([{"prompt": 3, "answer": "a"}], (), "example 1: its prompt is no text"),
        ([{"prompt": "a", "label": " x"}], (), "has a label, but no labels are given"),
        ([{"prompt": "a", "label": " x"}], (" y", " z"), "label ' x' is none of ' y', ' z'"),
        (
            [{"prompt": "a", "label": "y"}],
            (" y", " z"),
            "label 'y' is none of ' y', ' z'; words are compared as they are",
        ),
        ([{"prompt": "a", "label": True}], (" y", " z"), "label True is none of"),
        ([{"prompt": "a", "label": 2}], (" y", " z"), "label 2 is none of"),
        ([{"prompt": "a"}], (" y", " z"), "has no label"),
        ([{"prompt": "a", "label": " y"}], (" y",), "two different words or more"),
        (["word " * 3000], (), "has .* tokens, but beside the soft prompt the model takes|are more than"),
        (["\ud800"], (), "cannot be encoded as UTF-8"),
        ([5], (), "is no text and no object"),
    ],
)
def test_examples_that_cannot_be_learned_are_refused(
    rows: list[Any], labels: tuple[str, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        tune(TINY_BLOOM, rows, labels=labels)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "there are no examples"),
        (None, "examples must be a file or a list, not NoneType"),
        ({"../x": ["text"]}, "a task cannot be called '../x'"),
        ({"": ["text"]}, "a task cannot be called ''"),
    ],
)
def test_data_that_is_none_is_refused(data: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tune(TINY_BLOOM, data)


def test_labels_stay_as_they_are_written() -> None:
    rows = [{"prompt": "a b", "label": "yes"}, {"prompt": "b a", "answer": " no"}]
    task = make_task(ModelInfo(TINY_BLOOM), "t", rows, labels=["yes", " no"])
    assert task.labels == ("yes", " no")
    assert [example.label for example in task.train] == [0, 1]
    with pytest.raises(InputError, match=r"label 'yes' is none of ' yes', ' no'; .* blanks included"):
        make_task(ModelInfo(TINY_BLOOM), "t", rows, labels=[" yes", " no"])


def test_examples_are_read_from_csv_and_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    (tmp_path / "a.csv").write_text("prompt,label,id\nIs it?, yes,1\nIs it not?,1,2\n")
    rows: list[Any] = [
        {"prompt": "Is it?", "label": " yes", "id": "1", "line": 2},
        {"prompt": "Is it not?", "label": 1, "id": "2", "line": 3},
    ]
    assert read_rows(tmp_path / "a.csv") == rows
    table = pyarrow.table({"prompt": ["a"], "answer": [" b"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet") == [{"prompt": "a", "answer": " b", "line": 1}]
    (tmp_path / "b.csv").write_text("question\nIs it?\n")
    with pytest.raises(
        InputError, match=r"b\.csv: has none of the columns prompt, answer, label, text; there are"
    ):
        read_rows(tmp_path / "b.csv")


def test_a_label_that_is_a_number_is_first_of_all_a_word() -> None:
    rows = [{"prompt": "a b", "label": 0}, {"prompt": "b a", "label": 1}]
    task = make_task(ModelInfo(TINY_BLOOM), "t", rows, labels=[" 1", " 0"])
    assert [task.labels[example.label or 0] for example in task.train] == [" 0", " 1"]
    task = make_task(ModelInfo(TINY_BLOOM), "t", rows, labels=[" no", " yes"])
    assert [example.label for example in task.train] == [0, 1]


def test_the_memory_of_many_trials_is_counted() -> None:
    recipes = [Recipe(kind="prefix", num_tokens=500, num_steps=1, seed=seed) for seed in range(80)]
    with pytest.raises(PlanError, match="the smallest that would do is"):
        tune(TINY_BLOOM, ["The value is returned."], recipes=recipes, ram="2GiB")


def test_a_folder_with_a_prompt_is_not_given_to_several_trials(tiny: Tiny, tmp_path: Path) -> None:
    run(tiny("bloom"), [Recipe(**QUICK)], out=tmp_path)  # type: ignore[arg-type]
    two = [Recipe(seed=seed, **QUICK) for seed in (0, 1)]  # type: ignore[arg-type]
    with pytest.raises(InputError, match="holds a prompt of an earlier run"):
        run(tiny("bloom"), two, out=tmp_path)
    run(tiny("bloom"), two, out=tmp_path / "two")
    with pytest.raises(InputError, match="the folders in it have: seed-0, seed-1"):
        soft_prompt_files.load_prompt(tmp_path / "two")
    with (
        soft_prompt_files.check_folder(tmp_path, is_shared=False),
        pytest.raises(InputError, match="another run writes its prompt there"),
    ):
        run(tiny("bloom"), [Recipe(**QUICK)], out=tmp_path)  # type: ignore[arg-type]


def test_the_folder_of_several_trials_is_not_given_to_one(tiny: Tiny, tmp_path: Path) -> None:
    run(tiny("bloom"), [Recipe(seed=seed, **QUICK) for seed in (0, 1)], out=tmp_path)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="holds the prompts of several trials of an earlier run"):
        run(tiny("bloom"), [Recipe(**QUICK)], out=tmp_path)  # type: ignore[arg-type]


def test_a_run_that_learned_nothing_leaves_an_earlier_prompt_alone(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no more")

    run(tiny("bloom"), [Recipe(**QUICK)], out=tmp_path)  # type: ignore[arg-type]
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(session.Session, "_close_step", fail)
    with pytest.raises(OSError, match="no more"):
        run(tiny("bloom"), [Recipe(seed=7, **QUICK)], out=tmp_path)  # type: ignore[arg-type]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_from_its_first_step_on_the_folder_is_the_runs_own(tiny: Tiny, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def look(record: dict[str, Any]) -> None:
        if record["step"] > 1:
            about = json.loads((tmp_path / "slowllm.json").read_text())
            seen.append((about["recipe"]["seed"], about["steps"]))

    for seed in (3, 4):
        seen.clear()
        recipe = Recipe(num_tokens=LENGTH, num_steps=4, seed=seed)
        run(tiny("bloom"), [recipe], [Task("t", examples(6))], out=tmp_path, on_record=look)
        assert {first for first, _ in seen} == {seed}
        assert seen[0][1] == 1


def test_the_step_that_is_named_is_that_of_the_numbers_kept(tiny: Tiny) -> None:
    with slowllm.load(tiny("bloom"), dtype="fp32") as lm:
        recipe = Recipe(num_tokens=LENGTH, num_steps=5)
        trial = Trial("t", Task("t", examples(6)), recipe, starts_of(lm, [recipe], 0)[0])
    prompts = [trial.prompt().digest()]
    for loss in (3.0, 2.0, 9.0, 9.0, 2.5):
        assert trial.result.digest() == prompts[trial.good_step]
        trial.learn(loss, {name: torch.ones_like(value) for name, value in trial.values.items()}, VOCAB)
        prompts.append(trial.prompt().digest())
        if trial.step in (3, 4):
            assert trial.good_step == 1, "the losses of 9 do not speak for the updates before them"
    assert (trial.good_step, trial.ended) == (5, True)
    assert trial.result.digest() == prompts[5]


def test_a_refused_command_leaves_the_log_of_the_last_run(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The value is returned.")
    out = tmp_path / "out"
    assert verb("tune", str(tmp_path / "text.txt"), "--out", str(out), "--steps", "1").exit_code == 0
    before = (out / "log.jsonl").read_bytes()
    assert verb("tune", str(tmp_path / "missing.txt"), "--out", str(out)).exception is not None
    assert (out / "log.jsonl").read_bytes() == before
    assert verb("tune", str(tmp_path / "missing.txt"), "--out", str(tmp_path / "new")).exception is not None
    assert not (tmp_path / "new").exists()


def test_a_state_whose_records_are_damaged_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    run(tiny("bloom"), [Recipe(**QUICK)], state=tmp_path)  # type: ignore[arg-type]
    (tmp_path / "results.jsonl").write_bytes(b"")
    with pytest.raises(StateError, match="the records of its steps are damaged; delete the folder"):
        run(tiny("bloom"), [Recipe(**QUICK)], state=tmp_path)  # type: ignore[arg-type]


def test_a_state_of_another_run_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    run(tiny("bloom"), [Recipe(**QUICK)], state=tmp_path)  # type: ignore[arg-type]
    with pytest.raises(StateError, match=r"another job \(learning_rate was 0.03 and is 0.5\)"):
        run(tiny("bloom"), [Recipe(learning_rate=0.5, **QUICK)], state=tmp_path)  # type: ignore[arg-type]
    with pytest.raises(StateError, match="is the state of another job"):
        run(tiny("llama-2"), [Recipe(**QUICK)], state=tmp_path)  # type: ignore[arg-type]


# Kills


def command(folder: Path, out: Path, state: Path | None, *more: str) -> list[str]:
    train, test = folder / "train.jsonl", folder / "test.jsonl"
    if not train.exists():
        lines = corpus()
        train.write_text("".join(json.dumps(row) + "\n" for row in ordered(lines[:12])))
        test.write_text("".join(json.dumps(row) + "\n" for row in ordered(lines[12:16])))
    kept = [] if state is None else ["--state", str(state)]
    return [
        "-m", "slowllm", "tune", str(train), "--validation", str(test), "--label", " yes", "--label", " no",
        "--steps", "6", "--batch-size", "4", "--eval-every", "3", "--dtype", "fp32", "--out", str(out), "--json", *kept, *more,
    ]  # fmt: skip


def log_of(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "read_bytes")} for row in rows]


@pytest.mark.parametrize(
    ("more", "kills"),  # after so many lines of the log
    [
        (("--kind", "prefix", "--top", "3"), (4,)),
        pytest.param(("--kind", "prefix", "--top", "3"), (2, 5), marks=pytest.mark.long),
        pytest.param(("--kind", "shallow", "--trials", "2"), (4,), marks=pytest.mark.long),
    ],
)
def test_a_killed_run_goes_on_with_the_same_curve(
    more: tuple[str, ...], kills: tuple[int, ...], tmp_path: Path, processes: Processes
) -> None:
    whole = verb(*command(tmp_path, tmp_path / "whole", None, *more)[2:])
    assert whole.exit_code == 0, whole.output
    for kill_after in kills:
        process = processes.start(
            *command(tmp_path, tmp_path / "out", tmp_path / "state", *more), stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        for _ in range(kill_after):
            assert process.stdout.readline()
        process.end(signal.SIGKILL)
    done = verb(*command(tmp_path, tmp_path / "out", tmp_path / "state", *more)[2:])
    assert done.exit_code == 0, done.output
    assert log_of(tmp_path / "out") == log_of(tmp_path / "whole")
    for path in (tmp_path / "whole").rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.relative_to(tmp_path / "whole")).read_bytes()


# The verb


def verb(*arguments: str) -> Result:
    """Run the command line in this process; a process of its own takes five seconds to begin."""
    return CliRunner().invoke(app, list(arguments))


def test_a_prompt_is_tuned_on_lines_of_text_and_used_by_every_verb(tmp_path: Path) -> None:
    lines = corpus()
    (tmp_path / "text.txt").write_text("\n".join(lines[:12]))
    out = tmp_path / "out"
    done = verb(
        "tune",
        str(tmp_path / "text.txt"),
        "--out",
        str(out),
        "--steps",
        "3",
        "--lr",
        "0.1",
        "--dtype",
        "fp32",
        "--tokens",
        "4",
    )
    assert done.exit_code == 0, done.output
    assert "of RAM" in done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert {"loss", "grad_norm", "num_tokens", "seconds", "read_bytes", "learning_rate"} <= set(rows[0])
    (tmp_path / "line.txt").write_text(lines[20])
    (tmp_path / "items.jsonl").write_text(json.dumps({"context": "The value", "choices": [" is", " of"]}))
    (tmp_path / "boolq.jsonl").write_text(
        json.dumps({"question": "is it", "passage": "It is.", "answer": True})
    )
    every = [
        ["forward", str(tmp_path / "line.txt")],
        ["score", str(tmp_path / "items.jsonl")],
        ["yesno", str(tmp_path / "line.txt")],
        ["generate", "The value is", "--max-new-tokens", "6"],
        [
            "eval",
            "boolq",
            "--data",
            str(tmp_path / "boolq.jsonl"),
            "--out",
            str(tmp_path / "predictions.jsonl"),
        ],
    ]
    for arguments in every:
        ran = verb(*arguments, "--dtype", "fp32", "--prompt", str(out))
        assert ran.exit_code == 0, ran.output
        if arguments[0] in ("forward", "generate"):
            plain = verb(*arguments, "--dtype", "fp32")
            assert ran.stdout != plain.stdout, f"{arguments[0]} does not see the prompt"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.jsonl"], "missing.jsonl: No such file"),
        (["a.txt", "b/a.txt"], "two files have the same name: a, a"),
        (
            ["a.txt", "--validation", "x", "--validation", "y"],
            "give as many files with --validation as of examples: 1, not 2",
        ),
        (["a.txt", "--patience", "1"], "--patience and --eval-every need --validation"),
        (["a.txt", "--init", "text"], "--init text needs --init-text"),
        (["a.txt", "--init-text", " "], "--init-text is empty"),
        (["a.txt", "--out", ""], "--out is empty; name a folder"),
        (["a.txt", "--label", "", "--label", " no"], "a label is empty: ''"),
        (
            ["json.txt"],
            "json.txt: line 1 is JSON, but only files named .jsonl are read as such; rename the file",
        ),
        (["a.txt", "--tokens", "999999"], "999999 virtual tokens are more than the 2048"),
        (["a.txt", "--out", "same", "--state", "same"], "cannot be both the folder of the prompt"),
        (["a.txt", "--kind", "lora"], "kind 'lora' is unknown"),
        (["a.txt", "--ram", "lots"], "'lots' is not a size"),
        (["a.txt", "--model", "nowhere/at/all"], "no such folder"),
        (["a.txt", "--top", "2"], "top goes with a deep prompt or a prefix"),
        (["bad.jsonl"], "bad.jsonl: line 2 cannot be read"),
        (["list.jsonl"], "list.jsonl: line 1 is JSON, but no object"),
        (["empty.txt"], "empty.txt: has no examples"),
        (["a.txt", "--out", "a.txt"], "a.txt: is a file; a prompt is a folder"),
        (["a.txt", "--out", "-"], "--out - is no folder"),
        (
            ["a.txt", "--steps", "2", "--epochs", "1"],
            "--steps and --epochs contradict each other; give one of them",
        ),
        (
            ["a.txt", "--lr", "0.1", "--lr", "0.2", "--trials", "200"],
            "400 trials (every --lr with every seed",
        ),
    ],
)
def test_what_cannot_be_tuned_is_one_sentence(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b").mkdir()
    for name, text in {
        "a.txt": "The value.", "b/a.txt": "x", "bad.jsonl": '{"text": "x"}\n{', "list.jsonl": "[1]", "empty.txt": "\n\n",
        "json.txt": '{"prompt": "a", "answer": " b"}\n',
    }.items():  # fmt: skip
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    out = [] if "--out" in arguments else ["--out", "out"]
    with pytest.raises(SlowLLMError, match=re.escape(message)) as caught:
        app(["tune", *arguments, *out], standalone_mode=False)
    assert "\n" not in str(caught.value)


def test_an_interrupted_run_keeps_its_prompt(tmp_path: Path, processes: Processes) -> None:
    process = processes.start(
        # More steps than can be done before it hears of it.
        *command(tmp_path, tmp_path / "out", None, "--kind", "prefix", "--steps", "200"),
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    for _ in range(3):
        assert process.stdout.readline()
    assert process.end(signal.SIGINT).returncode == 130
    kept, about = soft_prompt_files.load_prompt(tmp_path / "out")
    assert kept.kind == "prefix"
    assert about["steps"] >= 1


def test_tensorboard_reads_the_log(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "text.txt").write_text("\n".join(corpus()[:4]))
    done = verb(
        "tune", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out"), "--steps", "2", "--dtype", "fp32"
    )
    assert done.exit_code == 0, done.output
    log = EventAccumulator(str(tmp_path / "out"))
    log.Reload()
    written = [json.loads(line)["loss"] for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [event.value for event in log.Scalars("text/loss")] == pytest.approx(written)


# Recipes


@num_examples(50)
@given(
    total=st.integers(1, 40), batch=st.integers(1, 9), accumulate=st.integers(1, 3), seed=st.integers(0, 5)
)
def test_every_epoch_brings_each_example_once(total: int, batch: int, accumulate: int, seed: int) -> None:
    recipe = Recipe(num_epochs=3, batch_size=batch, accumulate=accumulate, seed=seed)
    start = slowllm.SoftPrompt("shallow", torch.zeros(2, 4))
    trial = Trial("t", Task("t", examples(total)), recipe, start)
    orders = []
    for _ in range(3):
        seen: list[int] = []
        while len(seen) < total:
            part = trial.batch()
            assert 0 < len(part) <= batch * accumulate
            seen += part
            trial.step += 1
        assert sorted(seen) == list(range(total))
        orders.append(tuple(seen))
    assert trial.batch() == []
    assert total < 8 or len(set(orders)) > 1


def test_a_trial_stops_when_validation_gets_no_better() -> None:
    recipe = Recipe(patience=2, eval_every=1)
    trial = Trial("t", TASK, recipe, slowllm.SoftPrompt("shallow", torch.zeros(2, 4)))
    for loss, ended in ((2.0, False), (1.0, False), (1.5, False), (1.2, True)):
        trial.values["embeddings"].data.fill_(loss)
        trial.judge(loss)
        assert trial.ended is ended
    assert trial.best_loss == 1.0
    assert trial.result.embeddings is not None
    assert float(trial.result.embeddings[0, 0]) == 1.0, "the best is kept"


def test_a_prefix_is_not_tuned_where_the_caches_are_elsewhere(
    tiny_bloom: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_bloom, "swarm", object())
    recipes = [Recipe(num_tokens=2), Recipe(kind="prefix", num_tokens=2)]
    with pytest.raises(InputError, match="stay at the servers of a swarm"):
        starts_of(tiny_bloom, recipes, 0)
