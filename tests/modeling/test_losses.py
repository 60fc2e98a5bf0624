"""Losses from one pass over the head equal those of whole logits, and so do their gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import slowllm
from slowllm.modeling.losses import choice_logits, token_losses
from tests.support.families import VOCAB, family_cases

Tiny = Callable[..., Path]
IDS = torch.randint(5, VOCAB, (3, 9), generator=torch.Generator().manual_seed(1))
ROWS = torch.tensor([0, 0, 2, 1, 1, 1])
POSITIONS = torch.tensor([3, 8, 1, 0, 5, 5])
TOKENS = torch.tensor([7, 300, 12, 306, 0, 44])
# The softmax is summed in another order.
RELATIVE = 1e-6


def resident(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return (
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager")
        .eval()
        .requires_grad_(False)
    )


def embedded(model: Any) -> torch.Tensor:
    return model.get_input_embeddings()(IDS).detach().requires_grad_(True)


def whole(model: Any, vectors: torch.Tensor) -> torch.Tensor:
    logits = model(inputs_embeds=vectors, use_cache=False).logits[ROWS, POSITIONS].float()
    return F.cross_entropy(logits, TOKENS, reduction="none")


@pytest.mark.parametrize("name", family_cases(leave_out={"mamba"}))
def test_losses_and_gradients_equal_those_of_whole_logits(name: str, tiny: Tiny) -> None:
    plain = resident(tiny(name))
    theirs = embedded(plain)
    wanted = whole(plain, theirs)
    (wanted * torch.arange(1, 7)).sum().backward()
    with slowllm.load(tiny(name), dtype="fp32", keep_resident=False, poison=True) as lm:
        ours = embedded(lm.model)
        found = token_losses(lm.model, ROWS, POSITIONS, TOKENS, inputs_embeds=ours)
        (found * torch.arange(1, 7)).sum().backward()
    assert (found - wanted).abs().max() <= 1e-5
    assert theirs.grad is not None
    assert theirs.grad.norm() > 0
    assert (ours.grad - theirs.grad).norm() <= RELATIVE * theirs.grad.norm()


@pytest.mark.parametrize("name", ["bloom", "gemma-2-soft-cap", "cohere-scaled-logits"])
def test_many_tiles_and_chunks_give_the_gradient_of_one(
    name: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slowllm.modeling.online_softmax.TILE_COLUMNS", 17)
    monkeypatch.setattr("slowllm.modeling.layout.MIN_CHUNK_BYTES", 64 * 64 * 4)
    with slowllm.load(tiny(name), dtype="fp32") as lm:
        assert len(lm.layout.chunks) > 1
    test_losses_and_gradients_equal_those_of_whole_logits(name, tiny)


@pytest.mark.parametrize("name", ["bloom", "llama-3-scaled-rope"])
def test_bf16_gradients_are_as_good_as_the_resident_models(name: str, tiny: Tiny) -> None:
    exact = resident(tiny(name))
    vectors = embedded(exact)
    whole(exact, vectors).sum().backward()
    plain = resident(tiny(name), torch.bfloat16)
    theirs = embedded(plain)
    whole(plain, theirs).sum().backward()
    with slowllm.load(tiny(name), dtype="bf16", keep_resident=False, poison=True) as lm:
        ours = embedded(lm.model)
        token_losses(lm.model, ROWS, POSITIONS, TOKENS, inputs_embeds=ours).sum().backward()
    assert vectors.grad is not None
    noise = (theirs.grad.float() - vectors.grad).norm()
    assert noise > 0
    assert (ours.grad.float() - vectors.grad).norm() <= 1.5 * noise


def test_the_head_comes_by_once_for_loss_and_gradient(tiny: Tiny) -> None:
    stops: list[int] = []
    with (
        slowllm.load(tiny("bloom"), dtype="fp32", keep_resident=False, poison=True) as lm,
        lm.watching(lambda passage: stops.append(passage.stop)),
    ):
        ours = embedded(lm.model)
        token_losses(lm.model, ROWS, POSITIONS, TOKENS, inputs_embeds=ours).sum().backward()
        assert lm.num_stops == 4, "three blocks and the head"
        lm.close()  # the last passage is reported after the visitor has gone on
    assert stops == [0, 1, 2, 3, 2, 1, 0]


@pytest.mark.parametrize("name", ["bloom", "gemma-2-soft-cap"])
def test_choices_are_compared_without_a_visit_to_the_head(name: str, tiny: Tiny) -> None:
    choices, right = torch.tensor([9, 30, 200]), torch.tensor([0, 2, 1, 1, 0, 2])
    plain = resident(tiny(name))
    theirs = embedded(plain)
    logits = plain(inputs_embeds=theirs, use_cache=False).logits[ROWS, POSITIONS]
    F.cross_entropy(logits[:, choices], right, reduction="sum").backward()
    stops: list[int] = []
    with (
        slowllm.load(tiny(name), dtype="fp32", keep_resident=False, poison=True) as lm,
        lm.watching(lambda passage: stops.append(passage.stop)),
    ):
        ours = embedded(lm.model)
        F.cross_entropy(
            choice_logits(lm.model, ROWS, POSITIONS, choices, {"inputs_embeds": ours}), right, reduction="sum"
        ).backward()
        assert max(stops) == len(lm.layout.blocks) - 1
    assert (ours.grad - theirs.grad).norm() <= RELATIVE * theirs.grad.norm()
