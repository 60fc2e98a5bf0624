"""Tasks of each kind for lm-eval, a small model with a tokenizer of its own, and evaluations that must be the same."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils import collect_env
from transformers import PreTrainedTokenizerFast

from tests.support.families import VOCAB, save_tiny

# lm-eval puts into each of its results what `pip list`, `lscpu` and others say of the machine: they say it once.
collect_env.get_pretty_env_info = functools.cache(collect_env.get_pretty_env_info)

# A log-likelihood sums tens of nats; in fp32 a product of another shape rounds otherwise.
TOLERANCE = 1e-5
HEADER = "The compiler checks every reference before the value is returned to the caller.\n"
QUESTIONS = [
    {"question": "Is the value returned", "label": 0, "text": "The value is returned. The memory on the heap."},
    {"question": "Does the compiler check", "label": 1, "text": "A reference of the caller."},
    {"question": "Can the heap hold it", "label": 1, "text": "word " * 90},
    {"question": "No", "label": 0, "text": "heap"},
]  # fmt: skip
CHAT = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "<s>{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def save_llama(folder: Path) -> None:
    """Save a llama with a tokenizer that puts BOS before a text, as Llama's does, and takes 64 tokens."""
    save_tiny("llama-2", folder, max_position_embeddings=64)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [HEADER, *(row["text"] for row in QUESTIONS)],
        trainers.BpeTrainer(
            vocab_size=VOCAB, special_tokens=["<pad>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        ),
    )  # fmt: skip
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=CHAT
    )
    fast.save_pretrained(folder)


def rows_in(folder: Path) -> Callable[..., dict[str, Any]]:
    """Return what writes a task's rows to a folder, and returns what its config needs to read them."""

    def write(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = {"data_files": {"test": str(file)}, "cache_dir": str(folder / "cache")}
        return {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}

    return write


def tasks_of(rows: Callable[..., dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one task of each kind of request."""
    header = HEADER.replace("{", "")
    return [
        {
            **rows(QUESTIONS, "choices"), "output_type": "multiple_choice",
            "doc_to_text": header + "{{question}}?", "doc_to_choice": ["no", "yes, it is", "yes"], "doc_to_target": "label",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}, {"metric": "acc_mutual_info"}],
        },
        {
            **rows(QUESTIONS, "likely"), "output_type": "loglikelihood",
            "doc_to_text": "{{text}} ", "doc_to_target": "{{question}}",
            "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        },
        {
            **rows(QUESTIONS, "rolling"), "output_type": "loglikelihood_rolling",
            "doc_to_text": "", "doc_to_target": "{{text}}", "metric_list": [{"metric": "word_perplexity"}],
        },
        {
            **rows(QUESTIONS, "until"), "output_type": "generate_until",
            "doc_to_text": "{{text}}", "doc_to_target": "x", "metric_list": [{"metric": "exact_match"}],
            "generation_kwargs": {"until": ["\n", "e", " the"], "max_gen_toks": 9},
        },
        {
            **rows(QUESTIONS, "free"), "output_type": "generate_until",
            "doc_to_text": "{{question}}", "doc_to_target": "x", "metric_list": [{"metric": "exact_match"}],
            "generation_kwargs": {"max_tokens": 12, "do_sample": False, "temperature": 0.7, "until": []},
        },
    ]  # fmt: skip


@functools.cache
def manager() -> TaskManager:
    # Without lm-eval's own tasks, whose thousands of files take seconds to look at.
    return TaskManager(include_defaults=False)


def evaluate(model: Any, tasks: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    found = lm_eval.simple_evaluate(
        model=model, tasks=[dict(task) for task in tasks], bootstrap_iters=0, log_samples=True,
        task_manager=manager(), **options,
    )  # fmt: skip
    assert found is not None
    return dict(found)


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Every response to every sample is the same, and so are the metrics."""
    assert ours["samples"].keys() == theirs["samples"].keys()
    num_likelihoods = num_texts = 0
    for name, samples in theirs["samples"].items():
        for ours_one, theirs_one in zip(ours["samples"][name], samples, strict=True):
            assert ours_one["arguments"] == theirs_one["arguments"]
            for (mine, *_), (other, *_) in zip(ours_one["resps"], theirs_one["resps"], strict=True):
                if isinstance(other, str):
                    assert mine == other, ours_one["arguments"]
                    num_texts += 1
                    continue
                if isinstance(other, tuple | list):
                    assert mine[1] == other[1], "is_greedy"
                pair = (mine[0], other[0]) if isinstance(other, tuple | list) else (mine, other)
                assert pair[0] == pytest.approx(pair[1], rel=TOLERANCE, abs=TOLERANCE)
                num_likelihoods += 1
    assert num_likelihoods + num_texts
    for name, metrics in theirs["results"].items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                assert ours["results"][name][metric] == pytest.approx(value, rel=1e-4), (name, metric)
