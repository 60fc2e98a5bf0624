"""Checkpoints of bitsandbytes are read as they are, and compute what transformers computes with them dequantised."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import int8_vectorwise_dequant
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import slowllm
from slowllm.errors import CheckpointError
from slowllm.modeling.native.bnb import find
from slowllm.storage.checkpoint import Checkpoint
from slowllm.storage.codecs.registry import CODECS
from tests.support.bnb_checkpoints import BnbLayer, flat_dequantised
from tests.support.cases import crossed
from tests.support.families import save_tiny
from tests.support.packed_checkpoints import packed_pair
from tests.support.properties import num_examples

FAMILIES = ["llama-2", "mixtral", "deepseek-v3", "bloom"]
IDS = torch.arange(5, 25)[None]
LAYERS = {
    "nf4": BnbLayer(),
    "fp4": BnbLayer("fp4", is_nested=False),
    "int8": BnbLayer("int8"),
    "blocks-of-32": BnbLayer(block=32),
}


def bnb_model(family: str, tmp_path: Path, layer: BnbLayer) -> tuple[Path, Path]:
    save_tiny(family, tmp_path / "plain", torch.bfloat16)
    return packed_pair(tmp_path, layer, layer.settings)


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
    crossed(FAMILIES, LAYERS, quick=[("llama-2", "fp4"), ("llama-2", "int8"), ("mixtral", "nf4")]),
)
def test_logits_are_those_of_the_dequantised_model(name: str, layer: str, tmp_path: Path) -> None:
    folder, back = bnb_model(name, tmp_path, LAYERS[layer])
    for dtype, resident in (("bfloat16", True), ("bfloat16", False), ("float32", False)):
        assert_same(folder, dtype, logits_of(back, dtype), resident=resident)


@pytest.mark.parametrize(
    "settings",
    [
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
        BitsAndBytesConfig(load_in_8bit=True),
    ],
    ids=["nf4", "fp4", "int8"],
)
def test_what_transformers_saves_is_read(settings: BitsAndBytesConfig, tmp_path: Path) -> None:
    save_tiny("llama-2", tmp_path / "plain", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=settings, dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "saved")
    plain = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", dtype=torch.float32, experts_implementation="eager"
    )
    for name, module in model.named_modules():
        if isinstance(module, (Linear4bit, Linear8bitLt)):
            plain.get_submodule(name).weight.data = dequantised(module)
    with slowllm.load(tmp_path / "saved", dtype="float32") as lm, torch.no_grad():
        assert torch.equal(lm.model(IDS).logits, plain(IDS).logits)


def dequantised(module: Linear4bit | Linear8bitLt) -> torch.Tensor:
    weight = module.weight
    if isinstance(module, Linear4bit):
        return flat_dequantised(weight.data, weight.quant_state)
    found: torch.Tensor = int8_vectorwise_dequant(weight.data, weight.SCB)
    return found


def test_tokens_and_gradients_are_those_of_the_dequantised_model(tmp_path: Path) -> None:
    found = []
    for one in bnb_model("llama-2", tmp_path, LAYERS["nf4"]):
        with slowllm.load(one, dtype="float32", resident=False) as lm:
            embedded = lm.model.get_input_embeddings()(IDS).detach().requires_grad_()
            loss = lm.model(inputs_embeds=embedded, labels=IDS).loss
            loss.backward()
            tokens = lm.model.generate(IDS, max_new_tokens=5, do_sample=False)
            found.append((loss.detach(), embedded.grad, tokens))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def _quantise_too(folder: Path, name: str, back: Path | None = None) -> None:
    """Store one more tensor by bitsandbytes, and put what it is dequantised to in the place of the plain one."""
    weight_map = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        if name in tensors:
            arrays, weight = BnbLayer()(name, tensors[name])
            tensors |= {key: array.contiguous() for key, array in arrays.items()}
            save_file(tensors, path, {"format": "pt"})
            if back is not None:
                save_file({**load_file(back / path.name), name: weight}, back / path.name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, path.name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("resident", [True, False])
def test_a_quantised_head_is_read(resident: bool, tmp_path: Path) -> None:
    folder, back = bnb_model("llama-2", tmp_path, LAYERS["nf4"])
    _quantise_too(folder, "lm_head.weight", back)
    assert_same(folder, "float32", logits_of(back, "float32"), resident=resident)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints by the name of their layer, to be copied."""
    return {
        name: bnb_model("llama-2", tmp_path_factory.mktemp(name), LAYERS[name])[0] for name in ("nf4", "int8")
    }


STEM = "model.layers.1.mlp.up_proj"
NAME = f"{STEM}.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"


def _damaged(folder: Path, change: Any) -> None:
    weight_map = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        if NAME in tensors:
            change(tensors)
        weight_map |= dict.fromkeys(tensors, path.name)
        save_file(tensors, path, {"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _drop(name: str) -> Any:
    return lambda tensors: tensors.pop(name)


def _put(name: str, change: Any) -> Any:
    def put(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = change(tensors.get(name)).contiguous()

    return put


def _text(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _say(**said: Any) -> Any:
    def change(old: torch.Tensor) -> torch.Tensor:
        return _text(json.dumps({**json.loads(bytes(old.tolist())), **said}))

    return _put(STATE, change)


@pytest.mark.parametrize(
    ("layer", "change", "message"),
    [
        ("nf4", _drop(STATE), rf"{NAME} is stored as U8, and the checkpoint has no scales for it"),
        ("nf4", _drop(NAME), rf"{NAME}\.\w+ belongs to no weight that bitsandbytes stored|quant_state\S+ belongs to no"),
        ("nf4", _drop(f"{NAME}.absmax"), rf"{NAME} has no {NAME}.absmax"),
        ("nf4", _drop(f"{NAME}.nested_absmax"), rf"{NAME} has no {NAME}.nested_absmax"),
        ("nf4", _put(f"{NAME}.absmax", lambda old: old[1:]), rf"{NAME}.absmax is U8 of shape \[95\], not U8 of shape \[96\]"),
        ("nf4", _put(f"{NAME}.absmax", lambda old: old.float()), rf"{NAME}.absmax is F32 of shape \[96\], not U8"),
        ("nf4", _put(f"{NAME}.quant_map", lambda old: old[1:]), rf"{NAME}.quant_map is F32 of shape \[15\], not F32"),
        ("nf4", _put(NAME, lambda old: old[1:]), rf"{NAME} is U8 of shape \[3071, 1\], not U8 of shape \[3072, 1\]"),
        ("nf4", _put(f"{NAME}.quant_state.bitsandbytes__fp4", lambda _: _text("{}")), rf"{NAME} is said to be .*; one must go"),
        ("nf4", _put(STATE, lambda old: old[1:]), rf"{STATE} is not JSON, which is no state of bitsandbytes"),
        ("nf4", _put(STATE, lambda _: _text("[1]")), rf"{STATE} is not a table, which"),
        ("nf4", _put(STATE, lambda old: old.float()), rf"{STATE} is F32 of shape"),
        ("nf4", _put(STATE, lambda _: torch.zeros(5000, dtype=torch.uint8)), rf"{STATE} is U8 of shape \[5000\]"),
        ("nf4", _say(quant_type="fp4"), rf"{STATE} is of 'fp4', which"),
        ("nf4", _say(shape=[96]), rf"{STATE} is for a shape \[96\], which"),
        ("nf4", _say(shape=[96, -64]), rf"{STATE} is for a shape \[96, -64\], which"),
        ("nf4", _say(shape=[64, 96]), r"up_proj.weight has shape \[64, 96\] but \S+ needs \[96, 64\]"),
        ("nf4", _say(blocksize=63), rf"{STATE} is for blocks of 63, which"),
        ("nf4", _say(nested_offset="x"), rf"{STATE} is for scales coded with x and blocks of 256"),
        ("nf4", _say(nested_blocksize=64), rf"{STATE} is for scales coded with \S+ and blocks of 64"),
        ("int8", _drop(f"{STEM}.SCB"), rf"{NAME} is stored as I8, and the checkpoint has no scales for it"),
        ("int8", _drop(NAME), rf"{STEM}.\w+ belongs to no weight that bitsandbytes stored"),
        ("int8", _put(f"{STEM}.SCB", lambda old: old[1:]), rf"{STEM}.SCB is F32 of shape \[95\], not F32 of shape \[96\]"),
        ("int8", _put(NAME, lambda old: old.float()), rf"{NAME} is F32 of shape \[96, 64\], but {STEM}.SCB is for a matrix of I8"),
        ("int8", _put(f"{STEM}.weight_format", lambda old: old + 2), rf"{STEM}.weight_format is not 0, so {NAME} is not stored row"),
    ],
)  # fmt: skip
def test_half_a_format_is_refused_by_name(
    layer: str, change: Any, message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders[layer], tmp_path / "copy"))
    _damaged(folder, change)
    with pytest.raises(CheckpointError, match=message):
        slowllm.load(folder)


def test_a_config_that_lies_of_the_bits_is_not_believed(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["int8"], tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = BnbLayer("nf4").settings
    (folder / "config.json").write_text(json.dumps(config))
    with slowllm.load(folder) as ours, slowllm.load(folders["int8"]) as theirs, torch.no_grad():
        assert torch.equal(ours.model(IDS).logits, theirs.model(IDS).logits)


@num_examples(100)
@given(
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=4),
    st.none() | st.integers(1, 170),
)
def test_any_damage_of_a_state_is_refused_or_what_the_codec_takes(
    changes: list[tuple[int, int]], length: int | None
) -> None:
    arrays = dict(BnbLayer()("a.weight", torch.ones(8, 64))[0])
    name = "a.weight.quant_state.bitsandbytes__nf4"
    for place, byte in changes:
        arrays[name][place % len(arrays[name])] = byte
    arrays[name] = arrays[name][:length]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "config.json").write_text("{}")
        save_file({key: array.contiguous() for key, array in arrays.items()}, folder / "model.safetensors")
        with Checkpoint.open(folder) as checkpoint:
            try:
                found, used = find({}, checkpoint.spans)
            except CheckpointError:
                return
    assert used == set(arrays)
    parts = {part.name: (part.dtype, part.shape) for part in found[0].parts}
    rows, width = found[0].shape
    assert CODECS["bnb_4bit"].has_parts(parts, rows, width, found[0].group)
