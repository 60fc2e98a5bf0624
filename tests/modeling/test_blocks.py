"""Which list of a model is the list of its blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from slowllm.errors import ArchitectureError
from slowllm.modeling.blocks import find_blocks
from slowllm.modeling.skeleton import build_skeleton
from tests.support.families import FAMILIES, VOCAB

TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": VOCAB, "num_hidden_layers": 3,
}  # fmt: skip


def skeleton(model_type: str, **config: Any) -> PreTrainedModel:
    return build_skeleton(AutoConfig.for_model(model_type, **config), Path("nowhere"), torch.float32)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_one_list_of_blocks(name: str) -> None:
    model_type, config = FAMILIES[name]
    model = skeleton(model_type, **config)
    _, blocks = find_blocks(model)
    assert len(blocks) == model.config.get_text_config().num_hidden_layers


@pytest.mark.parametrize("depth", [2, 3])
def test_a_tower_as_deep_as_the_text_model_is_not_taken_for_it(depth: int) -> None:
    vision = {
        "hidden_size": 32, "output_channels": 16, "num_hidden_layers": depth, "num_attention_heads": 2,
        "image_size": 64, "patch_size": 16, "mlp_dim": 48, "global_attn_indexes": [1], "window_size": 2,
    }  # fmt: skip
    model = skeleton("got_ocr2", text_config={"model_type": "qwen2", **TEXT}, vision_config=vision)
    name, blocks = find_blocks(model)
    assert name == "model.language_model.layers"
    assert len(blocks) == 3
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 3]
    assert len(lists) == depth - 1, "the tower's list is as long"


def test_two_lists_of_the_text_model_are_refused() -> None:
    model = skeleton("llama", **TEXT)
    model.model.other_layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    with pytest.raises(
        ArchitectureError, match=r"the lists of that length are: model.layers, model.other_layers"
    ):
        find_blocks(model)


def test_blocks_that_share_weights_are_refused() -> None:
    model = skeleton("llama", **TEXT)
    model.model.layers[2].mlp = model.model.layers[0].mlp
    with pytest.raises(ArchitectureError, match="blocks 0 and 2 share weights"):
        find_blocks(model)
