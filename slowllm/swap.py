"""Hand weights over in the dtype that the model computes in.

A layer between the stops and the carousel: where storage and compute dtype differ, a stop's tensors are cast
once a visit into a kept buffer, however many riders pass. What lies in that buffer is overwritten at the next
stop, so nobody may keep it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from slowllm.carousel import Stops, Weights
from slowllm.checkpoint import Placement


def swap_bytes(stops: Sequence[Sequence[Placement]], dtypes: Mapping[str, torch.dtype]) -> int:
    """Return the size of the kept buffer: what has to be cast of the stop where that is most."""
    return max((_cast_bytes(stop, dtypes) for stop in stops), default=0)


def _cast_bytes(stop: Sequence[Placement], dtypes: Mapping[str, torch.dtype]) -> int:
    # Each tensor begins on a cache line.
    return sum(
        -(-p.num_bytes // p.dtype.itemsize * dtypes[p.name].itemsize // 64) * 64 + 64
        for p in stop
        if dtypes[p.name] != p.dtype
    )


class CastStops:
    """Stops whose weights are in the compute dtype.

    Args:
        stops: that hand out weights as stored.
        dtypes: compute dtype of every tensor, by name.
        scratch_bytes: from `swap_bytes`.
    """

    def __init__(self, stops: Stops, dtypes: Mapping[str, torch.dtype], scratch_bytes: int) -> None:
        self.num_stops = stops.num_stops
        self._stops = stops
        self._dtypes = dtypes
        self._scratch = torch.empty(scratch_bytes, dtype=torch.uint8)

    @contextlib.contextmanager
    def visit(self, stop: int, upcoming: Sequence[int] = ()) -> Iterator[Weights]:
        """Hold a stop; see `Stops.visit`."""
        with self._stops.visit(stop, upcoming) as stored:
            offset = 0
            weights: dict[str, Tensor] = {}
            for name, tensor in stored.items():
                dtype = self._dtypes[name]
                if tensor.dtype == dtype:
                    weights[name] = tensor
                    continue
                num_bytes = tensor.numel() * dtype.itemsize
                kept = self._scratch[offset : offset + num_bytes].view(dtype).view(tensor.shape)
                weights[name] = kept.copy_(tensor)
                offset += -(-num_bytes // 64) * 64
            yield weights
