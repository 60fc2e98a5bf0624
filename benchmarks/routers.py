"""Routers whose experts are unequally popular, as those of trained mixtures are.

The logarithm of an expert's popularity falls with that of its rank (Zipf's law, with Mandelbrot's offset); each block ranks its experts
in another order. Where a router has a bias, popularity is in the bias; where it has none, it is in the weights along the direction that
hidden states have in common (`heavy_tails.common_direction`).
"""

from __future__ import annotations

import math
from collections.abc import Container

import torch
from torch import Tensor

from benchmarks.heavy_tails import COMMON, common_direction, generator_of

# How much popularity adds to the logits of experts, whose own deviation is one. With the bias of DeepSeek-V3, 149 tokens of a text
# choose about 80 % of 256 experts, and without it all.
SKEW = 0.5
_OFFSET = 2.7
# DeepSeek-V3 adds its bias to sigmoids; this is about their mean slope where experts are chosen, found by counting them.
_SLOPE = 0.095
_ROUTERS = ("router", "gate")
_BIASES = ("bias", "e_score_correction_bias")


def is_router(name: str) -> bool:
    """Return whether a tensor on disk belongs to a router."""
    module, _, last = name.rpartition(".")
    return module.rpartition(".")[2] in _ROUTERS and last in ("weight", *_BIASES)


def popularity(num_experts: int, block: str) -> Tensor:
    """Return the logarithms of the experts' popularity in a block, float32, with a mean of zero and a deviation of one."""
    ranks = torch.randperm(num_experts, generator=generator_of(block))
    logs = -(ranks + _OFFSET).log()
    return (logs - logs.mean()) / logs.std(correction=0)


def router_content(name: str, shape: tuple[int, ...], names: Container[str]) -> Tensor:
    """Return a router's weights (experts, width) or bias (experts,): bfloat16, but DeepSeek-V3's bias, which is float32.

    Args:
        name: of the tensor on disk.
        shape: of it.
        names: of all tensors, among them the router's bias if it has one.
    """
    router = name.rpartition(".")[0]
    popular = SKEW * popularity(shape[0], router)
    if name.endswith("e_score_correction_bias"):
        return popular * _SLOPE
    if name.endswith(_BIASES):
        return popular.to(torch.bfloat16)
    width = shape[1]
    weights = torch.randn(shape, generator=generator_of(name)) / math.sqrt(width)
    if not any(f"{router}.{bias}" in names for bias in _BIASES):
        weights += popular[:, None] * common_direction(width) / (width * COMMON)
    return weights.to(torch.bfloat16)
