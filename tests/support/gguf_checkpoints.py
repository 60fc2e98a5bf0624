"""Tiny random models in GGUF files, written with the maker's package: names, layouts and metadata as llama.cpp writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from transformers.convert_slow_tokenizer import bytes_to_unicode

from slowllm.storage.gguf import BLOCKS

VOCAB, HIDDEN, WIDE, HEADS, KV_HEADS, BLOCK_COUNT, EXPERTS = 272, 256, 512, 4, 2, 2, 4
HEAD = HIDDEN // HEADS

# The type of a tensor by its name; norms and vectors are F32 always.
Kinds = Callable[[str], str]
# Where a block has float16 scales, and numbers that make weights of ordinary size.
_SCALES: Mapping[str, tuple[tuple[int, ...], float]] = {
    "q4_0": ((0,), 1e-2), "q4_1": ((0, 2), 5e-3), "q5_0": ((0,), 5e-3), "q5_1": ((0, 2), 3e-3), "q8_0": ((0,), 5e-4),
    "iq4_nl": ((0,), 5e-4), "q2_k": ((80, 82), 1e-3), "q3_k": ((108,), 5e-4), "q4_k": ((0, 2), 1e-4),
    "q5_k": ((0, 2), 5e-5), "q6_k": ((208,), 2e-5), "iq4_xs": ((0,), 2e-5),
    "iq1_s": ((0,), 5e-3), "iq2_xxs": ((0,), 1e-3), "iq2_xs": ((0,), 1e-3), "iq2_s": ((0,), 1e-3), "iq3_xxs": ((0,), 3e-4),
    "iq3_s": ((0,), 2e-4),
}  # fmt: skip


def _attention(block: str, bias: bool = False, norms: bool = False) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, rows in (("q", HIDDEN), ("k", KV_HEADS * HEAD), ("v", KV_HEADS * HEAD)):
        yield f"{block}.attn_{name}.weight", (rows, HIDDEN)
        if bias:
            yield f"{block}.attn_{name}.bias", (rows,)
    if norms:
        yield f"{block}.attn_q_norm.weight", (HEAD,)
        yield f"{block}.attn_k_norm.weight", (HEAD,)
    yield f"{block}.attn_output.weight", (HIDDEN, HIDDEN)


def _mlp(block: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, shape in (("gate", (WIDE, HIDDEN)), ("up", (WIDE, HIDDEN)), ("down", (HIDDEN, WIDE))):
        yield f"{block}.ffn_{name}.weight", shape


def _experts(block: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{block}.ffn_gate_inp.weight", (EXPERTS, HIDDEN)
    for name, shape in (("gate", (WIDE, HIDDEN)), ("up", (WIDE, HIDDEN)), ("down", (HIDDEN, WIDE))):
        yield f"{block}.ffn_{name}_exps.weight", (EXPERTS, *shape)


def _shared_expert(block: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{block}.ffn_gate_inp_shexp.weight", (HIDDEN,)
    for name, shape in (("gate", (WIDE, HIDDEN)), ("up", (WIDE, HIDDEN)), ("down", (HIDDEN, WIDE))):
        yield f"{block}.ffn_{name}_shexp.weight", shape


def _fused_attention(block: str, rows: int, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    shapes = {
        "attn_qkv": (rows, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_up": (4 * HIDDEN, HIDDEN),
        "ffn_down": (HIDDEN, 4 * HIDDEN),
    }
    for name, shape in shapes.items():
        yield f"{block}.{name}.weight", shape
        if bias:
            yield f"{block}.{name}.bias", shape[:1]


def _norms(block: str, *names: str, bias: bool = False) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name in names:
        yield f"{block}.{name}.weight", (HIDDEN,)
        if bias:
            yield f"{block}.{name}.bias", (HIDDEN,)


_TWO_NORMS = ("attn_norm", "ffn_norm")
_FOUR_NORMS = (*_TWO_NORMS, "post_attention_norm", "post_ffw_norm")
_BLOCKS_OF: Mapping[str, Callable[[str], list[tuple[str, tuple[int, ...]]]]] = {
    "llama": lambda b: [*_attention(b), *_mlp(b), *_norms(b, *_TWO_NORMS)],
    "mixtral": lambda b: [*_attention(b), *_experts(b), *_norms(b, *_TWO_NORMS)],
    "qwen2": lambda b: [*_attention(b, bias=True), *_mlp(b), *_norms(b, *_TWO_NORMS)],
    "qwen2moe": lambda b: [
        *_attention(b, bias=True), *_experts(b), *_shared_expert(b), *_norms(b, *_TWO_NORMS)
    ],
    "qwen3": lambda b: [*_attention(b, norms=True), *_mlp(b), *_norms(b, *_TWO_NORMS)],
    "qwen3moe": lambda b: [*_attention(b, norms=True), *_experts(b), *_norms(b, *_TWO_NORMS)],
    "gemma2": lambda b: [*_attention(b), *_mlp(b), *_norms(b, *_FOUR_NORMS)],
    "gemma3": lambda b: [*_attention(b, norms=True), *_mlp(b), *_norms(b, *_FOUR_NORMS)],
    "bloom": lambda b: [*_fused_attention(b, 3 * HIDDEN, True), *_norms(b, *_TWO_NORMS, bias=True)],
    "falcon": lambda b: [*_fused_attention(b, HIDDEN + 2 * HEAD, False), *_norms(b, "attn_norm", bias=True)],
    "falcon-40b": lambda b: [
        *_fused_attention(b, HIDDEN + 2 * KV_HEADS * HEAD, False), *_norms(b, "attn_norm", "attn_norm_2", bias=True)
    ],
}  # fmt: skip
FAMILIES = tuple(_BLOCKS_OF)


def tensors_of(family: str, *, has_head: bool) -> list[tuple[str, tuple[int, ...]]]:
    """Return names and shapes, in torch's order, of the tensors of a family."""
    found: list[tuple[str, tuple[int, ...]]] = [("token_embd.weight", (VOCAB, HIDDEN))]
    found += [("output_norm.weight", (HIDDEN,))]
    if family in ("bloom", "falcon", "falcon-40b"):
        found += [("output_norm.bias", (HIDDEN,))]
    if family == "bloom":
        found += [("token_embd_norm.weight", (HIDDEN,)), ("token_embd_norm.bias", (HIDDEN,))]
    if has_head:
        found += [("output.weight", (VOCAB, HIDDEN))]
    for number in range(BLOCK_COUNT):
        found += _BLOCKS_OF[family](f"blk.{number}")
    return found


def architecture_of(family: str) -> str:
    """Return what llama.cpp calls a family."""
    return {"mixtral": "llama", "falcon-40b": "falcon"}.get(family, family)


def metadata_of(family: str) -> dict[str, Any]:
    """Return the metadata of a family's tiny model, without tokenizer."""
    architecture = architecture_of(family)
    found: dict[str, Any] = {
        "context_length": 128, "embedding_length": HIDDEN, "block_count": BLOCK_COUNT, "feed_forward_length": WIDE,
        "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "rope.freq_base": 10000.0,
        "attention.layer_norm_rms_epsilon": 1e-5, "attention.key_length": HEAD, "attention.value_length": HEAD,
        "vocab_size": VOCAB,
    }  # fmt: skip
    if family in ("llama", "mixtral"):
        found["rope.dimension_count"] = HEAD
    if family in ("mixtral", "qwen2moe", "qwen3moe"):
        found |= {"expert_count": EXPERTS, "expert_used_count": 2}
    if family in ("qwen2moe", "qwen3moe"):
        found |= {"expert_feed_forward_length": WIDE, "expert_shared_feed_forward_length": WIDE}
    if family.startswith("gemma"):
        found |= {"attention.sliding_window": 8}
    if family == "gemma2":
        found |= {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0}
    if family == "falcon-40b":
        found["attention.layer_norm_epsilon"] = 1e-5
    if family in ("bloom", "falcon"):
        found["attention.layer_norm_epsilon"] = 1e-5
        found["attention.head_count_kv"] = HEADS if family == "bloom" else 1
    return {f"{architecture}.{key}": value for key, value in found.items()}


def random_blocks(kind: str, num_rows: int, width: int, draw: np.random.Generator) -> np.ndarray:
    """Return random blocks (rows, bytes of a row) whose weights are of ordinary size."""
    weights, size = BLOCKS[kind]
    blocks = draw.integers(0, 256, (num_rows, width // weights, size), dtype=np.uint8)
    if kind == "mxfp4":
        blocks[..., 0] = draw.integers(117, 122, blocks.shape[:2])
        return blocks.reshape(num_rows, -1)
    if kind == "iq1_m":  # the digits of a float16 number of about 0.01 stand in four places
        for place, digit in ((49, 0), (51, 2), (53, 1), (55, 2)):
            blocks[..., place] = blocks[..., place] & 15 | digit << 4
        return blocks.reshape(num_rows, -1)
    places, scale = _SCALES[kind]
    for place in places:
        scales = (
            draw.uniform(0.2, 1.0, blocks.shape[:2]) * scale * draw.choice([-1, 1], blocks.shape[:2])
        ).astype("<f2")
        blocks[..., place : place + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(num_rows, -1)


def add_tensor(
    writer: GGUFWriter, name: str, shape: tuple[int, ...], kind: str, draw: np.random.Generator
) -> None:
    """Add a random tensor."""
    if kind in BLOCKS:
        stored = random_blocks(kind, int(np.prod(shape[:-1])), shape[-1], draw).reshape(*shape[:-1], -1)
        writer.add_tensor(name, stored, raw_shape=stored.shape, raw_dtype=GGMLQuantizationType[kind.upper()])
        return
    values = draw.standard_normal(shape).astype(np.float32) * 0.05
    if name.endswith("norm.weight"):
        values += 1
    if kind == "bf16":
        bits = (values.view(np.uint32) >> 16).astype(np.uint16)
        writer.add_tensor(
            name,
            bits.view(np.uint8),
            raw_shape=(*shape[:-1], 2 * shape[-1]),
            raw_dtype=GGMLQuantizationType.BF16,
        )
        return
    writer.add_tensor(name, values.astype(np.float16 if kind == "f16" else np.float32))


def write_gguf(
    path: Path,
    family: str = "llama",
    kinds: Kinds | str = "q4_k",
    *,
    has_head: bool = True,
    metadata: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    seed: int = 0,
    part: tuple[int, int] = (0, 1),
) -> Path:
    """Write a tiny random model, and return its path.

    Args:
        path: of the file.
        family: one of `FAMILIES`.
        kinds: the type of matrices, by name or for all.
        has_head: whether the head is stored apart from the embedding.
        metadata: further keys, or others.
        extra: further tensors.
        seed: of the weights.
        part: which of how many parts of the tensors is written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, architecture_of(family))
    for key, value in {**metadata_of(family), **(metadata or {})}.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            writer.add_string(key, value)
    for number, (name, shape) in enumerate(tensors_of(family, has_head=has_head)):
        if number % part[1] != part[0]:
            continue
        draw = np.random.default_rng([seed, number])
        is_plain = len(shape) == 1 or "ffn_gate_inp." in name
        kind = "f32" if is_plain else kinds if isinstance(kinds, str) else kinds(name)
        add_tensor(writer, name, shape, kind, draw)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level_tokenizer() -> dict[str, Any]:
    """Return the metadata of a byte-level tokenizer of `VOCAB` tokens."""
    alphabet = list(bytes_to_unicode().values())
    merges = ["t h", "Ġ a", "Ġ th", "i n", "e r", "Ġ c", "o n", "Ġ s", "a t", "Ġc at"]
    tokens = [*alphabet, *(merge.replace(" ", "") for merge in merges), "<s>", "</s>"]
    tokens += [f"<extra{number}>" for number in range(VOCAB - len(tokens))]
    types = [1] * (256 + len(merges)) + [3, 3] + [4] * (VOCAB - 258 - len(merges))
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types, "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": tokens.index("<s>"), "tokenizer.ggml.eos_token_id": tokens.index("</s>"),
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }  # fmt: skip


def sentencepiece_tokenizer() -> dict[str, Any]:
    """Return the metadata of a tokenizer with scores and bytes, of `VOCAB` tokens."""
    words = ["▁", "t", "h", "e", "th", "the", "▁the", "c", "a", "at", "cat", "▁cat"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += words
    tokens += [f"x{number}" for number in range(VOCAB - len(tokens))]
    types = [2, 3, 3] + [6] * 256 + [1] * (VOCAB - 259)
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(number) for number in range(VOCAB)], "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
    }  # fmt: skip
