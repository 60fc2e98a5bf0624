"""Make floating tensors shorter for the wire, with a known loss, and restore them.

The loss of each way, for a value x of a row whose largest magnitude is a:

- ``none``: none.
- ``bfloat16``: at most 2^-8 |x|, for normal numbers. ``float16``: 2^-11 |x| or 2^-25, whichever is more.
- ``int8``: half of the row's scale a / 127, and float32's rounding; a row is what lies along the last dimension, and
  has one float32 scale. Rows with a below 127 times float32's smallest normal number (1.5e-36) become zeros.

Restored values are rounded to the tensor's own dtype after that. What is not finite, or would not be finite on the
wire, is refused and never sent as something else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from slowllm.errors import InputError, ProtocolError
from slowllm.options import COMPRESSIONS

_HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
FLOATING = {
    "float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64,
}  # fmt: skip
_MAX_INT8 = 127


def check_compression(name: str) -> None:
    """Refuse an unknown way to compress.

    Raises:
        InputError: the name is none of `COMPRESSIONS`.
    """
    if name not in COMPRESSIONS:
        raise InputError(f"compression {name!r} is unknown; use one of {', '.join(COMPRESSIONS)}")


def compress(name: str, tensor: Tensor, how: str) -> tuple[Tensor, Tensor | None]:
    """Return what is sent for a floating tensor, and the scales of its rows where there are any.

    Args:
        name: of the tensor, for the message of an error.
        tensor: (..., H) of a floating dtype.
        how: one of `COMPRESSIONS`.
    Returns:
        The tensor in the wire's dtype, and float32 scales (..., 1) for ``int8``.
    Raises:
        InputError: `how` is unknown, or the tensor is not floating.
        ProtocolError: a value is NaN or infinite, or too large for the wire's dtype.
    """
    check_compression(how)
    if tensor.dtype not in FLOATING.values():
        raise InputError(f"{name} of dtype {tensor.dtype} cannot be compressed; only floating tensors can")
    if how == "none":
        return tensor, None
    if how in _HALVES:
        short = tensor.to(_HALVES[how])
        # float16's largest numbers are finite in bfloat16, but not when they come back.
        if not bool(torch.isfinite(short.to(tensor.dtype)).all()):
            raise _refusal(name, tensor, how)
        return short, None
    wide = tensor.float()
    rows = wide if wide.dim() else wide[None]
    largest = rows.abs().amax(-1, keepdim=True) if rows.numel() else rows.new_zeros(*rows.shape[:-1], 1)
    scales = largest / _MAX_INT8
    if not bool(torch.isfinite(scales * _MAX_INT8).all()):
        raise _refusal(name, tensor, how)
    # A scale below the normal numbers is too coarse to divide by.
    is_zero = scales < torch.finfo(torch.float32).tiny
    scales = scales.masked_fill(is_zero, 0.0)
    levels = (rows / scales.masked_fill(is_zero, torch.inf)).round_().clamp_(-_MAX_INT8, _MAX_INT8)
    return levels.to(torch.int8).view(tensor.shape), scales


def restore(name: str, sent: Tensor, scales: Tensor | None, how: str, dtype: str) -> Tensor:
    """Return the tensor that `compress` was given, with the loss of `how`.

    Args:
        name: of the tensor, for the message of an error.
        sent: what `compress` returned.
        scales: what `compress` returned with it.
        how: as it was compressed.
        dtype: name of the tensor's own dtype, one of `FLOATING`.
    Raises:
        ProtocolError: these do not belong together, or a scale is negative or not finite.
    """
    if dtype not in FLOATING:
        raise ProtocolError(f"{name} is said to be of the dtype {dtype!r}, which is not a floating one")
    if how in _HALVES:
        if sent.dtype is not _HALVES[how]:
            raise ProtocolError(f"{name} is said to be compressed as {how} but has the dtype {sent.dtype}")
        return sent.to(FLOATING[dtype])
    if how != "int8":
        raise ProtocolError(f"{name} is compressed in the unknown way {how!r}")
    shape = (*sent.shape[:-1], 1)
    if sent.dtype is not torch.int8 or scales is None or scales.dtype is not torch.float32:
        raise ProtocolError(f"{name} is said to be compressed as int8 but has no int8 values or no scales")
    if scales.shape != shape:
        raise ProtocolError(f"{name} has scales of shape {list(scales.shape)}, not {list(shape)}")
    if not bool(((scales >= 0) & torch.isfinite(scales)).all()):
        raise ProtocolError(f"{name} has a scale that is negative or not finite")
    return (sent * scales.view(shape if sent.dim() else ())).to(FLOATING[dtype])


def _refusal(name: str, tensor: Tensor, how: str) -> ProtocolError:
    if bool(torch.isfinite(tensor).all()):
        largest = float(tensor.abs().max())
        return ProtocolError(f"{name} has a value of magnitude {largest:.3g}, too large to be sent as {how}")
    return ProtocolError(f"{name} has a NaN or an infinity, which cannot be sent as {how}")


def wire_bytes(tensors: Mapping[str, Tensor], compression: Mapping[str, str]) -> int:
    """Return the bytes that tensors take on the wire without the header, to estimate how long sending them takes.

    Args:
        tensors: what is sent.
        compression: how some of them are compressed, by name.
    """
    total = 0
    for name, tensor in tensors.items():
        size = {"bfloat16": 2, "float16": 2, "int8": 1}.get(
            compression.get(name, "none"), tensor.element_size()
        )
        total += tensor.numel() * size
        if compression.get(name) == "int8":
            total += 4 * math.prod(tensor.shape[:-1])
    return total
