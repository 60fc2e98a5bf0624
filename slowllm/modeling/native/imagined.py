"""How many bytes would a matrix take in a quantised format? For plans that are made by config.json alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from slowllm.rounding import ceil_div
from slowllm.storage.spans import TORCH_DTYPES, Coding, Placement, Run, Span

# Of formats that do not name the size of their groups.
_GROUP, _BNB_GROUP = 128, 64


def imagined_placement(name: str, shape: tuple[int, ...], settings: Mapping[str, Any]) -> Placement | None:
    """Return the placement of a coded parameter of which only the shape is known; None where the format leaves it plain.

    Args:
        name: of the parameter: a linear map of a block, or experts.
        shape: of it.
        settings: what config.json says of the format.
    """
    if _is_left_alone(name, settings):
        return None
    method = str(settings.get("quant_method"))
    if method == "mxfp4" and len(shape) < 3:  # gpt-oss's: experts only
        return None
    bits = _BITS.get(method, _plain_bits)(settings)
    num_bytes = ceil_div(round(math.prod(shape) * bits), 8)
    span = Span(name, Path("config.json"), "U8", (num_bytes,), 0, num_bytes)
    return Placement(name, shape, TORCH_DTYPES["BF16"], (Run(span, 0, 0, num_bytes),), Coding("stacked", ()))


def _is_left_alone(name: str, settings: Mapping[str, Any]) -> bool:
    for key in ("modules_to_not_convert", "ignore", "ignored_layers", "llm_int8_skip_modules"):
        for pattern in settings.get(key) or ():
            # As in model.layers.*.self_attn, or re:.*gate; the parts that are plain words must come in their order.
            words = [
                word
                for word in str(pattern).removeprefix("re:").replace("\\", "").split("*")
                if word.strip(".")
            ]
            at = 0
            for word in words:
                at = name.find(word.strip("."), at)
                if at < 0:
                    break
            else:
                if words:
                    return True
    return False


def _fp8_bits(settings: Mapping[str, Any]) -> float:
    block = settings.get("weight_block_size")
    return 8 + (32 / math.prod(block) if block else 0.0)


def _grouped_bits(settings: Mapping[str, Any]) -> float:
    bits = float(settings.get("bits") or settings.get("w_bit") or 4)
    group = settings.get("group_size") or settings.get("q_group_size") or _GROUP
    return bits + ((16 + bits) / group if group > 0 else 0.0)


def _bitsandbytes_bits(settings: Mapping[str, Any]) -> float:
    if not (settings.get("load_in_4bit") or settings.get("_load_in_4bit")):
        return 8.0
    return 4 + (8 if settings.get("bnb_4bit_use_double_quant") else 32) / _BNB_GROUP


def _compressed_bits(settings: Mapping[str, Any]) -> float:
    groups = settings.get("config_groups") or {}
    weights = [group.get("weights") or {} for group in groups.values() if isinstance(group, Mapping)]
    if not weights:
        return _plain_bits(settings)
    bits, group = float(weights[0].get("num_bits") or 8), weights[0].get("group_size") or 0
    return bits + (16 / group if group > 0 else 0.0)


def _plain_bits(settings: Mapping[str, Any]) -> float:
    return 16.0


_BITS: Mapping[str, Callable[[Mapping[str, Any]], float]] = {
    "fp8": _fp8_bits,
    "fbgemm_fp8": _fp8_bits,
    "mxfp4": lambda _: 4.25,
    "gptq": _grouped_bits,
    "awq": _grouped_bits,
    "bitsandbytes": _bitsandbytes_bits,
    "compressed-tensors": _compressed_bits,
    "modelopt": lambda _: 4.5,
}
