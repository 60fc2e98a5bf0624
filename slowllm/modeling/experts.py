"""Which parameters hold experts that are used one at a time?

Knows transformers' classes of experts (`use_experts_implementation`): a loop over the experts that tokens chose, or a grouped product,
of which `LazyWeight` makes such a loop on the processor.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

# Set by the decorator of classes whose experts can be computed in several ways.
_DECORATED = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
# Those ways that take one expert at a time.
_ONE_BY_ONE = ("eager", "grouped_mm", None)


def experts_modules(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of experts that can be computed in several ways, with their names."""
    for name, module in model.named_modules():
        if all(hasattr(module, attribute) for attribute in _DECORATED):
            yield name, module


def picked_experts(model: PreTrainedModel) -> frozenset[str]:
    """Return the parameters of experts of which each operation on the processor reads one.

    Args:
        model: a skeleton.
    """
    found = set()
    for name, module in experts_modules(model):
        if getattr(module.config, "_experts_implementation", None) in _ONE_BY_ONE:
            found |= {
                f"{name}.{key}"
                for key, value in module._parameters.items()
                if value is not None and value.dim() == 3
            }
    return frozenset(found)
