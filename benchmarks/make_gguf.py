"""Write a GGUF file of a Llama's real geometry with random weights, in the types that llama.cpp calls Q4_K_M.

    python -m benchmarks.make_gguf --geometry llama-70b --blocks 4 OUT

Half of the attention's values and of the last matrices of the MLPs are Q6_K, the others Q4_K; rows that are no multiple of 256
weights are Q8_0. Weights are heavy-tailed (`heavy_tails`), coded once for each type and width (`gguf_blocks`), and written repeatedly
from shifting places, so that the disk and not the generator is the limit. The file says that it has no tokenizer, so that llama.cpp
opens it and takes token ids; a small tokenizer for slowllm lies beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gguf_blocks import encode
from benchmarks.heavy_tails import Pool, bytes_of, generator_of
from benchmarks.make_checkpoint import GEOMETRIES, ROOT
from benchmarks.native_weights import PoolKind, deviation_of
from slowllm.storage.gguf import BLOCKS, DEFAULT_ALIGNMENT, MAGIC
from slowllm.storage.gguf_files import SUFFIX

POOL_ELEMENTS = 1 << 23
# The numbers of types in the file.
_TYPES = {"f32": 0, "q8_0": 8, "q4_k": 12, "q6_k": 14}
_UINT32, _FLOAT32, _STRING = 4, 6, 8


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the file: name, shape in torch's order, and the name of its type."""

    name: str
    shape: tuple[int, ...]
    kind: str

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        if self.kind == "f32":
            return 4 * math.prod(self.shape)
        weights, size = BLOCKS[self.kind]
        return math.prod(self.shape) // weights * size


def tensors_of(options: dict[str, Any], num_blocks: int) -> Iterator[StoredTensor]:
    """Yield the tensors of a Llama, the embedding first."""
    hidden, wide, vocab = options["hidden_size"], options["intermediate_size"], options["vocab_size"]
    values = hidden // options["num_attention_heads"] * options["num_key_value_heads"]

    def matrix(name: str, rows: int, width: int, *, is_precise: bool = False) -> StoredTensor:
        kind = ("q6_k" if is_precise else "q4_k") if width % 256 == 0 else "q8_0"
        return StoredTensor(f"{name}.weight", (rows, width), kind)

    yield matrix("token_embd", vocab, hidden)
    for number in range(num_blocks):
        block, is_precise = f"blk.{number}", number % 2 == 0
        yield StoredTensor(f"{block}.attn_norm.weight", (hidden,), "f32")
        yield matrix(f"{block}.attn_q", hidden, hidden)
        yield matrix(f"{block}.attn_k", values, hidden)
        yield matrix(f"{block}.attn_v", values, hidden, is_precise=is_precise)
        yield matrix(f"{block}.attn_output", hidden, hidden)
        yield StoredTensor(f"{block}.ffn_norm.weight", (hidden,), "f32")
        yield matrix(f"{block}.ffn_gate", wide, hidden)
        yield matrix(f"{block}.ffn_up", wide, hidden)
        yield matrix(f"{block}.ffn_down", hidden, wide, is_precise=is_precise)
    yield StoredTensor("output_norm.weight", (hidden,), "f32")
    yield matrix("output", vocab, hidden, is_precise=True)


def make_gguf(geometry: str, num_blocks: int, out: Path, *, seed: int = 0) -> int:
    """Write the folder `out` with the file and a tokenizer, and return the file's size in bytes."""
    kind, _, options = GEOMETRIES[geometry]
    assert kind == "llama", "only Llamas are written"
    tensors = list(tensors_of(options, num_blocks))
    header = _header(options, num_blocks, tensors)
    out.mkdir(parents=True, exist_ok=True)
    pools: dict[str, Pool] = {}
    with open(out / f"{geometry}{SUFFIX}", "wb") as file:
        file.write(header + bytes(-len(header) % DEFAULT_ALIGNMENT))
        for tensor in tensors:
            _write(file, tensor, pools, seed)
        num_bytes = file.tell()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "weights" / "tiny-bloom" / name, out)
    return num_bytes


def _header(options: dict[str, Any], num_blocks: int, tensors: list[StoredTensor]) -> bytes:
    def string(text: str) -> bytes:
        return struct.pack("<Q", len(text)) + text.encode()

    counts = {
        "context_length": options["max_position_embeddings"], "embedding_length": options["hidden_size"],
        "block_count": num_blocks, "feed_forward_length": options["intermediate_size"],
        "attention.head_count": options["num_attention_heads"],
        "attention.head_count_kv": options["num_key_value_heads"],
        "rope.dimension_count": options["hidden_size"] // options["num_attention_heads"], "vocab_size": options["vocab_size"],
    }  # fmt: skip
    words = {"general.architecture": "llama", "tokenizer.ggml.model": "none"}
    pairs = [string(key) + struct.pack("<I", _STRING) + string(word) for key, word in words.items()]
    pairs += [string(f"llama.{key}") + struct.pack("<II", _UINT32, value) for key, value in counts.items()]
    eps = string("llama.attention.layer_norm_rms_epsilon") + struct.pack("<If", _FLOAT32, 1e-5)
    text = MAGIC + struct.pack("<IQQ", 3, len(tensors), len(pairs) + 1) + b"".join(pairs) + eps
    position = 0
    for tensor in tensors:
        number = _TYPES[tensor.kind]
        shape = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        text += string(tensor.name) + shape + struct.pack("<IQ", number, position)
        position += tensor.num_bytes + -tensor.num_bytes % DEFAULT_ALIGNMENT
    return text


def _write(file: Any, tensor: StoredTensor, pools: dict[str, Pool], seed: int) -> None:
    if tensor.kind == "f32":
        file.write(np.ones(tensor.shape, np.float32).tobytes())
    else:
        width = tensor.shape[-1]
        deviation = 1.0 if "embd" in tensor.name else deviation_of(tensor.name, width)
        kind = PoolKind(tensor.kind, width, deviation, encode(tensor.kind))
        if kind.name not in pools:
            pools[kind.name] = kind.draw(POOL_ELEMENTS, generator_of(kind.name, seed))
        for piece in bytes_of(pools[kind.name], "", tensor.num_bytes, generator_of(tensor.name, seed)):
            file.write(piece.numpy().data)
    file.write(bytes(-tensor.num_bytes % DEFAULT_ALIGNMENT))


def main() -> None:
    """Parse the command line, and write the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    llamas = sorted(name for name, (kind, _, _) in GEOMETRIES.items() if kind == "llama")
    parser.add_argument("--geometry", required=True, choices=llamas)
    parser.add_argument("--blocks", type=int, required=True, help="number of blocks")
    parser.add_argument("out", type=Path, help="folder to write")
    arguments = parser.parse_args()
    if arguments.blocks < 1:
        parser.error("--blocks must be at least 1")
    num_bytes = make_gguf(arguments.geometry, arguments.blocks, arguments.out)
    print(json.dumps({"out": str(arguments.out), "bytes": num_bytes}))


if __name__ == "__main__":
    main()
