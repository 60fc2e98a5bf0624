"""Which experts will a block choose, asked of its router alone?

Knows how transformers' mixtures name their routers and norms; computes with the router's weights, and with no others of the block.
Asked with another block's output, the answer is a guess: attention is still to come.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slowllm.modeling.experts import is_decorated

_ROUTERS = ("gate", "router")
# Norms of a block's input to its mixture, in the order in which they are looked for.
_NORMS_BEFORE = ("pre_feedforward_layernorm", "pre_mlp_layernorm", "pre_ff_layernorm", "ffn_norm")
# The same, but in blocks that have the norm of what a mixture gives, these are of attention.
_NORM_BEHIND = "post_feedforward_layernorm"
_NORMS_BEFORE_UNLESS_BEHIND = ("post_attention_layernorm", "input_layernorm", "norm")


@dataclass(frozen=True)
class Router:
    """The router of a block, to be asked which experts it chooses.

    Attributes:
        module: the router.
        norm: of the hidden states before they come to the mixture; None if there is none, or if it is not known.
        parameters: the names in the block of all parameters and buffers that are read.
    """

    module: nn.Module
    norm: nn.Module | None
    parameters: tuple[str, ...]
    _others: tuple[Tensor, ...]

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the experts chosen, (T, k) int64.

        Args:
            hidden: (B, T', H) or (T, H) in the compute dtype, as the mixture has them, behind the norm.
        """
        rows = (
            hidden.reshape(1, -1, hidden.shape[-1]) if self._others else hidden.reshape(-1, hidden.shape[-1])
        )
        with torch.no_grad():
            chosen: Tensor = self.module(rows, *self._others)[2]
        return chosen.reshape(-1, chosen.shape[-1])

    def guess(self, hidden: Tensor) -> Tensor:
        """Return the experts chosen, (T, k) int64, of hidden states before the norm, as between two blocks.

        Args:
            hidden: (B, T', H) or (T, H) in the compute dtype.
        """
        with torch.no_grad():
            return self(hidden if self.norm is None else self.norm(hidden))


def find_router(block: nn.Module) -> Router | None:
    """Return the router of a block with decorated experts.

    Returns:
        None if the block has no such experts, more than one module of them, or a router that asks for more than the hidden states:
        the tokens (DeepSeek-V4's first blocks), or what the router before it knew (Zaya).
    """
    mixtures = [
        (name, module)
        for name, module in block.named_modules()
        if any(is_decorated(child) for child in module.children())
    ]
    if len(mixtures) != 1:
        return None
    name, mixture = mixtures[0]
    key = next((key for key in _ROUTERS if isinstance(getattr(mixture, key, None), nn.Module)), None)
    if key is None:
        return None
    module: nn.Module = getattr(mixture, key)
    _, *asked = inspect.signature(module.forward).parameters
    others = [
        value for value in (getattr(mixture, other, None) for other in asked) if isinstance(value, Tensor)
    ]
    if len(others) < len(asked):
        return None
    norm_name, norm = (None, None) if mixture is block else _norm_before(block)
    parts: list[tuple[str | None, Any]] = [(f"{name}.{key}".lstrip("."), module), (norm_name, norm)]
    names = [
        f"{part}.{inner}"
        for part, owner in parts
        if owner is not None
        for inner, _ in (*owner.named_parameters(), *owner.named_buffers())
    ]
    names += [f"{name}.{other}".lstrip(".") for other in asked]
    return Router(module, norm, tuple(names), tuple(others))


def _norm_before(block: nn.Module) -> tuple[str | None, nn.Module | None]:
    """Return the norm through which hidden states come to a block's mixture, with its name."""
    children = dict(block.named_children())
    wanted = _NORMS_BEFORE if _NORM_BEHIND in children else _NORMS_BEFORE + _NORMS_BEFORE_UNLESS_BEHIND
    name = next((key for key in wanted if key in children), None)
    return name, None if name is None else children[name]
