"""What the benchmarks write in each format is read, and computes finite numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import slowllm
from benchmarks import make_checkpoint
from benchmarks.native_weights import FORMATS


@pytest.mark.parametrize("storage", sorted(FORMATS))
def test_a_checkpoint_in_each_format_is_read(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_checkpoint, "POOL_ELEMENTS", 50_001)
    make_checkpoint.make_checkpoint("tiny", 2, tmp_path / "made", storage=storage)
    with slowllm.load(tmp_path / "made") as lm, torch.no_grad():
        logits = lm.model(torch.arange(5, 25)[None]).logits
    assert logits.isfinite().all()
    assert 0.1 < logits.float().std() < 10
