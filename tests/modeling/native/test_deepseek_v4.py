"""DeepSeek-V4 in its published layout, experts in float4 and the rest in float8 with exponents, is read as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

import slowllm
from tests.support.damaged_checkpoints import spans_of
from tests.support.native_checkpoints import fp8_settings, save_dequantised, store_fp4, store_fp8

IDS = torch.arange(5, 25)[None]
BLOCK = (8, 16)
HEAVY, SPARSE = "heavily_compressed_attention", "compressed_sparse_attention"
# Of the attention and of the experts that all tokens share, these are in float8; the compressors and all else stay plain.
IN_FLOAT8 = (
    "attn.wq_a.",
    "attn.wq_b.",
    "attn.wkv.",
    "attn.wo_a.",
    "attn.wo_b.",
    "indexer.wq_b.",
    "shared_experts.",
)


def tiny_model() -> torch.nn.Module:
    config = AutoConfig.for_model(
        "deepseek_v4", vocab_size=259, hidden_size=64, moe_intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, head_dim=32, q_lora_rank=32, num_experts_per_tok=2, n_routed_experts=4,
        max_position_embeddings=256, hc_mult=2, sliding_window=8, o_groups=2, o_lora_rank=32, index_n_heads=2,
        index_head_dim=32, index_topk=4, partial_rotary_factor=0.5, layer_types=[HEAVY, SPARSE, HEAVY],
        mlp_layer_types=["hash_moe", "moe", "moe"], compress_rates={SPARSE: 4, HEAVY: 8},
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.dim() == 1:
                tensor.add_(torch.randn_like(tensor) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):
                buffer.copy_(torch.randint_like(buffer, 4))
    return model.bfloat16()


def stored(name: str, weight: Tensor) -> Mapping[str, Tensor]:
    if ".ffn.experts." in name:
        return store_fp4(suffix=".scale")(name, weight)
    if any(part in name for part in IN_FLOAT8):
        return store_fp8(BLOCK, torch.float8_e8m0fnu, ".scale")(name, weight)
    return {name: weight}


def published(folder: Path) -> Path:
    """Save a tiny model under its published names, which have no prefix; return the folder."""
    tiny_model().save_pretrained(folder / "plain")
    tensors: dict[str, Tensor] = {}
    for name, weight in load_file(folder / "plain" / "model.safetensors").items():
        own = stored(name.removeprefix("model."), weight)
        tensors |= {key: value.contiguous() for key, value in own.items()}
    out = folder / "published"
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "plain" / "config.json").read_text())
    settings = {**fp8_settings(BLOCK), "scale_fmt": "ue8m0"}
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return out


def dequantised(folder: Path, out: Path) -> Path:
    """Return the folder of the plain checkpoint that transformers' own operation dequantises one to."""
    tensors, weights = load_file(folder / "model.safetensors"), {}
    for name, tensor in tensors.items():
        if (scales := tensors.get(f"{name.removesuffix('.weight')}.scale")) is not None:
            weights[name] = Fp8Dequantize(None)._dequantize_one(tensor, scales, torch.float32)
        elif not name.endswith(".scale"):
            weights[name] = tensor
    return save_dequantised(weights, folder, out)


@pytest.mark.parametrize(("dtype", "resident"), [("bfloat16", False), ("float32", True)])
def test_logits_are_those_of_the_dequantised_model(dtype: str, resident: bool, tmp_path: Path) -> None:
    folder = published(tmp_path)
    spans = spans_of(folder)
    assert spans["layers.1.ffn.experts.2.w1.weight"].dtype == "I8"
    assert spans["layers.1.ffn.experts.2.w1.scale"].dtype == "F8_E8M0"
    assert spans["layers.1.attn.wq_a.weight"].dtype == "F8_E4M3"
    model = AutoModelForCausalLM.from_pretrained(
        dequantised(folder, tmp_path / "back"), dtype=getattr(torch, dtype), experts_implementation="eager"
    )
    with torch.no_grad(), slowllm.load(folder, dtype=dtype, resident=resident) as lm:
        assert torch.equal(lm.model(IDS).logits, model(IDS).logits)
