"""Find weights in float8: e4m3 numbers with scales for blocks, for rows, or for the matrix.

As DeepSeek-V3, Qwen3-FP8, MiniMax and GLM are published, and as transformers saves them (`FineGrainedFP8Config`). Integers of
8 bits are pairs of e2m1 numbers, as DeepSeek-V4's experts are published.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping
from typing import Any

from slowllm.errors import CheckpointError
from slowllm.modeling.native.coded_tensor import CodedPart, CodedTensor
from slowllm.rounding import ceil_div
from slowllm.storage.spans import Span

_PAIRS = ("I8", "F4")  # two numbers in a byte; of F4, a header counts numbers, of I8 bytes
_DTYPES = ("F8_E4M3", *_PAIRS)
_SCALE_DTYPES = ("F32", "BF16", "F16", "U8", "F8_E8M0")
# Of these dtypes, scales are exponents of two.
_EXPONENTS = ("U8", "F8_E8M0")
_MICROSCALED = (1, 32)
# Scales of activations, which are not quantised here.
_ACTIVATIONS = re.compile(r"(activation_scale|input_scale|input_scale_inv|qscale_act|k_scale|v_scale)$")


def find(settings: Mapping[str, Any], spans: Mapping[str, Span]) -> tuple[list[CodedTensor], set[str]]:
    """Return the weights in float8 and float4, and the names of all spans that belong to them.

    Args:
        settings: of config.json.
        spans: of the checkpoint.
    Raises:
        CheckpointError: a scale is missing, or has another shape than its weight needs.
    """
    block = _block_of(settings)
    used = {name for name in spans if _ACTIVATIONS.search(name)}
    found = []
    for name, span in spans.items():
        if span.dtype not in _DTYPES or name in used:
            continue
        scale = _scale_of(name, spans)
        if len(span.shape) < 2 or 0 in span.shape:
            raise CheckpointError(f"{span.path.name}: {name} is stored as {span.dtype} but is no matrix")
        found.append(_coded(span, scale, block))
        used |= {name, scale.name}
    if lonely := sorted(name for name in spans.keys() - used if _is_scale(name, spans)):
        raise CheckpointError(
            f"{spans[lonely[0]].path.name}: {lonely[0]} is a scale, but its weight is not stored in float8; config.json and "
            "the weights do not belong together"
        )
    return found, used


def _is_scale(name: str, spans: Mapping[str, Span]) -> bool:
    """Whether an array is the scale of a weight, by its name."""
    return name.endswith(("_scale_inv", ".qscale_weight")) or (
        name.endswith("_scale") and name.removesuffix("_scale") in spans
    )


def _block_of(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    block = settings.get("weight_block_size")
    if block is None:
        return None
    if (
        not isinstance(block, list | tuple)
        or len(block) != 2
        or not all(isinstance(side, int) and 0 < side < 1 << 31 for side in block)
    ):
        raise CheckpointError(
            f"config.json: weight_block_size is {reprlib.repr(block)}, not two numbers such as [128, 128]"
        )
    return block[0], block[1]


def _scale_of(name: str, spans: Mapping[str, Span]) -> Span:
    stem = name.removesuffix(".weight")
    names = [f"{name}_scale_inv", f"{name}_scale"]
    if stem != name:
        names += [f"{stem}.scale", f"{stem}.qscale_weight"]
    there = [other for other in names if other in spans]
    if len(there) != 1:
        said = f"has two scales, {' and '.join(there)}" if there else f"has no scale ({names[0]})"
        raise CheckpointError(
            f"{spans[name].path.name}: {name} is stored as {spans[name].dtype} but {said}; fetch all shards and the index again"
        )
    return spans[there[0]]


def _coded(weight: Span, scale: Span, block: tuple[int, int] | None) -> CodedTensor:
    """Return a weight with its scales; experts (E, R, K) as one matrix where their blocks allow it.

    Raises:
        CheckpointError: the scales do not go with the weight.
    """
    *outer, rows, width = weight.shape
    if weight.dtype == "I8":
        width *= 2
    group = _group_of(scale, rows, width, tuple(outer), block)
    is_odd = weight.dtype == "F4" and width % 2
    if scale.dtype not in _SCALE_DTYPES or group is None or (outer and rows % group[0]) or is_odd:
        wanted = "" if block is None else f" with blocks of {block[0]} x {block[1]}"
        raise CheckpointError(
            f"{scale.path.name}: {scale.name} is {scale.dtype} of shape {list(scale.shape)}, which are no scales for "
            f"{weight.name} of shape {list(weight.shape)}{wanted}"
        )
    num_rows = math.prod(outer) * rows
    grid = (ceil_div(num_rows, group[0]), ceil_div(width, group[1]))
    are_pairs = weight.dtype in _PAIRS
    codes = CodedPart("codes", weight, (num_rows, width // 2 if are_pairs else width))
    parts, codec = (CodedPart("scales", scale, grid), codes), "fp4" if are_pairs else "fp8"
    return CodedTensor(weight.name, (*outer, rows, width), codec, parts, group)


def _group_of(
    scale: Span, rows: int, width: int, outer: tuple[int, ...], block: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Return the rows and columns of a block; None where a scale's shape fits none."""
    shape = scale.shape
    has_grid = len(shape) == len(outer) + 2 and shape[:-2] == outer and 0 not in shape
    if block is not None:
        # Another grid than that of config.json's blocks belongs to another matrix, or is a part of one; but for experts with an
        # exponent for each 32 numbers of a row, as DeepSeek-V4 has them.
        for rows_of_block, columns in (block, *([_MICROSCALED] if scale.dtype in _EXPONENTS else [])):
            grid = (ceil_div(rows, rows_of_block), ceil_div(width, columns))
            if (has_grid and shape[-2:] == grid) or (grid == (1, 1) and math.prod(shape) == 1 and not outer):
                return rows_of_block, columns
        return None
    if math.prod(shape) == 1 and not outer:
        return rows, width
    if shape in ((*outer, rows), (*outer, rows, 1)):
        return 1, width
    if not has_grid or rows % shape[-2] or width % shape[-1]:
        return None
    return rows // shape[-2], width // shape[-1]
