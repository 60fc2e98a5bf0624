"""What DeepSeek-V4's checkpoints have that no other model's have: names without a prefix, and small arrays in float32.

Knows names, shapes and contents; writes nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.heavy_tails import generator_of
from benchmarks.routers import SKEW, popularity

# As in deepseek-ai/DeepSeek-V4-Flash. The last of the ratios belongs to the block that predicts a second token, which is not written.
FLASH: Mapping[str, Any] = {
    "vocab_size": 129280, "hidden_size": 4096, "moe_intermediate_size": 2048, "num_attention_heads": 64,
    "num_key_value_heads": 1, "head_dim": 512, "qk_rope_head_dim": 64, "q_lora_rank": 1024, "o_groups": 8, "o_lora_rank": 1024,
    "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 6, "num_hash_layers": 3,
    "scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc", "norm_topk_prob": True, "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0, "expert_dtype": "fp4", "sliding_window": 128, "index_n_heads": 64, "index_head_dim": 128,
    "index_topk": 512, "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0], "compress_rope_theta": 160000, "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1,
    },
    "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "rms_norm_eps": 1e-6, "num_nextn_predict_layers": 1,
    "max_position_embeddings": 1048576, "tie_word_embeddings": False,
}  # fmt: skip
# transformers renames these when it loads a checkpoint, and does not quite undo it.
_PUBLISHED = (
    (r"^model\.", ""),
    (r"^embed_tokens\.", "embed."),
    (r"^hc_head\.hc_", "hc_head_"),
    (r"\.attn\.norm\.", ".attn.kv_norm."),
)
# The bias is added to the root of a softplus; this is about its mean slope where experts are chosen.
_SLOPE = 0.3


def published_name(name: str) -> str:
    """Return the name of a tensor on the hub, given what transformers would save it as."""
    for pattern, replacement in _PUBLISHED:
        name = re.sub(pattern, replacement, name)
    return name


def content_of(name: str, tensor: Tensor, num_experts: int) -> Tensor | None:
    """Return the content of a small array, float32 or int64; None for one that is stored like other models'.

    Args:
        name: on the hub.
        tensor: only its shape is looked at.
        num_experts: of a block.
    """
    module, _, last = name.rpartition(".")
    shape = tuple(tensor.shape)
    if last == "tid2eid":
        return _experts_of_tokens(shape, module, num_experts)
    if name.endswith(".ffn.gate.bias"):
        return popularity(shape[0], module) * SKEW * _SLOPE
    if re.fullmatch(r"hc_\w+_fn", last):
        return torch.randn(shape, generator=generator_of(name)) / math.sqrt(shape[1])
    if re.fullmatch(r"hc_\w+_scale", last):
        return torch.ones(shape)
    if last in ("ape", "attn_sink") or re.fullmatch(r"hc_\w+_base", last):
        return torch.zeros(shape)
    return None


def _experts_of_tokens(shape: tuple[int, ...], router: str, num_experts: int) -> Tensor:
    """Return the experts that a hash gives to each token (tokens, experts of a token), int64, no expert twice in a row."""
    uniform = torch.rand(shape[0], num_experts, generator=generator_of(router)).clamp_(min=1e-9)
    # Gumbel's noise draws without replacement.
    drawn = popularity(num_experts, router) * SKEW - (-uniform.log_()).log_()
    return drawn.topk(shape[1]).indices
