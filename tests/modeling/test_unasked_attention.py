"""Attention weights that nobody asked for do not wait with their riders for experts; asked for, they are transformers' own."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

import slowllm
from slowllm.modeling.streamed_experts import StreamedExperts
from tests.support.families import resident, save_tiny

IDS = torch.arange(5, 35).view(2, 15)
# Attention weights of one of these: no other tensor of four dimensions ends so.
NUM_RIDERS, LENGTH = 3, 15


def num_scores() -> int:
    """Count the tensors of attention weights that are alive."""
    found = (one for one in gc.get_objects() if isinstance(one, torch.Tensor))
    return sum(
        one.dim() == 4 and one.shape[1] > 1 and one.shape[-2] == LENGTH == one.shape[-1] for one in found
    )


@pytest.mark.parametrize("name", ["gpt-oss", "mixtral", "deepseek-v3"])
def test_riders_that_wait_for_experts_hold_no_attention_weights(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(name, tmp_path, torch.float32)
    alive, serve = list[tuple[int, int]](), StreamedExperts.serve

    def counting(self: StreamedExperts, items: Any) -> Any:
        alive.append((len(items), num_scores()))
        return serve(self, items)

    monkeypatch.setattr(StreamedExperts, "serve", counting)
    with slowllm.load(tmp_path, dtype="float32", granularity="experts", resident=False) as lm:
        lm.model.set_attn_implementation("eager")
        with torch.no_grad():
            lm.ride([lambda: lm.model(IDS, use_cache=False) for _ in range(NUM_RIDERS)])
    assert alive
    assert all(counts == (NUM_RIDERS, 0) for counts in alive), alive


@pytest.mark.parametrize("name", ["gpt-oss", "mixtral", "deepseek-v3"])
def test_attention_weights_that_are_asked_for_come(name: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path, torch.float32)
    plain: Any = resident(tmp_path, torch.float32)
    with slowllm.load(tmp_path, dtype="float32", granularity="experts", resident=False) as lm:
        for model in (plain, lm.model):
            model.set_attn_implementation("eager")
        with torch.no_grad():
            lm.model(IDS)
            wanted, found = (model(IDS, output_attentions=True).attentions for model in (plain, lm.model))
        assert len(wanted) == len(found) == lm.config.num_hidden_layers
        assert all(torch.equal(one, other) for one, other in zip(wanted, found, strict=True))


def test_hooks_of_others_see_attention_weights(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path, torch.float32)
    seen = []
    with slowllm.load(tmp_path, dtype="float32", granularity="experts", resident=False) as lm:
        lm.model.set_attn_implementation("eager")
        attention = lm.model.get_decoder().layers[0].self_attn
        attention.register_forward_hook(lambda module, args, output: seen.append(output[1].shape))
        with torch.no_grad():
            lm.model(IDS)
    assert [shape[-2:] for shape in seen] == [(15, 15)]
