"""Refuse NaN and infinity in the output of a block or the head, at positions that hold text."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slowllm.errors import NonFiniteError
from slowllm.streaming.call_context import current_call

# Stands for an attention mask that is not (B, T), from which it cannot be read which positions hold text.
UNKNOWN_MASK = torch.empty(0)


def check_finite(
    name: str, values: Tensor, *, infinity_is_legal: bool = False, has_rows: bool = True
) -> None:
    """Check an output at the positions that hold text.

    Args:
        name: of the block, for the error.
        values: (B, T, ...); another shape is checked as a whole.
        infinity_is_legal: whether only NaN is refused.
        has_rows: whether the first dimension is that of the batch's rows, one of which the error then names.
    Raises:
        NonFiniteError: names the first bad position.
    """
    # Each NaN and each infinity makes the sum NaN or infinite; so may numbers that are merely large. A sum makes
    # no copies.
    accumulates = torch.float32 if values.dtype == torch.float16 else None
    if math.isfinite(values.detach().sum(dtype=accumulates).item()):
        return
    good = ~values.isnan() if infinity_is_legal else values.isfinite()
    if bool(good.all()):
        return
    bad = ~good.flatten(2).all(-1) if values.dim() >= 3 else ~good
    mask = current_call().text_mask
    if mask is UNKNOWN_MASK:  # padding may be NaN, so only a tensor without a good position is surely damaged
        if not bool(bad.all()):
            return
    elif mask is not None and bad.dim() == 2 and len(mask) == len(bad) and mask.shape[1] >= bad.shape[1]:
        bad &= mask[:, -bad.shape[1] :].bool().to(bad.device)
    if bool(bad.any()):
        kind = "NaN" if bool(values.isnan().any()) else "infinity"
        position = bad.nonzero()[0].tolist()
        error = NonFiniteError(
            f"{name}: {kind} in the output at position {position}; "
            "the weights are damaged, or their numbers are too large for the compute dtype (try float32)"
        )
        error.row = position[0] if has_rows and len(position) > 1 else None
        raise error
