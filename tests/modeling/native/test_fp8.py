"""Checkpoints in float8 are read as they are, and compute what transformers computes with them dequantised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import slowllm
from slowllm.errors import CheckpointError, NonFiniteError
from slowllm.storage.codecs.stacked import Stacked
from tests.support.damaged_checkpoints import change_settings
from tests.support.families import save_tiny
from tests.support.native_checkpoints import dequantised, fp8_settings, quantised, store_fp8

FAMILIES = ["llama-2", "mixtral", "deepseek-v3", "olmoe", "bloom"]
IDS = torch.arange(5, 25)[None]


def fp8(name: str, tmp_path: Path, block: tuple[int, int] = (8, 16), **options: Any) -> Path:
    save_tiny(name, tmp_path / "plain", torch.bfloat16)
    return quantised(tmp_path / "plain", tmp_path / "fp8", fp8_settings(block), store_fp8(block, **options))


def logits_of(folder: Path, dtype: str) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), experts_implementation="eager"
    )
    with torch.no_grad():
        logits: torch.Tensor = model(IDS).logits
    return logits


def assert_same(folder: Path, dtype: str, wanted: torch.Tensor, **options: Any) -> None:
    with slowllm.load(folder, dtype=dtype, **options) as lm, torch.no_grad():
        assert torch.equal(lm.model(IDS).logits, wanted)


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_the_dequantised_model(name: str, resident: bool, tmp_path: Path) -> None:
    folder = fp8(name, tmp_path)
    assert_same(folder, "bfloat16", logits_of(folder, "bfloat16"), resident=resident)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_need_not_divide_the_matrix(name: str, dtype: str, tmp_path: Path) -> None:
    # transformers mixes dtypes where it dequantises to float32, and derives other blocks where they do not come out even.
    block = (13, 24)
    folder = fp8(name, tmp_path, block)
    wanted = logits_of(dequantised(tmp_path / "plain", tmp_path / "back", block), dtype)
    assert_same(folder, dtype, wanted, resident=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e8m0fnu])
def test_scales_may_be_of_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = fp8("llama-2", tmp_path, dtype=dtype)
    assert_same(folder, "bfloat16", logits_of(folder, "bfloat16"))


def test_scales_may_have_other_names_and_other_blocks_than_config_says(tmp_path: Path) -> None:
    save_tiny("llama-2", tmp_path / "plain", torch.bfloat16)
    store = store_fp8((1, 32), torch.float8_e8m0fnu, ".scale")  # as DeepSeek-V4's experts
    folder = quantised(tmp_path / "plain", tmp_path / "fp8", fp8_settings((8, 16)), store)
    assert_same(folder, "bfloat16", logits_of(folder, "bfloat16"))


@pytest.mark.parametrize("block", [(1, 1 << 20), (1 << 20, 1 << 20)])
def test_a_scale_may_be_that_of_a_row_or_of_the_matrix(block: tuple[int, int], tmp_path: Path) -> None:
    save_tiny("llama-2", tmp_path / "plain", torch.bfloat16)
    folder = quantised(tmp_path / "plain", tmp_path / "fp8", fp8_settings(None), store_fp8(block))
    wanted = logits_of(dequantised(tmp_path / "plain", tmp_path / "back", block), "bfloat16")
    assert_same(folder, "bfloat16", wanted)


def test_a_model_that_transformers_saved_with_fused_experts_is_read(tmp_path: Path) -> None:
    """Experts as one tensor (E, R, K) with scales (E, R / 8, K / 16)."""
    save_tiny("mixtral", tmp_path / "plain", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", dtype=torch.bfloat16, experts_implementation="eager"
    )
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    one = store_fp8((8, 16))

    def store(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        if weight.dim() == 2:
            return dict(one(name, weight))
        found = [one(name, expert) for expert in weight]
        return {key: torch.stack([stored[key] for stored in found]) for key in found[0]}

    folder = quantised(tmp_path / "fused", tmp_path / "fp8", fp8_settings((8, 16)), store)
    wanted = logits_of(dequantised(tmp_path / "plain", tmp_path / "back", (8, 16)), "bfloat16")
    assert_same(folder, "bfloat16", wanted, resident=False)


def test_only_the_experts_that_tokens_chose_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fp8("olmoe", tmp_path)
    decoded: list[tuple[int, int]] = []
    decode = Stacked.decode

    def noting(self: Stacked, parts: Any, out: Any, first: int, last: int, team: Any) -> None:
        decoded.append((first, last - first))
        decode(self, parts, out, first, last, team)

    monkeypatch.setattr(Stacked, "decode", noting)
    with slowllm.load(folder, dtype="bfloat16") as lm, torch.no_grad():
        router_logits = lm.model(IDS[:, :1], output_router_logits=True).router_logits
        chosen = sum(len(set(one.topk(2).indices.flatten().tolist())) for one in router_logits)
        assert len(decoded) == 2 * chosen  # gate and up together, and down
        config = lm.model.config
        heights = {2 * config.intermediate_size, config.hidden_size}
        assert {height for _, height in decoded} == heights


def test_tokens_and_gradients_are_those_of_the_dequantised_model(tmp_path: Path) -> None:
    folder = fp8("llama-2", tmp_path)
    plain = dequantised(tmp_path / "plain", tmp_path / "back", (8, 16))
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


def _damaged(folder: Path, change: Any) -> None:
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        index = folder / "model.safetensors.index.json"
        listed = json.loads(index.read_text())
        before = set(tensors)
        change(tensors)
        for name in before - set(tensors):
            del listed["weight_map"][name]
        for name in set(tensors) - before:
            listed["weight_map"][name] = path.name
        index.write_text(json.dumps(listed))
        save_file(tensors, path, {"format": "pt"})


NAME = "model.layers.1.mlp.up_proj.weight"


def _without_scale(tensors: dict[str, torch.Tensor]) -> None:
    tensors.pop(f"{NAME}_scale_inv", None)


def _without_weight(tensors: dict[str, torch.Tensor]) -> None:
    tensors.pop(NAME, None)


def _with_short_scale(tensors: dict[str, torch.Tensor]) -> None:
    if NAME in tensors:
        tensors[f"{NAME}_scale_inv"] = tensors[f"{NAME}_scale_inv"][:-1].clone()


def _with_another_grid(tensors: dict[str, torch.Tensor]) -> None:
    if NAME in tensors:  # which comes out even, too
        tensors[f"{NAME}_scale_inv"] = tensors[f"{NAME}_scale_inv"][:, :2].clone()


def _with_one_number(tensors: dict[str, torch.Tensor]) -> None:
    if NAME in tensors:
        tensors[f"{NAME}_scale_inv"] = torch.ones(())


def _with_whole_numbers(tensors: dict[str, torch.Tensor]) -> None:
    if NAME in tensors:
        tensors[f"{NAME}_scale_inv"] = tensors[f"{NAME}_scale_inv"].int()


def _with_two_scales(tensors: dict[str, torch.Tensor]) -> None:
    if NAME in tensors:
        tensors[f"{NAME}_scale"] = torch.ones(1)


def _with_a_weight_that_is_not_coded(suffix: str) -> Any:
    """Return what puts a plain weight in the place of a coded one, whose scales stay under a name of another maker."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        if NAME in tensors:
            tensors[f"{NAME}{suffix}"] = tensors.pop(f"{NAME}_scale_inv")
            tensors[NAME] = tensors[NAME].bfloat16()

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without_scale, rf"{NAME} is stored as F8_E4M3 but has no scale \({NAME}_scale_inv\)"),
        (_without_weight, rf"{NAME}_scale_inv is a scale, but its weight is not stored in float8"),
        (
            _with_short_scale,
            rf"{NAME}_scale_inv is F32 of shape \[11, 4\], which are no scales for {NAME} of shape \[96, 64\]",
        ),
        (_with_another_grid, rf"{NAME}_scale_inv is F32 of shape \[12, 2\], which are no scales for"),
        (
            _with_one_number,
            rf"{NAME}_scale_inv is F32 of shape \[\], which are no scales for .* with blocks of 8 x 16",
        ),
        (_with_whole_numbers, rf"{NAME}_scale_inv is I32 of shape"),
        (
            _with_a_weight_that_is_not_coded("_scale"),
            rf"{NAME}_scale is a scale, but its weight is not stored in float8",
        ),
        (
            _with_a_weight_that_is_not_coded("_scale_inv"),
            rf"{NAME}_scale_inv is a scale, but its weight is not",
        ),
        (_with_two_scales, rf"{NAME} is stored as F8_E4M3 but has two scales"),
    ],
)
def test_half_a_format_is_refused_by_name(change: Any, message: str, tmp_path: Path) -> None:
    folder = fp8("llama-2", tmp_path)
    _damaged(folder, change)
    with pytest.raises(CheckpointError, match=message):
        slowllm.load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("resident", [True, False])
def test_scales_that_are_no_numbers_are_refused_by_name(value: float, resident: bool, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        if NAME in tensors:
            tensors[f"{NAME}_scale_inv"][2, 1] = value

    folder = fp8("llama-2", tmp_path)
    _damaged(folder, change)
    message = rf"model-\d+-of-\d+\.safetensors: {NAME}_scale_inv has NaN or infinity among its scales"
    with (
        slowllm.load(folder, resident=resident) as lm,
        torch.no_grad(),
        pytest.raises(CheckpointError, match=message),
    ):
        lm.model(IDS)


def test_exponents_that_are_no_numbers_are_refused_by_name(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        if NAME in tensors:
            tensors[f"{NAME}_scale_inv"].view(torch.uint8)[2, 1] = 0xFF

    folder = fp8("llama-2", tmp_path, dtype=torch.float8_e8m0fnu)
    _damaged(folder, change)
    message = rf"model-\d+-of-\d+\.safetensors: {NAME}_scale_inv has NaN among its scales; fetch"
    with slowllm.load(folder) as lm, torch.no_grad(), pytest.raises(CheckpointError, match=message):
        lm.model(IDS)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_weights_that_are_no_numbers_end_with_the_name_of_their_block(code: int, tmp_path: Path) -> None:
    """As in transformers, such a code is a NaN; it is noticed where it comes out."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        if NAME in tensors:
            tensors[NAME].view(torch.uint8)[3, 5] = code

    folder = fp8("llama-2", tmp_path)
    _damaged(folder, change)
    message = r"model\.layers\.1: NaN in the output at position \[0, 0\]; the weights are damaged"
    with (
        slowllm.load(folder, resident=False) as lm,
        torch.no_grad(),
        pytest.raises(NonFiniteError, match=message),
    ):
        lm.model(IDS)


def _with_arrays_of_gptq(tensors: dict[str, torch.Tensor]) -> None:
    if NAME in tensors:
        del tensors[NAME], tensors[f"{NAME}_scale_inv"]
        tensors[f"{NAME.removesuffix('weight')}qweight"] = torch.zeros(8, 96, dtype=torch.int32)


def _with_arrays_of_modelopt(tensors: dict[str, torch.Tensor]) -> None:
    if NAME in tensors:
        del tensors[f"{NAME}_scale_inv"]
        tensors |= {NAME: torch.zeros(96, 32, dtype=torch.uint8), f"{NAME}_scale": torch.ones(96, 4)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_with_arrays_of_gptq, rf"{NAME}.* missing"),
        (_with_arrays_of_modelopt, rf"{NAME}_scale is a scale, but its weight is not stored"),
    ],
)
def test_a_second_format_in_the_checkpoint_is_refused_by_name(
    change: Any, message: str, tmp_path: Path
) -> None:
    folder = fp8("llama-2", tmp_path)
    _damaged(folder, change)
    with pytest.raises(CheckpointError, match=message):
        slowllm.load(folder)


def test_arrays_decide_which_modules_are_quantised_and_not_what_config_says(tmp_path: Path) -> None:
    folder = fp8("llama-2", tmp_path)
    with torch.no_grad(), slowllm.load(folder, resident=False) as lm:
        wanted = lm.model(IDS).logits
    change_settings(folder, {**fp8_settings((8, 16)), "modules_to_not_convert": ["model.layers.1.mlp"]})
    with torch.no_grad(), slowllm.load(folder, resident=False) as lm:
        assert torch.equal(lm.model(IDS).logits, wanted)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "is stored as F8_E4M3, and the checkpoint has no scales for it"),
        (
            {"quant_method": "fp8", "weight_block_size": [0, 16]},
            r"weight_block_size is \[0, 16\], not two numbers",
        ),
        ({"quant_method": "fp8", "weight_block_size": "16"}, "weight_block_size is '16', not two numbers"),
        ({"quant_method": "hqq"}, r"is already quantised \(hqq\), which is not read"),
        ("fp8", r"config\.json: is already quantised \(fp8\), which is not read"),
        ({"quant_method": []}, r"config\.json: is already quantised \(\[\]\), which is not read"),
        ({"quant_method": {"a": 1}}, r"config\.json: is already quantised \(\{'a': 1\}\), which is not read"),
        (
            {"quant_method": "x" * 5000},
            r"config\.json: is already quantised \('x{12}\.{3}x{13}'\), which is not read",
        ),
        (
            {"quant_method": "fp8", "weight_block_size": "9" * 5000},
            r"weight_block_size is '9{12}\.{3}9{13}', not two",
        ),
    ],
)
def test_a_config_that_lies_is_refused(settings: Any, message: str, tmp_path: Path) -> None:
    folder = fp8("llama-2", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    with pytest.raises(CheckpointError, match=message):
        slowllm.load(folder)
