"""Checkpoints as compressed-tensors and modelopt write them; the package compressed-tensors is the reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor

from tests.support.native_checkpoints import Store, e2m1_codes

# Name of the case: (format, what config.json says of the weights, dtype of the scales).
CASES: dict[str, tuple[str, dict[str, Any], torch.dtype]] = {
    "int4 groups": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 16}, torch.bfloat16),
    "int4 groups with zeros": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
        torch.bfloat16,
    ),
    "int4 channels": ("pack-quantized", {"num_bits": 4, "strategy": "channel"}, torch.float16),
    "int8 groups with zeros": (
        "pack-quantized",
        {"num_bits": 8, "strategy": "group", "group_size": 16, "symmetric": False},
        torch.float32,
    ),
    "int8 channels": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}, torch.bfloat16),
    "plain int8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}, torch.bfloat16),
    "plain int8 with zeros": (
        "int-quantized",
        {"num_bits": 8, "strategy": "channel", "symmetric": False},
        torch.float32,
    ),
    "float8 channels": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, torch.bfloat16),
    "float8 tensors": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}, torch.bfloat16),
    "float8 blocks": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [8, 16]},
        torch.bfloat16,
    ),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
        torch.float8_e4m3fn,
    ),
    "mxfp4": ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}, torch.uint8),
}  # fmt: skip


def settings_of(case: str) -> dict[str, Any]:
    """Return what config.json says of a case."""
    form, weights, _ = CASES[case]
    group = {"targets": ["Linear"], "weights": {"symmetric": True, "type": "int", **weights}}
    return {
        "quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}, "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }  # fmt: skip


def scheme_of(case: str) -> QuantizationScheme:
    """Return the package's own scheme of a case."""
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**CASES[case][1]))


def stored(case: str, weight: Tensor) -> dict[str, Tensor]:
    """Return the arrays of a weight, by their names in the module."""
    form, settings, dtype = CASES[case]
    if form.endswith("fp4-pack-quantized"):
        return _float4(weight.float(), dtype)
    scales, zeros = _scales_of(weight.float(), settings)
    arrays = {"weight": weight.float(), "weight_scale": scales.to(dtype)}
    if settings.get("symmetric") is False:
        arrays["weight_zero_point"] = zeros.to(torch.int8)
    compressor = BaseCompressor.get_value_from_registry(form)
    return dict(compressor.compress(arrays, scheme_of(case)))


def decompressed(case: str, arrays: Mapping[str, Tensor]) -> Tensor:
    """Return the weight that the package makes of its arrays."""
    compressor = BaseCompressor.get_value_from_registry(CASES[case][0])
    weight: Tensor = compressor.decompress(dict(arrays), scheme_of(case))["weight"]
    return weight


def _scales_of(weight: Tensor, settings: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    rows, width = weight.shape
    if settings["strategy"] == "block":
        down, across = settings["block_structure"]
        padded = torch.zeros(-(-rows // down) * down, -(-width // across) * across)
        padded[:rows, :width] = weight
        blocks = padded.unflatten(1, (-1, across)).unflatten(0, (-1, down))
        largest = blocks.abs().amax((1, 3))
        return largest.clamp(min=1e-6) / 448, torch.zeros_like(largest)
    blocks = weight.unflatten(1, (-1, settings.get("group_size", width)))
    if settings["strategy"] == "tensor":
        blocks = weight.view(1, 1, -1)
    low, high = blocks.amin(-1), blocks.amax(-1)
    most = 448 if settings.get("type") == "float" else 2 ** (settings["num_bits"] - 1) - 1
    if settings.get("symmetric") is False:
        scales = ((high - low) / (2 * most + 1)).clamp(min=1e-6)
        return scales, (-most - 1 - low / scales).round().clamp(-most - 1, most)
    scales = blocks.abs().amax(-1).clamp(min=1e-6) / most
    return (scales.view(1) if settings["strategy"] == "tensor" else scales), torch.zeros_like(scales)


def _float4(weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    if dtype == torch.uint8:
        blocks = weight.unflatten(1, (-1, 32))
        exponents = blocks.abs().amax(-1).clamp(min=2.0**-100).log2().floor() - 2
        codes = e2m1_codes(blocks / torch.exp2(exponents)[..., None]).flatten(-2)
        return {"weight_packed": codes, "weight_scale": (exponents + 127).to(torch.uint8)}
    blocks = weight.unflatten(1, (-1, 16))
    divisor = (448 * 6 / weight.abs().max()).view(1)
    scales = (blocks.abs().amax(-1) / 6 * divisor).to(torch.float8_e4m3fn)
    factors = (scales.float() / divisor).clamp(min=1e-12)
    codes = e2m1_codes(blocks / factors[..., None]).flatten(-2)
    return {"weight_packed": codes, "weight_scale": scales, "weight_global_scale": divisor}


def store_compressed(case: str) -> Store:
    """Return what stores a weight as compressed-tensors does."""

    def store(name: str, weight: Tensor) -> dict[str, Tensor]:
        module = name.removesuffix(".weight")
        return {f"{module}.{kind}": array for kind, array in stored(case, weight).items()}

    return store


def store_decompressed(case: str) -> Store:
    """Return what stores a weight as compressed-tensors gives it back, in float32."""
    return lambda name, weight: {name: decompressed(case, stored(case, weight)).float()}


def store_modelopt(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Store a weight in NVFP4 as modelopt does; those of attention in float8."""
    if "attn" in name:
        scale = weight.float().abs().max() / 448
        return {name: (weight.float() / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}
    arrays = _float4(weight.float(), torch.float8_e4m3fn)
    return {
        name: arrays["weight_packed"],
        f"{name}_scale": arrays["weight_scale"],
        f"{name}_scale_2": (1 / arrays["weight_global_scale"]).view(()),
        f"{name.removesuffix('.weight')}.input_scale": torch.ones(()),
    }


def store_modelopt_back(dtype: torch.dtype) -> Store:
    """Return what stores a weight as modelopt's own operations dequantise it for a dtype; float4 in float32, to be rounded once."""

    def store(name: str, weight: Tensor) -> dict[str, Tensor]:
        arrays = store_modelopt(name, weight)
        if "attn" in name:
            return {name: arrays[name].to(dtype) * arrays[f"{name}_scale"].to(dtype)}
        magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
        table = torch.cat([magnitudes, -magnitudes])
        packed = arrays[name]
        values = table[torch.stack([packed & 15, packed >> 4], -1).flatten(1).int()]
        scales = arrays[f"{name}_scale"].float() * arrays[f"{name}_scale_2"]
        return {name: (values.unflatten(1, (-1, 16)) * scales[..., None]).flatten(1)}

    return store
