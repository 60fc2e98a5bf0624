"""Which parameters hold experts, and which part of them is one expert's?

Knows transformers' classes of experts (`use_experts_implementation`): a loop over the experts that tokens chose, or a grouped product,
of which `LazyWeight` makes such a loop on the processor. Reads no weight: a skeleton will do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# Set by the decorator of classes whose experts can be computed in several ways.
_DECORATED = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
# Those ways that take one expert at a time.
_ONE_BY_ONE = ("eager", "grouped_mm", "slowllm", None)


@dataclass(frozen=True)
class ExpertLayout:
    """What one expert of a module is made of.

    Attributes:
        name: of the module in the model.
        num_experts: how many experts it has.
        shapes: the shape of one expert's part of each parameter that has a leading dimension of experts, by the parameter's name in
            the module, in the order of their definition.
        dtypes: of these parameters, in the skeleton.
    """

    name: str
    num_experts: int
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]

    @property
    def parameters(self) -> tuple[str, ...]:
        """The full names of the parameters, each of which holds all experts."""
        return tuple(f"{self.name}.{key}" for key in self.shapes)

    @property
    def matrices(self) -> tuple[str, ...]:
        """Those of an expert's parts that are matrices, by the parameters' names in the module; the others are biases."""
        return tuple(key for key, shape in self.shapes.items() if len(shape) == 2)

    @property
    def expert_bytes(self) -> int:
        """The bytes of one expert in the compute dtype."""
        return sum(
            torch.Size(shape).numel() * self.dtypes[key].itemsize for key, shape in self.shapes.items()
        )


def is_decorated(module: nn.Module) -> bool:
    """Return whether a module holds experts whose way of computing transformers lets one choose."""
    return all(hasattr(module, attribute) for attribute in _DECORATED)


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the decorated modules of experts in a model or block, by name."""
    return {name: module for name, module in model.named_modules() if is_decorated(module)}


def expert_layouts(model: nn.Module, prefix: str = "") -> tuple[ExpertLayout, ...]:
    """Return what the experts of each decorated module in a model or block are made of.

    Args:
        model: a skeleton, or a model with its weights; or a part of one.
        prefix: the part's name in the model.
    """
    found = []
    for inner, module in expert_modules(model).items():
        name = ".".join(part for part in (prefix, inner) if part)
        own = _own_parameters(module)
        found.append(
            ExpertLayout(
                name=name,
                num_experts=int(module.num_experts),  # type: ignore[arg-type]
                shapes={key: tuple(value.shape[1:]) for key, value in own.items()},
                dtypes={key: value.dtype for key, value in own.items()},
            )
        )
    return tuple(found)


def weights_of(module: nn.Module, expert: int) -> dict[str, Tensor]:
    """Return views of one expert's tensors by the names of the module's parameters: matrices of two dimensions, biases of one."""
    return {key: value[expert] for key, value in _own_parameters(module).items()}


def _own_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of a module that have a leading dimension of experts."""
    return {
        key: value
        for key, value in module._parameters.items()
        if value is not None and value.dim() >= 2 and value.shape[0] == module.num_experts
    }


def picked_experts(model: PreTrainedModel) -> frozenset[str]:
    """Return the matrices of experts of which each operation reads one.

    Args:
        model: a skeleton.
    """
    return frozenset(
        f"{name}.{key}"
        for name, module in expert_modules(model).items()
        if getattr(module.config, "_experts_implementation", None) in _ONE_BY_ONE
        for key, value in module._parameters.items()
        if value is not None and value.dim() == 3
    )
