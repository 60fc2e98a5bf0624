"""Checkpoints of modelopt, in NVFP4 and float8, are read as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

import slowllm
from slowllm.errors import CheckpointError
from slowllm.modeling.native.formats import find_native, settings_of
from slowllm.modeling.native.modelopt import QUANT_CONFIG
from slowllm.modeling.skeleton import read_config
from slowllm.storage.codecs.registry import CODECS
from tests.support.cases import crossed
from tests.support.compressed_checkpoints import store_modelopt, store_modelopt_back
from tests.support.damaged_checkpoints import change_settings, change_tensors, damaged_spans, spans_of
from tests.support.families import save_tiny
from tests.support.native_checkpoints import plain_copy, quantised
from tests.support.properties import num_examples

IDS = torch.arange(5, 25)[None]
SETTINGS = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "ignore": ["lm_head"]}
NAME = "model.layers.1.mlp.up_proj.weight"
FLOAT8 = "model.layers.1.self_attn.q_proj.weight"


def modelopt(name: str, tmp_path: Path) -> Path:
    save_tiny(name, tmp_path / "plain", torch.bfloat16)
    return quantised(tmp_path / "plain", tmp_path / "stored", SETTINGS, store_modelopt)


@pytest.mark.parametrize(
    ("name", "dtype", "resident"),
    crossed(
        ["llama-2", "qwen3-moe"],
        ["float32", "bfloat16"],
        [True, False],
        quick=[
            ("llama-2", "bfloat16", True),
            ("llama-2", "float32", False),
            ("qwen3-moe", "bfloat16", False),
        ],
    ),
)
def test_logits_are_those_of_the_dequantised_model(
    name: str, dtype: str, resident: bool, tmp_path: Path
) -> None:
    folder = modelopt(name, tmp_path)
    store = store_modelopt_back(getattr(torch, dtype))
    back = plain_copy(tmp_path / "plain", tmp_path / "back", store)
    model = AutoModelForCausalLM.from_pretrained(
        back, dtype=getattr(torch, dtype), experts_implementation="eager"
    )
    with torch.no_grad(), slowllm.load(folder, dtype=dtype, resident=resident) as lm:
        assert torch.equal(lm.model(IDS).logits, model(IDS).logits)


def test_tokens_and_gradients_are_those_of_the_dequantised_model(tmp_path: Path) -> None:
    folder = modelopt("llama-2", tmp_path)
    back = plain_copy(tmp_path / "plain", tmp_path / "back", store_modelopt_back(torch.float32))
    found = []
    for one in (folder, back):
        with slowllm.load(one, dtype="float32", resident=False) as lm:
            embedded = lm.model.get_input_embeddings()(IDS).detach().requires_grad_()
            loss = lm.model(inputs_embeds=embedded, labels=IDS).loss
            loss.backward()
            tokens = lm.model.generate(IDS, max_new_tokens=5, do_sample=False)
            found.append((loss.detach(), embedded.grad, tokens))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def _changed(name: str, change: Any) -> Any:
    def apply(tensors: dict[str, torch.Tensor]) -> None:
        if name in tensors:
            tensors[name] = change(tensors[name]).clone()

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{NAME}_scale", None), rf"{NAME} is stored as U8 but has no scale \({NAME}_scale\)"),
        (lambda t: t.pop(f"{NAME}_scale_2", None), rf"{NAME} is stored as U8 but has no scale \({NAME}_scale_2\)"),
        (lambda t: t.pop(NAME, None), rf"{NAME}_scale\w* is a scale, but its weight is not quantised"),
        (_changed(f"{NAME}_scale", lambda t: t[1:]), rf"{NAME}_scale is F8_E4M3 of shape \[95, 4\], which are no scales for {NAME}"),
        (_changed(f"{NAME}_scale_2", lambda t: t.half()), rf"{NAME}_scale_2 is F16 of shape \[\]"),
        (_changed(NAME, lambda t: t.view(-1)), rf"{NAME} is U8 but is no matrix"),
        (
            lambda t: (_changed(NAME, lambda t: t[:, :28])(t), _changed(f"{NAME}_scale", lambda t: t[:, :3])(t)),
            rf"{NAME} has 56 columns, no multiple of 16",
        ),
        (
            lambda t: FLOAT8 in t and t.update({f"{FLOAT8}_scale_2": torch.ones(())}),
            rf"{FLOAT8} is in float8, and has two scales",
        ),
    ],
)  # fmt: skip
def test_half_a_format_is_refused_by_name(change: Any, message: str, tmp_path: Path) -> None:
    folder = modelopt("llama-2", tmp_path)
    change_tensors(folder, change)
    with pytest.raises(CheckpointError, match=message):
        slowllm.load(folder)


def test_scales_that_are_no_numbers_are_refused_by_name(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        if NAME in tensors:
            tensors[f"{NAME}_scale"].view(torch.uint8)[0, 0] = 0x7F

    folder = modelopt("llama-2", tmp_path)
    change_tensors(folder, change)
    with (
        slowllm.load(folder) as lm,
        pytest.raises(CheckpointError, match=rf"{NAME}_scale has NaN among its scales"),
    ):
        lm.model(IDS)


def test_an_algorithm_that_is_not_read_is_refused(tmp_path: Path) -> None:
    folder = modelopt("llama-2", tmp_path)
    change_settings(folder, {**SETTINGS, "quant_algo": "W4A8_AWQ"})
    with pytest.raises(CheckpointError, match="quant_algo is 'W4A8_AWQ', which is not read; there are FP8"):
        slowllm.load(folder)


def with_a_file_of_its_own(folder: Path, content: object) -> Path:
    """Move what config.json says of the format to modelopt's own file, which older checkpoints have alone."""
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / QUANT_CONFIG).write_text(json.dumps(content))
    return folder


def test_a_file_of_modelopts_own_is_read_where_config_json_says_nothing(tmp_path: Path) -> None:
    folder = modelopt("llama-2", tmp_path)
    with torch.no_grad(), slowllm.load(folder, dtype="bfloat16") as lm:
        wanted = lm.model(IDS).logits
    quantization = {
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_quant_algo": None,
        "exclude_modules": ["lm_head"],
    }
    with_a_file_of_its_own(folder, {"producer": {"name": "modelopt"}, "quantization": quantization})
    with torch.no_grad(), slowllm.load(folder, dtype="bfloat16") as lm:
        assert torch.equal(lm.model(IDS).logits, wanted)
    assert settings_of(read_config(folder)) == SETTINGS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"quantization": {"quant_algo": "W4A8_AWQ"}}, rf"{QUANT_CONFIG}: quant_algo is 'W4A8_AWQ', which is not read"),
        ({"producer": {}}, rf"{QUANT_CONFIG}: has no table called quantization"),
        ([], rf"{QUANT_CONFIG}: is not a JSON object"),
        ({"quantization": {"quant_algo": None}}, "is stored as F8_E4M3, and the checkpoint has no scales for it"),
    ],
)  # fmt: skip
def test_a_file_of_modelopts_own_that_lies_is_refused(content: object, message: str, tmp_path: Path) -> None:
    folder = with_a_file_of_its_own(modelopt("llama-2", tmp_path), content)
    with pytest.raises(CheckpointError, match=message):
        slowllm.load(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return modelopt("llama-2", tmp_path_factory.mktemp("saved"))


@num_examples(100)
@given(st.data())
def test_damaged_arrays_are_refused_or_make_the_same_tensor(saved: Path, data: st.DataObject) -> None:
    spans = {name: span for name, span in spans_of(saved).items() if ".layers.1." in name}
    config = AutoConfig.from_pretrained(saved)
    try:
        native = find_native(config, data.draw(damaged_spans(spans)))
    except CheckpointError:
        return
    for tensor in native.coded.values():
        parts = {part.name: (part.dtype, part.shape) for part in tensor.parts}
        assert CODECS[tensor.codec].has_parts(parts, *tensor.shape, tensor.group)
