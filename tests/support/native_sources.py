"""A tiny checkpoint in each format of the makers, by name, to be converted or fetched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support.bnb_checkpoints import BnbLayer
from tests.support.compressed_checkpoints import settings_of, store_compressed, store_modelopt
from tests.support.families import save_tiny
from tests.support.gguf_checkpoints import byte_level_tokenizer, write_gguf
from tests.support.native_checkpoints import Store, fp8_settings, quantised, store_fp4, store_fp8, store_mxfp4
from tests.support.packed_checkpoints import PackedLayer

Layer = Callable[[str, Tensor], tuple[Mapping[str, Tensor], Tensor]]


def _of(layer: Layer) -> Store:
    return lambda name, weight: layer(name, weight)[0]


def _fbgemm(name: str, weight: Tensor) -> dict[str, Tensor]:
    scales = weight.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
    return {name: (weight.float() / scales).to(torch.float8_e4m3fn), f"{name}_scale": scales}


_AWQ, _GPTQ = PackedLayer("awq"), PackedLayer(is_ordered=True)
_NESTED, _INT8 = BnbLayer(), BnbLayer("int8")
# The family, what config.json says, and what stores a weight.
_FORMATS: dict[str, tuple[str, Mapping[str, Any], Store]] = {
    "fp8": ("llama-2", fp8_settings((8, 16)), store_fp8((8, 16))),
    "fp8 experts": ("mixtral", fp8_settings((8, 16)), store_fp8((8, 16))),
    "fp8 deepseek": ("deepseek-v3", fp8_settings((13, 24)), store_fp8((13, 24), torch.float8_e8m0fnu)),
    "fp4 experts": ("deepseek-v3", fp8_settings((8, 16)), store_fp4()),
    "mxfp4": ("gpt-oss", {"quant_method": "mxfp4"}, store_mxfp4),
    "modelopt": ("llama-2", {"quant_method": "modelopt", "quant_algo": "NVFP4"}, store_modelopt),
    "fbgemm": ("llama-2", {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, _fbgemm),
    "gptq": ("llama-2", _GPTQ.settings, _of(_GPTQ)),
    "awq": ("llama-2", _AWQ.settings, _of(_AWQ)),
    "bnb nf4": ("llama-2", _NESTED.settings, _of(_NESTED)),
    "bnb int8": ("llama-2", _INT8.settings, _of(_INT8)),
    **{
        f"compressed {case}": ("llama-2", settings_of(case), store_compressed(case))
        for case in ("int4 groups with zeros", "plain int8", "float8 blocks", "nvfp4")
    },
}
_GGUF = {"gguf": "llama", "gguf experts": "qwen3moe", "gguf norms": "gemma2", "gguf heads": "bloom"}
NATIVE_SOURCES = (*_FORMATS, *_GGUF)


def mixed_kinds(name: str) -> str:
    """Return types of GGUF's as files of the kind Q4_K_M have them, and plain ones among them."""
    if name in ("token_embd.weight", "output.weight"):
        return "q6_k"
    return {"attn_v": "f16", "attn_k": "q8_0", "attn_q": "bf16", "ffn_down": "q5_k"}.get(
        name.split(".")[-2], "q4_k"
    )


def save_native(name: str, folder: Path) -> Path:
    """Write a tiny checkpoint of `NATIVE_SOURCES` below a folder; return its folder or file."""
    if name in _GGUF:
        has_head = _GGUF[name] != "gemma2"
        return write_gguf(
            folder / "m.gguf", _GGUF[name], mixed_kinds, has_head=has_head, metadata=byte_level_tokenizer()
        )
    family, settings, store = _FORMATS[name]
    save_tiny(family, folder / "plain", torch.bfloat16)
    return quantised(folder / "plain", folder / "native", settings, store)
