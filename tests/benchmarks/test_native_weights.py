"""What the benchmarks write in each format is read, and computes finite numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import slowllm
from benchmarks import deepseek_v4, make_checkpoint
from benchmarks.native_weights import FORMATS
from tests.support.damaged_checkpoints import spans_of

# Wide enough for groups of 128 numbers.
WIDE = {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4096,
    "max_position_embeddings": 2048,
}  # fmt: skip


@pytest.mark.parametrize("storage", sorted(FORMATS))
def test_a_checkpoint_in_each_format_is_read(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_checkpoint, "POOL_ELEMENTS", 50_001)
    kind, shape = "llama", WIDE
    # gpt-oss's format is of experts only.
    if storage == "mxfp4":
        kind, shape = "gpt_oss", {**shape, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32}
    monkeypatch.setitem(make_checkpoint.GEOMETRIES, "tiny", (kind, 8, shape))
    make_checkpoint.make_checkpoint("tiny", 2, tmp_path / "made", storage=storage)
    with slowllm.load(tmp_path / "made") as lm, torch.no_grad():
        logits = lm.model(torch.arange(5, 25)[None]).logits
    assert logits.isfinite().all()
    assert 0.1 < logits.float().std() < 10


@pytest.mark.parametrize(
    ("geometry", "storage"),
    [
        ("gpt-oss-120b", "mxfp4"),
        ("deepseek-v3", "fp8"),
        ("qwen3-235b", "fp8"),
        ("deepseek-v4-flash", "fp4"),
        ("llama-70b", "bf16"),
        ("tiny", "bf16"),
    ],
)
def test_the_native_format_is_that_in_which_a_model_is_published(geometry: str, storage: str) -> None:
    assert make_checkpoint.format_of(geometry, "native") == storage
    assert make_checkpoint.format_of(geometry, "fp8") == "fp8"


# DeepSeek-V4 with blocks of all kinds of attention, and of both kinds of routers.
NARROW = {
    "vocab_size": 300, "hidden_size": 128, "moe_intermediate_size": 128, "num_attention_heads": 4, "head_dim": 64,
    "qk_rope_head_dim": 16, "q_lora_rank": 128, "o_groups": 2, "o_lora_rank": 64, "n_routed_experts": 12,
    "num_experts_per_tok": 3, "num_hash_layers": 2, "index_n_heads": 2, "index_head_dim": 32, "index_topk": 4,
    "hc_mult": 2, "max_position_embeddings": 4096,
}  # fmt: skip


@pytest.fixture
def deepseek(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(make_checkpoint, "POOL_ELEMENTS", 50_001)
    monkeypatch.setattr(make_checkpoint, "SHARD_BYTES", 300_000)
    monkeypatch.setitem(
        make_checkpoint.GEOMETRIES, "deepseek-v4-flash", ("deepseek_v4", 43, {**deepseek_v4.FLASH, **NARROW})
    )
    make_checkpoint.make_checkpoint("deepseek-v4-flash", 4, tmp_path / "made", storage="native")
    return tmp_path / "made"


def test_deepseek_v4_is_written_as_published(deepseek: Path) -> None:
    spans = spans_of(deepseek)
    dtypes = {
        "embed.weight": "BF16", "head.weight": "BF16", "norm.weight": "BF16", "hc_head_fn": "F32",
        "layers.0.attn.attn_sink": "F32", "layers.0.attn.kv_norm.weight": "BF16", "layers.0.attn.wq_a.weight": "F8_E4M3",
        "layers.0.attn.wq_a.scale": "F8_E8M0", "layers.0.hc_attn_base": "F32", "layers.1.ffn.gate.tid2eid": "I64",
        "layers.2.ffn.gate.weight": "BF16", "layers.2.ffn.gate.bias": "F32", "layers.2.attn.indexer.compressor.ape": "F32",
        "layers.2.attn.indexer.weights_proj.weight": "BF16", "layers.3.attn.compressor.wkv.weight": "BF16",
        "layers.3.ffn.experts.11.w2.weight": "I8", "layers.3.ffn.experts.11.w2.scale": "F8_E8M0",
        "layers.3.ffn.shared_experts.w1.weight": "F8_E4M3",
    }  # fmt: skip
    assert {name: spans[name].dtype for name in dtypes} == dtypes
    settings = json.loads((deepseek / "config.json").read_text())
    published = {**deepseek_v4.FLASH, **NARROW}
    assert {name: settings[name] for name in published} == published
    assert settings["quantization_config"]["scale_fmt"] == "ue8m0"


def test_codes_of_an_expert_of_deepseek_v4_lie_side_by_side_and_so_do_its_scales(deepseek: Path) -> None:
    spans = spans_of(deepseek)
    assert len(list(deepseek.glob("*.safetensors"))) > 1
    for block in range(4):
        for expert in range(12):
            for part in ("weight", "scale"):
                first, second, third = (
                    spans[f"layers.{block}.ffn.experts.{expert}.{matrix}.{part}"]
                    for matrix in ("w1", "w2", "w3")
                )
                assert first.path == second.path == third.path
                assert first.offset + first.num_bytes == second.offset
                assert second.offset + second.num_bytes == third.offset


def test_deepseek_v4_is_read_with_experts_chosen_unequally(deepseek: Path) -> None:
    with slowllm.load(deepseek) as lm, torch.no_grad():
        logits = lm.model(torch.arange(5, 45)[None]).logits
        tables = [lm.model.model.layers[block].mlp.gate.tid2eid for block in (0, 1)]
    assert logits.isfinite().all()
    assert 0.1 < logits.float().std() < 10
    for table in tables:
        assert (table.sort(1).values.diff(dim=1) > 0).all(), "no expert twice"
        counts = table.flatten().bincount(minlength=12)
        assert 1.5 * counts.min() < counts.max()
    assert not torch.equal(*tables)


@pytest.mark.parametrize("storage", ["mxfp4", "compressed-int4"])
def test_a_format_that_codes_nothing_of_a_model_is_refused(storage: str, tmp_path: Path) -> None:
    """Its config.json would name a format that no tensor is in."""
    with pytest.raises(
        SystemExit, match=f"tiny has no weights that {storage} codes; choose another --format"
    ):
        make_checkpoint.make_checkpoint("tiny", 2, tmp_path / "out", storage=storage)
    assert not (tmp_path / "out").exists()
