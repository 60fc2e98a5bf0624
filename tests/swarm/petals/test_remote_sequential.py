"""Blocks at servers are one module that is called, indexed and sliced, with the bits of plain transformers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from slowllm.errors import InputError, UnsupportedError
from slowllm.swarm.petals import ClientConfig, RemoteSequential
from slowllm.swarm.petals.base_model import distribute
from tests.support.petals import Case, embedded, ids

Pair = tuple[Any, Any]


def test_the_parts_of_a_model_under_petals_names_compute_what_the_model_computes(pair: Pair) -> None:
    model, plain = pair
    base = model.transformer
    with torch.no_grad():
        states = plain(ids(), output_hidden_states=True, use_cache=False)
        hidden = embedded(model, ids())
        assert torch.equal(hidden, states.hidden_states[0])
        assert torch.equal(base.ln_f(base.h(hidden)), states.hidden_states[-1])
        assert torch.equal(model.lm_head(base.ln_f(base.h(hidden))), states.logits)
        assert torch.equal(base(ids()).last_hidden_state, states.hidden_states[-1])
        assert torch.equal(model(ids()).logits, states.logits)
    assert base.word_embeddings.weight.shape == plain.get_input_embeddings().weight.shape


def test_blocks_are_indexed_sliced_and_iterated(pair: Pair) -> None:
    model, _ = pair
    blocks, hidden = model.transformer.h, embedded(model, ids())
    assert isinstance(blocks, RemoteSequential)
    whole, one_by_one = blocks(hidden), hidden
    for block in blocks:
        one_by_one = block(one_by_one)
    assert torch.equal(one_by_one, whole)
    assert (len(blocks), len(blocks[1:]), len(blocks[-1])) == (3, 2, 1)
    assert torch.equal(blocks[1:](blocks[0](hidden)), whole)
    assert torch.equal(blocks[1:][1](blocks[:2](hidden)), whole)
    assert repr(blocks[1:]) == "RemoteSequential(blocks 1:3)"
    assert blocks(hidden[:, :0]).shape == hidden[:, :0].shape
    assert blocks(hidden.double()).dtype == torch.float64
    with pytest.raises(InputError, match="the slice has step 2"):
        blocks[::2]


def test_gradients_pass_through_blocks_as_through_plain_ones(pair: Pair) -> None:
    model, plain = pair

    def gradient(run: Any) -> torch.Tensor:
        hidden = embedded(model, ids()).requires_grad_(True)
        (run(hidden) ** 2).sum().backward()
        assert hidden.grad is not None
        return hidden.grad

    base = getattr(plain, plain.base_model_prefix)
    caught: list[Any] = []
    last = next(
        module for module in base.modules() if isinstance(module, nn.ModuleList) and len(module) == 3
    )[-1]
    handle = last.register_forward_hook(lambda module, args, output: caught.append(output))

    def plain_blocks(hidden: torch.Tensor) -> torch.Tensor:
        layernorm = getattr(base, "word_embeddings_layernorm", None)
        if layernorm is not None:  # the norm is passed by on the way in
            base.word_embeddings_layernorm = nn.Identity()
        try:
            base(inputs_embeds=hidden, use_cache=False)
        finally:
            if layernorm is not None:
                base.word_embeddings_layernorm = layernorm
        output = caught.pop()
        return output if isinstance(output, torch.Tensor) else output[0]

    expected = gradient(plain_blocks)
    handle.remove()
    blocks = model.transformer.h
    assert torch.equal(gradient(blocks), expected)
    assert torch.equal(gradient(lambda hidden: blocks[1:](blocks[:1](hidden))), expected)


def test_deep_prompts_are_added_before_each_block_and_get_gradients(pair: Pair) -> None:
    model, _ = pair
    blocks, hidden = model.transformer.h, embedded(model, ids())
    prompts = torch.randn(3, 2, 4, hidden.shape[-1], generator=torch.Generator().manual_seed(1)) * 0.1

    def by_hand(prompts: torch.Tensor) -> torch.Tensor:
        state = hidden
        for block, own in zip(blocks, prompts, strict=True):
            state = block(torch.cat([state[:, :4] + own, state[:, 4:]], 1))
        return state

    ours, theirs = (prompts.clone().requires_grad_(True) for _ in range(2))
    output, expected = blocks(hidden, prompts=ours), by_hand(theirs)
    assert torch.equal(output, expected)
    (output**2).sum().backward()
    (expected**2).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert torch.equal(
        blocks(hidden, prompts=prompts[:, :1]), blocks(hidden, prompts=prompts[:, :1].expand(-1, 2, -1, -1))
    )
    for wrong in (prompts[:2], prompts[..., 1:], prompts.repeat(1, 1, 2, 1), prompts[0]):
        with pytest.raises(InputError, match=r"prompts of shape .* do not fit inputs of shape"):
            blocks(hidden, prompts=wrong)


def test_what_blocks_cannot_take_is_refused(pair: Pair) -> None:
    model, _ = pair
    blocks, hidden = model.transformer.h, embedded(model, ids())
    with pytest.raises(InputError, match=r"inputs of shape \[2, 7, 63\] and torch.float32 were given"):
        blocks(hidden[..., 1:])
    with pytest.raises(InputError, match="hypo_ids reorder the rows of a session"):
        blocks(hidden, hypo_ids=torch.tensor([1, 0]))
    with (
        blocks[1:].inference_session(max_length=3) as session,
        pytest.raises(InputError, match="the session is of blocks 1:3, but these are 0:3"),
        blocks.use_session(session),
    ):
        pass
    for name in ("dht", "sequence_manager"):
        with pytest.raises(InputError, match=f"{name} is not taken"):
            RemoteSequential(model.config, **{name: object()})


def test_a_family_that_adds_positions_does_not_pretend_to_have_a_norm_only(tmp_path: Any) -> None:
    with Case("gpt2", tmp_path) as case:
        model = case.model
        with pytest.raises(UnsupportedError, match="does more between its embeddings and its first block"):
            model.transformer.word_embeddings_layernorm  # noqa: B018
        with torch.no_grad():
            assert torch.equal(model(ids()).logits, case.plain(ids()).logits)


def test_a_norm_without_a_known_name_is_not_guessed(tmp_path: Any) -> None:
    with Case("llama-2", tmp_path) as case:
        base = case.model.transformer
        base._modules["another"] = base._modules.pop("norm")
        with pytest.raises(UnsupportedError, match="the norm behind its last block has no known name"):
            base.ln_f  # noqa: B018


def test_a_model_that_owns_its_blocks_itself_is_refused() -> None:
    lm: Any = SimpleNamespace(layout=SimpleNamespace(blocks_name="h"), model=nn.Module())
    with pytest.raises(UnsupportedError, match="Module: owns its blocks itself"):
        distribute(lm, ClientConfig())
