"""Experts in float4 inside of a float8 checkpoint compute what transformers computes with them dequantised."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

import slowllm
from slowllm.errors import CheckpointError
from slowllm.modeling.native.formats import find_native
from slowllm.storage.codecs.registry import CODECS
from tests.support.cases import crossed
from tests.support.damaged_checkpoints import change_tensors, damaged_spans, spans_of
from tests.support.families import save_tiny
from tests.support.native_checkpoints import fp8_settings, quantised, save_dequantised, store_fp4
from tests.support.properties import num_examples

IDS = torch.arange(5, 25)[None]
NAME = "model.layers.1.block_sparse_moe.experts.2.w1.weight"


def fp4(name: str, tmp_path: Path, dtype: torch.dtype = torch.int8, suffix: str = "_scale_inv") -> Path:
    save_tiny(name, tmp_path / "plain", torch.bfloat16)
    store = store_fp4(dtype, suffix)
    return quantised(tmp_path / "plain", tmp_path / f"fp4{suffix}", fp8_settings((8, 16)), store)


def back(folder: Path, out: Path) -> Path:
    """Return the folder of the plain checkpoint that transformers' own operation dequantises one to."""
    stored = {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}
    weights = {}
    for name, tensor in stored.items():
        if (scales := stored.get(f"{name}_scale_inv")) is not None:
            weights[name] = Fp8Dequantize(None)._dequantize_one(tensor, scales, torch.float32)
        elif not name.endswith("_scale_inv"):
            weights[name] = tensor
    return save_dequantised(weights, folder, out)


@pytest.mark.parametrize(
    ("name", "dtype", "resident"),
    crossed(
        ["mixtral", "deepseek-v3", "qwen3-moe"],
        ["float32", "bfloat16"],
        [True, False],
        quick=[
            ("mixtral", "bfloat16", True),
            ("mixtral", "float32", False),
            ("deepseek-v3", "bfloat16", False),
        ],
    ),
)
def test_logits_are_those_of_the_dequantised_model(
    name: str, dtype: str, resident: bool, tmp_path: Path
) -> None:
    folder = fp4(name, tmp_path)
    plain = back(folder, tmp_path / "back")
    model = AutoModelForCausalLM.from_pretrained(
        plain, dtype=getattr(torch, dtype), experts_implementation="eager"
    )
    assert any(span.dtype == "I8" for span in spans_of(folder).values())
    with torch.no_grad(), slowllm.load(folder, dtype=dtype, resident=resident) as lm:
        assert torch.equal(lm.model(IDS).logits, model(IDS).logits)


def test_logits_are_those_that_transformers_computes_of_the_checkpoint(tmp_path: Path) -> None:
    folder = fp4("mixtral", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, experts_implementation="eager")
    with torch.no_grad(), slowllm.load(folder, dtype="bfloat16") as lm:
        assert torch.equal(lm.model(IDS).logits, model(IDS).logits)


def test_pairs_may_be_called_float4_and_scales_otherwise(tmp_path: Path) -> None:
    one = fp4("mixtral", tmp_path)
    (tmp_path / "other").mkdir()
    other = fp4("mixtral", tmp_path / "other", torch.float4_e2m1fn_x2, ".scale")
    assert any(span.dtype == "F4" for span in spans_of(other).values())
    found = []
    for folder in (one, other):
        with torch.no_grad(), slowllm.load(folder, resident=False) as lm:
            found.append(lm.model(IDS).logits)
    assert torch.equal(*found)


def test_tokens_and_gradients_are_those_of_the_dequantised_model(tmp_path: Path) -> None:
    folder = fp4("mixtral", tmp_path)
    plain = back(folder, tmp_path / "back")
    found = []
    for one in (folder, plain):
        with slowllm.load(one, dtype="float32", resident=False) as lm:
            embedded = lm.model.get_input_embeddings()(IDS).detach().requires_grad_()
            loss = lm.model(inputs_embeds=embedded, labels=IDS).loss
            loss.backward()
            tokens = lm.model.generate(IDS, max_new_tokens=5, do_sample=False)
            found.append((loss.detach(), embedded.grad, tokens))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_pairs_without_scales_are_refused_by_name(tmp_path: Path) -> None:
    folder = fp4("mixtral", tmp_path)
    change_tensors(folder, lambda tensors: tensors.pop(f"{NAME}_scale_inv", None))
    with pytest.raises(
        CheckpointError, match=rf"{NAME} is stored as I8 but has no scale \({NAME}_scale_inv\)"
    ):
        slowllm.load(folder)


def test_pairs_that_are_no_matrix_are_refused_by_name(tmp_path: Path) -> None:
    folder = fp4("mixtral", tmp_path)
    change_tensors(
        folder, lambda tensors: NAME in tensors and tensors.update({NAME: tensors[NAME].flatten()})
    )
    with pytest.raises(CheckpointError, match=rf"{NAME} is stored as I8 but is no matrix"):
        slowllm.load(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fp4("mixtral", tmp_path_factory.mktemp("saved"))


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
        rows = tensor.as_plain().num_bytes // 2 // tensor.shape[-1]
        assert CODECS[tensor.codec].has_parts(parts, rows, tensor.shape[-1], tensor.group)
