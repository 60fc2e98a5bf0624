"""Checkpoints in GPTQ's and AWQ's formats, packed bit by bit, and what the packages that wrote them dequantise them to."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support.families import save_tiny
from tests.support.native_checkpoints import quantised

# Where AWQ's packer puts eight outputs in a word.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# Returns the stored arrays by their names on disk, and the dequantised weight.
Layer = Callable[[str, Tensor], tuple[Mapping[str, Tensor], Tensor]]


@dataclass(frozen=True)
class PackedLayer:
    """How a weight is packed.

    Attributes:
        method: gptq or awq.
        bits: of a code.
        group: inputs that share a scale; -1 for all.
        is_ordered: whether the inputs' groups are mixed, as by desc_act.
        version: of GPTQ's layout.
        has_order: whether the groups of the inputs are stored.
        dtype: of the scales.
    """

    method: str = "gptq"
    bits: int = 4
    group: int = 16
    is_ordered: bool = False
    version: str = "gptq"
    has_order: bool = True
    dtype: torch.dtype = torch.float16

    @property
    def settings(self) -> dict[str, Any]:
        """What config.json says."""
        if self.method == "awq":
            return {
                "quant_method": "awq",
                "bits": 4,
                "group_size": self.group,
                "zero_point": True,
                "version": "gemm",
            }
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group,
            "desc_act": self.is_ordered,
            "sym": False,
            "checkpoint_format": self.version,
        }

    def __call__(self, name: str, weight: Tensor) -> tuple[Mapping[str, Tensor], Tensor]:
        """Return the arrays of a weight (N, K) by their names on disk, and the dequantised weight."""
        stem, (_, width) = name.removesuffix(".weight"), weight.shape
        size = width if self.group == -1 else self.group
        of_input = torch.arange(width) // size
        if self.is_ordered:
            of_input = of_input[torch.randperm(width, generator=torch.Generator().manual_seed(width))]
        codes, zeros, scales = self._rounded(weight.T.float(), of_input)
        half = scales[of_input] * (codes - zeros[of_input]).to(self.dtype)
        if self.method == "awq":
            arrays = {"qweight": awq_packed(codes), "qzeros": awq_packed(zeros), "scales": scales}
        else:
            stored = zeros - int(self.version == "gptq")
            arrays = {"qweight": packed(codes, self.bits), "qzeros": packed(stored.T, self.bits).T}
            arrays["scales"] = scales
            if self.has_order:
                arrays["g_idx"] = of_input.int()
        return {f"{stem}.{key}": value.contiguous() for key, value in arrays.items()}, half.T.contiguous()

    def _rounded(self, weight: Tensor, of_input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes (K, N), zeros (G, N) and scales (G, N)."""
        top, num_groups = 2**self.bits - 1, int(of_input.max()) + 1
        low, high = (
            torch.stack([pick(weight[of_input == group], 0) for group in range(num_groups)])
            for pick in (torch.amin, torch.amax)
        )
        scales = ((high - low).clamp(min=1e-4) / top).to(self.dtype)
        zeros = (-low / scales.float()).round().clamp(1, top).long()  # of zero, nothing can be subtracted
        codes = (weight / scales.float()[of_input]).round().long() + zeros[of_input]
        return codes.clamp(0, top), zeros, scales


def words_of(bits: Tensor) -> Tensor:
    """Return the words (H, W) int32 of bits (32 x H, W), the lowest first."""
    places = torch.arange(32)[None, :, None]
    words = (bits.long().view(-1, 32, bits.shape[1]) << places).sum(1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def packed(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (K, W) along the first axis, as one stream of bits."""
    each = codes[:, None] >> torch.arange(bits)[None, :, None] & 1
    return words_of(each.flatten(0, 1))


def awq_packed(codes: Tensor) -> Tensor:
    """Pack codes (K, W) along the second axis, in AWQ's order."""
    mixed = codes.view(len(codes), -1, 8)[:, :, list(AWQ_ORDER)].flatten(1)
    return packed(mixed.T, 4).T


def packed_model(family: str, tmp_path: Path, layer: PackedLayer) -> tuple[Path, Path]:
    """Save a tiny model, packed and dequantised to float32; return the folders."""
    save_tiny(family, tmp_path / "plain", torch.bfloat16)
    return packed_pair(tmp_path, layer, layer.settings)


def packed_pair(tmp_path: Path, layer: Layer, settings: Mapping[str, Any]) -> tuple[Path, Path]:
    """Copy the checkpoint in `plain`, its matrices stored otherwise and dequantised to float32; return the folders."""
    ours = quantised(tmp_path / "plain", tmp_path / "packed", settings, lambda *item: layer(*item)[0])
    back = quantised(
        tmp_path / "plain", tmp_path / "back", {}, lambda name, weight: {name: layer(name, weight)[1].float()}
    )
    config = json.loads((back / "config.json").read_text())
    del config["quantization_config"]
    (back / "config.json").write_text(json.dumps(config))
    return ours, back
