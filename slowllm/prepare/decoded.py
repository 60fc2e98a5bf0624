"""Decode a tensor that a source has in its maker's format, a piece at a time, so that a store can code it otherwise.

Knows arrays and codecs; knows nothing of files or models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from slowllm.rounding import round_up
from slowllm.storage.codecs.base import Parts
from slowllm.storage.codecs.gguf import PLAIN_NAMES
from slowllm.storage.codecs.registry import CODECS
from slowllm.storage.codecs.team import OneThread
from slowllm.storage.spans import TORCH_DTYPES, Coding, Placement, Run
from slowllm.streaming.cast_stops import coded_shape


def is_quantised(coding: Coding) -> bool:
    """Whether weights were rounded to be coded so; those of GGUF files may only lie in another order."""
    return bool(coding.codecs - PLAIN_NAMES - {"stacked"})


def num_matrices(placement: Placement) -> int:
    """Return how many matrices a parameter has: of fused experts, those that were put together."""
    assert placement.coding is not None, "asked of coded tensors only"
    return len(placement.coding.rows) or math.prod(placement.shape[:-2])


def coded_pieces(placement: Placement) -> Iterator[Placement]:
    """Yield what of a coded tensor can be decoded by itself, in order of its rows: of a stack each of its matrices."""
    coding, width = placement.coding, placement.shape[-1]
    assert coding is not None, "asked of coded tensors only"
    if not coding.rows:
        yield placement
    for rows in coding.rows:
        parts, runs, at = [], list[Run](), 0
        for array in sorted(rows.coding.parts, key=lambda array: -TORCH_DTYPES[array.dtype].itemsize):
            end = array.offset + math.prod(array.shape) * TORCH_DTYPES[array.dtype].itemsize
            for run in placement.runs:
                low, high = max(run.target, array.offset), min(run.target + run.num_bytes, end)
                if low < high:
                    target = at + low - array.offset
                    runs.append(Run(run.span, run.source + low - run.target, target, high - low))
            parts.append(replace(array, offset=at))
            at += end - array.offset
        coding = replace(rows.coding, parts=tuple(parts))
        yield Placement(placement.name, (rows.num_rows, width), placement.dtype, tuple(runs), coding)


def decoded(
    placement: Placement, stored: Tensor, dtype: torch.dtype, unit: int, piece_bytes: int
) -> Iterator[Tensor]:
    """Yield the numbers of a coded tensor in order, as flat pieces.

    Args:
        placement: from `coded_pieces`.
        stored: (num_bytes,) uint8, its arrays.
        dtype: to decode to; numbers are rounded once.
        unit: of which the length of each piece, but the last, is a multiple.
        piece_bytes: size of a piece, about.
    """
    coding, shape = placement.coding, coded_shape(placement)
    assert coding is not None, "asked of coded tensors only"
    codec, parts = CODECS[coding.codec], Parts.of(stored, coding, shape)
    own_dtype = dtype if codec.decodes_to_any else torch.bfloat16
    rows = unit // math.gcd(unit, parts.width)
    rows = round_up(max(1, piece_bytes // (parts.width * own_dtype.itemsize)), rows)
    if coding.is_transposed:
        rows = shape[-2]
    for begin in range(0, parts.num_rows, rows):
        end = min(begin + rows, parts.num_rows)
        out = torch.empty(end - begin, parts.width, dtype=own_dtype)
        codec.decode(parts, out, begin, end, OneThread())
        yield (out.T if coding.is_transposed else out).to(dtype).reshape(-1)
