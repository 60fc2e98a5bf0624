"""A streamed weight that is read outside of its visit is refused, and `lm.weights` returns it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import slowllm
from slowllm.errors import InputError, UnsupportedError
from slowllm.modeling import layout
from tests.support.families import family_cases, resident, save_tiny
from tests.support.stores import make_store

Tiny = Callable[..., Path]

READS: dict[str, Callable[[torch.Tensor], Any]] = {
    "linear": lambda weight: F.linear(torch.ones(2, weight.shape[-1]), weight),
    "norm": lambda weight: weight.norm(),
    "plus": lambda weight: weight + 1,
    "of a view": lambda weight: weight.data.T[:1].sum(),
    "item": lambda weight: weight[0, 0].item(),
    "float": lambda weight: float(weight[0, 0]),
    "numpy": lambda weight: weight.numpy(),
    "tolist": lambda weight: weight.tolist(),
    "cpu": lambda weight: weight.cpu(),
    "clone": lambda weight: weight.clone(),
    "write": lambda weight: weight.zero_(),
    "equal": lambda weight: torch.equal(weight, weight),
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.self_attn.q_proj.weight"])
def test_a_read_outside_of_a_visit_names_the_way(name: str, read: str, tiny: Tiny) -> None:
    message = rf"{name} has values only.*lm\.weights\('{name}'\)"
    with (
        slowllm.load(tiny("llama-2"), keep_resident=False) as lm,
        torch.no_grad(),
        pytest.raises(UnsupportedError, match=message),
    ):
        READS[read](lm.model.get_parameter(name))


def test_what_is_known_without_a_visit_can_be_asked(tiny: Tiny) -> None:
    plain = resident(tiny("llama-2"))
    with slowllm.load(tiny("llama-2"), keep_resident=False) as lm:
        assert lm.model.num_parameters() == plain.num_parameters()
        for (name, ours), theirs in zip(lm.model.named_parameters(), plain.parameters(), strict=True):
            assert (ours.shape, ours.dtype, ours.numel()) == (theirs.shape, theirs.dtype, theirs.numel())
            assert not ours.requires_grad
            assert name in repr(ours) or not ours.is_meta
        assert lm.model.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize(("name", "granularity"), family_cases(["blocks", "leaves"]))
def test_weights_are_those_of_the_resident_model(
    name: str, granularity: Any, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "MIN_LEAF_BYTES", 0)
    monkeypatch.setattr(layout, "MIN_CHUNK_BYTES", 4096)
    plain = resident(tiny(name))
    with slowllm.load(
        tiny(name), dtype="fp32", keep_resident=False, granularity=granularity, poison=True
    ) as lm:
        for key, weight in plain.named_parameters():
            found = lm.weights(key)
            assert found.dtype == weight.dtype
            assert torch.equal(found, weight), key
        with pytest.raises(InputError, match="has no parameter 'nobody'"):
            lm.weights("nobody")


def test_a_copy_is_in_the_compute_dtype_and_keeps_its_values(tiny: Tiny) -> None:
    folder = tiny("llama-2", torch.bfloat16)
    plain = resident(folder)  # in float32
    name = "model.layers.0.mlp.down_proj.weight"
    with slowllm.load(folder, dtype="fp32", keep_resident=False) as lm, torch.no_grad():
        found = lm.weights(name)
        lm.model(torch.ones(1, 3, dtype=torch.long))  # other weights pass through the buffer
        assert torch.equal(found, plain.get_parameter(name))


def test_a_coded_weight_comes_decoded(tmp_path: Path, tiny: Tiny) -> None:
    folder = tiny("llama-2", torch.bfloat16)
    store = tmp_path / "store"
    make_store(folder, store, "lossless")
    name = "model.layers.0.mlp.down_proj.weight"
    with slowllm.load(store, dtype="bf16", keep_resident=False) as lm:
        assert torch.equal(lm.weights(name), resident(folder, torch.bfloat16).get_parameter(name))


def test_a_head_of_its_own_under_a_config_that_ties_it(tmp_path: Path) -> None:
    save_tiny("llama-2", tmp_path, torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    ids = torch.tensor([[5, 6, 7]])
    plain = resident(tmp_path)
    with slowllm.load(tmp_path, dtype="fp32", keep_resident=False) as lm, torch.no_grad():
        assert torch.equal(lm.model(ids).logits, plain(ids).logits)
        assert torch.equal(lm.weights("lm_head.weight"), plain.get_output_embeddings().weight)
        assert torch.equal(lm.weights("model.embed_tokens.weight"), plain.get_input_embeddings().weight)
