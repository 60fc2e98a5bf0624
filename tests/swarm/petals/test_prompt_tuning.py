"""ptune and deep_ptune: prompts before every text are trained, saved and generated with, and nothing else is trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import slowllm
from slowllm.errors import InputError
from slowllm.modeling.soft_prompt_files import load_prompt
from slowllm.swarm.petals import InferenceSession
from tests.support.petals import FAMILIES, Case, greedy, ids

NUM_TOKENS = 3


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, tmp_path_factory.mktemp(request.param)


@pytest.fixture(scope="module", params=["ptune", "deep_ptune"])
def case(request: pytest.FixtureRequest, folder: tuple[str, Path]) -> Iterator[Case]:
    torch.manual_seed(5)
    with Case(*folder, tuning_mode=request.param, pre_seq_len=NUM_TOKENS) as opened:
        yield opened


@pytest.fixture(scope="module")
def model(case: Case) -> Any:
    return case.model


class Reference:
    """Plain transformers with the same prompt before every text; of a deep prompt, with its vectors before every block."""

    def __init__(self, model: Any, plain: Any) -> None:
        self.plain, self.prompt = plain, model.transformer.soft_prompt()
        self.leaves = [tensor.detach().requires_grad_(True) for tensor in self.prompt.tensors]
        base = getattr(plain, plain.base_model_prefix)
        self.blocks = next(m for m in base.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3)

    def _add(self, number: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden: Tensor = args[0] if args else kwargs["hidden_states"]
            if hidden.shape[1] > 1:  # of the first call
                vectors = self.leaves[1 + number]
                hidden = torch.cat([hidden[:, :NUM_TOKENS] + vectors, hidden[:, NUM_TOKENS:]], 1)
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return hook

    def __call__(self, work: Any, tokens: Tensor) -> Any:
        """Return what `work` returns for the embeddings of prompt and tokens."""
        text = self.plain.get_input_embeddings()(tokens)
        given = torch.cat([self.leaves[0].expand(len(text), -1, -1), text], 1)
        handles = []
        if self.prompt.kind == "deep":
            handles = [
                b.register_forward_pre_hook(self._add(n), with_kwargs=True) for n, b in enumerate(self.blocks)
            ]
        try:
            return work(given)
        finally:
            for handle in handles:
                handle.remove()


def test_a_text_follows_the_prompt_with_the_bits_of_plain_transformers(case: Case, model: Any) -> None:
    reference = Reference(model, case.plain)
    with torch.no_grad():
        expected = reference(lambda given: case.plain(inputs_embeds=given).logits, ids())
        assert torch.equal(model(ids()).logits, expected[:, NUM_TOKENS:])
        assert torch.equal(
            model(ids(), attention_mask=torch.ones_like(ids())).logits, expected[:, NUM_TOKENS:]
        )
        states = model.transformer(ids(), output_hidden_states=True).hidden_states
        assert {state.shape[1] for state in states} == {7}
        assert model.transformer(ids(), return_dict=False)[0].shape[1] == 7


@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 3}, {"do_sample": True}], ids=["greedy", "beams", "sampled"]
)
def test_generation_follows_the_prompt(case: Case, model: Any, settings: dict[str, Any]) -> None:
    reference = Reference(model, case.plain)
    torch.manual_seed(2)
    ours = model.generate(ids(), **{**greedy(5), **settings})
    torch.manual_seed(2)
    with torch.no_grad():
        theirs = reference(
            lambda given: case.plain.generate(inputs_embeds=given, **{**greedy(5), **settings}), ids()
        )
    assert torch.equal(ours[:, :7], ids())
    assert torch.equal(ours[:, 7:], theirs)


def test_a_session_begins_with_the_prompt(model: Any) -> None:
    whole = model.generate(ids(), **greedy(6))
    with model.inference_session(max_length=NUM_TOKENS + 7 + 5) as session:
        assert isinstance(session, InferenceSession)
        parts = [model.generate(ids(), **greedy(2)), model.generate(None, **greedy(4))]
        assert torch.equal(torch.cat(parts, 1), whole)
        assert session.position == NUM_TOKENS + 7 + 5
        session.position = NUM_TOKENS + 8
        assert torch.equal(model.generate(None, **greedy(3)), whole[:, 8:11])
        with pytest.raises(ValueError, match="Maximum length exceeded"):
            model.generate(None, **greedy(9))


def test_the_prompt_alone_is_trained_with_the_gradients_of_plain_transformers(case: Case, model: Any) -> None:
    reference = Reference(model, case.plain)
    labels = ids().clone()
    labels[0, :3] = -100
    model.train()
    model(input_ids=ids(), labels=labels).loss.backward()
    model.eval()
    full = torch.cat([torch.full((2, NUM_TOKENS), -100), labels], 1)
    full[:, NUM_TOKENS] = -100  # the first token of a text is not scored: what foretells it is the prompt
    reference(
        lambda given: case.plain(inputs_embeds=given, labels=full, use_cache=False).loss.backward(), ids()
    )
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("prompt_embeddings" in name for name in trained)
    grads = [parameter.grad for parameter in trained.values()]
    assert all(grad is not None for grad in grads)
    torch.testing.assert_close(grads[0], reference.leaves[0].grad, atol=1e-7, rtol=1e-4)
    if len(grads) > 1:
        expected = torch.stack([leaf.grad for leaf in reference.leaves[1:] if leaf.grad is not None], 1)
        torch.testing.assert_close(grads[1], expected.flatten(1), atol=1e-7, rtol=1e-4)
    model.zero_grad()


def test_a_prompt_is_saved_for_slowllm_and_read_again(
    case: Case, model: Any, folder: Any, tmp_path: Path
) -> None:
    base = model.transformer
    base.save_prompt(tmp_path)
    before = [tensor.detach().clone() for tensor in base.soft_prompt().tensors]
    saved, _ = load_prompt(tmp_path)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(before, saved.tensors, strict=True))
    with torch.no_grad():
        base.prompt_embeddings.weight.zero_()
    base.load_prompt(tmp_path)
    assert all(
        torch.equal(ours, theirs) for ours, theirs in zip(before, base.soft_prompt().tensors, strict=True)
    )
    state = base.prompt_embeddings.state_dict()
    assert list(state) == ["weight"]
    base.prompt_embeddings.load_state_dict(state)
    with slowllm.load(folder[1], dtype="float32", ram="3GiB", prompt=tmp_path) as lm:
        assert lm.num_virtual_tokens == NUM_TOKENS


def test_a_prompt_of_another_kind_is_not_read(case: Case, model: Any, folder: Any, tmp_path: Path) -> None:
    with Case(*folder, tuning_mode="ptune", pre_seq_len=2) as other:
        other.model.transformer.save_prompt(tmp_path)
    with pytest.raises(InputError, match="is a shallow prompt of 2 tokens, but the model tunes a"):
        model.transformer.load_prompt(tmp_path)


def test_without_a_prompt_there_is_nothing_to_save(folder: Any, tmp_path: Path) -> None:
    with Case(*folder) as case, pytest.raises(InputError, match="there is no prompt to save"):
        case.model.transformer.save_prompt(tmp_path)


def test_word_embeddings_get_plain_transformers_gradient(folder: Any) -> None:
    with Case(*folder) as case:
        model = case.model
        for one in (model.transformer.word_embeddings, case.plain.get_input_embeddings()):
            one.weight.requires_grad = True
        model(ids(), labels=ids()).loss.backward()
        case.plain(ids(), labels=ids(), use_cache=False).loss.backward()
        ours = model.transformer.word_embeddings.weight.grad
        assert torch.equal(ours, case.plain.get_input_embeddings().weight.grad)
