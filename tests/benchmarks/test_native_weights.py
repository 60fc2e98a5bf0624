"""What the benchmarks write in each format is read, and computes finite numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import slowllm
from benchmarks import make_checkpoint
from benchmarks.native_weights import FORMATS

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
        ("llama-70b", "bf16"),
        ("tiny", "bf16"),
    ],
)
def test_the_native_format_is_that_in_which_a_model_is_published(geometry: str, storage: str) -> None:
    assert make_checkpoint.format_of(geometry, "native") == storage
    assert make_checkpoint.format_of(geometry, "fp8") == "fp8"
