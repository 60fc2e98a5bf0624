"""Matrices as codecs write them."""

from __future__ import annotations

import torch
from torch import Tensor

from slowllm.storage.codecs.base import Parts
from slowllm.storage.codecs.registry import STORE_CODECS


def coded(codec: str, matrix: Tensor) -> Parts:
    rows, width = matrix.shape
    unit = STORE_CODECS[codec].unit(width)
    step = max(unit, 1 << 17) // unit * unit
    pieces = [STORE_CODECS[codec].encode(piece, width) for piece in matrix.flatten().split(step)]
    return STORE_CODECS[codec].join(pieces, rows, width)


def matrix_of(seed: int, rows: int, width: int, spread: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, width, generator=generator)
    # Exponents that are far apart have no code, and are kept whole.
    values *= torch.exp(spread * torch.randn(rows, width, generator=generator))
    values[torch.rand(rows, width, generator=generator) < 0.01] = 0.0
    return values.bfloat16()
