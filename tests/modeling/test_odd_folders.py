"""Odd folders, with `from_pretrained` as the oracle: what it makes whole is made here too, or refused in one true sentence."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import slowllm
from slowllm.errors import SlowLLMError
from tests.support.families import VOCAB, save_tiny

IDS = torch.randint(5, VOCAB, (2, 9), generator=torch.Generator().manual_seed(2))
INDEX = "model.safetensors.index.json"
Change = Callable[[Path], None]


def logits_of_transformers(folder: Path) -> Tensor | None:
    """Return the logits of `from_pretrained`'s model; None where it refuses, or makes up weights that are missing."""
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
    except Exception:
        return None
    if found["missing_keys"] or found["mismatched_keys"]:
        return None
    with torch.no_grad():
        logits: Tensor = model.eval().requires_grad_(False)(IDS).logits
    return logits


@contextlib.contextmanager
def tensors(folder: Path, file: str = "model.safetensors") -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of a file, and write back what has become of them."""
    found = load_file(folder / file)
    found = {name: tensor.clone() for name, tensor in found.items()}
    yield found
    save_file(found, folder / file, {"format": "pt"})


@contextlib.contextmanager
def table(folder: Path, file: str) -> Iterator[dict[str, Any]]:
    """Yield a JSON file's object, and write back what has become of it."""
    found = json.loads((folder / file).read_text())
    yield found
    (folder / file).write_text(json.dumps(found))


def renamed(old: str, new: str) -> Change:
    def change(folder: Path) -> None:
        with tensors(folder) as found:
            for name in [name for name in found if name.startswith(old)]:
                found[new + name[len(old) :]] = found.pop(name)

    return change


def without(*parts: str) -> Change:
    def change(folder: Path) -> None:
        with tensors(folder) as found:
            for name in [name for name in found if any(part in name for part in parts)]:
                del found[name]

    return change


def with_tensor(name: str, tensor: Tensor) -> Change:
    def change(folder: Path) -> None:
        with tensors(folder) as found:
            found[name] = tensor

    return change


def cast(part: str, dtype: torch.dtype) -> Change:
    def change(folder: Path) -> None:
        with tensors(folder) as found:
            found.update({name: tensor.to(dtype) for name, tensor in found.items() if part in name})

    return change


def configured(**fields: Any) -> Change:
    def change(folder: Path) -> None:
        with table(folder, "config.json") as config:
            config.update(fields)
            for name in [name for name, value in config.items() if value == "remove"]:
                del config[name]

    return change


def tied_with_a_head_of_its_own(folder: Path) -> None:
    configured(tie_word_embeddings=True)(folder)


def tied_without_a_head(folder: Path) -> None:
    without("lm_head")(folder)
    configured(tie_word_embeddings=True)(folder)


def head_in_the_place_of_the_embedding(folder: Path) -> None:
    without("embed_tokens")(folder)
    configured(tie_word_embeddings=True)(folder)


def linked(folder: Path) -> None:
    os.rename(folder / "model.safetensors", folder / "blob")
    os.symlink("blob", folder / "model.safetensors")


def dangling(folder: Path) -> None:
    os.unlink(folder / "model.safetensors")
    os.symlink("nowhere", folder / "model.safetensors")


def cut_off(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 100)


def appended(folder: Path) -> None:
    with open(folder / "model.safetensors", "ab") as file:
        file.write(b"more")


def named_otherwise(folder: Path) -> None:
    os.rename(folder / "model.safetensors", folder / "weights.safetensors")


def second_file_beside(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "adapter_model.safetensors")


def pickle_beside(folder: Path) -> None:
    torch.save({"model.norm.weight": torch.zeros(3)}, folder / "pytorch_model.bin")


def stale_index(folder: Path) -> None:
    (folder / INDEX).write_text(
        json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00009.safetensors"}})
    )


def bytes_out_of_order(folder: Path) -> None:
    with tensors(folder) as found:
        backwards = dict(reversed(found.items()))
        found.clear()
        found.update(backwards)


def shard_in_a_folder(folder: Path) -> None:
    (folder / "parts").mkdir()
    name = sorted(path.name for path in folder.glob("model-*.safetensors"))[0]
    os.rename(folder / name, folder / "parts" / name)
    with table(folder, INDEX) as index:
        index["weight_map"] = {k: f"parts/{v}" if v == name else v for k, v in index["weight_map"].items()}


def index_without_metadata(folder: Path) -> None:
    with table(folder, INDEX) as index:
        del index["metadata"]


def index_names_another_shard(folder: Path) -> None:
    with table(folder, INDEX) as index:
        first, second = sorted(set(index["weight_map"].values()))[:2]
        index["weight_map"] = {k: second if v == first else v for k, v in index["weight_map"].items()}


def index_lacks_a_tensor(folder: Path) -> None:
    with table(folder, INDEX) as index:
        del index["weight_map"]["model.norm.weight"]


def index_names_a_tensor_more(folder: Path) -> None:
    with table(folder, INDEX) as index:
        index["weight_map"]["model.extra"] = next(iter(index["weight_map"].values()))


def shard_lost(folder: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def index_lost(folder: Path) -> None:
    (folder / INDEX).unlink()


def shard_beside_the_index(folder: Path) -> None:
    save_file({"model.norm.weight": torch.zeros(64)}, folder / "model-00099-of-00099.safetensors")


def doubled_tensor(folder: Path) -> None:
    first = sorted(folder.glob("model-*.safetensors"))[0].name
    with tensors(folder, first) as found:
        found["model.norm.weight"] = torch.full((64,), 9.0)


# Transformers refuses the folder though no weight is in doubt.
MORE = "more"
# Of one file: what is done to it, and a part of the sentence that refuses it; None where it must be as transformers has it.
WHOLE: dict[str, tuple[Change, str | None]] = {
    "as it is": (lambda folder: None, None),
    "base model's names": (renamed("model.", ""), None),
    "names of a wrapper": (renamed("", "module."), "begin with module."),
    "names of a compiled model": (renamed("", "_orig_mod."), "begin with _orig_mod."),
    "names of two wrappers": (renamed("", "module._orig_mod."), "begin with module._orig_mod."),
    "names with a doubled prefix": (renamed("model.", "model.model."), None),
    "a tied head of its own": (tied_with_a_head_of_its_own, None),
    "tied, without a head": (tied_without_a_head, None),
    "tied, with the head only": (head_in_the_place_of_the_embedding, None),
    "no head": (without("lm_head"), "missing from the checkpoint"),
    "no last norm": (without("model.norm"), "missing from the checkpoint"),
    "no weight in a block": (without("layers.1.mlp.up"), "missing from the checkpoint"),
    "no last block": (without("layers.2."), "missing from the checkpoint"),
    "a block more": (with_tensor("model.layers.3.mlp.up_proj.weight", torch.zeros(96, 64)), "a block beyond"),
    "an old buffer more": (with_tensor("model.layers.0.self_attn.rotary_emb.inv_freq", torch.zeros(8)), None),
    "a tensor more": (with_tensor("value_head.weight", torch.zeros(1, 64)), None),
    "an empty tensor more": (with_tensor("empty", torch.zeros(0)), None),
    "a scalar more": (with_tensor("step", torch.tensor(7)), None),
    "fp16 throughout": (cast("", torch.float16), None),
    "bf16 throughout": (cast("", torch.bfloat16), None),
    "fp64 throughout": (cast("", torch.float64), None),
    "bf16 among fp32": (cast("mlp", torch.bfloat16), None),
    "fp16 norms": (cast("norm", torch.float16), None),
    "integers": (cast("mlp.up", torch.int32), "is stored as torch.int32"),
    "another shape": (with_tensor("model.norm.weight", torch.zeros(65)), "shape"),
    "transposed": (with_tensor("model.layers.0.mlp.up_proj.weight", torch.zeros(64, 96)), "shape"),
    "a flat matrix": (with_tensor("model.layers.0.mlp.up_proj.weight", torch.zeros(96 * 64)), "shape"),
    "more blocks in config": (configured(num_hidden_layers=4), "missing from the checkpoint"),
    "fewer blocks in config": (configured(num_hidden_layers=2), "a block beyond"),
    "a larger vocabulary in config": (configured(vocab_size=VOCAB + 1), "shape"),
    "no architectures": (configured(architectures="remove"), None),
    "foreign architectures": (configured(architectures=["GPT2LMHeadModel"]), None),
    "no model_type": (configured(model_type="remove"), "names no model_type"),
    "an unknown model_type": (configured(model_type="nobody"), "cannot be used by this version"),
    "an old dtype field": (configured(dtype="remove", torch_dtype="float16"), None),
    "an auto_map": (configured(auto_map={"AutoModelForCausalLM": "modeling_x.X"}), None),
    "rope in the old form": (configured(rope_parameters="remove", rope_theta=10000.0), None),
    "quantised": (configured(quantization_config={"quant_method": "gptq", "bits": 4}), r"says that weights are quantised \(gptq\), but none is"),
    "a link": (linked, None),
    "a dangling link": (dangling, "."),
    "cut off": (cut_off, "."),
    "bytes behind the last tensor": (appended, "."),
    "another file name": (named_otherwise, MORE),
    "an adapter beside": (second_file_beside, None),
    "a pickle beside": (pickle_beside, None),
    "a stale index beside": (stale_index, None),
    "bytes in another order": (bytes_out_of_order, None),
}  # fmt: skip
# Of several shards.
SHARDED: dict[str, tuple[Change, str | None]] = {
    "as it is": (lambda folder: None, None),
    "a shard in a folder": (shard_in_a_folder, None),
    "an index without metadata": (index_without_metadata, MORE),
    "an index that names another shard": (index_names_another_shard, "is missing, though"),
    "an index that lacks a tensor": (index_lacks_a_tensor, None),
    "an index that names a tensor more": (index_names_a_tensor_more, "is missing, though"),
    "a lost shard": (shard_lost, "missing; fetch this shard"),
    "a lost index": (index_lost, "but no model.safetensors.index.json"),
    "a shard beside the index": (shard_beside_the_index, None),
    "a tensor in two shards": (doubled_tensor, None),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("odd")
    save_tiny("llama-2", out / "whole", shard="1GB")
    save_tiny("llama-2", out / "sharded")
    return {"whole": out / "whole", "sharded": out / "sharded"}


@pytest.mark.parametrize(
    ("kind", "name"), [*(("whole", name) for name in WHOLE), *(("sharded", name) for name in SHARDED)]
)
def test_a_folder_is_what_transformers_makes_of_it(
    kind: str, name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    change, refusal = (WHOLE if kind == "whole" else SHARDED)[name]
    folder = Path(shutil.copytree(folders[kind], tmp_path / "model"))
    change(folder)
    wanted = logits_of_transformers(folder)
    if refusal == MORE:
        assert wanted is None
        wanted, refusal = logits_of_transformers(folders[kind]), None
    if refusal is not None:
        with pytest.raises(SlowLLMError, match=refusal) as caught:
            slowllm.load(folder, dtype="fp32")
        assert "\n" not in str(caught.value)
        return
    with slowllm.load(folder, dtype="fp32") as lm, torch.no_grad():
        found = lm.model(IDS).logits
    assert wanted is not None, "transformers refuses it or makes up weights, and so should slowllm"
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("rest", [0, 8, 24, 56])
def test_experts_begin_on_a_cache_line_wherever_they_begin_in_the_file(
    rest: int, resident: bool, tmp_path: Path
) -> None:
    """Products with experts in float32 round otherwise at other addresses, but not in the mode of MKL that tests set."""
    save_tiny("gpt-oss", tmp_path, shard="1GB")
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length].rstrip()
    header += b" " * ((rest - 8 - len(header)) % 64)
    file.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
    with slowllm.load(tmp_path, dtype="fp32", keep_resident=resident) as lm:
        for stop, placements in enumerate(lm.layout.stops):
            experts = [placement.name for placement in placements if len(placement.shape) == 3]

            def addresses(weights: Any, names: list[str] = experts) -> list[int]:
                return [weights[name].data_ptr() % 64 for name in names]

            assert not any(lm._carousel.visit(stop, "up", addresses))
        wanted = logits_of_transformers(tmp_path)
        with torch.no_grad():
            assert wanted is not None
            assert torch.equal(lm.model(IDS).logits, wanted)
