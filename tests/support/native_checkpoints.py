"""Checkpoints in quantised formats of their makers, made of plain ones by the published layouts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# Makes the stored arrays of a weight, by their names on disk.
Store = Callable[[str, Tensor], Mapping[str, Tensor]]
# Of these, as published, the weights stay plain.
PLAIN = ("embed", "lm_head", "norm", "router", ".gate.", "ln_", "layernorm")


def is_stored_plain(name: str, tensor: Tensor) -> bool:
    """Return whether a weight of the tests' models is left as it is."""
    return tensor.dim() < 2 or any(word in name for word in PLAIN)


def quantised(folder: Path, out: Path, settings: Mapping[str, Any], store: Store) -> Path:
    """Copy a plain checkpoint, its matrices stored otherwise; return the copy's folder."""
    out.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix != ".safetensors":
            if path.is_file() and not path.name.endswith(".index.json"):
                shutil.copy(path, out)
            continue
        stored: dict[str, Tensor] = {}
        for name, tensor in load_file(path).items():
            own = {name: tensor} if is_stored_plain(name, tensor) else store(name, tensor)
            stored |= {key: value.contiguous() for key, value in own.items()}
        save_file(stored, out / path.name, {"format": "pt"})
        weight_map |= dict.fromkeys(stored, path.name)
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": dict(settings)}))
    return out


def fp8_settings(block: tuple[int, int] | None) -> dict[str, Any]:
    """Return what config.json says of float8 in blocks."""
    size = None if block is None else list(block)
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": size}


def store_fp8(
    block: tuple[int, int], dtype: torch.dtype = torch.float32, suffix: str = "_scale_inv"
) -> Store:
    """Return what stores a weight in float8 e4m3 with scales of a dtype for its blocks."""

    def store(name: str, weight: Tensor) -> dict[str, Tensor]:
        codes, scales = fp8_of(weight, block, dtype)
        scale_name = name.removesuffix(".weight") + suffix if suffix.startswith(".") else name + suffix
        return {name: codes, scale_name: scales}

    return store


def fp8_of(weight: Tensor, block: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a matrix in float8 (R, K) and the scales of its blocks; blocks at the edges may be smaller."""
    rows, width = weight.shape
    down, across = -(-rows // block[0]), -(-width // block[1])
    scales = torch.zeros(down, across)
    codes = torch.zeros(rows, width, dtype=torch.float8_e4m3fn)
    for i in range(down):
        for j in range(across):
            there = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scale = weight[there].abs().max().float().clamp(min=1e-12) / 448
            if dtype == torch.float8_e8m0fnu:
                scale = torch.exp2(torch.ceil(torch.log2(scale)))
            scales[i, j] = scale.to(dtype).float()
            codes[there] = (weight[there].float() / scales[i, j]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, scales.to(dtype)


def dequantised(folder: Path, out: Path, block: tuple[int, int]) -> Path:
    """Copy a plain checkpoint, its matrices rounded to float8 in blocks and back to float32; return the copy's folder."""

    def store(name: str, weight: Tensor) -> dict[str, Tensor]:
        codes, scales = fp8_of(weight, block, torch.float32)
        rows, columns = (torch.arange(side) // step for side, step in zip(weight.shape, block, strict=True))
        return {name: codes.float() * scales[rows][:, columns]}

    return plain_copy(folder, out, store)


def plain_copy(folder: Path, out: Path, store: Store) -> Path:
    """Copy a plain checkpoint, its matrices changed but stored plainly; return the copy's folder."""
    quantised(folder, out, {}, store)
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    return out


def store_mxfp4(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Store experts (E, K, R) as gpt-oss does, and other weights as they are."""
    if weight.dim() != 3:
        return {name: weight}
    blocks = weight.float().transpose(1, 2).unflatten(-1, (-1, 32))
    exponents = blocks.abs().amax(-1).clamp(min=2.0**-100).log2().floor() - 2
    codes = e2m1_codes(blocks / torch.exp2(exponents)[..., None])
    return {f"{name}_blocks": codes, f"{name}_scales": (exponents + 127).to(torch.uint8)}


def store_fp4(dtype: torch.dtype = torch.int8, suffix: str = "_scale_inv") -> Store:
    """Return what stores experts as DeepSeek-V4 does, in float4 with an exponent for 32 numbers, and the rest in float8."""
    others = store_fp8((8, 16), suffix=suffix)

    def store(name: str, weight: Tensor) -> Mapping[str, Tensor]:
        if ".experts." not in name:
            return others(name, weight)
        blocks = weight.float().unflatten(-1, (-1, 32))
        scales = torch.exp2(blocks.abs().amax(-1).clamp(min=2.0**-100).log2().floor() - 2)
        codes = e2m1_codes(blocks / scales[..., None]).flatten(-2)
        scale_name = name.removesuffix(".weight") + suffix if suffix.startswith(".") else name + suffix
        return {name: codes.view(dtype), scale_name: scales.to(torch.float8_e8m0fnu)}

    return store


def e2m1_codes(values: Tensor) -> Tensor:
    """Return the nearest codes of numbers (.., 2 N), two to a byte, the first in the low bits."""
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    nearest = (values.abs()[..., None] - magnitudes).abs().argmin(-1)
    codes = (nearest + 8 * values.signbit()).to(torch.uint8).unflatten(-1, (-1, 2))
    return codes[..., 0] | codes[..., 1] << 4


def save_dequantised(weights: Mapping[str, Tensor], folder: Path, out: Path) -> Path:
    """Write weights as a plain checkpoint, all else as in `folder`; return the new folder."""
    out.mkdir(parents=True)
    for path in folder.iterdir():
        if path.is_file() and ".safetensors" not in path.name:
            shutil.copy(path, out)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    config.pop("quantization_config", None)
    (out / "config.json").write_text(json.dumps(config))
    return out
