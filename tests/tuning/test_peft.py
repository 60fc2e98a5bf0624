"""PEFT and transformers' Trainer work unchanged on a streamed model: the same losses, prompts, logits and tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from transformers import Trainer, TrainingArguments

import slowllm
from tests.support.cases import crossed, quick_and_long
from tests.support.families import VOCAB, resident

# Everywhere here equal is torch.equal: one micro-batch after another, the same products in the same order.

Tiny = Callable[..., Path]

FAMILIES = ["bloom", "llama-3-scaled-rope", "mixtral", "falcon-new-decoder"]
KINDS = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}


def row(seed: int) -> dict[str, Tensor]:
    """Return a text of 4 to 10 tokens, padded to 10."""
    generator = torch.Generator().manual_seed(seed)
    length = int(torch.randint(4, 11, (), generator=generator))
    ids = torch.randint(5, VOCAB, (length,), generator=generator)
    padding = (0, 10 - length)
    return {
        "input_ids": F.pad(ids, padding),
        "attention_mask": F.pad(torch.ones_like(ids), padding),
        "labels": F.pad(ids, padding, value=-100),
    }


ROWS = [row(seed) for seed in range(12)]


def streamed(folder: Path) -> slowllm.StreamedLM:
    return slowllm.load(folder, dtype="fp32", keep_resident=False, poison=True)


def with_prompt(model: Any, kind: str, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return peft.get_peft_model(model, KINDS[kind](task_type="CAUSAL_LM", num_virtual_tokens=3, **options))


def prompts_of(adapted: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in adapted.named_parameters() if p.requires_grad}


def logits_of(adapted: Any) -> Tensor:
    ids = torch.stack([r["input_ids"] for r in ROWS[:2]])
    with torch.no_grad():
        return adapted.eval()(input_ids=ids).logits


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def train(adapted: Any, folder: Path, resume: Path | None = None, **options: Any) -> list[dict[str, Any]]:
    """Train for four steps. Returns what Trainer logged, but for the times."""
    chosen = {
        "per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": 0.05, "max_grad_norm": 1.0,
        "save_strategy": "no", **options,
    }  # fmt: skip
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", logging_steps=1, disable_tqdm=True, **chosen
    )
    trainer = Trainer(adapted, arguments, train_dataset=ROWS, eval_dataset=ROWS[:4])
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return [
        {key: value for key, value in entry.items() if not key.endswith(("_runtime", "_per_second"))}
        for entry in trainer.state.log_history
    ]


@dataclass(frozen=True)
class Run:
    """What one training gave: Trainer's log, the prompts, where `save_pretrained` put them, logits with them."""

    log: list[dict[str, Any]]
    prompts: dict[str, Tensor]
    saved: Path
    logits: Tensor


def run(model: Any, kind: str, folder: Path) -> Run:
    adapted = with_prompt(model, kind)
    log = train(adapted, folder / "trainer")
    adapted.save_pretrained(folder / "saved")
    return Run(log, prompts_of(adapted), folder / "saved", logits_of(adapted))


@pytest.fixture(scope="module")
def runs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Run, Run]]:
    """Return the training of a family's streamed model, and that of the resident one; trained on first use."""
    made: dict[tuple[str, str], tuple[Run, Run]] = {}

    def get(name: str, kind: str) -> tuple[Run, Run]:
        if (name, kind) not in made:
            with streamed(tiny(name)) as lm:
                found = run(lm.model, kind, tmp_path_factory.mktemp("streamed"))
            made[name, kind] = found, run(resident(tiny(name)), kind, tmp_path_factory.mktemp("resident"))
        return made[name, kind]

    return get


Runs = Callable[[str, str], tuple[Run, Run]]
# In the quick run prompts once more with a second family, of experts; prefixes are trained below.
every_family_and_kind = pytest.mark.parametrize(
    ("name", "kind"),
    crossed(
        FAMILIES,
        KINDS,
        quick=[
            ("bloom", "prompt"),
            ("mixtral", "prompt"),
        ],
    ),
)


# Training


@every_family_and_kind
def test_trainer_logs_and_learns_what_it_does_on_the_resident_model(
    name: str, kind: str, runs: Runs, tiny: Tiny
) -> None:
    found, wanted = runs(name, kind)
    assert [entry["step"] for entry in found.log if "loss" in entry] == [1, 2, 3, 4]
    assert all(entry["grad_norm"] > 0 for entry in found.log if "loss" in entry)
    assert found.log == wanted.log
    assert equal(found.prompts, wanted.prompts)
    assert not equal(found.prompts, prompts_of(with_prompt(resident(tiny(name)), kind)))  # it has learned


CLIPPED = {"optim": "sgd", "learning_rate": 100.0, "max_grad_norm": 1e-3}
BEST = {
    "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
    "load_best_model_at_end": True, "metric_for_best_model": "eval_loss",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        # Under AdamW the scale of a gradient cancels; under SGD a wrong sum or a wrong clip shows.
        ("bloom", "prompt", {"gradient_accumulation_steps": 2, **CLIPPED}),
        pytest.param(
            "mixtral", "prefix", {"gradient_accumulation_steps": 2, **CLIPPED}, marks=pytest.mark.long
        ),
        # With a prefix, transformers' own checkpointing drops the cache that holds it, and a resident model fails.
        pytest.param(
            "llama-3-scaled-rope", "prompt", {"activation_checkpointing": True}, marks=pytest.mark.long
        ),
        pytest.param("falcon-new-decoder", "prefix", BEST, marks=pytest.mark.long),
    ],
    ids=["accumulated-and-clipped", "the-same-with-experts", "checkpointing", "best-at-end"],
)
def test_trainers_options_work_as_on_the_resident_model(
    name: str, kind: str, options: dict[str, Any], tiny: Tiny, tmp_path: Path
) -> None:
    plain = with_prompt(resident(tiny(name)), kind)
    before = prompts_of(plain)
    wanted = train(plain, tmp_path / "resident", **options)
    with streamed(tiny(name)) as lm:
        adapted = with_prompt(lm.model, kind)
        assert train(adapted, tmp_path / "streamed", **options) == wanted
        assert equal(prompts_of(adapted), prompts_of(plain))
    assert not equal(prompts_of(plain), before)
    limit = options.get("max_grad_norm", 0.0)
    assert all(entry["grad_norm"] > limit for entry in wanted if "loss" in entry), "the clip is felt"


def test_a_prefix_made_by_a_network_is_trained_as_on_the_resident_model(tiny: Tiny, tmp_path: Path) -> None:
    options = {"prefix_projection": True, "encoder_hidden_size": 16}
    plain = with_prompt(resident(tiny("bloom")), "prefix", **options)
    wanted = train(plain, tmp_path)
    with streamed(tiny("bloom")) as lm:
        adapted = with_prompt(lm.model, "prefix", **options)
        assert train(adapted, tmp_path) == wanted
        assert len(prompts_of(plain)) == 5
        assert equal(prompts_of(adapted), prompts_of(plain))


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"activation_checkpointing": True}, marks=pytest.mark.long)],
    ids=["plainly", "checkpointing"],
)
def test_trainer_rides_and_a_micro_batch_is_one_sweep_up_and_down(
    options: dict[str, Any], tiny: Tiny, tmp_path: Path
) -> None:
    options = {"max_steps": 2, "gradient_accumulation_steps": 2, **options}
    wanted = train(with_prompt(resident(tiny("bloom")), "prompt"), tmp_path, **options)
    passages: list[int] = []
    with streamed(tiny("bloom")) as lm, lm.watching(lambda passage: passages.append(passage.stop)):
        adapted = with_prompt(lm.model, "prompt")
        assert lm.ride([lambda: train(adapted, tmp_path, **options)]) == [wanted]
        last = lm.num_stops - 1
        lm.close()  # the last passage is reported after its rider has left
    # Both stops at which it turns, the last and the first, are passed once for two visits.
    assert passages == [*range(last), *range(last, 0, -1)] * 4 + [0]


@pytest.mark.long
def test_several_trainers_share_their_sweeps(runs: Runs, tiny: Tiny, tmp_path: Path) -> None:
    with streamed(tiny("mixtral")) as lm:
        adapted = {kind: with_prompt(lm.model, kind) for kind in KINDS}
        logs = lm.ride([lambda kind=kind: train(adapted[kind], tmp_path / kind) for kind in KINDS])
        assert lm.report.num_passages == 4 * 2 * (lm.num_stops - 1) + 1  # as many as for one of them
    for kind, log in zip(KINDS, logs, strict=True):
        _, wanted = runs("mixtral", kind)
        assert log == wanted.log
        assert equal(prompts_of(adapted[kind]), wanted.prompts)


@pytest.mark.parametrize("kind", quick_and_long(KINDS, quick=["prefix"]))
def test_training_goes_on_from_trainers_checkpoint(kind: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("llama-3-scaled-rope")
    plain = with_prompt(resident(folder), kind)
    wanted = train(plain, tmp_path / "resident")
    with streamed(folder) as lm:
        train(with_prompt(lm.model, kind), tmp_path, save_strategy="steps", save_steps=2)
    checkpoint = tmp_path / "checkpoint-2"
    assert not list(checkpoint.glob("model*")), "the weights of the model are not saved again"
    with streamed(folder) as lm:  # another session, and a prompt that begins elsewhere
        adapted = with_prompt(lm.model, kind, seed=1)
        log = train(adapted, tmp_path / "resumed", resume=checkpoint)
        steps = [[entry for entry in entries if "loss" in entry] for entries in (log, wanted)]
        assert steps[0] == steps[1]
        assert equal(prompts_of(adapted), prompts_of(plain))


# What was saved


@every_family_and_kind
def test_a_prompt_trained_while_streaming_serves_a_resident_model(
    name: str, kind: str, runs: Runs, tiny: Tiny
) -> None:
    trained, _ = runs(name, kind)
    with safe_open(trained.saved / "adapter_model.safetensors", "pt") as file:
        assert set(file.keys()) == {"prompt_embeddings"}
    plain = resident(tiny(name))
    without = logits_of(plain)
    found = logits_of(peft.PeftModel.from_pretrained(plain, trained.saved))
    assert torch.equal(found, trained.logits)
    assert not torch.equal(found[:, -1], without[:, -1])


@every_family_and_kind
def test_a_prompt_trained_on_a_resident_model_serves_a_streamed_one(
    name: str, kind: str, runs: Runs, tiny: Tiny
) -> None:
    _, trained = runs(name, kind)
    with streamed(tiny(name)) as lm:
        without = logits_of(lm.model)
        found = logits_of(peft.PeftModel.from_pretrained(lm.model, trained.saved))
    assert torch.equal(found, trained.logits)
    assert not torch.equal(found[:, -1], without[:, -1])


@every_family_and_kind
def test_generation_with_a_prompt_gives_the_resident_models_tokens(
    name: str, kind: str, runs: Runs, tiny: Tiny
) -> None:
    saved = runs(name, kind)[0].saved
    ids = torch.stack([r["input_ids"][:4] for r in ROWS[:2]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])  # padded on the left, as for any generation in a batch
    options = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}

    def tokens(model: Any) -> list[Tensor]:
        adapted = peft.PeftModel.from_pretrained(model, saved)
        return [
            adapted.generate(input_ids=ids, attention_mask=mask, num_beams=n, do_sample=False, **options)
            for n in (1, 3)
        ]

    with streamed(tiny(name)) as lm:
        found = tokens(lm.model)
    for streamed_ids, wanted in zip(found, tokens(resident(tiny(name))), strict=True):
        assert wanted.shape == (2, 10)
        assert torch.equal(streamed_ids, wanted)
