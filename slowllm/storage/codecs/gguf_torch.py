"""Decode blocks of GGUF files by operations of torch, on any device, with the bits of `gguf_kernels`.

Each takes blocks (N, bytes of a block) uint8 and returns (N, weights of a block) float32. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

# The 16 values of IQ4_NL and IQ4_XS, as bytes, eight in a word: a table would have to be copied to the device.
_VALUES_LOW, _VALUES_HIGH = 0xF6EADDCFBFAD9881 - (1 << 64), 0x7159453526190D01


def _half(blocks: Tensor, place: int) -> Tensor:
    """Return the float16 number at a place of each block as (N, 1) float32."""
    return blocks[:, place : place + 2].contiguous().view(torch.float16).float()


def _steps(step: int, device: torch.device) -> Tensor:
    """Return the multiples of a step that are less than 8."""
    return torch.arange(0, 8, step, dtype=torch.uint8, device=device)


def _shifted(codes: Tensor, step: int) -> Tensor:
    """Return bytes (N, ..., K) shifted right by each multiple of a step, (N, ..., 8 / step, K)."""
    return codes.unsqueeze(-2) >> _steps(step, codes.device)[:, None]


def _nibbles(codes: Tensor) -> Tensor:
    """Return the low halves of bytes (N, K), then the high ones, (N, 2 K)."""
    return (_shifted(codes, 4) & 15).flatten(1)


def _fifths(blocks: Tensor, place: int) -> Tensor:
    """Return the 32 bits of four bytes of each block, (N, 32), times 16."""
    bytes_of = blocks[:, place : place + 4].unsqueeze(-1)
    return ((bytes_of >> _steps(1, blocks.device)) & 1).flatten(1) << 4


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).float() + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * ((_nibbles(blocks[:, 6:]) | _fifths(blocks, 2)).float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, 8:]) | _fifths(blocks, 4)
    return _half(blocks, 0) * codes.float() + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * blocks[:, 2:].contiguous().view(torch.int8).float()


def _iq4_nl(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _nonlinear(_nibbles(blocks[:, 2:]))


def _mxfp4(blocks: Tensor) -> Tensor:
    e = blocks[:, :1].int()
    # Half of the power of two, of which the smallest two are subnormal.
    bits = torch.where(e < 2, 0x00200000 << e.clamp(max=1), (e - 1).clamp(min=0) << 23)
    return bits.view(torch.float32) * _twice_e2m1(_nibbles(blocks[:, 1:]))


def _nonlinear(codes: Tensor) -> Tensor:
    """Return the values of IQ4_NL."""
    words = torch.where(codes < 8, _VALUES_LOW, _VALUES_HIGH)
    values = words >> (codes.long() & 7) * 8 & 255
    return ((values ^ 128) - 128).float()


def _twice_e2m1(codes: Tensor) -> Tensor:
    """Return twice e2m1 numbers; of the magnitudes, which grow ever faster, the largest of three lines."""
    magnitudes = codes.int() & 7
    values = torch.maximum(torch.maximum(magnitudes, 2 * magnitudes - 4), 4 * magnitudes - 16)
    return torch.where(codes < 8, values, -values).float()


def _q2_k(blocks: Tensor) -> Tensor:
    scales = _half(blocks, 80) * (blocks[:, :16] & 15).float()
    lows = _half(blocks, 82) * (blocks[:, :16] >> 4).float()
    codes = (_shifted(blocks[:, 16:80].unflatten(1, (2, 32)), 2) & 3).reshape(-1, 16, 16)
    return (scales[..., None] * codes.float() - lows[..., None]).flatten(1)


def _q3_k(blocks: Tensor) -> Tensor:
    low = (_shifted(blocks[:, 96:104], 4) & 15).flatten(1)
    high = (_shifted(blocks[:, 104:108], 2) & 3).flatten(1)
    scales = _half(blocks, 108) * ((low | high << 4).float() - 32)
    codes = (_shifted(blocks[:, 32:96].unflatten(1, (2, 32)), 2) & 3).reshape(-1, 16, 16)
    bits = (_shifted(blocks[:, :32], 1) & 1).reshape(-1, 16, 16)
    values = codes.float() - (1 - bits.float()) * 4
    return (scales[..., None] * values).flatten(1)


def _scales_and_lows(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the 8 scales and offsets of Q4_K and Q5_K, (N, 8, 1): 6 bits each, of the last four in two places."""
    one, two, both = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat([one & 63, both & 15 | (one >> 2) & 48], 1).float()
    lows = torch.cat([two & 63, both >> 4 | (two >> 2) & 48], 1).float()
    return (_half(blocks, 0) * scales)[..., None], (_half(blocks, 2) * lows)[..., None]


def _q4_k(blocks: Tensor) -> Tensor:
    scales, lows = _scales_and_lows(blocks)
    codes = (_shifted(blocks[:, 16:].unflatten(1, (4, 32)), 4) & 15).reshape(-1, 8, 32)
    return (scales * codes.float() - lows).flatten(1)


def _q5_k(blocks: Tensor) -> Tensor:
    scales, lows = _scales_and_lows(blocks)
    codes = (_shifted(blocks[:, 48:].unflatten(1, (4, 32)), 4) & 15).reshape(-1, 8, 32)
    codes = codes | (_shifted(blocks[:, 16:48], 1) & 1) << 4
    return (scales * codes.float() - lows).flatten(1)


def _q6_k(blocks: Tensor) -> Tensor:
    scales = _half(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8).float()
    low = (_shifted(blocks[:, :128].unflatten(1, (2, 64)), 4) & 15).reshape(-1, 8, 32)
    high = (_shifted(blocks[:, 128:192].unflatten(1, (2, 32)), 2) & 3).reshape(-1, 8, 32)
    values = (low | high << 4).float() - 32
    return (scales[..., None] * values.reshape(-1, 16, 16)).flatten(1)


def _iq4_xs(blocks: Tensor) -> Tensor:
    low = (blocks[:, 4:8].unsqueeze(-1) >> _steps(4, blocks.device)) & 15
    high = (blocks[:, 2:4].unsqueeze(-1) >> _steps(2, blocks.device)) & 3
    scales = _half(blocks, 0) * ((low.flatten(1) | high.flatten(1) << 4).float() - 32)
    codes = (_shifted(blocks[:, 8:].unflatten(1, (8, 16)), 4) & 15).reshape(-1, 8, 32)
    return (scales[..., None] * _nonlinear(codes)).flatten(1)


DECODERS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "q4_0": _q4_0, "q4_1": _q4_1, "q5_0": _q5_0, "q5_1": _q5_1, "q8_0": _q8_0, "iq4_nl": _iq4_nl, "mxfp4": _mxfp4,
    "q2_k": _q2_k, "q3_k": _q3_k, "q4_k": _q4_k, "q5_k": _q5_k, "q6_k": _q6_k, "iq4_xs": _iq4_xs,
}  # fmt: skip
"""By type, what decodes blocks of it."""
