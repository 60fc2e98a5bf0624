"""Tiny random models of many families, with odd sizes, as checkpoints on disk."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tests.support.cases import crossed, quick_and_long
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
_YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0,
    "mscale_all_dim": 1.0, "original_max_position_embeddings": 32,
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
            **_LLAMA, "num_key_value_heads": 4, "first_k_dense_replace": 1, "n_routed_experts": 16, "n_group": 8,
            "topk_group": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 32, "q_lora_rank": 16,
            "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
            "rope_parameters": _YARN,
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
    "gpt-oss": (
        "gpt_oss",
        # By default the bias alone would choose the same experts for every token.
        {
            **_LLAMA, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.1,
            "sliding_window": 8,
        },
    ),
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
    "qwen3-next-hybrid": (
        "qwen3_next",
        {
            **_LLAMA, **_EXPERTS, "head_dim": 16, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_key_head_dim": 8,
            "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        },
    ),
    "stablelm": ("stablelm", _LLAMA),
    "xglm-scaled-embedding": (
        "xglm",
        {"d_model": 64, "num_layers": 3, "attention_heads": 4, "ffn_dim": 96, "vocab_size": VOCAB},
    ),
}  # fmt: skip
# Where a test takes every family, `make test` takes these, one of each kind of block, and `make test-long` takes all.
QUICK_FAMILIES = (
    "bloom",  # ALiBi, a norm behind the embedding
    "deepseek-v3",  # latent keys and values, a dense block before mixtures
    "falcon-multi-query",  # one head of keys for all, attention beside the MLP
    "gemma-3-sliding",  # windows, two rotary tables, a scaled embedding
    "gpt2",  # learnt positions, transposed matrices
    "llama-2",  # rotary positions
    "mixtral",  # experts
    "qwen3-next-hybrid",  # recurrent states beside keys and values
)
# Of those, the ones that the quick run also takes with a second dtype, codec or granularity.
FEW_FAMILIES = ("bloom", "mixtral")
# The cases whose blocks hold experts, of which a token takes some.
MIXTURES = {"deepseek-v3", "gpt-oss", "mixtral", "olmoe", "qwen3-moe", "qwen3-next-hybrid"}


def family_cases(
    others: Sequence[Any] = (),
    *,
    quick: Collection[str] = QUICK_FAMILIES,
    few: Collection[str] = FEW_FAMILIES,
    leave_out: Collection[str] = (),
) -> list[Any]:
    """Return every family as a parameter, marked as long where the quick run leaves it out.

    Args:
        others: values to combine each family with; a parameter is then a pair.
        quick: families that the quick run takes, with the first of the values.
        few: families that it takes with the other values, too.
        leave_out: families that this test has no use for.
    """
    names = [name for name in FAMILIES if name not in leave_out]
    if not others:
        return quick_and_long(names, quick)
    first, *further = others
    return crossed(names, others, quick=[*product(quick, [first]), *product(few, further)])


def experts_in(model: nn.Module) -> list[str]:
    """Return the names of a model's modules of experts: those whose matrices hold one for each expert."""
    return [
        name
        for name, module in model.named_modules()
        if name.endswith("experts") and any(matrix.dim() == 3 for matrix in module.parameters(recurse=False))
    ]


def save_tiny(
    name: str, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "60KB", **overrides: Any
) -> None:
    """Save a random model of a family in several shards."""
    model_type, config = FAMILIES[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**config, **overrides}))
    assert bool(experts_in(model)) == (name in MIXTURES), (
        f"{name} says that it has experts, or that it has none"
    )
    with torch.no_grad():
        # Norms and biases begin as ones and zeros, which would hide a mix-up; so do corrections of a router.
        corrections = [buffer for key, buffer in model.named_buffers() if key.endswith("correction_bias")]
        for tensor in (*model.parameters(), *corrections):
            if tensor.dim() == 1:
                tensor.add_(torch.randn_like(tensor) * 0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)


def resident(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """Load the reference: plain transformers, all in memory.

    Frozen, as streamed weights are: torch takes another path through a product with a matrix that requires grad.
    """
    options = {"experts_implementation": "eager", **options}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval().requires_grad_(False)


def speaking(folder: Path, out: Path) -> Path:
    """Copy a tiny checkpoint and put a tokenizer beside it."""
    shutil.copytree(folder, out)
    AutoTokenizer.from_pretrained(TINY_BLOOM).save_pretrained(out)
    return out
