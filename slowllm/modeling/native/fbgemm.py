"""Find weights in float8 with a scale for each output, as FBGEMM's quantiser stores them (Llama-3.1-405B-FP8).

The scales are multiplied as those of other float8 numbers are (`fp8`); activations, and the bound of their scales, are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from slowllm.errors import CheckpointError
from slowllm.modeling.native import fp8
from slowllm.modeling.native.coded_tensor import CodedTensor
from slowllm.storage.spans import Span

_BOUND = "input_scale_ub"


def find(settings: Mapping[str, Any], spans: Mapping[str, Span]) -> tuple[list[CodedTensor], set[str]]:
    """Return the weights in float8, and the names of all spans that belong to them.

    Args:
        settings: of config.json, which says nothing of the weights.
        spans: of the checkpoint.
    Raises:
        CheckpointError: a scale is missing, or has another shape than its weight needs.
    """
    bounds = {name for name in spans if name.endswith(_BOUND)}
    seen = {name: span for name, span in spans.items() if name not in bounds}
    for name, weight in spans.items():
        scale = spans.get(f"{name}_scale")
        if weight.dtype == "F8_E4M3" and scale is not None:
            seen[scale.name] = replace(scale, shape=_grid_of(weight, scale))
    found, used = fp8.find({}, seen)
    return found, used | bounds


def _grid_of(weight: Span, scale: Span) -> tuple[int, ...]:
    """Return the shape of a weight's scales; those of experts, which are stored transposed, are for columns.

    Raises:
        CheckpointError: they are not one for each output.
    """
    *outer, rows, width = weight.shape if len(weight.shape) > 1 else (0, 0)
    if not outer and scale.shape in ((rows,), (rows, 1)):
        return scale.shape
    if len(outer) == 1 and scale.shape in ((*outer, 1, width), (*outer, width, 1)):
        return (*outer, 1, width)
    raise CheckpointError(
        f"{scale.path.name}: {scale.name} is {scale.dtype} of shape {list(scale.shape)}, which is not one scale for each output of "
        f"{weight.name} of shape {list(weight.shape)}"
    )
