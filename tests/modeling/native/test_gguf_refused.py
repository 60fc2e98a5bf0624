"""GGUF files whose metadata and tensors do not go together are refused by name, and damage never ends otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import slowllm
from slowllm.errors import CheckpointError, SlowLLMError
from slowllm.modeling.native import gguf as gguf_format
from slowllm.storage.codecs import layout_constants
from slowllm.storage.spans import Span
from tests.support.gguf_checkpoints import HIDDEN, write_gguf
from tests.support.properties import num_examples

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": (
        {"metadata": {"general.architecture": "mamba"}, "family": "llama"}, r"architecture 'mamba' is not read from GGUF; there are llama",
    ),
    "heads by block": (
        {"metadata": {"llama.attention.head_count": [4, 4]}},
        r"llama.attention.head_count is \[4, 4\], where one number for all blocks is read",
    ),
    "heads": (
        {"family": "bloom", "metadata": {"bloom.attention.head_count": 5}},
        r"blk.0.attn_qkv.weight of shape \[768, 256\] is not divided by 5 heads, of which the metadata tells",
    ),
    "falcon": (
        {"family": "falcon", "metadata": {"falcon.attention.head_count_kv": 8}},
        "is a Falcon with 4 heads for 8 heads of keys, which do not divide them",
    ),
    "falcon of other rows": (
        {"family": "falcon-40b", "metadata": {"falcon.attention.head_count_kv": 3, "falcon.attention.head_count": 6}},
        r"blk.0.attn_qkv.weight of shape \[512, 256\] is not divided by 6 heads|cannot be used",
    ),
    "metadata": ({"metadata": {"llama.block_count": 0}}, "names 0 blocks"),
    "unusable metadata": ({"metadata": {"llama.embedding_length": 0.5}}, "cannot be used|needs"),
    "many blocks": (
        {"family": "gemma3", "metadata": {"gemma3.block_count": 1 << 31}},
        r"m\.gguf: names 2,147,483,648 blocks \(num_hidden_layers\); there are at most 10,000",
    ),
    "no heads of keys": (
        {"metadata": {"llama.attention.head_count_kv": 0}}, r"m\.gguf: llama\.attention\.head_count_kv is 0, which is not positive",
    ),
    "no base": ({"metadata": {"llama.rope.freq_base": 0.0}}, r"m\.gguf: llama\.rope\.freq_base is 0\.0, which is not positive"),
    "NaN": (
        {"metadata": {"llama.rope.freq_base": float("nan")}},
        r"m\.gguf: llama\.rope\.freq_base is nan, which is no number to compute with",
    ),
    "infinity": (
        {"metadata": {"llama.attention.layer_norm_rms_epsilon": float("inf")}}, r"m\.gguf: llama\.attention\.\w+ is inf, which is no",
    ),
    "no epsilon": (
        {"metadata": {"llama.attention.layer_norm_rms_epsilon": None}},
        r"m\.gguf: has none of attention\.layer_norm_rms_epsilon and attention\.layer_norm_epsilon of llama, which its norms need",
    ),
    "no count of used experts": (
        {"family": "qwen2moe", "metadata": {"qwen2moe.expert_used_count": None}},
        r"m\.gguf: qwen2moe\.expert_used_count is None, where a number from 1 to 4 is needed",
    ),
    "no used expert": (
        {"family": "qwen2moe", "metadata": {"qwen2moe.expert_used_count": 0}},
        r"m\.gguf: qwen2moe\.expert_used_count is 0, where a number from 1 to 4 is needed",
    ),
    "too many used experts": (
        {"family": "qwen2moe", "metadata": {"qwen2moe.expert_used_count": 1 << 31}},
        r"m\.gguf: qwen2moe\.expert_used_count is 2147483648, where a number from 1 to 4 is needed",
    ),
    "impossible metadata": (
        {"metadata": {"llama.embedding_length": 1 << 31}},
        r"m\.gguf: describes a model with [\d,]+ bytes of norms and tables, where 2,147,483,648 may be; a size in it is wrong",
    ),
    "width": (
        {"metadata": {"llama.feed_forward_length": 96}},
        r"m\.gguf: model\.layers\.0\.mlp\.down_proj\.weight has shape \[256, 512\] but .* needs \[256, 96\]",
    ),
    "too many blocks": (
        {"metadata": {"llama.block_count": 1}},
        r"m\.gguf: blk\.1\.\w+\.weight belongs to a block beyond the 1 that llama\.block_count names",
    ),
    "too few blocks": ({"metadata": {"llama.block_count": 3}}, r"model\.layers\.2\..* and \d+ more: missing from the checkpoint"),
    "experts": (
        {"family": "mixtral", "metadata": {"llama.expert_count": 5}},
        r"ffn_gate_exps.weight of shape \[4, 512, 256\] is no stack of 5 experts",
    ),
    "twice": (
        {"extra": {"model.norm.weight": np.ones(HIDDEN, np.float32)}},
        "model.norm.weight and output_norm.weight are both model.norm.weight; one must go",
    ),
    "factors of another type": (
        {"extra": {"rope_freqs.weight": np.ones(4, np.float16)}}, r"rope_freqs.weight is F16 of shape \[4\], which are no factors",
    ),
    "factors": ({"extra": {"rope_freqs.weight": np.zeros(32, np.float32)}}, "rope_freqs.weight has factors that are not positive"),
    "rope": ({"metadata": {"llama.rope.scaling.type": "su"}}, r"scales its rotary table by \{'type': 'su'\}, which is not read"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_lies_is_refused_by_name(name: str, tmp_path: Path) -> None:
    options, message = REFUSED[name]
    path = write_gguf(tmp_path / "m.gguf", **{"family": "llama", "kinds": "q8_0", **options})
    with pytest.raises(CheckpointError, match=message):
        slowllm.load(path)


def test_a_norm_in_blocks_that_is_stored_plus_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, "gemma2", "q8_0")
    data = path.read_bytes()
    # The type of a tensor stands behind its name, its number of dimensions and its only length.
    at = data.index(b"output_norm.weight") + len(b"output_norm.weight") + 4 + 8
    path.write_bytes(data[:at] + bytes([8]) + data[at + 1 :])
    with pytest.raises(
        CheckpointError,
        match=r"output_norm\.weight is a norm, and stored in blocks \(Q8_0\), which is not read",
    ):
        slowllm.load(path)


def test_a_type_whose_code_words_are_not_installed_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama", "iq3_s")
    monkeypatch.setattr(layout_constants, "HAS_GRIDS", False)
    message = r"m\.gguf: token_embd\.weight is of type IQ3_S, whose code words are in the package gguf, .* pip install gguf"
    with pytest.raises(CheckpointError, match=message):
        slowllm.load(path)


def test_a_config_that_says_gguf_of_safetensors_is_refused(tmp_path: Path) -> None:
    span = Span("a", tmp_path / "model.safetensors", "F32", (2, 2), 0, 16)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is no GGUF file"):
        gguf_format.find({"architecture": "llama"}, {"a": span})


@num_examples(15)
@given(st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(0, 255)), min_size=1, max_size=2))
def test_a_damaged_file_is_refused_or_loads(
    tmp_path_factory: pytest.TempPathFactory, damage: list[tuple[int, int]]
) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged-model"
    if not (folder / "whole.gguf").exists():
        write_gguf(folder / "whole.gguf", "qwen2", "q8_0")
    data = bytearray((folder / "whole.gguf").read_bytes())
    header = data.index(b"blk.1.ffn_down.weight") + 60
    for place, value in damage:
        data[place % header] = value
    path = folder / "m.gguf"
    path.write_bytes(bytes(data))
    try:
        with slowllm.load(path, dtype="float32") as lm:
            lm.model(torch.arange(5, 9)[None])
    except SlowLLMError:
        return
