"""Compute one expert of a mixture on the rows that a router sent to it, as transformers' `eager` loop does.

Generic over the families whose classes carry transformers' `use_experts_implementation`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slowllm.errors import CheckpointError


@dataclass(frozen=True)
class Routing:
    hidden: Tensor
    index: Tensor
    weights: Tensor
    num_experts: int

    @classmethod
    def checked(cls, name: str, hidden: Tensor, index: Tensor, weights: Tensor, num_experts: int) -> Self:
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) <= num_experts:
            raise CheckpointError(f"{name}: its router names an expert that is not among {num_experts}")
        if not bool(weights.isfinite().all()):
            raise CheckpointError(f"{name}: its router's weights are not finite")
        return cls(hidden, index, weights, num_experts)

    def experts(self) -> list[int]:
        return [number for number in self.index.unique().tolist() if number < self.num_experts]

    def rows_of(self, number: int) -> tuple[Tensor, Tensor]:
        places, tokens = torch.where((self.index == number).t())
        return tokens, places


def expert_output(module: nn.Module, held: Mapping[str, Tensor], rows: Tensor) -> Tensor:
    kind: Any = module

    def product(x: Tensor, name: str) -> Tensor:
        weight, bias = held[name], held.get(f"{name}_bias")
        if kind.is_transposed:
            out = x @ weight
            return out if bias is None else out + bias
        return F.linear(x, weight, bias)

    out = product(rows, "gate_up_proj" if kind.has_gate else "up_proj")
    out = kind._apply_gate(out) if kind.has_gate else kind.act_fn(out)
    out = product(out, "down_proj")
    return kind.post_expert_norm(out) if getattr(kind, "has_post_expert_norm", False) else out


def add_rows(out: Tensor, routing: Routing, tokens: Tensor, places: Tensor, rows: Tensor) -> Tensor:
    weighted = rows * routing.weights[tokens, places, None]
    return out.index_add_(0, tokens, weighted.to(out.dtype))
