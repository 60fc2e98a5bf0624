"""Models whose blocks `slowllm serve` computes in other processes give the bits of a local model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from slowllm.entrypoints.api import LM
from slowllm.inference import speculative
from slowllm.inference.generation_types import Settings, encode_prompt
from slowllm.inference.speculative_loop import Acceptance
from slowllm.modeling.soft_prompts import SoftPrompt
from tests.support.served import GREEDY, NUM_BLOCKS, Served, same, texts

SENTENCES = ["The value is returned.", "Paris is the capital.", "A buffer of bytes"]
QUESTIONS = ["Is the value returned?", "Is the buffer a value?"]


@pytest.fixture(autouse=True)
def _quiet(lm: LM) -> None:
    """Open the client before anything is compared."""


def test_logits_and_hidden_states_have_the_bits_of_a_local_model(lm: LM, local: LM) -> None:
    ids, mask = texts()
    with torch.no_grad():
        same(lambda model: [model(ids).logits], lm.model, local.model)
        same(
            lambda model: [model(ids, attention_mask=mask).logits[mask.bool()]],
            lm.model, local.model,
        )  # fmt: skip
        same(lambda model: list(model(ids, output_hidden_states=True).hidden_states), lm.model, local.model)


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_beams": 4}, {"do_sample": True}, {"prompt_lookup_num_tokens": 3}],
    ids=["greedy", "4 beams", "sampled", "assisted"],
)
def test_generation_gives_the_tokens_of_a_local_model(settings: dict[str, Any], lm: LM, local: LM) -> None:
    ids, mask = texts()
    row = ids[:1].repeat(1, 3)
    given = (
        {"inputs": row, "attention_mask": torch.ones_like(row)}
        if "prompt_lookup_num_tokens" in settings
        else {"inputs": ids, "attention_mask": mask}
    )

    def generated(model: Any) -> list[Tensor]:
        torch.manual_seed(1)
        return [model.generate(**given, **{**GREEDY, **settings})]

    same(generated, lm.model, local.model)


def test_texts_are_scored_chosen_answered_and_continued_as_on_a_local_model(lm: LM, local: LM) -> None:
    assert lm.score(SENTENCES) == local.score(SENTENCES)
    assert lm.choose(SENTENCES, [" yes", " no, it is not"]) == local.choose(
        SENTENCES, [" yes", " no, it is not"]
    )
    assert lm.yes_no(QUESTIONS) == local.yes_no(QUESTIONS)
    assert lm.generate(SENTENCES, max_new_tokens=5) == local.generate(SENTENCES, max_new_tokens=5)


@pytest.mark.parametrize("draft", ["lookup", "model"])
def test_drafts_are_verified_elsewhere_and_give_the_same_tokens(
    draft: str, lm: LM, local: LM, served: Served
) -> None:
    prompts = [encode_prompt(lm, text, Settings(12)) for text in SENTENCES]

    def continued(model: LM, small: Any) -> list[list[int]]:
        counts = Acceptance()
        found = list(speculative.generate(model, prompts, small, counts=counts))
        assert counts.num_drafted
        return [list(one.ids) for (one,) in found]

    plain = [list(one.ids) for (one,) in local.generate(SENTENCES, max_new_tokens=12)]
    if draft == "lookup":
        assert continued(lm, "lookup") == plain
        return
    with served.load_local() as small:  # a draft that is always right
        assert continued(lm, small) == plain


def deep_prompt(model: Any) -> SoftPrompt:
    generator = torch.Generator().manual_seed(3)
    size = model.config.hidden_size
    made = [torch.randn(4, size, generator=generator).requires_grad_(True) for _ in range(NUM_BLOCKS + 1)]
    return SoftPrompt("deep", made[0], tuple(made[1:]))


def test_gradients_of_inputs_deep_vectors_and_prefixes_are_those_of_a_local_model(lm: LM, local: LM) -> None:
    ids, mask = texts()
    mask = mask.flip(1)

    def inputs(model: Any) -> list[Tensor]:
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_(True)
        loss = model(inputs_embeds=embeddings, labels=ids).loss
        loss.backward()
        return [loss.detach(), embeddings.grad]

    def deep(model: Any) -> list[Tensor]:
        prompt = deep_prompt(model)
        rows = torch.cat([torch.tensor(prompt.virtual_ids).expand(2, -1), ids], 1)
        whole = torch.cat([torch.ones(2, 4, dtype=torch.int64), mask], 1)
        with prompt.applied(model, rows, whole) as given:
            logits = model(**given, use_cache=False).logits
        logits.logsumexp(-1)[whole.bool()].sum().backward()
        return [logits.detach()[whole.bool()], *(tensor.grad for tensor in prompt.tensors)]

    def prefix(model: Any) -> list[Tensor]:
        generator = torch.Generator().manual_seed(4)
        pairs = [
            torch.randn(2, 4, 5, 16, generator=generator).requires_grad_(True) for _ in range(NUM_BLOCKS)
        ]
        with SoftPrompt("prefix", pairs=tuple(pairs)).applied(model, ids, mask) as given:
            logits = model(**given).logits
        logits.logsumexp(-1)[mask.bool()].sum().backward()
        return [logits.detach()[mask.bool()], *(pair.grad for pair in pairs)]

    for work in (inputs, deep, prefix):
        same(work, lm.model, local.model)


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_peft_tunes_a_prompt_and_a_prefix_and_generates_with_them(kind: str, served: Served) -> None:
    peft = pytest.importorskip("peft")
    ids, mask = texts()
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=5)

    def tuned(model: Any) -> list[Tensor]:
        torch.manual_seed(7)
        adapted = peft.get_peft_model(model, copy.deepcopy(config))
        loss = adapted(input_ids=ids, attention_mask=mask, labels=ids).loss
        loss.backward()
        grads = [parameter.grad for parameter in adapted.parameters() if parameter.requires_grad]
        with torch.no_grad():
            tokens = adapted.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GREEDY)
        return [loss.detach(), *grads, tokens]

    with served.load() as ours, served.load_local() as theirs:
        same(tuned, ours.model, theirs.model)


def test_trainer_takes_the_steps_that_it_takes_on_a_local_model(served: Served, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    ids, _ = texts()
    rows = [{"input_ids": row, "labels": row} for row in ids]

    def trained(model: Any) -> list[Tensor]:
        torch.manual_seed(7)
        adapted = peft.get_peft_model(
            model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
        )
        arguments = TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=0.1, report_to=[], save_strategy="no",
            use_cpu=True, disable_tqdm=True, logging_steps=1,
        )  # fmt: skip
        trainer = Trainer(adapted, arguments, train_dataset=rows)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        learnt = [parameter.detach() for parameter in adapted.parameters() if parameter.requires_grad]
        return [torch.tensor(losses), *learnt]

    with served.load() as ours, served.load_local() as theirs:
        same(trained, ours.model, theirs.model)
