"""Every family against plain transformers on the same weights: outputs, generated tokens and gradients.

All blocks stream and released weights are poisoned, so that whoever keeps a weight gets NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import slowllm
from slowllm.errors import ArchitectureError
from slowllm.runtime.streamed_lm import StreamedLM
from tests.support.families import (
    MIXTURES,
    QUICK_FAMILIES,
    VOCAB,
    experts_in,
    family_cases,
    resident,
    save_tiny,
)

DTYPES = [torch.float32, torch.bfloat16]
# An online softmax and log_softmax round differently: a few units in the last place of a logarithm near -6.
LOG_PROB_TOLERANCE = 5e-6
# Relative to the gradient's norm. Most are bit-equal; Mamba sums the uses of its state in another order.
GRADIENT_TOLERANCE = 1e-6
# torch folds a batch that is not contiguous into one product where the weight is a tensor subclass, and into many
# where it is not; on some processors these round differently. Of the families here only Mamba has such a product.
FOLDED_TOLERANCE = 5e-6

Pair = tuple[StreamedLM, Any]


@pytest.fixture(
    scope="module",
    # A parameter of a fixture is one value.
    params=[
        pytest.param(case.values, marks=case.marks, id=case.id)
        # Of the recurrent ones also one without attention, whose products are others.
        for case in family_cases(DTYPES, quick=(*QUICK_FAMILIES, "mamba"))
    ],
)
def pair(request: pytest.FixtureRequest, tiny: Callable[..., Path]) -> Iterator[Pair]:
    name, dtype = request.param
    folder = tiny(name, dtype)
    with slowllm.load(folder, dtype=str(dtype), keep_resident=False, poison=True) as lm:
        yield lm, resident(folder, dtype)


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, VOCAB, shape, generator=generator) for shape in [(1, 7), (3, 13), (2, 30)]]


def test_logits_are_bit_equal_in_shared_sweeps(pair: Pair) -> None:
    lm, plain = pair
    with torch.no_grad():
        rides = lm.ride([lambda ids=ids: lm.model(ids).logits for ids in batches()])
        for ids, logits in zip(batches(), rides, strict=True):
            assert torch.equal(logits, plain(ids).logits)


def test_padded_batches_are_bit_equal(pair: Pair) -> None:
    lm, plain = pair
    ids = batches()[1]
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    with torch.no_grad():
        streamed = lm.model(ids, attention_mask=mask).logits
        assert torch.equal(streamed, plain(ids, attention_mask=mask).logits)


def test_greedy_generation_of_16_tokens_is_equal(pair: Pair) -> None:
    lm, plain = pair
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    rides = lm.ride([lambda ids=ids: lm.model.generate(ids, **options) for ids in batches()])
    for ids, tokens in zip(batches(), rides, strict=True):
        assert torch.equal(tokens, plain.generate(ids, **options))


def test_log_probs_equal_log_softmax_of_the_logits(pair: Pair) -> None:
    lm, plain = pair
    assert lm.model.get_output_embeddings().logit_transform is not None  # not by way of whole logits
    for ids in batches():
        targets = ids.roll(-1, 1)
        targets[0, -1] = -100
        found = slowllm.log_probs(lm.model, targets, input_ids=ids)
        with torch.no_grad():
            wanted = (
                plain(ids).logits.float().log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
            )
        assert torch.allclose(
            found, wanted.masked_fill(targets == -100, 0.0), rtol=0, atol=LOG_PROB_TOLERANCE
        )


def soft_prompt_gradient(model: Any, prompt: Tensor, ids: Tensor) -> Tensor:
    """One step of soft-prompt tuning with the default use_cache."""
    text = model.get_input_embeddings()(ids).detach()
    inputs = torch.cat([prompt[None].expand(len(ids), -1, -1).to(text.dtype), text], 1)
    logits = model(inputs_embeds=inputs).logits[:, len(prompt) : -1].float()
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    return torch.autograd.grad(loss, prompt)[0]


def test_soft_prompt_gradients_are_equal(pair: Pair) -> None:
    lm, plain = pair
    prompt = torch.randn(4, 64, generator=torch.Generator().manual_seed(2)).mul_(0.02).requires_grad_(True)
    rides = lm.ride([lambda ids=ids: soft_prompt_gradient(lm.model, prompt, ids) for ids in batches()])
    for ids, gradient in zip(batches(), rides, strict=True):
        wanted = soft_prompt_gradient(plain, prompt, ids)
        assert wanted.norm() > 0
        assert (gradient - wanted).norm() <= GRADIENT_TOLERANCE * wanted.norm()


def test_parameters_are_counted_as_transformers_counts_them(pair: Pair) -> None:
    lm, plain = pair
    assert lm.model.num_parameters() == plain.num_parameters()
    assert [name for name, _ in lm.model.named_parameters()] == [name for name, _ in plain.named_parameters()]


# Who casts does not ask what the block is: fewer kinds than elsewhere.
@pytest.mark.parametrize(
    ("name", "stored"),
    family_cases(
        [torch.bfloat16, torch.float16],
        quick=("bloom", "gpt2", "llama-2", "mixtral", "mamba"),
        few=("bloom",),
    ),
)
def test_half_precision_checkpoints_compute_in_fp32(
    name: str, stored: torch.dtype, tiny: Callable[..., Path]
) -> None:
    folder = tiny(name, stored)
    plain = resident(folder, torch.float32)
    prompt = torch.randn(4, 64).mul_(0.02).requires_grad_(True)
    with slowllm.load(folder, dtype="fp32", keep_resident=False, poison=True) as lm:
        assert lm.model.dtype == torch.float32
        for ids in batches():
            with torch.no_grad():
                logits, reference = lm.model(ids).logits, plain(ids).logits
            if name == "mamba":
                assert torch.allclose(logits, reference, rtol=0, atol=FOLDED_TOLERANCE)
            else:
                assert torch.equal(logits, reference)
            gradient, wanted = (soft_prompt_gradient(model, prompt, ids) for model in (lm.model, plain))
            assert (gradient - wanted).norm() <= GRADIENT_TOLERANCE * wanted.norm()


@pytest.mark.parametrize("model_type", ["t5", "zamba2", "bart"])
def test_an_architecture_that_does_not_fit_is_refused_by_name(model_type: str, tmp_path: Path) -> None:
    import transformers

    options: dict[str, Any] = {
        "vocab_size": VOCAB,
        "d_model": 64,
        "num_layers": 2,
        "num_heads": 4,
        "d_ff": 96,
    }
    if model_type == "bart":
        options = {
            "vocab_size": VOCAB, "d_model": 64, "encoder_layers": 3, "decoder_layers": 3, "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 96, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        }  # fmt: skip
    if model_type == "zamba2":
        options = {
            "vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
            "n_mamba_heads": 8, "mamba_headdim": 16, "mamba_ngroups": 1, "intermediate_size": 96,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "hybrid_layer_ids": [1, 3],
            "num_mem_blocks": 1, "pad_token_id": 0,
        }  # fmt: skip
    config = transformers.AutoConfig.for_model(model_type, **options)
    torch.manual_seed(0)
    decoder = model_type == "zamba2"
    kind = transformers.AutoModelForCausalLM if decoder else transformers.AutoModelForSeq2SeqLM
    kind.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ArchitectureError, match=r"(?i)t5|zamba2|bart"):
        slowllm.load(tmp_path)


def test_a_mapped_model_gives_the_bits_of_a_streamed_one(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path, torch.bfloat16)
    ids = batches()[2]
    logits = []
    for keep in (True, False):
        with slowllm.load(tmp_path, dtype="bf16", keep_resident=keep) as lm, torch.no_grad():
            assert bool(lm.plan.ring_bytes) != keep
            logits.append(lm.model(ids).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("name", sorted(MIXTURES))
def test_a_mixture_has_experts_and_its_tokens_take_different_ones(
    name: str, tiny: Callable[..., Path]
) -> None:
    plain = resident(tiny(name))
    assert experts_in(plain)
    taken: dict[str, set[int]] = {}

    def note(place: str, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        indices = next(
            t for t in (*inputs, *kwargs.values()) if isinstance(t, Tensor) and not t.is_floating_point()
        )
        taken.setdefault(place, set()).update(indices.flatten().tolist())

    for place in experts_in(plain):
        plain.get_submodule(place).register_forward_pre_hook(
            lambda _, inputs, kwargs, place=place: note(place, inputs, kwargs), with_kwargs=True
        )
    with torch.no_grad():
        plain(batches()[2])
    assert set(taken) == set(experts_in(plain))
    assert all(len(numbers) > 2 for numbers in taken.values())


def test_deepseek_chooses_by_groups_and_corrections(tiny: Callable[..., Path]) -> None:
    plain = resident(tiny("deepseek-v3"))
    dense, *mixtures = plain.model.layers
    assert not experts_in(dense)
    assert all(experts_in(block) for block in mixtures)
    router = mixtures[0].mlp.gate
    assert (router.num_experts, router.num_group, router.topk_group) == (16, 8, 4)
    assert router.e_score_correction_bias.abs().min() > 0
    assert plain.config.rope_parameters["rope_type"] == "yarn"
