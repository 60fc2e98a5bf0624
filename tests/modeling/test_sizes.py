"""The plan's count of a cache against the bytes of a real one, and what is counted of stops."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import slowllm
from slowllm.modeling.cache_sizes import CacheSize, measure_cache
from slowllm.modeling.recompute import tensor_refs
from slowllm.modeling.sizes import MIN_ROW_TOKENS
from slowllm.modeling.skeleton import build_skeleton
from slowllm.rounding import ceil_div
from tests.support.families import FAMILIES, QUICK_FAMILIES, VOCAB, family_cases, save_tiny

# With a window of 8, and one longer than what is passed here.
WINDOWS = {"gemma-2-soft-cap", "gemma-3-sliding", "gemma-3-with-a-tower", "gpt-oss"}
DTYPES = [torch.float32, torch.bfloat16]


def held_bytes(output: Any) -> int:
    """Return the bytes of the cache that a call has returned, shared storage counted once."""
    cache = output.get("cache_params", output.get("past_key_values"))
    if cache is None:  # OpenAI GPT has none
        return 0
    storages = [ref.get([cache]).untyped_storage() for ref in tensor_refs(0, cache)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def measured(name: str, dtype: torch.dtype) -> tuple[Any, CacheSize]:
    """Return a resident model of a family, and what is counted for a row of its cache."""
    model_type, config = FAMILIES[name]
    made = AutoConfig.for_model(model_type, **config)
    size = measure_cache(build_skeleton(made, Path("nowhere"), dtype))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(made, dtype=dtype).eval(), size


def held_by(model: Any, rows: int, tokens: int) -> int:
    with torch.no_grad():
        return held_bytes(model(torch.randint(5, VOCAB, (rows, tokens)), use_cache=True))


# Also one without attention, and one whose windows lie beside whole attention with experts.
@pytest.mark.parametrize(("name", "dtype"), family_cases(DTYPES, quick=(*QUICK_FAMILIES, "gpt-oss", "mamba")))
def test_a_cache_is_counted_to_the_byte(name: str, dtype: torch.dtype) -> None:
    model, size = measured(name, dtype)
    for rows, tokens in [(1, 2), (3, 7), (2, 40)]:
        counted = rows * (tokens * size.token_bytes + size.row_bytes)
        held = held_by(model, rows, tokens)
        # Layers with a window share one counter of 8 bytes among their rows.
        assert counted == held or (name in WINDOWS and held < counted <= held + rows * 3 * 8)


def test_latents_take_a_fraction_of_full_keys_and_values() -> None:
    made = AutoConfig.for_model("deepseek_v3", num_hidden_layers=5)  # all else as released
    size = measure_cache(build_skeleton(made, Path("nowhere"), torch.bfloat16))
    # Their heads have 192 numbers and those of the values 128, for which torch has no fused attention.
    assert size == CacheSize(5 * 2 * (made.kv_lora_rank + made.qk_rope_head_dim), 0, unfused_heads=128)
    # The formula that was here before: a head_dim of 64, keys and values of 128 heads.
    assert pytest.approx(28.4, abs=0.1) == 2 * 128 * 64 / (512 + 64)


def test_only_one_block_of_a_kind_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssDecoderLayer

    model_type, config = FAMILIES["gpt-oss"]
    made = AutoConfig.for_model(model_type, **{**config, "num_hidden_layers": 6})
    calls: list[int] = []
    forward = GptOssDecoderLayer.forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(GptOssDecoderLayer, "forward", counted)
    measure_cache(build_skeleton(made, Path("nowhere"), torch.float32))
    assert len(calls) == 2 * 3, "a sliding and a full block, in three passes"


def test_a_model_that_does_not_run_without_numbers_gets_full_keys_and_values(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers.models.llama.modeling_llama import LlamaAttention

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("Tensor.item() cannot be called on meta tensors")

    monkeypatch.setattr(LlamaAttention, "forward", fail)
    skeleton = build_skeleton(
        AutoConfig.for_model("llama", **FAMILIES["llama-3-scaled-rope"][1]), Path("nowhere"), torch.float32
    )
    with caplog.at_level(logging.INFO, logger="slowllm"):
        assert measure_cache(skeleton) == CacheSize(3 * 2 * 2 * 16 * 4, 0)
    assert "LlamaForCausalLM: its cache is not measured" in caplog.text


def test_measuring_leaves_no_trace_in_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaAttention

    forward = LlamaAttention.forward

    def caching(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        self.last_seen = hidden_states
        self.register_buffer("kept", hidden_states)
        return forward(self, hidden_states, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", caching)
    skeleton = build_skeleton(
        AutoConfig.for_model("llama", **FAMILIES["llama-3-scaled-rope"][1]), Path("nowhere"), torch.float32
    )
    assert measure_cache(skeleton) == CacheSize(3 * 2 * 2 * 16 * 4, 0)
    for module in skeleton.modules():
        assert not {"forward", "last_seen"} & set(vars(module))
    assert not any(buffer.is_meta for buffer in skeleton.buffers())


@pytest.mark.parametrize("name", ["bloom", "mamba", "gemma-3-sliding"])
def test_the_plan_counts_what_a_call_of_a_streamed_model_returns(name: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path)
    with slowllm.load(tmp_path, dtype="fp32") as lm, torch.no_grad():
        (sizes,) = (sizes for sizes in lm.choices if sizes.granularity == lm.plan.granularity)
        for rows, tokens in [(3, MIN_ROW_TOKENS), (2, 50)]:
            output = lm.model(torch.randint(5, VOCAB, (rows, tokens)), use_cache=True)
            held = held_bytes(output) + output.logits.nbytes
            assert held <= rows * tokens * sizes.result_token_bytes


def test_states_of_a_row_are_shared_out_among_its_tokens(tmp_path: Path) -> None:
    save_tiny("mamba", tmp_path)
    with slowllm.load(tmp_path, dtype="fp32") as lm:
        size = measured("mamba", torch.float32)[1]
        assert size.token_bytes == 0
        for sizes in lm.choices:
            assert sizes.result_token_bytes == ceil_div(size.row_bytes, MIN_ROW_TOKENS) + 4 * VOCAB


def test_experts_a_token_may_be_counted_for_each_block(tmp_path: Path) -> None:
    """As HunYuan-A13B's config does."""
    config: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 16,
        "num_key_value_heads": 2, "vocab_size": VOCAB, "num_experts": 4,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("hunyuan_v1_moe", moe_topk=2, **config))
    model.save_pretrained(tmp_path / "one")
    model.config.moe_topk = [2, 2, 2]
    model.save_pretrained(tmp_path / "list")
    with (
        slowllm.load(tmp_path / "one", dtype="fp32") as one,
        slowllm.load(tmp_path / "list", dtype="fp32") as lm,
    ):
        assert lm.choices == one.choices
        assert [sizes.experts.top_k for sizes in lm.choices if sizes.experts is not None] == [2]
