"""Find experts in mxfp4: e2m1 numbers in blocks of 32 that share a power of two, as gpt-oss is published."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slowllm.errors import CheckpointError
from slowllm.modeling.native.coded_tensor import CodedPart, CodedTensor
from slowllm.storage.codecs.mxfp4 import BLOCK
from slowllm.storage.spans import Span

_CODES, _SCALES = "_blocks", "_scales"


def find(settings: Mapping[str, Any], spans: Mapping[str, Span]) -> tuple[list[CodedTensor], set[str]]:
    """Return the experts in mxfp4, and the names of all spans that belong to them.

    Args:
        settings: of config.json. Which modules it leaves plain is seen in the spans.
        spans: of the checkpoint.
    Raises:
        CheckpointError: one of the two arrays of a parameter is missing, or they do not go together.
    """
    found, used = [], set[str]()
    for name, codes in spans.items():
        if not name.endswith(_CODES):
            continue
        scales = spans.get(name.removesuffix(_CODES) + _SCALES)
        if scales is None:
            raise CheckpointError(
                f"{codes.path.name}: {name} has no scales ({name.removesuffix(_CODES)}{_SCALES}); fetch all shards and the "
                "index again"
            )
        found.append(_coded(name.removesuffix(_CODES), codes, scales))
        used |= {name, scales.name}
    if lonely := sorted(name for name in spans if name.endswith(_SCALES) and name not in used):
        raise CheckpointError(
            f"{spans[lonely[0]].path.name}: {lonely[0]} has no numbers ({lonely[0].removesuffix(_SCALES)}{_CODES}); fetch all "
            "shards and the index again"
        )
    return found, used


def _coded(name: str, codes: Span, scales: Span) -> CodedTensor:
    """Return a parameter (E, K, R), whose matrices are stored transposed.

    Raises:
        CheckpointError: the arrays do not go together.
    """
    if codes.dtype != "U8" or len(codes.shape) != 4 or codes.shape[3] != BLOCK // 2 or 0 in codes.shape:
        raise CheckpointError(
            f"{codes.path.name}: {codes.name} is {codes.dtype} of shape {list(codes.shape)}, not U8 of shape "
            f"[experts, rows, blocks, {BLOCK // 2}]"
        )
    if scales.dtype not in ("U8", "F8_E8M0") or scales.shape != codes.shape[:3]:
        raise CheckpointError(
            f"{scales.path.name}: {scales.name} is {scales.dtype} of shape {list(scales.shape)}, which are no scales for "
            f"{codes.name} of shape {list(codes.shape)}"
        )
    experts, rows, blocks = scales.shape
    parts = (CodedPart("codes", codes, codes.shape), CodedPart("scales", scales, scales.shape))
    return CodedTensor(name, (experts, blocks * BLOCK, rows), "mxfp4", parts)
