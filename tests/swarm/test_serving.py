"""Models whose blocks `slowllm serve` computes in other processes give the bits of a local model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from torch import Tensor
from transformers import Trainer, TrainingArguments

import slowllm
from slowllm.entrypoints.api import LM
from slowllm.entrypoints.lm_eval_model import SlowLM
from slowllm.errors import InputError
from slowllm.inference import speculative
from slowllm.inference.generation_types import Settings, encode_prompt
from slowllm.inference.speculative_loop import Acceptance
from slowllm.modeling.soft_prompts import SoftPrompt
from tests.support.served import GREEDY, NUM_BLOCKS, Served, deep_prompt_grads, same, texts

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
    assert lm.generate(SENTENCES, max_new_tokens=3) == local.generate(SENTENCES, max_new_tokens=3)


@pytest.mark.parametrize("draft", ["lookup", "model"])
def test_drafts_are_verified_elsewhere_and_give_the_same_tokens(
    draft: str, lm: LM, local: LM, served: Served
) -> None:
    repeated = [f"{text} {text} {text}" for text in SENTENCES[:2]]  # where look-up finds something
    prompts = [encode_prompt(lm, text, Settings(8)) for text in repeated]

    def continued(model: LM, small: Any) -> list[list[int]]:
        counts = Acceptance()
        found = list(speculative.generate(model, prompts, small, counts=counts))
        assert counts.num_passes < counts.num_tokens
        return [list(one.ids) for (one,) in found]

    plain = [list(one.ids) for (one,) in local.generate(repeated, max_new_tokens=8)]
    if draft == "lookup":
        assert continued(lm, "lookup") == plain
        return
    with served.load_local() as small:  # a draft that is always right
        assert continued(lm, small) == plain


def test_gradients_of_inputs_deep_vectors_and_prefixes_are_those_of_a_local_model(lm: LM, local: LM) -> None:
    ids, mask = texts()
    mask = mask.flip(1)

    def inputs(model: Any) -> list[Tensor]:
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_(True)
        loss = model(inputs_embeds=embeddings, labels=ids).loss
        loss.backward()
        return [loss.detach(), embeddings.grad]

    def deep(model: Any) -> list[Tensor]:
        return deep_prompt_grads(model, ids, mask)

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


@pytest.mark.parametrize(
    "kind", ["PrefixTuningConfig", pytest.param("PromptTuningConfig", marks=pytest.mark.long)]
)
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


@pytest.mark.long
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


EXAMPLES = [
    {"prompt": "The value is", "answer": " returned."},
    {"prompt": "A buffer of", "answer": " bytes."},
    {"prompt": "Paris is the", "answer": " capital."},
]


def test_tune_gives_the_losses_and_the_prompt_of_a_local_run(served: Served, tmp_path: Path) -> None:
    recipe = {"num_steps": 3, "num_tokens": 4, "ram": "3GiB"}
    (ours,) = slowllm.tune(
        served.ends, EXAMPLES, EXAMPLES, swarm=[served.address], out=tmp_path / "prompt", **recipe
    )
    (theirs,) = slowllm.tune(served.whole, EXAMPLES, EXAMPLES, dtype="float32", **recipe)
    losses = [[record.get("loss") for record in tuned.records] for tuned in (ours, theirs)]
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(ours.prompt.tensors, theirs.prompt.tensors, strict=True))
    # It says nothing of weights that the client has not, and is used with and without a swarm.
    with (
        served.load(prompt=tmp_path / "prompt") as lm,
        served.load_local(prompt=tmp_path / "prompt") as local,
    ):
        assert lm.generate(SENTENCES, max_new_tokens=3) == local.generate(SENTENCES, max_new_tokens=3)


def test_likelihoods_for_lm_eval_are_those_of_a_local_model(served: Served) -> None:
    requests = [
        Instance("loglikelihood", {}, (text, " it is"), number) for number, text in enumerate(SENTENCES)
    ]
    ours = SlowLM(pretrained=str(served.ends), swarm=served.address, ram="3GiB")
    theirs = SlowLM(pretrained=str(served.whole), dtype="fp32", ram="3GiB")
    try:
        assert ours.loglikelihood(requests) == theirs.loglikelihood(requests)
    finally:
        ours.close()
        theirs.close()


def test_a_loaded_model_for_lm_eval_has_its_own_swarm(lm: LM, served: Served) -> None:
    with pytest.raises(InputError, match="a loaded model has its own swarm; give it to load"):
        SlowLM(pretrained=lm, swarm=served.address)


@pytest.mark.long
def test_lm_eval_gets_the_figures_of_a_local_model(served: Served, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"question": q, "label": 1, "text": t} for q, t in zip(QUESTIONS, SENTENCES[:2], strict=True)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"data_files": {"test": str(file)}, "cache_dir": str(tmp_path / "cache")}
    common = {"dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
    tasks = [
        {
            **common, "task": "choices", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
            "doc_to_choice": [" no", " yes, it is"], "doc_to_target": "label", "metric_list": [{"metric": "acc"}],
        },
        {
            **common, "task": "until", "output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "x",
            "metric_list": [{"metric": "exact_match"}], "generation_kwargs": {"until": ["zz"], "max_gen_toks": 5},
        },
    ]  # fmt: skip

    def responses(**arguments: Any) -> dict[str, Any]:
        found = lm_eval.simple_evaluate(
            model=SlowLM(ram="3GiB", **arguments), tasks=[dict(task) for task in tasks], bootstrap_iters=0,
            log_samples=True, task_manager=TaskManager(include_defaults=False),
        )  # fmt: skip
        assert found is not None
        return {name: [one["resps"] for one in samples] for name, samples in found["samples"].items()}

    ours = responses(pretrained=str(served.ends), swarm=served.address)
    assert ours == responses(pretrained=str(served.whole), dtype="fp32")
