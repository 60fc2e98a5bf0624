"""Write a checkpoint of real geometry with random weights, to measure with before downloading 350 GB.

    python -m benchmarks.make_checkpoint --geometry llama-70b --blocks 4 OUT
    python -m benchmarks.make_checkpoint --geometry llama-70b --blocks 4 --format fp8 OUT

The files are laid out as on the hub: the hub's tensor names, shards of about 5 GB with an index, and a small tokenizer beside them.
Weights are heavy-tailed in every format, their rows and columns differ in size (`heavy_tails`), and they are coded by the format's own
rule (`coded_pools`): once for each width, and written repeatedly from shifting places, so that the disk and not the generator is the
limit. Norms are one and biases zero, so that activations stay of the order of one. Experts are unequally popular (`routers`).

Geometries, and the formats in which they are published:
%(geometries)s
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from benchmarks import deepseek_v4
from benchmarks.heavy_tails import Pool, bytes_of, generator_of
from benchmarks.native_weights import FORMATS, StoredArray, arrays_of
from slowllm.runtime.known_models import KNOWN_MODELS
from slowllm.storage.spans import DTYPE_BITS

ROOT = Path(__file__).resolve().parent.parent
SHARD_BYTES = 5_000_000_000
POOL_ELEMENTS = 1 << 24  # 400 rows of the widest matrices
_EXPERT = re.compile(r"(.*\.experts\.)(\d+)\.")
# In the order of safetensors' own writer.
_DTYPES = ("I64", "F32", "BF16", "F8_E8M0", "F8_E4M3", "I8")

# Name on the command line: the hub id of a model whose published shape is taken.
PUBLISHED = {
    "bloom-7b1": "bigscience/bloom-7b1",
    "bloom-176b": "bigscience/bloom",
    "llama-70b": "meta-llama/Llama-3.1-70B",
    "llama-405b": "meta-llama/Llama-3.1-405B",
    "mixtral-8x22b": "mistralai/Mixtral-8x22B-Instruct-v0.1",
    "falcon-180b": "tiiuae/falcon-180B",
    "deepseek-v3": "deepseek-ai/DeepSeek-V3",
    "kimi-k2": "moonshotai/Kimi-K2-Instruct",
    "qwen3-235b": "Qwen/Qwen3-235B-A22B-FP8",
    "gpt-oss-120b": "openai/gpt-oss-120b",
}


def _published(hub_id: str) -> tuple[str, int, dict[str, Any]]:
    known = KNOWN_MODELS[hub_id]
    options = dict(known.options)
    return known.model_type, options.pop("num_hidden_layers"), options


# Model type, number of blocks of the whole model, and its published configuration.
GEOMETRIES: dict[str, tuple[str, int, dict[str, Any]]] = {
    **{name: _published(hub_id) for name, hub_id in PUBLISHED.items()},
    "deepseek-v4-flash": ("deepseek_v4", 43, dict(deepseek_v4.FLASH)),
    # As in zai-org/GLM-5.2.
    "glm-5.2": (
        "glm_moe_dsa",
        78,
        {
            "vocab_size": 154880, "hidden_size": 6144, "intermediate_size": 12288, "moe_intermediate_size": 2048,
            "num_attention_heads": 64, "num_key_value_heads": 64, "q_lora_rank": 2048, "kv_lora_rank": 512,
            "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256, "n_routed_experts": 256, "n_shared_experts": 1,
            "num_experts_per_tok": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 3, "norm_topk_prob": True,
            "routed_scaling_factor": 2.5, "index_n_heads": 32, "index_head_dim": 128, "index_topk": 2048, "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 8000000.0}, "max_position_embeddings": 202752,
            "tie_word_embeddings": False,
        },
    ),
    # For the tests of the benchmarks.
    "tiny": (
        "llama",
        8,
        {
            "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": 4096, "max_position_embeddings": 2048,
        },
    ),
}  # fmt: skip


def format_of(geometry: str, storage: str) -> str:
    """Return the name of a format, that in which the model is published for ``native``.

    Raises:
        KeyError: this model is published in a format that is not written here.
    """
    if storage != "native":
        return storage
    if GEOMETRIES[geometry][0] == "deepseek_v4":
        return "fp4"
    published = KNOWN_MODELS[PUBLISHED[geometry]].quantisation if geometry in PUBLISHED else None
    return "bf16" if published is None else {"fp8": "fp8", "mxfp4": "mxfp4"}[str(published["quant_method"])]


def num_model_blocks(geometry: str) -> int:
    """Return the number of blocks of a geometry's whole model."""
    return GEOMETRIES[geometry][1]


def make_checkpoint(
    geometry: str, num_blocks: int, out: Path, *, seed: int = 0, storage: str = "bf16"
) -> int:
    """Write a checkpoint and return its size in bytes. The folder gets its name when it is complete.

    Raises:
        SystemExit: there is too little free space, or nothing in the model that the format codes.
    """
    form = FORMATS[format_of(geometry, storage)]
    model = _on_meta(geometry, num_blocks)
    arrays = list(arrays_of(form, _names_on_disk(model)))
    plain = {array.name for array in arrays_of(FORMATS["bf16"], _names_on_disk(model))}
    if form.settings is not None and {array.name for array in arrays} == plain:
        sys.exit(
            f"{out}: {geometry} has no weights that {format_of(geometry, storage)} codes; choose another --format"
        )
    num_bytes = sum(map(_bytes_of, arrays))
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if num_bytes > 0.98 * free:
        sys.exit(f"{out}: needs {num_bytes / 1e9:.1f} GB but {free / 1e9:.1f} GB are free")
    partial = out.with_name(out.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()

    shards = list(_shards(arrays))
    if form.is_by_dtype:
        shards = [
            sorted(shard, key=lambda array: (_DTYPES.index(array.dtype), array.name)) for shard in shards
        ]
    weight_map = {}
    pools: dict[str, Pool] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update({array.name: file for array in shard})
        _write_shard(partial / file, shard, pools, seed)
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    model.config.architectures = [type(model).__name__]
    model.config.dtype = torch.bfloat16
    if form.settings is not None:
        model.config.quantization_config = dict(form.settings)
    model.config.save_pretrained(partial)
    if model.config.model_type == "deepseek_v4":
        _add_published(partial / "config.json", GEOMETRIES[geometry][2])
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "weights" / "tiny-bloom" / file, partial)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return num_bytes


def _add_published(path: Path, options: dict[str, Any]) -> None:
    """Add to config.json what it says on the hub and transformers leaves out or names otherwise, for programs that read only that."""
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({**options, **saved}, indent=2))


def _bytes_of(array: StoredArray) -> int:
    return array.num_elements * DTYPE_BITS[array.dtype] // 8


def _on_meta(geometry: str, num_blocks: int) -> PreTrainedModel:
    kind, _, options = GEOMETRIES[geometry]
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    config = AutoConfig.for_model(kind, num_hidden_layers=num_blocks, **options, **tokens)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _names_on_disk(model: PreTrainedModel) -> dict[str, Tensor]:
    state = {
        name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys
    }
    names = revert_weight_conversion(model, state)
    if model.config.model_type == "deepseek_v4":
        names = {deepseek_v4.published_name(name): tensor for name, tensor in names.items()}
    if model.config.model_type == "bloom":  # as in bigscience/bloom
        names = {name.removeprefix("transformer."): tensor for name, tensor in names.items()}
    return dict(sorted(names.items(), key=_place(list(names))))


def _place(names: list[str]) -> Callable[[tuple[str, Tensor]], tuple[int, int, int]]:
    """Return a sort key: names in their order, but one expert's tensors after the other's, as published."""
    places = {name: place for place, name in enumerate(names)}
    first: dict[str, int] = {}

    def key(item: tuple[str, Tensor]) -> tuple[int, int, int]:
        found = _EXPERT.match(item[0])
        if found is None:
            return places[item[0]], 0, 0
        return first[found[1]], int(found[2]), places[item[0]]

    for name in names:
        if (found := _EXPERT.match(name)) is not None:
            first.setdefault(found[1], places[name])
    return key


def _shards(arrays: list[StoredArray]) -> Iterator[list[StoredArray]]:
    """Yield the arrays of each shard; an expert's are in one, as published."""
    shard: list[StoredArray] = []
    size = 0
    for _, group in itertools.groupby(arrays, key=_unit):
        unit = list(group)
        num_bytes = sum(map(_bytes_of, unit))
        if shard and size + num_bytes > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard += unit
        size += num_bytes
    yield shard


def _unit(array: StoredArray) -> str:
    found = _EXPERT.match(array.name)
    return array.name if found is None else found[0]


def _write_shard(path: Path, arrays: list[StoredArray], pools: dict[str, Pool], seed: int) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for array in arrays:
        offsets = [position, position + _bytes_of(array)]
        header[array.name] = {"dtype": array.dtype, "shape": list(array.shape), "data_offsets": offsets}
        position = offsets[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays:
            _write_array(file, array, pools, seed)


def _write_array(file: Any, array: StoredArray, pools: dict[str, Pool], seed: int) -> None:
    kind = array.kind
    if kind is None:
        assert array.content is not None, "what is not cut from a pool has a content"
        file.write(array.content.expand(array.shape).contiguous().view(torch.uint8).numpy().data)
        return
    if kind.name not in pools:
        pools[kind.name] = kind.draw(POOL_ELEMENTS, generator_of(kind.name, seed))
    for piece in bytes_of(pools[kind.name], array.part, array.num_elements, generator_of(array.origin, seed)):
        file.write(piece.numpy().data)


def described() -> str:
    """Return a line for each geometry: its name, its blocks, and its native format."""
    return "\n".join(
        f"    {name:<14} {num_model_blocks(name):>3} blocks, {format_of(name, 'native')}"
        for name in sorted(GEOMETRIES)
    )


def main() -> None:
    """Parse the command line, write the checkpoint, and print how long it took."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "") % {"geometries": described()},
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--geometry", required=True, choices=sorted(GEOMETRIES))
    parser.add_argument(
        "--blocks", type=int, required=True, help="number of blocks; the whole model has more"
    )
    parser.add_argument(
        "--format",
        choices=["native", *sorted(FORMATS)],
        default="bf16",
        help="how weights are stored; native: as the model is published",
    )
    parser.add_argument("out", type=Path, help="folder to write")
    arguments = parser.parse_args()
    if arguments.blocks < 1:
        parser.error("--blocks must be at least 1")
    started = time.perf_counter()
    num_bytes = make_checkpoint(arguments.geometry, arguments.blocks, arguments.out, storage=arguments.format)
    seconds = time.perf_counter() - started
    result = {"out": str(arguments.out), "bytes": num_bytes, "seconds": round(seconds, 2)}
    print(
        f"{num_bytes / 1e9:.2f} GB in {seconds:.1f} s, {seconds / num_bytes * 1e9:.2f} s/GB", file=sys.stderr
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
