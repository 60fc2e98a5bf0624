"""Checkpoints of GPTQ and AWQ are read as they are, and compute what transformers computes with them dequantised."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import slowllm
from slowllm.errors import CheckpointError
from slowllm.modeling.native.packed import find_awq, find_gptq
from slowllm.storage.codecs.registry import CODECS
from slowllm.storage.spans import DTYPE_BITS, Span
from tests.support.cases import crossed, quick_and_long
from tests.support.damaged_checkpoints import change_tensors
from tests.support.families import save_tiny
from tests.support.packed_checkpoints import PackedLayer, packed_model, packed_pair
from tests.support.properties import num_examples

FAMILIES = ["llama-2", "mixtral", "deepseek-v3", "qwen3-moe", "bloom"]
IDS = torch.arange(5, 25)[None]
LAYERS = {
    "gptq": PackedLayer(),
    "gptq-ordered": PackedLayer(is_ordered=True),
    "awq": PackedLayer("awq"),
}


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


@pytest.mark.parametrize(
    ("name", "layer"),
    crossed(FAMILIES, LAYERS, quick=[("llama-2", "gptq"), ("mixtral", "gptq-ordered"), ("mixtral", "awq")]),
)
def test_logits_are_those_of_the_dequantised_model(name: str, layer: str, tmp_path: Path) -> None:
    folder, back = packed_model(name, tmp_path, LAYERS[layer])
    for dtype, resident in (("bfloat16", True), ("bfloat16", False), ("float32", False)):
        assert_same(folder, dtype, logits_of(back, dtype), resident=resident)


@pytest.mark.parametrize(
    ("layer", "dtype"),
    crossed(LAYERS, ["float32", "bfloat16"], quick=[("gptq-ordered", "float32"), ("awq", "bfloat16")]),
)
def test_layers_of_gpt_2_are_those_of_the_dequantised_model(layer: str, dtype: str, tmp_path: Path) -> None:
    """Their weights are transposed, which GPTQModel undoes before it packs them."""
    save_tiny("gpt2", tmp_path / "plain", torch.bfloat16)

    def pack(name: str, weight: torch.Tensor) -> Any:
        if ".h." not in name:
            return {name: weight}, weight
        arrays, back = LAYERS[layer](name, weight.T)
        return arrays, back.T

    folder, back = packed_pair(tmp_path, pack, LAYERS[layer].settings)
    wanted = logits_of(back, dtype)
    assert_same(folder, dtype, wanted, resident=True)
    assert_same(folder, dtype, wanted, resident=False)


WIDE_3 = PackedLayer(bits=3, group=32, is_ordered=True, version="gptq_v2")
UNEVEN = PackedLayer("awq", group=24)


@pytest.mark.parametrize(
    "layer",
    quick_and_long(
        [
            WIDE_3,
            UNEVEN,
            PackedLayer(bits=2),
            PackedLayer(bits=3, group=32),
            PackedLayer(bits=8, has_order=False),
            PackedLayer(version="gptq_v2"),
            PackedLayer(group=-1),
            PackedLayer(group=24),
            PackedLayer(dtype=torch.bfloat16),
            PackedLayer("awq", group=-1),
            PackedLayer("awq", dtype=torch.bfloat16),
        ],
        quick=[WIDE_3, UNEVEN],
    ),
    ids=str,
)
def test_all_bits_versions_and_groups_are_read(layer: PackedLayer, tmp_path: Path) -> None:
    folder, back = packed_model("llama-2", tmp_path, layer)
    assert_same(folder, "float32", logits_of(back, "float32"))


def test_tokens_and_gradients_are_those_of_the_dequantised_model(tmp_path: Path) -> None:
    found = []
    for one in packed_model("llama-2", tmp_path, LAYERS["gptq-ordered"]):
        with slowllm.load(one, dtype="float32", resident=False) as lm:
            embedded = lm.model.get_input_embeddings()(IDS).detach().requires_grad_()
            loss = lm.model(inputs_embeds=embedded, labels=IDS).loss
            loss.backward()
            tokens = lm.model.generate(IDS, max_new_tokens=5, do_sample=False)
            found.append((loss.detach(), embedded.grad, tokens))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_modules_may_have_bits_and_groups_of_their_own(tmp_path: Path) -> None:
    few, many = PackedLayer(), PackedLayer(bits=8, group=32)
    layers = {True: many, False: few}
    save_tiny("llama-2", tmp_path / "plain", torch.bfloat16)
    settings = {**few.settings, "dynamic": {"+:.*down_proj": {"bits": 8, "group_size": 32}}}
    folder, back = packed_pair(
        tmp_path, lambda name, weight: layers["down_proj" in name](name, weight), settings
    )
    assert_same(folder, "bfloat16", logits_of(back, "bfloat16"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints by the name of their layer, to be copied."""
    return {
        name: packed_model("llama-2", tmp_path_factory.mktemp(name), layer)[0]
        for name, layer in LAYERS.items()
    }


STEM = "model.layers.1.mlp.up_proj"


def _damaged(folder: Path, change: Any) -> None:
    weight_map = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        if f"{STEM}.qweight" in tensors:
            change(tensors)
        weight_map |= dict.fromkeys(tensors, path.name)
        save_file(tensors, path, {"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _drop(name: str) -> Any:
    return lambda tensors: tensors.pop(f"{STEM}.{name}")


def _put(name: str, change: Any) -> Any:
    def put(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{STEM}.{name}"] = change(tensors.get(f"{STEM}.{name}")).contiguous()

    return put


@pytest.mark.parametrize(
    ("layer", "change", "message"),
    [
        ("gptq", _drop("qweight"), rf"{STEM}.(scales|qzeros|g_idx) has no {STEM}.qweight"),
        ("gptq", _drop("qzeros"), rf"{STEM}.qweight has no {STEM}.qzeros"),
        ("awq", _drop("scales"), rf"{STEM}.qweight has no {STEM}.scales"),
        ("gptq-ordered", _drop("g_idx"), rf"{STEM}.qweight has no {STEM}.g_idx, which desc_act"),
        ("gptq", _put("scales", lambda old: old[1:]), rf"{STEM}.scales is F16 of shape \[3, 96\], not F16 or BF16 of"),
        ("gptq", _put("scales", lambda old: old.float()), rf"{STEM}.scales is F32 of shape \[4, 96\], not F16 or BF16"),
        ("gptq", _put("qzeros", lambda old: old[:, 1:]), rf"{STEM}.qzeros is I32 of shape \[4, 11\], not I32 of shape"),
        ("gptq", _put("qweight", lambda old: old[1:]), rf"{STEM}.g_idx is I32 of shape \[64\], not what codes of 4 bits"),
        ("gptq", _put("qweight", lambda old: old.long()), rf"{STEM}.qweight is I64 of shape \[8, 96\], no codes that"),
        ("gptq", _put("g_idx", lambda old: old.long()), rf"{STEM}.g_idx is I64 of shape \[64\], no groups of its inputs"),
        ("gptq", _put("qweight", lambda old: old[:, :-3]), rf"{STEM}.scales is F16 of shape \[4, 96\], not F16 or"),
        ("awq", _put("qweight", lambda old: old.float()), rf"{STEM}.qweight is F32 of shape \[64, 12\], no codes that"),
        ("awq", _put("qzeros", lambda old: old[1:]), rf"{STEM}.qzeros is I32 of shape \[3, 12\], not I32 of shape"),
        ("awq", _put("g_idx", lambda _: torch.arange(64).int()), rf"{STEM}.g_idx is I32 of shape \[64\], which AWQ does not"),
        ("awq", _put("act.scales", lambda _: torch.ones(96)), rf"{STEM}.act.scales has no {STEM}.act.qweight"),
        ("awq", _put("weight", lambda _: torch.ones(96, 64)), rf"{STEM}.weight stands in the checkpoint twice"),
        ("awq", _put("qweight", lambda old: old[:32]), rf"{STEM}.scales is F16 of shape \[4, 96\]"),
    ],
)  # fmt: skip
def test_half_a_format_is_refused_by_name(
    layer: str, change: Any, message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders[layer], tmp_path / "copy"))
    _damaged(folder, change)
    with pytest.raises(CheckpointError, match=message):
        slowllm.load(folder)


def test_zeros_that_fill_no_words_are_refused() -> None:
    spans = spans_of({"a.qweight": ("I32", (4, 9)), "a.qzeros": ("I32", (2, 1)), "a.scales": ("F16", (2, 9))})
    with pytest.raises(
        CheckpointError, match=r"a\.qweight is I32 of shape .*codes of 4 bits whose zeros fill no words"
    ):
        find_gptq({"bits": 4, "group_size": 16}, spans)


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize(("by", "wrong"), [(1, 4), (-1, -1)])
def test_a_group_that_there_is_not_is_refused_by_name(
    by: int, wrong: int, resident: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["gptq"], tmp_path / "copy"))
    _damaged(folder, _put("g_idx", lambda old: old + by))
    message = (
        rf"model-\d+-of-\d+\.safetensors: {STEM}\.g_idx names group {wrong} of a matrix that has 4; fetch"
    )
    with slowllm.load(folder, resident=resident) as lm, pytest.raises(CheckpointError, match=message):
        lm.model(IDS)


def test_a_group_that_there_is_not_is_refused_inside_of_a_stack_of_experts(tmp_path: Path) -> None:
    folder, _ = packed_model("mixtral", tmp_path, LAYERS["gptq-ordered"])
    name = "model.layers.1.block_sparse_moe.experts.2.w1.g_idx"
    change_tensors(folder, lambda tensors: name in tensors and tensors.update({name: tensors[name] + 99}))
    message = rf"model-\d+-of-\d+\.safetensors: {name} names group \d+ of a matrix that has 4"
    with slowllm.load(folder) as lm, pytest.raises(CheckpointError, match=message):
        lm.model(IDS)


@pytest.mark.parametrize(
    ("layer", "settings", "message"),
    [
        ("gptq", {"bits": 5}, "bits is 5, not 2, 3, 4 or 8"),
        ("gptq", {"bits": None}, "bits is None, not 2, 3, 4 or 8"),
        ("gptq", {"bits": 8}, r"g_idx is I32 of shape \[64\], not what codes of 8 bits need"),
        ("gptq", {"group_size": 0}, "group_size is 0, not a number such as 128, or -1"),
        ("gptq", {"group_size": "16"}, "group_size is '16', not a number"),
        ("gptq", {"group_size": 32}, "scales is F16 of shape"),
        (
            "gptq",
            {"checkpoint_format": "gptq_pro"},
            "a layout of GPTQ, gptq_pro, is not read; there are gptq and gptq_v2: use a",
        ),
        ("gptq", {"is_marlin_format": True}, "a layout of GPTQ, marlin, is not read"),
        (
            "gptq",
            {"quant_method": "awq", "version": "gemv"},
            "a layout of AWQ, gemv, is not read; there is gemm: use a checkpoint of that version",
        ),
        ("awq", {"backend": "llm-awq"}, "a layout of AWQ, llm-awq, is not read"),
        ("awq", {"bits": 8}, "AWQ has 4 bits, not 8"),
        ("awq", {"quant_method": "gptq"}, "no g_idx|F16 of shape|I32 of shape"),
        ("gptq", {"quant_method": "awq"}, "I32 of shape|F16 of shape"),
    ],
)
def test_a_config_that_lies_is_refused(
    layer: str, settings: Any, message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders[layer], tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        slowllm.load(folder)


def spans_of(arrays: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, Span]:
    """Return spans of arrays, each with its dtype and shape."""
    return {
        name: Span(name, Path("one"), dtype, shape, 0, torch.Size(shape).numel() * DTYPE_BITS[dtype] // 8)
        for name, (dtype, shape) in arrays.items()
    }


SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 8, 12, 32, 64, 96]), max_size=3).map(tuple)
DTYPES = st.sampled_from(["I32", "F16", "BF16", "F32", "U8", "I64"])
GOOD = {
    "qweight": ("I32", (8, 96)), "qzeros": ("I32", (4, 12)), "scales": ("F16", (4, 96)), "g_idx": ("I32", (64,)),
}  # fmt: skip


@num_examples(300)
@given(
    st.dictionaries(st.sampled_from(sorted(GOOD)), st.none() | st.tuples(DTYPES, SHAPES), max_size=3),
    st.fixed_dictionaries({"bits": st.sampled_from([2, 3, 4, 8]), "group_size": st.sampled_from([-1, 1, 16, 64])}),
    st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_any_damage_is_refused_or_what_the_codec_takes(
    damage: dict[str, Any], settings: dict[str, Any], is_dynamic: bool, is_awq: bool
) -> None:
    arrays = {f"a.{key}": value for key, value in {**GOOD, **damage}.items() if value is not None}
    try:
        found, used = (find_awq if is_awq else find_gptq)(
            {**settings, "dynamic": is_dynamic}, spans_of(arrays)
        )
    except CheckpointError:
        return
    assert used == set(arrays)
    for tensor in found:
        parts = {part.name: (part.dtype, part.shape) for part in tensor.parts}
        assert CODECS[tensor.codec].has_parts(parts, tensor.shape[0], tensor.shape[1], tensor.group)
