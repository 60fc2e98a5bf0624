"""Which parameters hold experts that are used one at a time?

Knows transformers' classes of experts (`use_experts_implementation`), whose own loop takes the experts that tokens chose one by
one; other implementations multiply with all of them in one operation.
"""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedModel

from slowllm.storage.codecs.registry import codec_of
from slowllm.storage.spans import Placement

# What transformers calls the loop over the chosen experts.
ONE_BY_ONE = "eager"
# Set by the decorator of classes whose experts can be computed in several ways.
_DECORATED = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


def coded_experts(model: PreTrainedModel, placements: Mapping[str, Placement]) -> frozenset[str]:
    """Return the parameters of coded experts that can be used one at a time.

    Args:
        model: a skeleton.
        placements: of its parameters.
    """
    found = set()
    for module_name, module in model.named_modules():
        if not all(hasattr(module, attribute) for attribute in _DECORATED):
            continue
        for key, parameter in module._parameters.items():
            placement = placements.get(f"{module_name}.{key}")
            if parameter is None or parameter.dim() != 3 or placement is None or placement.coding is None:
                continue
            # Those of a lossless store have the bits of the plain checkpoint, which is computed as transformers does by default.
            if not codec_of(placement.coding).is_exact:
                found.add(placement.name)
    return frozenset(found)


def use_one_by_one(model: PreTrainedModel) -> None:
    """Let a model use its experts one at a time, so that only those are decoded that tokens chose."""
    model.set_experts_implementation(ONE_BY_ONE)
