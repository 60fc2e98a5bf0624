"""Write a checkpoint of real geometry with random weights, to measure with before downloading 350 GB.

    python -m benchmarks.make_checkpoint --geometry llama-70b --blocks 4 OUT

The files are laid out as on the hub: the hub's tensor names, bf16, shards of about 5 GB with an index, and a small
tokenizer beside them. Weights are drawn once per scale and written repeatedly at shifting offsets, so that the disk and
not the generator is the limit. Norms are one and biases zero, so that activations stay of the order of one.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from slowllm.runtime.known_models import KNOWN_MODELS

ROOT = Path(__file__).resolve().parent.parent
SHARD_BYTES = 5_000_000_000
POOL_ELEMENTS = (1 << 25) + 12_289  # odd, so that the rows of a matrix do not repeat in step

# Name on the command line: the hub id of a model whose published shape is taken.
PUBLISHED = {
    "bloom-7b1": "bigscience/bloom-7b1",
    "bloom-176b": "bigscience/bloom",
    "llama-70b": "meta-llama/Llama-3.1-70B",
    "llama-405b": "meta-llama/Llama-3.1-405B",
    "mixtral-8x22b": "mistralai/Mixtral-8x22B-Instruct-v0.1",
    "falcon-180b": "tiiuae/falcon-180B",
}


def _published(hub_id: str) -> tuple[str, int, dict[str, Any]]:
    known = KNOWN_MODELS[hub_id]
    options = dict(known.options)
    return known.model_type, options.pop("num_hidden_layers"), options


# Model type, number of blocks of the whole model, and its published configuration.
GEOMETRIES: dict[str, tuple[str, int, dict[str, Any]]] = {
    **{name: _published(hub_id) for name, hub_id in PUBLISHED.items()},
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


def num_model_blocks(geometry: str) -> int:
    """Return the number of blocks of a geometry's whole model."""
    return GEOMETRIES[geometry][1]


def make_checkpoint(geometry: str, num_blocks: int, out: Path, *, seed: int = 0) -> int:
    """Write a checkpoint and return its size in bytes. The folder gets its name when it is complete.

    Raises:
        SystemExit: there is too little free space.
    """
    model = _on_meta(geometry, num_blocks)
    tensors = _names_on_disk(model)
    num_bytes = sum(tensor.numel() * 2 for tensor in tensors.values())
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if num_bytes > 0.98 * free:
        sys.exit(f"{out}: needs {num_bytes / 1e9:.1f} GB but {free / 1e9:.1f} GB are free")
    partial = out.with_name(out.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()

    shards = list(_shards(tensors))
    weight_map = {}
    pools: dict[float, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update(dict.fromkeys(names, file))
        _write_shard(partial / file, {name: tensors[name] for name in names}, pools, generator)
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    model.config.architectures = [type(model).__name__]
    model.config.dtype = torch.bfloat16
    model.config.save_pretrained(partial)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "weights" / "tiny-bloom" / file, partial)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return num_bytes


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
    if model.config.model_type == "bloom":  # as in bigscience/bloom
        names = {name.removeprefix("transformer."): tensor for name, tensor in names.items()}
    return names


def _shards(tensors: dict[str, Tensor]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if names and size + tensor.numel() * 2 > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.numel() * 2
    yield names


def _write_shard(
    path: Path, tensors: dict[str, Tensor], pools: dict[float, Tensor], generator: torch.Generator
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in tensors.items():
        num_bytes = tensor.numel() * 2
        offsets = [position, position + num_bytes]
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": offsets}
        position += num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            _write_tensor(file, name, tensor, pools, generator)


def _write_tensor(
    file: Any, name: str, tensor: Tensor, pools: dict[float, Tensor], generator: torch.Generator
) -> None:
    if tensor.dim() == 1:
        value = 0.0 if name.endswith("bias") else 1.0
        file.write(torch.full(tensor.shape, value, dtype=torch.bfloat16).view(torch.uint8).numpy().data)
        return
    scale = 0.02 if "embed" in name else 1 / math.sqrt(tensor.shape[-1])
    if scale not in pools:
        pools[scale] = torch.randn(POOL_ELEMENTS, generator=generator).mul_(scale).to(torch.bfloat16)
    pool = pools[scale]
    start = int(torch.randint(POOL_ELEMENTS, (), generator=generator))
    left = tensor.numel()
    while left:
        piece = pool[start : start + left]
        file.write(piece.view(torch.uint8).numpy().data)
        left, start = left - len(piece), 0


def main() -> None:
    """Parse the command line, write the checkpoint, and print how long it took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--geometry", required=True, choices=sorted(GEOMETRIES))
    parser.add_argument(
        "--blocks", type=int, required=True, help="number of blocks; the whole model has more"
    )
    parser.add_argument("out", type=Path, help="folder to write")
    arguments = parser.parse_args()
    if arguments.blocks < 1:
        parser.error("--blocks must be at least 1")
    started = time.perf_counter()
    num_bytes = make_checkpoint(arguments.geometry, arguments.blocks, arguments.out)
    seconds = time.perf_counter() - started
    result = {"out": str(arguments.out), "bytes": num_bytes, "seconds": round(seconds, 2)}
    print(
        f"{num_bytes / 1e9:.2f} GB in {seconds:.1f} s, {seconds / num_bytes * 1e9:.2f} s/GB", file=sys.stderr
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
