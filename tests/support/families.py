"""Tiny random models of many families, with odd sizes, as checkpoints on disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tests.support.paths import TINY_BLOOM

VOCAB = 307

_LLAMA = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GPT = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_ROPE3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip

# Name of the case: (model type, config).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", {"hidden_size": 64, "n_layer": 3, "n_head": 4, "vocab_size": VOCAB}),
    "llama-2": ("llama", {**_LLAMA, "num_key_value_heads": 4}),
    "llama-3-scaled-rope": ("llama", {**_LLAMA, "rope_parameters": _ROPE3}),
    "llama-tied": ("llama", {**_LLAMA, "tie_word_embeddings": True}),
    "mixtral": ("mixtral", {**_LLAMA, "num_local_experts": 4}),
    "falcon-multi-query": (
        "falcon",
        {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": VOCAB},
    ),
    "falcon-new-decoder": (
        "falcon",
        {
            "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": VOCAB,
            "new_decoder_architecture": True, "num_kv_heads": 2,
        },
    ),
    "cohere-scaled-logits": ("cohere", {**_LLAMA, "logit_scale": 0.3}),
    "deepseek-v3": (
        "deepseek_v3",
        {
            **_LLAMA, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
            "num_experts_per_tok": 2, "moe_intermediate_size": 32, "q_lora_rank": 16, "kv_lora_rank": 16,
            "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
        },
    ),
    "gemma-2-soft-cap": (
        "gemma2",
        {**_LLAMA, "head_dim": 16, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0},
    ),
    "gemma-3-sliding": ("gemma3_text", {**_LLAMA, "head_dim": 16, "sliding_window": 8}),
    "gemma-3-with-a-tower": (
        "gemma3",
        {
            "text_config": {**_LLAMA, "head_dim": 16, "sliding_window": 8},
            # As many blocks as the text model has.
            "vision_config": {
                "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
                "image_size": 28, "patch_size": 14,
            },
            "mm_tokens_per_image": 4, "image_token_index": 306, "boi_token_index": 304, "eoi_token_index": 305,
        },
    ),
    "gpt2": ("gpt2", _GPT),
    "gpt-bigcode": ("gpt_bigcode", _GPT),
    "gpt-j-tables-in-blocks": ("gptj", {**_GPT, "rotary_dim": 8, "n_positions": 64}),
    "gpt-neo-local-attention": (
        "gpt_neo",
        {
            "hidden_size": 64, "num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 4,
            "vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2,
        },
    ),
    "gpt-neox": (
        "gpt_neox",
        {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"},
    ),
    "gpt-oss": ("gpt_oss", {**_LLAMA, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "granite-scaled-logits": ("granite", {**_LLAMA, "logits_scaling": 3.0, "embedding_multiplier": 2.0}),
    "mamba": ("mamba", {"hidden_size": 64, "num_hidden_layers": 3, "vocab_size": VOCAB}),
    "mpt-alibi": ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 3, "vocab_size": VOCAB}),
    "olmoe": ("olmoe", {**_LLAMA, **_EXPERTS}),
    "openai-gpt": ("openai-gpt", {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": VOCAB, "n_positions": 64}),
    "opt": (
        "opt",
        {
            "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": VOCAB,
            "word_embed_proj_dim": 64, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2,
        },
    ),
    "phi": ("phi", _LLAMA),
    "qwen3": ("qwen3", {**_LLAMA, "head_dim": 16}),
    "qwen3-moe": ("qwen3_moe", {**_LLAMA, **_EXPERTS, "head_dim": 16, "moe_intermediate_size": 32}),
    "stablelm": ("stablelm", _LLAMA),
    "xglm-scaled-embedding": (
        "xglm",
        {"d_model": 64, "num_layers": 3, "attention_heads": 4, "ffn_dim": 96, "vocab_size": VOCAB},
    ),
}  # fmt: skip


def save_tiny(
    name: str, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "60KB", **overrides: Any
) -> None:
    """Save a random model of a family in several shards."""
    model_type, config = FAMILIES[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**config, **overrides}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases begin as ones and zeros, which would hide a mix-up
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)


def resident(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """Load the reference: plain transformers, all in memory.

    Frozen, as streamed weights are: torch takes another path through a product with a matrix that requires grad.
    """
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval().requires_grad_(False)


def speaking(folder: Path, out: Path) -> Path:
    """Copy a tiny checkpoint and put a tokenizer beside it."""
    shutil.copytree(folder, out)
    AutoTokenizer.from_pretrained(TINY_BLOOM).save_pretrained(out)
    return out
