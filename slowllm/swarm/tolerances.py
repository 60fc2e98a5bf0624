"""By how much two honest answers to the same work may differ, and by how much two answers do."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# Of the largest value at a position. Servers of one kind of processor give equal bits; others add in another order, and each
# block rounds anew: some hundred units in the last place of float32, some of the shorter dtypes.
_OF_DTYPE = {"float32": 2.0**-13, "float16": 2.0**-7, "bfloat16": 2.0**-5}
# What the compression of either server may add: what docs/swarm.md says of it.
_OF_COMPRESSION = {"none": 0.0, "float16": 0.003, "bfloat16": 0.02, "int8": 0.05}


def tolerance(dtype: str, *compressions: str) -> float:
    """Return by how much two honest answers may differ, as a part of the largest value at a position.

    Args:
        dtype: that both compute in.
        compressions: of the two servers.
    """
    return _OF_DTYPE.get(dtype, _OF_DTYPE["bfloat16"]) + sum(_OF_COMPRESSION[one] for one in compressions)


def difference(ours: Mapping[int, Tensor], theirs: Mapping[int, Tensor], mask: Tensor | None) -> float:
    """Return the largest difference of two answers as a part of the largest value at its position; NaN of one is infinite.

    Args:
        ours: hidden states (B, T, ...) by blocks.
        theirs: the same.
        mask: (B, at least T), 0 where positions hold no text and anything may stand; None for text everywhere.
    """
    worst = 0.0
    for number, one in ours.items():
        other = theirs[number]
        if torch.equal(one, other):
            continue
        a, b = one.detach().float().flatten(2), other.detach().float().flatten(2)
        if mask is not None and mask.dim() == 2 and len(mask) == len(a) and mask.shape[1] >= a.shape[1]:
            text = mask[:, mask.shape[1] - a.shape[1] :].bool()
            a, b = a[text], b[text]
        a, b = a.flatten(0, -2), b.flatten(0, -2)
        if not a.numel():
            continue
        if not torch.equal(a.isfinite(), b.isfinite()):
            return float("inf")
        a, b = (torch.where(x.isfinite(), x, 0.0) for x in (a, b))
        largest = torch.maximum(a.abs().amax(-1), b.abs().amax(-1)).clamp_min(torch.finfo(torch.float32).tiny)
        worst = max(worst, float(((a - b).abs().amax(-1) / largest).max()))
    return worst
