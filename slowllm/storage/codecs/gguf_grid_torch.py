"""Decode blocks of GGUF files whose codes name rows of a table, by operations of torch; see `gguf_torch`.

The tables are copied to a device once, when its first block is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from slowllm.storage.codecs.gguf_grids import tables_on

_DELTA = 0.125


def _numbers(stored: Tensor, length: int) -> Tensor:
    """Return numbers (N, K / length) int64 of so many bytes each, the lowest first; stored (N, K) uint8."""
    wide = stored.long().unflatten(1, (-1, length))
    numbers: Tensor = (wide << 8 * torch.arange(length, device=stored.device)).sum(-1)
    return numbers


def _pieces(numbers: Tensor, step: int, count: int) -> Tensor:
    """Return numbers (N, K) shifted right by the first multiples of a step, (N, K x count)."""
    return (numbers[..., None] >> step * torch.arange(count, device=numbers.device)).flatten(1)


def _half(bits: Tensor) -> Tensor:
    """Return the float16 numbers of bits (N, 1) int64, as float32."""
    return torch.where(bits < 1 << 15, bits, bits - (1 << 16)).short().view(torch.float16).float()


def _scale(blocks: Tensor) -> Tensor:
    return _half(_numbers(blocks[:, :2], 2))


def _nibbles(stored: Tensor) -> Tensor:
    return _pieces(stored.long(), 4, 2) & 15


def _signed(kind: str, scales: Tensor, codes: Tensor, signs: Tensor) -> Tensor:
    """Return weights (N, 256): scales (N, S) times rows of the table, and signs, a byte of which is for 8 weights."""
    grid, table = tables_on(kind, codes.device)
    words, scales = grid[codes].flatten(1), scales.repeat_interleave(256 // scales.shape[1], 1)
    return scales * words * table[signs].flatten(1)


def _iq2_xxs(blocks: Tensor) -> Tensor:
    pairs = blocks[:, 2:].unflatten(1, (8, 8))
    words = _numbers(pairs[..., 4:].flatten(1), 4)
    scales = _scale(blocks) * (0.5 + (words >> 28).float()) * 0.25
    return _signed("iq2_xxs", scales, pairs[..., :4].flatten(1).long(), _pieces(words, 7, 4) & 127)


def _iq2_xs(blocks: Tensor) -> Tensor:
    words = _numbers(blocks[:, 2:66], 2)
    scales = _scale(blocks) * (0.5 + _nibbles(blocks[:, 66:]).float()) * 0.25
    return _signed("iq2_xs", scales, words & 511, words >> 9)


def _iq2_s(blocks: Tensor) -> Tensor:
    codes = blocks[:, 2:34].long() | (_pieces(blocks[:, 66:74].long(), 2, 4) & 3) << 8
    scales = _scale(blocks) * (0.5 + _nibbles(blocks[:, 74:]).float()) * 0.25
    return _signed("iq2_s", scales, codes, blocks[:, 34:66].long())


def _iq3_xxs(blocks: Tensor) -> Tensor:
    words = _numbers(blocks[:, 66:], 4)
    scales = _scale(blocks) * (0.5 + (words >> 28).float()) * 0.5
    return _signed("iq3_xxs", scales, blocks[:, 2:66].long(), _pieces(words, 7, 4) & 127)


def _iq3_s(blocks: Tensor) -> Tensor:
    codes = blocks[:, 2:66].long() | (_pieces(blocks[:, 66:74].long(), 1, 8) & 1) << 8
    scales = _scale(blocks) * (1 + 2 * _nibbles(blocks[:, 106:])).float()
    return _signed("iq3_s", scales, codes, blocks[:, 74:106].long())


def _shifted(kind: str, scales: Tensor, codes: Tensor, are_negative: Tensor) -> Tensor:
    """Return weights (N, 256): scales (N, S) times rows of the table, which are moved by an eighth up or down."""
    grid, _ = tables_on(kind, codes.device)
    deltas = torch.where(are_negative, -_DELTA, _DELTA)
    words = grid[codes].flatten(1) + deltas.repeat_interleave(256 // deltas.shape[1], 1)
    return scales.repeat_interleave(256 // scales.shape[1], 1) * words


def _iq1_s(blocks: Tensor) -> Tensor:
    words = _numbers(blocks[:, 34:], 2)
    codes = blocks[:, 2:34].long() | (_pieces(words, 3, 4) & 7) << 8
    scales = _scale(blocks) * (2 * (words >> 12 & 7) + 1).float()
    return _shifted("iq1_s", scales, codes, words >= 1 << 15)


def _iq1_m(blocks: Tensor) -> Tensor:
    words, high = _numbers(blocks[:, 48:], 2), _nibbles(blocks[:, 32:48])
    digits = words >> 12
    scale = _half((digits << 4 * torch.arange(4, device=blocks.device)).sum(1, keepdim=True))
    scales = scale * (2 * (_pieces(words, 3, 4) & 7) + 1).float()
    return _shifted("iq1_m", scales, blocks[:, :32].long() | (high & 7) << 8, high >= 8)


GRID_DECODERS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "iq1_s": _iq1_s, "iq1_m": _iq1_m, "iq2_xxs": _iq2_xxs, "iq2_xs": _iq2_xs, "iq2_s": _iq2_s, "iq3_xxs": _iq3_xxs,
    "iq3_s": _iq3_s,
}  # fmt: skip
"""By type, what decodes blocks of it."""
