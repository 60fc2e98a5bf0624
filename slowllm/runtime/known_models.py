"""The published shapes of well-known models, so that they can be planned before anything of them is downloaded.

Each entry has what its config.json on the hub says, as far as the sizes of weights, activations and caches depend on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slowllm.errors import CheckpointError, InputError
from slowllm.runtime.model_folder import find_folder


@dataclass(frozen=True)
class KnownModel:
    """The shape of a published model.

    Attributes:
        model_type: transformers' name of the architecture.
        dtype: of the weights on the hub, as torch calls it.
        options: of transformers' config.
        quantisation: what config.json says of the quantised format in which the weights are published; None for none.
    """

    model_type: str
    dtype: str
    options: Mapping[str, Any]
    quantisation: Mapping[str, Any] | None = None


_LLAMA_3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def _bloom(num_blocks: int, hidden_size: int, num_heads: int, dtype: str = "float16") -> KnownModel:
    options = {"num_hidden_layers": num_blocks, "hidden_size": hidden_size, "n_head": num_heads}
    return KnownModel("bloom", dtype, {**options, "vocab_size": 250880})


def _llama(num_blocks: int, hidden_size: int, intermediate_size: int, num_heads: int) -> KnownModel:
    options = {
        "num_hidden_layers": num_blocks, "hidden_size": hidden_size, "intermediate_size": intermediate_size,
        "num_attention_heads": num_heads, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 131072, "rope_parameters": _LLAMA_3_ROPE, "tie_word_embeddings": False,
    }  # fmt: skip
    return KnownModel("llama", "bfloat16", options)


def _mixtral(num_blocks: int, hidden_size: int, intermediate_size: int, num_heads: int, vocab_size: int, longest: int) -> KnownModel:  # fmt: skip
    options = {
        "num_hidden_layers": num_blocks, "hidden_size": hidden_size, "intermediate_size": intermediate_size,
        "num_attention_heads": num_heads, "num_key_value_heads": 8, "vocab_size": vocab_size,
        "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": longest,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}, "tie_word_embeddings": False,
    }  # fmt: skip
    return KnownModel("mixtral", "bfloat16", options)


def _falcon(num_blocks: int, hidden_size: int, num_heads: int, **options: Any) -> KnownModel:
    shape = {"num_hidden_layers": num_blocks, "hidden_size": hidden_size, "num_attention_heads": num_heads}
    return KnownModel(
        "falcon", "bfloat16", {**shape, "vocab_size": 65024, "bias": False, "alibi": False, **options}
    )


_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
_MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
    ],
}  # fmt: skip


def _deepseek(num_heads: int, vocab_size: int, num_experts: int, num_dense: int, num_groups: int, factor: float, longest: int) -> KnownModel:  # fmt: skip
    rope = {
        "rope_type": "yarn", "rope_theta": 10000.0 if num_dense == 3 else 50000.0, "factor": factor, "beta_fast": 32.0,
        "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
    }  # fmt: skip
    options = {
        "num_hidden_layers": 61, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "num_attention_heads": num_heads, "num_key_value_heads": num_heads, "vocab_size": vocab_size,
        "n_routed_experts": num_experts, "num_experts_per_tok": 8, "n_shared_experts": 1, "n_group": num_groups,
        "topk_group": max(1, num_groups // 2), "first_k_dense_replace": num_dense, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "max_position_embeddings": longest,
        "rope_parameters": rope, "tie_word_embeddings": False,
    }  # fmt: skip
    return KnownModel("deepseek_v3", "bfloat16", options, _FP8)


def _qwen3_moe(quantisation: Mapping[str, Any] | None) -> KnownModel:
    options = {
        "num_hidden_layers": 94, "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536,
        "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "num_experts": 128,
        "num_experts_per_tok": 8, "max_position_embeddings": 40960, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    }  # fmt: skip
    return KnownModel("qwen3_moe", "bfloat16", options, quantisation)


def _gpt_oss(num_blocks: int, num_experts: int) -> KnownModel:
    rope = {
        "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096,
    }  # fmt: skip
    options = {
        "num_hidden_layers": num_blocks, "hidden_size": 2880, "intermediate_size": 2880, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201088, "num_local_experts": num_experts,
        "num_experts_per_tok": 4, "max_position_embeddings": 131072, "sliding_window": 128, "rope_parameters": rope,
        "tie_word_embeddings": False,
    }  # fmt: skip
    return KnownModel("gpt_oss", "bfloat16", options, _MXFP4)


_BLOOM = {
    "bloom-560m": _bloom(24, 1024, 16),
    "bloom-1b1": _bloom(24, 1536, 16),
    "bloom-1b7": _bloom(24, 2048, 16),
    "bloom-3b": _bloom(30, 2560, 32),
    "bloom-7b1": _bloom(30, 4096, 32),
    "bloom": _bloom(70, 14336, 112, "bfloat16"),
}
_LLAMA = {
    "8B": _llama(32, 4096, 14336, 32),
    "70B": _llama(80, 8192, 28672, 64),
    "405B": _llama(126, 16384, 53248, 128),
}
_MIXTRAL_8X7B = _mixtral(32, 4096, 14336, 32, 32000, 32768)
_FALCON_7B = _falcon(32, 4544, 71, new_decoder_architecture=False, multi_query=True, parallel_attn=True)
_FALCON_40B = _falcon(60, 8192, 128, num_kv_heads=8, new_decoder_architecture=True)
_FALCON_180B = _falcon(
    80, 14848, 232, num_kv_heads=8, new_decoder_architecture=True, tie_word_embeddings=False
)

# By hub id.
KNOWN_MODELS: Mapping[str, KnownModel] = {
    **{f"bigscience/{name}": model for name, model in _BLOOM.items()},
    **{f"bigscience/{name.replace('bloom', 'bloomz')}": model for name, model in _BLOOM.items()},
    **{f"meta-llama/Llama-3.1-{name}": model for name, model in _LLAMA.items()},
    **{f"meta-llama/Llama-3.1-{name}-Instruct": model for name, model in _LLAMA.items()},
    "mistralai/Mixtral-8x7B-v0.1": _MIXTRAL_8X7B,
    "mistralai/Mixtral-8x7B-Instruct-v0.1": _MIXTRAL_8X7B,
    "mistralai/Mixtral-8x22B-v0.1": _mixtral(56, 6144, 16384, 48, 32000, 65536),
    "mistralai/Mixtral-8x22B-Instruct-v0.1": _mixtral(56, 6144, 16384, 48, 32768, 65536),
    "deepseek-ai/DeepSeek-V3": _deepseek(128, 129280, 256, 3, 8, 40.0, 163840),
    "deepseek-ai/DeepSeek-R1": _deepseek(128, 129280, 256, 3, 8, 40.0, 163840),
    "moonshotai/Kimi-K2-Instruct": _deepseek(64, 163840, 384, 1, 1, 32.0, 131072),
    "Qwen/Qwen3-235B-A22B": _qwen3_moe(None),
    "Qwen/Qwen3-235B-A22B-FP8": _qwen3_moe(_FP8),
    "openai/gpt-oss-20b": _gpt_oss(24, 32),
    "openai/gpt-oss-120b": _gpt_oss(36, 128),
    "tiiuae/falcon-7b": _FALCON_7B,
    "tiiuae/falcon-7b-instruct": _FALCON_7B,
    "tiiuae/falcon-40b": _FALCON_40B,
    "tiiuae/falcon-40b-instruct": _FALCON_40B,
    "tiiuae/falcon-180B": _FALCON_180B,
    "tiiuae/falcon-180B-chat": _FALCON_180B,
}


def find_known(name: str) -> tuple[str, KnownModel] | None:
    """Return the hub id and the shape of a known model; None where the name is not known.

    Args:
        name: a hub id, or its last part; upper and lower case are alike.
    """
    wanted = name.lower()
    for hub_id, model in KNOWN_MODELS.items():
        if wanted in (hub_id.lower(), hub_id.rpartition("/")[2].lower()):
            return hub_id, model
    return None


def find_folder_or_known(model: str) -> Path | tuple[str, KnownModel]:
    """Return the folder of a model; or, where it is not on this machine, its hub id and shape from the table.

    Raises:
        InputError: it is neither.
    """
    try:
        return find_folder(model)
    except CheckpointError as error:
        if (found := find_known(model)) is not None:
            return found
        raise InputError(
            f"{error}; to plan it without its weights, name its config.json with --config"
        ) from error
