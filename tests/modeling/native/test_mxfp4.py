"""Experts in mxfp4 are read as they are, and compute what transformers computes with them dequantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

import slowllm
from slowllm.errors import CheckpointError
from slowllm.modeling.native.formats import find_native
from slowllm.storage.codecs.registry import CODECS
from slowllm.streaming import lazy_weight
from tests.support.damaged_checkpoints import change_settings, change_tensors, damaged_spans, spans_of
from tests.support.families import save_tiny
from tests.support.native_checkpoints import quantised, save_dequantised, store_mxfp4
from tests.support.properties import num_examples

IDS = torch.arange(5, 25)[None]
SETTINGS = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
NAME = "model.layers.1.mlp.experts.down_proj"


def mxfp4(tmp_path: Path) -> Path:
    save_tiny("gpt-oss", tmp_path / "plain", torch.bfloat16)
    return quantised(tmp_path / "plain", tmp_path / "mxfp4", SETTINGS, store_mxfp4)


def dequantised(folder: Path, dtype: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), experts_implementation="eager"
    )


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_those_of_the_dequantised_model(dtype: str, resident: bool, tmp_path: Path) -> None:
    folder = mxfp4(tmp_path)
    assert len([name for name in spans_of(folder) if name.endswith("_blocks")]) == 6
    with torch.no_grad():
        wanted = dequantised(folder, dtype)(IDS).logits
        with slowllm.load(folder, dtype=dtype, resident=resident) as lm:
            assert torch.equal(lm.model(IDS).logits, wanted)


def test_tokens_and_gradients_are_those_of_the_dequantised_model(tmp_path: Path) -> None:
    folder = mxfp4(tmp_path)
    plain = save_dequantised(dequantised(folder, "float32").state_dict(), folder, tmp_path / "back")
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


def test_only_the_experts_that_are_picked_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = mxfp4(tmp_path)
    ranges: list[tuple[int, int]] = []
    decode = lazy_weight.CodedMatrix.decode

    def recorded(self: Any, out: torch.Tensor, first: int, last: int) -> None:
        assert self.codec is CODECS["mxfp4"]
        ranges.append((first, last))
        decode(self, out, first, last)

    with slowllm.load(folder, resident=False) as lm, torch.no_grad():
        monkeypatch.setattr(lazy_weight.CodedMatrix, "decode", recorded)
        lm.model(IDS[:, :1])
    # Three blocks, of two experts each two matrices.
    assert len(ranges) == 12
    assert {last - first for first, last in ranges} == {64, 96}


def _short(tensors: dict[str, torch.Tensor], name: str) -> None:
    if name in tensors:
        tensors[name] = tensors[name][:, :-1].clone()


def _with_floats(tensors: dict[str, torch.Tensor], name: str) -> None:
    if name in tensors:
        tensors[name] = tensors[name].float()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{NAME}_scales", None), rf"{NAME}_blocks has no scales \({NAME}_scales\)"),
        (lambda t: t.pop(f"{NAME}_blocks", None), rf"{NAME}_scales has no numbers \({NAME}_blocks\)"),
        (
            lambda t: _short(t, f"{NAME}_scales"),
            rf"{NAME}_scales is U8 of shape \[4, 63, 3\], which are no scales for {NAME}_blocks of shape \[4, 64, 3, 16\]",
        ),
        (lambda t: _with_floats(t, f"{NAME}_scales"), rf"{NAME}_scales is F32 of shape"),
        (lambda t: _with_floats(t, f"{NAME}_blocks"), rf"{NAME}_blocks is F32 of shape .*, not U8 of shape"),
        (
            lambda t: f"{NAME}_blocks" in t and t.update({NAME: torch.ones(2)}),
            rf"{NAME} stands in the checkpoint twice, quantised and plain",
        ),
        (
            lambda t: (_short(t, f"{NAME}_blocks"), _short(t, f"{NAME}_scales")),
            rf"{NAME} has shape \[4, 96, 63\] but {NAME} needs \[4, 96, 64\]",
        ),
    ],
)
def test_half_a_format_is_refused_by_name(change: Any, message: str, tmp_path: Path) -> None:
    folder = mxfp4(tmp_path)
    change_tensors(folder, change)
    with pytest.raises(CheckpointError, match=message):
        slowllm.load(folder)


def test_a_config_that_does_not_name_the_format_is_refused(tmp_path: Path) -> None:
    folder = mxfp4(tmp_path)
    change_settings(folder, None)
    with pytest.raises(CheckpointError, match=r"use a config\.json that belongs to it"):
        slowllm.load(folder)
    change_settings(folder, {"quant_method": "fp8"})
    with pytest.raises(CheckpointError, match=r"says that weights are quantised \(fp8\), but none is"):
        slowllm.load(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mxfp4(tmp_path_factory.mktemp("saved"))


@num_examples(60)
@given(st.data())
def test_damaged_arrays_are_refused_or_make_the_same_tensor(saved: Path, data: st.DataObject) -> None:
    spans = {name: span for name, span in spans_of(saved).items() if ".mlp." in name}
    config = AutoConfig.from_pretrained(saved)
    try:
        native = find_native(config, data.draw(damaged_spans(spans)))
    except CheckpointError:
        return
    for tensor in native.coded.values():
        parts = {part.name: (part.dtype, part.shape) for part in tensor.parts}
        assert CODECS[tensor.codec].has_parts(parts, tensor.shape[0] * tensor.shape[1], tensor.shape[2])
