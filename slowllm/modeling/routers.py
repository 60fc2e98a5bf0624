"""Which experts will a block choose, asked of its router alone?

Knows how transformers' mixtures name their routers and norms; computes with the router's weights, and with no others of the block,
in their place or as copies that stay when the block has gone.
Asked with another block's output, the answer is a guess: attention is still to come.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
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
# Routers that ask for texts of rows (B, T', H). All others take rows (T, H), and those of LFM2 nothing else.
_TAKES_TEXTS = frozenset({"AfmoeTokenChoiceRouter"})


@dataclass(frozen=True)
class Router:
    """The router of a block, to be asked which experts it chooses.

    Attributes:
        module: the router.
        norm: of the hidden states before they come to the mixture; None if there is none, or if it is not known.
        parameters: the names in the block of all parameters and buffers that are read.
        others: returns the tensors of the mixture that the router is called with beside the hidden states.
    """

    module: nn.Module
    norm: nn.Module | None
    parameters: tuple[str, ...]
    others: Callable[[], tuple[Tensor, ...]]

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the experts chosen, (T, k) int64.

        Args:
            hidden: (B, T', H) or (T, H) in the compute dtype, as the mixture has them, behind the norm.
        """
        takes_texts = any(kind.__name__ in _TAKES_TEXTS for kind in type(self.module).__mro__)
        rows = hidden.reshape(*((1,) if takes_texts else ()), -1, hidden.shape[-1])
        with torch.no_grad():
            chosen: Tensor = self.module(rows, *self.others())[2]
        return chosen.reshape(-1, chosen.shape[-1])

    def guess(self, hidden: Tensor) -> Tensor:
        """Return the experts chosen, (T, k) int64, of hidden states before the norm, as between two blocks.

        Args:
            hidden: (B, T', H) or (T, H) in the compute dtype.
        """
        with torch.no_grad():
            return self(hidden if self.norm is None else self.norm(hidden))


class KeptRouter:
    """A router that can be asked when its block is not in memory, with copies of its weights.

    Its modules are copies as well: what hooks record of the block's own calls, they do not record of guesses.

    Args:
        router: of a block that has not been called yet.
    """

    def __init__(self, router: Router) -> None:
        self._router = router
        self._copy = replace(router, module=copy.deepcopy(router.module), norm=copy.deepcopy(router.norm))
        self.is_kept = False

    @property
    def entrance(self) -> nn.Module:
        """The block's own module that hidden states come to as `guess` takes them."""
        return self._router.module if self._router.norm is None else self._router.norm

    def keep(self) -> None:
        """Copy the weights, which are in the block now."""
        with torch.inference_mode(False), torch.no_grad():
            _copy_weights(self._router.module, self._copy.module)
            if self._router.norm is not None and self._copy.norm is not None:
                _copy_weights(self._router.norm, self._copy.norm)
            others = tuple(other.detach().clone() for other in self._router.others())
        self._copy = replace(self._copy, others=lambda: others)
        self.is_kept = True

    def guess(self, hidden: Tensor) -> Tensor:
        """Return the experts chosen, as `Router.guess` does, when weights have been kept."""
        assert self.is_kept, "weights have been copied"
        return self._copy.guess(hidden)


def _copy_weights(source: nn.Module, target: nn.Module) -> None:
    for name, value in (*source.named_parameters(), *source.named_buffers()):
        path, _, key = name.rpartition(".")
        owner = target.get_submodule(path)
        tables: Any = owner._parameters if key in owner._parameters else owner._buffers
        tables[key] = value.detach().clone()


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
    if not all(isinstance(getattr(mixture, other, None), Tensor) for other in asked):
        return None

    def others() -> tuple[Tensor, ...]:
        # Looked up when they are needed: a parameter is in its place only while its block is visited.
        return tuple(getattr(mixture, other) for other in asked)

    norm_name, norm = (None, None) if mixture is block else _norm_before(block)
    parts: list[tuple[str | None, Any]] = [(f"{name}.{key}".lstrip("."), module), (norm_name, norm)]
    names = [
        f"{part}.{inner}"
        for part, owner in parts
        if owner is not None
        for inner, _ in (*owner.named_parameters(), *owner.named_buffers())
    ]
    names += [f"{name}.{other}".lstrip(".") for other in asked]
    return Router(module, norm, tuple(names), others)


def _norm_before(block: nn.Module) -> tuple[str | None, nn.Module | None]:
    """Return the norm through which hidden states come to a block's mixture, with its name."""
    children = dict(block.named_children())
    wanted = _NORMS_BEFORE if _NORM_BEHIND in children else _NORMS_BEFORE + _NORMS_BEFORE_UNLESS_BEHIND
    name = next((key for key in wanted if key in children), None)
    return name, None if name is None else children[name]
