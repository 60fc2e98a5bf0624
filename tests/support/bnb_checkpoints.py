"""Weights as bitsandbytes stores them, made by bitsandbytes, and what it dequantises them to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import Tensor


@dataclass(frozen=True)
class BnbLayer:
    """How a weight is stored.

    Attributes:
        kind: nf4, fp4 or int8.
        is_nested: whether scales are coded as well.
        block: numbers that share a scale.
    """

    kind: str = "nf4"
    is_nested: bool = True
    block: int = 64

    @property
    def settings(self) -> dict[str, Any]:
        """What config.json says."""
        if self.kind == "int8":
            return {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
        return {
            "quant_method": "bitsandbytes",
            "load_in_8bit": False,
            "load_in_4bit": True,
            "bnb_4bit_quant_type": self.kind,
            "bnb_4bit_use_double_quant": self.is_nested,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
        }

    def __call__(self, name: str, weight: Tensor) -> tuple[Mapping[str, Tensor], Tensor]:
        """Return the arrays of a weight (N, K) by their names on disk, and the dequantised weight as float32."""
        if self.kind == "int8":
            codes, scales, _ = bnb.int8_vectorwise_quant(weight.half())
            stem = name.removesuffix(".weight")
            arrays = {
                name: codes,
                f"{stem}.SCB": scales,
                f"{stem}.weight_format": torch.tensor(0, dtype=torch.uint8),
            }
            return arrays, bnb.int8_vectorwise_dequant(codes, scales)
        codes, state = bnb.quantize_4bit(
            weight.float(), blocksize=self.block, quant_type=self.kind, compress_statistics=self.is_nested
        )
        arrays = {name: codes, **{f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}}
        return arrays, flat_dequantised(codes, state)


def scales_of(state: Any) -> Tensor:
    """Return the scales of the blocks as bitsandbytes decodes them."""
    if not state.nested:
        found: Tensor = state.absmax
        return found
    decoded: Tensor = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    return decoded


def flat_dequantised(codes: Tensor, state: Any) -> Tensor:
    """Return a weight of 4 bits as one row: bitsandbytes on a CPU expects blocks that end where rows do."""
    flat: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        codes, scales_of(state), state.blocksize, state.quant_type, [1, state.shape.numel()], torch.float32
    )
    return flat.view(state.shape)
