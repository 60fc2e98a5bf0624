"""Folders that are not quite as slowllm expects: what transformers' `from_pretrained` makes of one is made here, too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import slowllm
from slowllm.errors import CheckpointError
from tests.support.families import FAMILIES, VOCAB, resident, save_tiny

Tiny = Callable[..., Path]
IDS = torch.randint(5, VOCAB, (2, 9), generator=torch.Generator().manual_seed(2))


def same_as_plain(folder: Path, dtype: torch.dtype = torch.float32) -> bool:
    with slowllm.load(folder, dtype=str(dtype)) as lm, torch.no_grad():
        return bool(torch.equal(lm.model(IDS).logits, resident(folder, dtype)(IDS).logits))


def add_to_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_a_single_file_counts_beside_an_older_index(tmp_path: Path) -> None:
    save_tiny("llama-2", tmp_path / "old")
    save_tiny("llama-2", tmp_path / "new", shard="1GB", initializer_range=0.3)
    shutil.copy(tmp_path / "new" / "model.safetensors", tmp_path / "old")
    assert same_as_plain(tmp_path / "old")
    for shard in (tmp_path / "old").glob("model-*.safetensors"):
        shard.unlink()
    assert same_as_plain(tmp_path / "old")


@pytest.mark.parametrize("name", ["deepseek-v3", "llama-2"])
def test_blocks_that_predict_further_tokens_are_left_aside(name: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path, shard="1GB")
    count = int(FAMILIES[name][1]["num_hidden_layers"])
    weights = load_file(tmp_path / "model.safetensors")
    last = {k: v for k, v in weights.items() if f"layers.{count - 1}." in k}
    more = {k.replace(f"layers.{count - 1}.", f"layers.{count}."): v.clone() for k, v in last.items()}
    save_file({**weights, **more}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    add_to_config(tmp_path, num_nextn_predict_layers=0)
    with pytest.raises(CheckpointError, match="belongs to a block beyond the 3 that config"):
        slowllm.load(tmp_path)
    add_to_config(tmp_path, num_nextn_predict_layers=1)
    assert same_as_plain(tmp_path)


@pytest.mark.parametrize("name", ["gpt-oss", "llama-2", "bloom"])
def test_norms_that_transformers_keeps_in_fp32_beside_fp16_are_kept(name: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path)
    assert same_as_plain(tmp_path, torch.float16)
