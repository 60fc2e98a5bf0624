"""Matrices as codecs write them."""

from __future__ import annotations

import torch
from torch import Tensor

from slowllm.storage.codecs.base import Parts
from slowllm.storage.codecs.registry import CODECS


def coded(codec: str, matrix: Tensor) -> Parts:
    rows, width = matrix.shape
    found = CODECS[codec]
    unit = found.unit(width)
    step = max(unit, 1 << 17) // unit * unit
    pieces = [found.encode(piece, width) for piece in matrix.flatten().split(step)]
    known = set(found.layout(rows, width))
    loose = {name: [piece[name] for piece in pieces] for name in pieces[0] if name not in known}
    arrays = {name: torch.cat([piece[name] for piece in pieces]) for name in known}
    arrays |= found.finish(loose)
    shapes = {name: shape for name, (_, shape) in found.layout(rows, width).items()}
    return Parts({name: a.view(shapes.get(name, a.shape)) for name, a in arrays.items()}, rows, width)


def matrix_of(seed: int, rows: int, width: int, spread: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, width, generator=generator)
    # Exponents that are far apart have no code, and are kept whole.
    values *= torch.exp(spread * torch.randn(rows, width, generator=generator))
    values[torch.rand(rows, width, generator=generator) < 0.01] = 0.0
    return values.bfloat16()
