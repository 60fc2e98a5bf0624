"""Checkpoints in FBGEMM's float8 are read as they are, those of Llama 4's experts included."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import slowllm
from slowllm.errors import CheckpointError
from slowllm.modeling.native.fbgemm import find
from slowllm.storage.spans import Span
from tests.support.families import save_tiny
from tests.support.packed_checkpoints import packed_pair

IDS = torch.arange(5, 25)[None]
SETTINGS: dict[str, Any] = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}


def fbgemm_layer(name: str, weight: torch.Tensor) -> tuple[Mapping[str, torch.Tensor], torch.Tensor]:
    """Return the arrays of a weight as transformers saves them, and the dequantised weight."""
    along = -1 if weight.dim() == 2 else -2  # experts are stored with the outputs behind
    scales = weight.float().abs().amax(along, keepdim=True).clamp(min=1e-12) / 448
    codes = (weight.float() / scales).clamp(-448, 448).to(torch.float8_e4m3fn)
    stored = scales.transpose(1, 2) if name.endswith("down_proj") and weight.dim() == 3 else scales
    arrays = {name: codes, f"{name}_scale": stored}
    if weight.dim() == 2:
        arrays[f"{name.removesuffix('weight')}input_scale_ub"] = torch.tensor([1200.0])
    return arrays, codes.float() * scales


def save_llama_4(folder: Path) -> None:
    config = AutoConfig.for_model(
        "llama4_text", hidden_size=64, intermediate_size=128, intermediate_size_mlp=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=307, num_local_experts=4,
        num_experts_per_tok=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


@pytest.mark.parametrize("name", ["llama-2", "mixtral", "llama-4"])
def test_logits_are_those_of_the_dequantised_model(name: str, tmp_path: Path) -> None:
    if name == "llama-4":
        save_llama_4(tmp_path / "plain")
    else:
        save_tiny(name, tmp_path / "plain", torch.bfloat16)
    folder, back = packed_pair(tmp_path, fbgemm_layer, SETTINGS)
    for dtype, resident in (("bfloat16", True), ("bfloat16", False), ("float32", False)):
        model = AutoModelForCausalLM.from_pretrained(
            back, dtype=getattr(torch, dtype), experts_implementation="eager"
        )
        with slowllm.load(folder, dtype=dtype, resident=resident) as lm, torch.no_grad():
            assert torch.equal(lm.model(IDS).logits, model(IDS).logits)


def spans_of(weight: tuple[int, ...], scale: tuple[int, ...] | None, dtype: str = "F32") -> dict[str, Span]:
    found = {"a.weight": Span("a.weight", Path("one"), "F8_E4M3", weight, 0, torch.Size(weight).numel())}
    if scale is not None:
        num_bytes = 4 * torch.Size(scale).numel()
        found["a.weight_scale"] = Span("a.weight_scale", Path("one"), dtype, scale, 0, num_bytes)
    return found


@pytest.mark.parametrize(
    ("weight", "scale", "dtype", "message"),
    [
        ((8, 16), None, "F32", r"a\.weight is stored as F8_E4M3 but has no scale"),
        (
            (8, 16),
            (16,),
            "F32",
            r"a\.weight_scale is F32 of shape \[16\], which is not one scale for each output",
        ),
        ((8, 16), (1, 1), "F32", r"a\.weight_scale is F32 of shape \[1, 1\], which is not one scale"),
        (
            (2, 8, 16),
            (2, 8, 1),
            "F32",
            r"a\.weight_scale is F32 of shape \[2, 8, 1\], which is not one scale",
        ),
        (
            (2, 2, 8, 16),
            (2, 2, 8, 1),
            "F32",
            r"a\.weight_scale is F32 of shape \[2, 2, 8, 1\], which is not one",
        ),
        ((16,), (1,), "F32", r"a\.weight_scale is F32 of shape \[1\], which is not one scale"),
        ((8, 16), (8, 1), "I32", r"a\.weight_scale is I32 of shape \[8, 1\], which are no scales"),
    ],
)
def test_scales_that_do_not_go_with_their_weight_are_refused(
    weight: tuple[int, ...], scale: tuple[int, ...] | None, dtype: str, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        find(SETTINGS, spans_of(weight, scale, dtype))


def test_a_config_that_names_another_format_is_refused(tmp_path: Path) -> None:
    save_tiny("llama-2", tmp_path / "plain", torch.bfloat16)
    folder, _ = packed_pair(tmp_path, fbgemm_layer, SETTINGS)
    config = json.loads((folder / "config.json").read_text())
    for method in ("gptq", "bitsandbytes"):
        config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 128}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(
            CheckpointError, match="is stored as F8_E4M3, and the checkpoint has no scales for it"
        ):
            slowllm.load(folder)
