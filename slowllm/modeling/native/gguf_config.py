"""Make transformers' config of what a GGUF file says of its model.

By transformers' own table of keys (`GGUF_CONFIG_MAPPING`), and by those keys that change the results and that the table
lacks: scaled rotary tables, soft caps, widths of heads and experts. Reads no weight, but the few factors of a rotary table.
"""

from __future__ import annotations

import math
import os
import re
import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers import AutoConfig, PreTrainedConfig
from transformers.integrations.ggml import GGUF_CONFIG_DEFAULTS_MAPPING, GGUF_CONFIG_MAPPING

from slowllm.errors import CheckpointError, first_line
from slowllm.modeling.block_counts import refuse_many_blocks
from slowllm.storage.gguf import GgufHeader
from slowllm.storage.shard import open_shard
from slowllm.storage.spans import Span

# The architectures that are read, with transformers' names of them.
MODEL_TYPES: Mapping[str, str] = {
    "llama": "llama", "qwen2": "qwen2", "qwen2moe": "qwen2_moe", "qwen3": "qwen3", "qwen3moe": "qwen3_moe",
    "gemma2": "gemma2", "gemma3": "gemma3", "falcon": "falcon", "bloom": "bloom",
}  # fmt: skip
# What the table lacks.
_HEADS = {"attention.key_length": "head_dim"}
_EXPERTS = {
    "expert_count": "num_experts", "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}  # fmt: skip
_CAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_MORE: Mapping[str, Mapping[str, str]] = {
    "llama": _HEADS,
    "mistral": _HEADS,
    "mixtral": {
        **_HEADS,
        "expert_count": "num_local_experts",
        "expert_used_count": "num_experts_per_tok",
    },
    "qwen2_moe": _EXPERTS,
    "qwen3": _HEADS,
    "qwen3_moe": {**_HEADS, **_EXPERTS},
    "gemma2": _CAPS,
    "gemma3": _CAPS,
}
# Numbers that are divided by, or of which there is one at least, where they are there.
_POSITIVE = ("attention.head_count", "attention.head_count_kv", "rope.freq_base", "rope.dimension_count")
# Of which a file has one; a default would be a guess that changes the results.
_EPSILONS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
# The name of a tensor of a block; no number is longer.
_BLOCK = re.compile(r"blk\.(\d{1,9})\.")
# Their head is the embedding, whatever the file has.
_TIED = ("falcon", "bloom")
# The factors by which a rotary table is divided, of Llama 3.1 and later.
ROPE_FACTORS = "rope_freqs.weight"
_MAX_FACTORS = 1 << 16


def config_of(name: str, header: GgufHeader) -> PreTrainedConfig:
    """Return the config of the model in a GGUF file.

    Its quantization_config says what the weights' finder has to know.

    Args:
        name: of the file, for messages.
        header: of it.
    Raises:
        CheckpointError: the architecture is not read, or the metadata lacks or contradicts something.
    """
    metadata = header.metadata
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in MODEL_TYPES:
        raise CheckpointError(
            f"{name}: its architecture {reprlib.repr(architecture)} is not read from GGUF; there are {', '.join(MODEL_TYPES)}; or use "
            "the original checkpoint in safetensors"
        )
    kind = MODEL_TYPES[architecture]
    if architecture == "llama":  # which Mistral and Mixtral are called as well
        kind = "mistral" if metadata.get("general.name") == "mistral" else kind
        kind = "mixtral" if metadata.get("llama.expert_count") else kind
    tables: Any = GGUF_CONFIG_MAPPING
    table = tables["llama" if kind == "mixtral" else kind]
    keys = {
        **{f"{architecture}.{key}": value for key, value in table.items()},
        **{f"{architecture}.{key}": value for key, value in _MORE.get(kind, {}).items()},
        **{f"tokenizer.{key}": value for key, value in tables["tokenizer"].items()},
    }
    found: dict[str, Any] = dict(GGUF_CONFIG_DEFAULTS_MAPPING.get(kind, {}))
    for key, value in metadata.items():
        if (target := keys.get(key)) is not None:
            if not isinstance(value, int | float):
                wanted = "one number" if key.startswith("tokenizer.") else "one number for all blocks"
                raise CheckpointError(f"{name}: {key} is {reprlib.repr(value)}, where {wanted} is read")
            if not math.isfinite(value):
                raise CheckpointError(f"{name}: {key} is {value}, which is no number to compute with")
            found[target] = value
    refuse_many_blocks(name, found)
    _refuse_unusable(name, architecture, header)
    found["tie_word_embeddings"] = "output.weight" not in header.spans or architecture in _TIED
    if "vocab_size" not in found and "token_embd.weight" in header.spans:
        tokens = metadata.get("tokenizer.ggml.tokens")
        found["vocab_size"] = (
            len(tokens) if isinstance(tokens, list) and tokens else header.spans["token_embd.weight"].shape[0]
        )
    rope = _rope_of(name, architecture, header, found)
    if kind == "gemma3":  # the files have the text model only
        kind = "gemma3_text"
        if rope is not None:
            local = {"rope_type": "default", "rope_theta": 10000.0}
            rope = {"full_attention": rope, "sliding_attention": local}
    if rope is not None:
        found["rope_parameters"] = rope
        found.pop("rope_theta", None)
    if architecture == "falcon" and (groups := found.get("num_key_value_heads", 1)) != 1:
        heads = found.get("num_attention_heads")
        if not isinstance(heads, int) or not isinstance(groups, int) or groups < 1 or heads % groups:
            raise CheckpointError(
                f"{name}: is a Falcon with {heads} heads for {groups} heads of keys, which do not divide them"
            )
        has_two_norms = "blk.0.attn_norm_2.weight" in header.spans
        found |= {"num_kv_heads": groups, "new_decoder_architecture": True}
        found["num_ln_in_parallel_attn"] = 2 if has_two_norms else 1
    try:
        config = AutoConfig.for_model(kind, **found)
        config.quantization_config = {
            "quant_method": "gguf",
            "architecture": architecture,
            "num_heads": int(config.num_attention_heads),
            "num_key_value_heads": int(
                found.get("num_kv_heads")
                or getattr(config, "num_key_value_heads", None)
                or (1 if architecture == "falcon" else config.num_attention_heads)
            ),
            "num_experts": int(
                getattr(config, "num_local_experts", None) or getattr(config, "num_experts", 0) or 0
            ),
        }
    except Exception as error:  # whatever transformers' validation may raise
        raise CheckpointError(f"{name}: its metadata cannot be used ({first_line(error)})") from error
    return config


def _refuse_unusable(name: str, architecture: str, header: GgufHeader) -> None:
    """Refuse numbers that no model has, and those that are missing though a default would change the results.

    Raises:
        CheckpointError: there is one.
    """
    metadata = header.metadata
    for key in (f"{architecture}.{one}" for one in _POSITIVE):
        if isinstance(value := metadata.get(key), int | float) and value <= 0:
            raise CheckpointError(f"{name}: {key} is {value}, which is not positive")
    if not any(f"{architecture}.{one}" in metadata for one in _EPSILONS):
        raise CheckpointError(
            f"{name}: has none of {' and '.join(_EPSILONS)} of {architecture}, which its norms need; fetch another file"
        )
    count, used = (metadata.get(f"{architecture}.{one}") for one in ("expert_count", "expert_used_count"))
    if isinstance(count, int) and count and not (isinstance(used, int) and 1 <= used <= count):
        raise CheckpointError(
            f"{name}: {architecture}.expert_used_count is {reprlib.repr(used)}, where a number from 1 to {count} is needed"
        )
    num_blocks = metadata.get(f"{architecture}.block_count")
    for tensor in header.spans:
        match = _BLOCK.match(tensor)
        if match and isinstance(num_blocks, int) and int(match[1]) >= num_blocks > 0:
            raise CheckpointError(
                f"{name}: {tensor} belongs to a block beyond the {num_blocks} that {architecture}.block_count names"
            )


def _rope_of(
    name: str, architecture: str, header: GgufHeader, found: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return how rotary tables are scaled; None where they are not."""
    rope = {
        key.removeprefix(f"{architecture}.rope.scaling."): value
        for key, value in header.metadata.items()
        if key.startswith(f"{architecture}.rope.scaling.")
    }
    kind = rope.get("type", "none" if "factor" not in rope else "linear")
    theta = {"rope_theta": float(found.get("rope_theta", 10000.0))}
    if (span := header.spans.get(ROPE_FACTORS)) is not None:
        factors = _factors(name, span)
        # Two lists, for short and for long texts, as transformers' type has them; here they are the same.
        return {
            "rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": 1.0,
            "original_max_position_embeddings": found.get("max_position_embeddings", 1), **theta,
        }  # fmt: skip
    if kind == "none":
        return None
    factor, before = rope.get("factor"), rope.get("original_context_length")
    if kind == "linear" and isinstance(factor, float) and factor > 0:
        return {"rope_type": "linear", "factor": factor, **theta}
    if kind == "yarn" and isinstance(factor, float) and factor > 0 and isinstance(before, int) and before > 0:
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": before, **theta}
    raise CheckpointError(
        f"{name}: scales its rotary table by {reprlib.repr(rope)}, which is not read; use the original checkpoint in safetensors"
    )


def _factors(name: str, span: Span) -> list[float]:
    if span.dtype != "F32" or len(span.shape) != 1 or span.shape[0] > _MAX_FACTORS:
        raise CheckpointError(
            f"{name}: {span.name} is {span.dtype} of shape {list(span.shape)}, which are no factors of a rotary table"
        )
    fd = open_shard(span)
    try:
        values = np.frombuffer(os.pread(fd, span.num_bytes, span.offset), np.float32)
    finally:
        os.close(fd)
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise CheckpointError(f"{name}: {span.name} has factors that are not positive")
    return [float(value) for value in values]
