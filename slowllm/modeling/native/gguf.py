"""Find the weights of GGUF files: their names, and what llama.cpp does to them when it converts a model.

Names become those of the published checkpoint, which transformers' own conversion maps to parameters. Rows that llama.cpp
puts in another order are put back when they are decoded, and norms that it stores plus one lose it then.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from slowllm.errors import CheckpointError
from slowllm.modeling.native.coded_tensor import CodedPart, CodedTensor
from slowllm.modeling.native.gguf_config import ROPE_FACTORS
from slowllm.rounding import ceil_div
from slowllm.storage.codecs import layout_constants
from slowllm.storage.codecs.gguf import PLUS_ONE
from slowllm.storage.codecs.gguf_grids import ROW_LENGTHS
from slowllm.storage.gguf import codec_name
from slowllm.storage.gguf_files import SUFFIX
from slowllm.storage.spans import Span

_LLAMA = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate", "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2", "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
}  # fmt: skip
_QWEN_EXPERTS = {
    "ffn_gate_inp": "mlp.gate", "ffn_gate_exps": "mlp.experts.{}.gate_proj", "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj", "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj", "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}  # fmt: skip
_GEMMA = {
    **_LLAMA, "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
_BLOOM = {
    "token_embd": "transformer.word_embeddings", "token_embd_norm": "transformer.word_embeddings_layernorm",
    "output_norm": "transformer.ln_f", "output": "lm_head", "attn_norm": "input_layernorm",
    "attn_qkv": "self_attention.query_key_value", "attn_output": "self_attention.dense",
    "ffn_norm": "post_attention_layernorm", "ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h",
}  # fmt: skip
# The larger Falcons, which call themselves falcon as well.
_FALCON_OF_TWO_NORMS = "falcon with two norms"
# By architecture: the name of the blocks, and the names of tensors without those of their blocks.
_NAMES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "llama": ("model.layers", {**_LLAMA, **_MIXTRAL}),
    "qwen2": ("model.layers", _LLAMA),
    "qwen2moe": ("model.layers", {**_LLAMA, **_QWEN_EXPERTS}),
    "qwen3": ("model.layers", _LLAMA),
    "qwen3moe": ("model.layers", {**_LLAMA, **_QWEN_EXPERTS}),
    "gemma2": ("model.layers", _GEMMA),
    "gemma3": ("model.layers", _GEMMA),
    "falcon": ("transformer.h", _BLOOM),
    _FALCON_OF_TWO_NORMS: ("transformer.h", {**_BLOOM, "attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"}),
    "bloom": ("transformer.h", _BLOOM),
}
_NAME = re.compile(r"(?:blk\.(?P<block>\d+)\.)?(?P<leaf>\w+)(?P<suffix>\.weight|\.bias)?")
_PLAIN = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


def find(
    settings: Mapping[str, Any], spans: Mapping[str, Span]
) -> tuple[list[CodedTensor], dict[str, Span], dict[str, tuple[int, ...]]]:
    """Return the tensors of a GGUF file by the names of the published checkpoint.

    Args:
        settings: from `gguf_config.config_of`.
        spans: of the file.
    Returns:
        the tensors that are decoded, those that are plain, and of these the order in which some lie: see
        `storage.codecs.gguf`.
    Raises:
        CheckpointError: the file is no GGUF file, or a tensor does not go with its model.
    """
    strangers = [span for span in spans.values() if span.path.suffix != SUFFIX]
    architecture = str(settings.get("architecture"))
    if strangers or architecture not in _NAMES:
        raise CheckpointError(
            f"config.json: says that the weights are quantised as GGUF, but {(strangers or list(spans.values()))[0].path.name} "
            "is no GGUF file; fetch config.json and the weights again"
        )
    has_two_norms = architecture == "falcon" and any(".attn_norm_2." in name for name in spans)
    names = _NAMES[_FALCON_OF_TWO_NORMS if has_two_norms else architecture]
    coded: list[CodedTensor] = []
    plain: dict[str, Span] = {}
    orders: dict[str, tuple[int, ...]] = {}
    seen: dict[str, str] = {}
    for span in spans.values():
        if span.name == ROPE_FACTORS:
            continue
        name, leaf = _renamed(span.name, *names)
        for own_name, own in _experts(name, span, settings) if "{}" in name else [(name, span)]:
            order = _order(leaf, own, settings)
            if own_name in seen:
                raise CheckpointError(
                    f"{own.path.name}: {own.name} and {seen[own_name]} are both {own_name}; one must go"
                )
            seen[own_name] = own.name
            _refuse_without_tables(own)
            is_plus_one = architecture.startswith("gemma") and leaf.endswith("_norm")
            if own.coding is not None or is_plus_one or (order and len(own.shape) > 1):
                coded.append(_coded(own_name, own, order, is_plus_one=is_plus_one))
                continue
            # A vector of one row, which the model has as a matrix.
            plain[own_name] = (
                replace(own, shape=(1, *own.shape))
                if leaf == "ffn_gate_inp_shexp" and len(own.shape) == 1
                else own
            )
            if order:
                orders[own_name] = order
    return coded, plain, orders


def _refuse_without_tables(span: Span) -> None:
    """Refuse a type whose code words are not on this machine."""
    kind = "" if span.coding is None else span.coding.codec.removeprefix(codec_name(""))
    if kind in ROW_LENGTHS and not layout_constants.HAS_GRIDS:
        raise CheckpointError(
            f"{span.path.name}: {span.name} is of type {kind.upper()}, whose code words are in the package gguf, which is not "
            "installed; pip install gguf"
        )


def _renamed(name: str, blocks: str, names: Mapping[str, str]) -> tuple[str, str]:
    """Return a tensor's name in the published checkpoint, and the part of its own that says what it is."""
    match = _NAME.fullmatch(name)
    if match is None:
        return name, name
    leaf = match["leaf"]
    base = "" if match["block"] is None else f"{blocks}.{match['block']}."
    return f"{base}{names.get(leaf, leaf)}{match['suffix'] or ''}", leaf


def _experts(name: str, span: Span, settings: Mapping[str, Any]) -> Iterator[tuple[str, Span]]:
    """Yield the matrices of a stack of experts, each under its own name."""
    count = settings["num_experts"]
    if len(span.shape) != 3 or span.shape[0] != count:
        raise CheckpointError(
            f"{span.path.name}: {span.name} of shape {list(span.shape)} is no stack of {count} experts, of which the metadata tells"
        )
    num_bytes = span.num_bytes // count
    for number in range(count):
        coding = span.coding
        if coding is not None:
            (blocks,) = coding.parts
            part = replace(blocks, shape=(blocks.shape[0] // count, blocks.shape[1]))
            coding = replace(coding, parts=(part,))
        offset = span.offset + number * num_bytes
        yield (
            name.format(number),
            replace(
                span,
                name=f"{span.name}[{number}]",
                shape=span.shape[1:],
                offset=offset,
                num_bytes=num_bytes,
                coding=coding,
            ),
        )


def _order(leaf: str, span: Span, settings: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the order in which the rows of a tensor lie; nothing where it is that of the model."""
    rows = span.shape[0]
    heads = settings["num_heads"]
    if settings["architecture"] == "llama" and leaf in ("attn_q", "attn_k"):
        heads = heads if leaf == "attn_q" else settings["num_key_value_heads"]
        # Pairs, of which the model has all first ones first.
        parts: int = 2 * heads
        order: tuple[int, ...] = (rows // heads // 2, 2, 1)
    elif settings["architecture"] == "bloom" and leaf == "attn_qkv":
        # All queries, then all keys; the model has them by heads.
        parts, order = 3 * heads, (3, heads, rows // heads // 3)
    elif settings["architecture"] == "falcon" and leaf == "attn_qkv" and settings["num_key_value_heads"] > 1:
        # All queries, then all keys, then all values; the model has them by heads of keys.
        groups = settings["num_key_value_heads"]
        parts, size = heads + 2 * groups, rows // (heads + 2 * groups)
        order = (groups, heads // groups * size, size, size)
    else:
        return ()
    if rows % parts or not rows:
        raise CheckpointError(
            f"{span.path.name}: {span.name} of shape {list(span.shape)} is not divided by {heads} heads, of which the metadata tells"
        )
    return order


def _coded(name: str, span: Span, order: tuple[int, ...], *, is_plus_one: bool) -> CodedTensor:
    """Return a tensor that is decoded when it is used."""
    rows = math.prod(span.shape[:-1])
    if span.coding is None:
        codec = codec_name(_PLAIN[span.dtype]) + (PLUS_ONE if is_plus_one else "")
    elif is_plus_one:
        raise CheckpointError(
            f"{span.path.name}: {span.name} is a norm, and stored in blocks ({span.coding.codec.removeprefix('gguf-').upper()}), "
            "which is not read"
        )
    else:
        codec = span.coding.codec
    shape = (rows, ceil_div(span.num_bytes, rows))
    stored = replace(span, dtype="U8", shape=shape, coding=None)
    return CodedTensor(name, span.shape, codec, (CodedPart("blocks", stored, shape),), order)
