"""Find weights that NVIDIA's modelopt stored: in NVFP4, or in float8 with one scale for the matrix."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slowllm.errors import CheckpointError
from slowllm.modeling.native.coded_tensor import CodedPart, CodedTensor
from slowllm.storage.checkpoint import read_json
from slowllm.storage.codecs import nvfp4
from slowllm.storage.spans import Span

# In which modelopt says what it did; newer versions of it say so in config.json as well.
QUANT_CONFIG = "hf_quant_config.json"
_ALGORITHMS = ("FP8", "NVFP4", "MIXED_PRECISION")
# Scales of activations and of caches, which are not quantised here.
_ACTIVATIONS = re.compile(r"\.(input_scale|output_scale|[kv]_scale|[kv]_proj\.[kv]_scale)$")


def settings_beside(folder: Path) -> dict[str, Any] | None:
    """Return what modelopt's own file says, as config.json would have it; None where there is no such file, or no format in it.

    Args:
        folder: of the checkpoint.
    Raises:
        CheckpointError: the file cannot be read, or names a format that is not read.
    """
    file = folder / QUANT_CONFIG
    if not file.is_file():
        return None
    quantization = read_json(file).get("quantization")
    if not isinstance(quantization, Mapping):
        raise CheckpointError(f"{file}: has no table called quantization; fetch it again")
    # Caches alone may be quantised, which is not imitated.
    if (algorithm := quantization.get("quant_algo")) is None:
        return None
    _refuse_unknown(str(file), algorithm)
    return {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "ignore": quantization.get("exclude_modules") or [],
    }


def _refuse_unknown(where: str, algorithm: object) -> None:
    if algorithm not in _ALGORITHMS:
        raise CheckpointError(
            f"{where}: quant_algo is {reprlib.repr(algorithm)}, which is not read; there are {', '.join(_ALGORITHMS)}"
        )


def find(settings: Mapping[str, Any], spans: Mapping[str, Span]) -> tuple[list[CodedTensor], set[str]]:
    """Return the weights in NVFP4 and float8, and the names of all spans that belong to them.

    Args:
        settings: of config.json.
        spans: of the checkpoint.
    Raises:
        CheckpointError: a scale is missing, or does not go with its weight; or config.json names a format that is not read.
    """
    _refuse_unknown("config.json", settings.get("quant_algo"))
    found, used = [], {name for name in spans if _ACTIVATIONS.search(name)}
    for name, codes in spans.items():
        if not name.endswith(".weight") or codes.dtype not in ("U8", "F8_E4M3"):
            continue
        if len(codes.shape) != 2 or 0 in codes.shape:
            raise CheckpointError(f"{codes.path.name}: {name} is {codes.dtype} but is no matrix")
        tensor = _nvfp4(codes, spans) if codes.dtype == "U8" else _fp8(codes, spans)
        found.append(tensor)
        used |= {part.span.name for part in tensor.parts}
    for name, span in spans.items():
        if name not in used and name.endswith((".weight_scale", ".weight_scale_2")):
            raise CheckpointError(
                f"{span.path.name}: {name} is a scale, but its weight is not quantised; config.json and the weights do not belong "
                "together"
            )
    return found, used


def _nvfp4(codes: Span, spans: Mapping[str, Span]) -> CodedTensor:
    rows, width = codes.shape[0], 2 * codes.shape[1]
    scales = _companion(codes, spans, "_scale", ("F8_E4M3",), ((rows, width // nvfp4.BLOCK),))
    number = _companion(codes, spans, "_scale_2", ("F32",), ((), (1,)))
    if width % nvfp4.BLOCK:
        raise CheckpointError(
            f"{codes.path.name}: {codes.name} has {width} columns, no multiple of {nvfp4.BLOCK}"
        )
    parts = (
        CodedPart("factor", number, (1,)),
        CodedPart("codes", codes, codes.shape),
        CodedPart("scales", scales, scales.shape),
    )
    return CodedTensor(codes.name, (rows, width), "nvfp4", parts)


def _fp8(codes: Span, spans: Mapping[str, Span]) -> CodedTensor:
    rows, width = codes.shape
    if f"{codes.name}_scale_2" in spans:
        raise CheckpointError(f"{codes.path.name}: {codes.name} is in float8, and has two scales")
    shapes = ((), (1,), (1, 1), (rows,), (rows, 1))
    scales = _companion(codes, spans, "_scale", ("F32", "BF16", "F16"), shapes)
    is_one = scales.shape in shapes[:3]
    group, grid = ((rows, width), (1, 1)) if is_one else ((1, width), (rows, 1))
    parts = (CodedPart("scales", scales, grid), CodedPart("codes", codes, codes.shape))
    return CodedTensor(codes.name, codes.shape, "fp8_cast_scales", parts, group)


def _companion(
    codes: Span,
    spans: Mapping[str, Span],
    suffix: str,
    dtypes: tuple[str, ...],
    shapes: tuple[tuple[int, ...], ...],
) -> Span:
    name = f"{codes.name}{suffix}"
    if (span := spans.get(name)) is None:
        raise CheckpointError(
            f"{codes.path.name}: {codes.name} is stored as {codes.dtype} but has no scale ({name}); fetch all shards and the "
            "index again"
        )
    if span.dtype not in dtypes or span.shape not in shapes:
        raise CheckpointError(
            f"{span.path.name}: {name} is {span.dtype} of shape {list(span.shape)}, which are no scales for {codes.name} of shape "
            f"{list(codes.shape)}"
        )
    return span
