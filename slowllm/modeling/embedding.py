"""The embedding stays transformers' own module, on a memory-mapped parameter: a look-up reads only its rows."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn

from slowllm.errors import ArchitectureError
from slowllm.streaming.lazy_weight import LazyWeight
from slowllm.streaming.mapped_pages import fetch_rows

# Fewer rows are read by faults in as little time.
MIN_ROWS = 8


class HostEmbedding(nn.Embedding):
    """Mixin for an input embedding whose rows are looked up in the host's memory while the model is on a device."""

    _device: torch.device

    __call__ = nn.Module.__call__

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of ids, which may be on any device, on the model's device."""
        return super().forward(input.cpu()).to(self._device)


def stream_embedding(
    embedding: nn.Module,
    weight: Tensor,
    compute_dtype: torch.dtype,
    device: torch.device | None = None,
    mapped: Tensor | None = None,
) -> None:
    """Put a mapped weight (V, H) into a model's input embedding, which stays a module of its own class.

    A weight stored in another dtype than `compute_dtype` is looked up as stored, and only its rows are cast.

    Args:
        embedding: of the model.
        weight: in the host's memory; a coded one is lazy already.
        compute_dtype: of the model.
        device: that the rows are moved to; None for the processor.
        mapped: the weight as it is stored, on a memory map; None where it has been read.
    Raises:
        ArchitectureError: the embedding is no `nn.Embedding`.
    """
    if not isinstance(embedding, nn.Embedding):
        raise ArchitectureError(f"{type(embedding).__name__}: the input embedding is no nn.Embedding")
    if weight.dtype != compute_dtype and not isinstance(weight, LazyWeight):
        weight = LazyWeight(weight, compute_dtype, torch.empty(0, dtype=torch.uint8))
    embedding._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    if device is not None:
        kind = type(embedding)
        embedding.__class__ = type(kind.__name__, (HostEmbedding, kind), {"__module__": __name__})
        cast(HostEmbedding, embedding)._device = device
    if mapped is not None:
        embedding.register_forward_pre_hook(functools.partial(_fetch, mapped, len(weight)))


def _fetch(mapped: Tensor, num_rows: int, module: nn.Module, args: tuple[Any, ...]) -> None:
    """Have the rows that a call looks up read together."""
    del module
    ids = args[0] if args else None
    if isinstance(ids, Tensor) and ids.dtype in (torch.int64, torch.int32) and ids.numel() >= MIN_ROWS:
        rows = ids.unique().tolist()  # ascending
        if rows[0] >= 0 and rows[-1] < num_rows:
            fetch_rows(mapped, mapped.nbytes // num_rows, rows)
