"""Write a GGUF file of a Llama's real geometry with random weights, in the types that llama.cpp calls Q4_K_M.

    python -m benchmarks.make_gguf --geometry llama-70b --blocks 4 OUT

Half of the attention's values and of the last matrices of the MLPs are Q6_K, the others Q4_K; rows that are no multiple of 256
weights are Q8_0. Blocks are drawn once a type and written repeatedly at shifting offsets, so that the disk and not the generator
is the limit. A small tokenizer lies beside the file.
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

from benchmarks.make_checkpoint import GEOMETRIES, ROOT
from slowllm.storage.gguf import BLOCKS, DEFAULT_ALIGNMENT, MAGIC
from slowllm.storage.gguf_files import SUFFIX

POOL_BLOCKS = (1 << 16) + 129  # odd, so that the rows of a matrix do not repeat in step
# Number of a type, where its float16 scales lie, and the standard deviation of its codes times the scale's own.
_TYPES = {"q4_k": (12, (0, 2), 150.0), "q6_k": (14, (208,), 1300.0), "q8_0": (8, (0,), 74.0)}
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
    draw = np.random.default_rng(seed)
    pools: dict[str, np.ndarray] = {}
    with open(out / f"{geometry}{SUFFIX}", "wb") as file:
        file.write(header + bytes(-len(header) % DEFAULT_ALIGNMENT))
        for tensor in tensors:
            _write(file, tensor, pools, draw)
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
        "attention.head_count_kv": options["num_key_value_heads"], "vocab_size": options["vocab_size"],
    }  # fmt: skip
    pairs = [string("general.architecture") + struct.pack("<I", _STRING) + string("llama")]
    pairs += [string(f"llama.{key}") + struct.pack("<II", _UINT32, value) for key, value in counts.items()]
    eps = string("llama.attention.layer_norm_rms_epsilon") + struct.pack("<If", _FLOAT32, 1e-5)
    text = MAGIC + struct.pack("<IQQ", 3, len(tensors), len(pairs) + 1) + b"".join(pairs) + eps
    position = 0
    for tensor in tensors:
        number = 0 if tensor.kind == "f32" else _TYPES[tensor.kind][0]
        shape = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        text += string(tensor.name) + shape + struct.pack("<IQ", number, position)
        position += tensor.num_bytes + -tensor.num_bytes % DEFAULT_ALIGNMENT
    return text


def _write(file: Any, tensor: StoredTensor, pools: dict[str, np.ndarray], draw: np.random.Generator) -> None:
    if tensor.kind == "f32":
        file.write(np.ones(tensor.shape, np.float32).tobytes())
    else:
        name = f"{tensor.kind} {tensor.shape[-1]}"
        if name not in pools:
            pools[name] = _blocks(tensor.kind, tensor.shape[-1], draw)
        pool, left = pools[name], math.prod(tensor.shape) // BLOCKS[tensor.kind][0]
        start = int(draw.integers(POOL_BLOCKS))
        while left:
            piece = pool[start : start + left]
            file.write(piece.data)
            left, start = left - len(piece), 0
    file.write(bytes(-tensor.num_bytes % DEFAULT_ALIGNMENT))


def _blocks(kind: str, width: int, draw: np.random.Generator) -> np.ndarray:
    """Return random blocks whose weights have about the deviation that keeps activations of the order of one."""
    _, places, spread = _TYPES[kind]
    blocks = draw.integers(0, 256, (POOL_BLOCKS, BLOCKS[kind][1]), dtype=np.uint8)
    scales = draw.uniform(0.5, 1.5, (POOL_BLOCKS, len(places))) / spread / math.sqrt(width)
    if len(places) == 2:  # offsets, half of the largest code
        scales[:, 1] = 7.5 * scales[:, 0]
    for number, place in enumerate(places):
        halves = scales[:, number].astype("<f2")
        blocks[:, place : place + 2] = halves[:, None].view(np.uint8)
    return blocks


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
