"""The plan knows for which models torch's attention writes out all scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from slowllm.modeling.cache_sizes import measure_cache
from slowllm.modeling.unfused_attention import UnfusedAttention
from tests.support.families import FAMILIES

# Head sizes as DeepSeek publishes them, eight times smaller; the tiny model of the family has equal ones.
MLA = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("sizes", "heads", "options", "num_heads"),
    [
        ((16, 16, 16), (4, 4, 4), {"is_causal": True}, 0),
        ((24, 24, 16), (4, 4, 4), {"is_causal": True}, 4),
        ((16, 16, 16), (4, 1, 1), {}, 4),
        ((16, 16, 16), (4, 2, 2), {"enable_gqa": True}, 0),
    ],
)
def test_attention_without_a_fused_kernel_is_found_on_any_device(
    device: str,
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    heads: tuple[int, ...],
    options: dict[str, Any],
    num_heads: int,
) -> None:
    tensors = [
        torch.ones(1, count, 9, size, dtype=dtype, device=device)
        for count, size in zip(heads, sizes, strict=True)
    ]
    with UnfusedAttention() as found:
        output = F.scaled_dot_product_attention(*tensors, **options)
    assert output.shape == (1, heads[0], 9, sizes[2])
    assert found.num_heads == num_heads


@pytest.mark.parametrize(
    ("name", "fields", "num_heads"),
    [("llama-2", {}, 0), ("deepseek-v3", {}, 0), ("deepseek-v3", MLA, 4), ("falcon-multi-query", {}, 4)],
)
def test_it_agrees_with_what_a_pass_calls(name: str, fields: dict[str, Any], num_heads: int) -> None:
    kind, given = FAMILIES[name]
    config = AutoConfig.for_model(kind, **{**given, **fields})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    with torch.no_grad(), torch.profiler.profile() as profile:
        model(torch.arange(5, 35).view(1, 30))
    is_unfused = any("scaled_dot_product_attention_math" in event.key for event in profile.key_averages())
    assert is_unfused == (num_heads > 0)
    assert measure_cache(model.to("meta")).unfused_heads == num_heads
