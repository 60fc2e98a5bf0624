"""Read a checkpoint's first block, embedding and head for transformers' own model, decoded where transformers would not do it here.

Decodes what the benchmarks write of compressed-tensors, and GGUF with llama.cpp's own package; float8 and gpt-oss's experts are left to
transformers. Nothing of slowllm is used, because its results are compared with these.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig

_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_GGUF_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


def gguf_file(folder: Path) -> Path | None:
    """Return the GGUF file of a folder that has no other weights."""
    return None if (folder / "config.json").is_file() else next(folder.glob("*.gguf"), None)


def config_of(folder: Path) -> Any:
    """Return transformers' config of a checkpoint; of one that is decoded here, without its format."""
    file = gguf_file(folder)
    config = AutoConfig.from_pretrained(folder, **({"gguf_file": file.name} if file else {}))
    if getattr(config, "quantization_config", {}).get("quant_method") == "compressed-tensors":
        del config.quantization_config
    return config


def first_block(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the first block and of what is outside the blocks, by the names of the hub."""
    if file := gguf_file(folder):
        yield from _first_block_of_gguf(file, config_of(folder))
        return
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as shard:
            names = set(shard.keys())
            for name in sorted(names):
                number = re.search(r"(?:^|\.)(?:h|layers|blocks)\.(\d+)\.", name)
                if number is not None and int(number[1]):
                    continue
                stem, _, last = name.rpartition(".")
                if last == "weight_packed":
                    # The writer keeps the arrays of a matrix in one shard, or the next begins with its scales.
                    yield (
                        f"{stem}.weight",
                        _decode(shard.get_tensor(name), _scales(folder, f"{stem}.weight_scale")),
                    )
                elif last != "weight_scale":
                    yield name, shard.get_tensor(name).clone()  # otherwise it would keep the file mapped


def _scales(folder: Path, name: str) -> Tensor:
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as shard:
            if name in shard.keys():  # noqa: SIM118 (the file is no dict)
                return shard.get_tensor(name)
    raise AssertionError(f"{name} is in no shard")


def _decode(packed: Tensor, scales: Tensor) -> Tensor:
    """Return the weights of a matrix (rows, columns) in bfloat16, as compressed-tensors rounds them."""
    if packed.dtype == torch.uint8:
        codes = torch.stack([packed & 15, packed >> 4], -1).flatten(1)
        levels = torch.tensor([*_LEVELS, *(-level for level in _LEVELS)], dtype=torch.bfloat16)
        numbers, factors = levels[codes.int()], torch.exp2(scales.float() - 127).to(torch.bfloat16)
    else:
        places = torch.arange(0, 32, 4, dtype=torch.int32)
        numbers = ((packed[..., None] >> places & 15) - 8).flatten(1).to(torch.bfloat16)
        factors = scales
    groups = numbers.view(len(numbers), scales.shape[1], -1)
    return (groups * factors[..., None]).view(len(numbers), -1)


def _first_block_of_gguf(file: Path, config: Any) -> Iterator[tuple[str, Tensor]]:
    from gguf import GGUFReader, quants

    for tensor in GGUFReader(file).tensors:
        stem = tensor.name.removesuffix(".weight")
        if stem.startswith("blk.") and not stem.startswith("blk.0."):
            continue
        name = stem.removeprefix("blk.0.")
        weights = torch.from_numpy(np.array(quants.dequantize(tensor.data, tensor.tensor_type)))
        if name in ("attn_q", "attn_k"):  # llama.cpp keeps the two halves of a rotated head as pairs
            heads = config.num_attention_heads if name == "attn_q" else config.num_key_value_heads
            pairs = weights.view(heads, -1, 2, weights.shape[1])
            weights = pairs.transpose(1, 2).reshape(weights.shape)
        block = "model.layers.0." if stem != name else ""
        yield f"{block}{_GGUF_NAMES[name]}.weight", weights.to(torch.bfloat16)
