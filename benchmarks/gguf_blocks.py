"""Code matrices in the types of GGUF that llama.cpp calls Q4_K, Q6_K and Q8_0, by simple rules: the range of each group is covered.

llama.cpp searches for scales that fit a little better; bytes and time are the same.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.heavy_tails import Encode, Pool

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


def _ratio(numerators: Floats, denominators: Floats) -> Floats:
    return np.divide(numerators, denominators, out=np.zeros_like(numerators), where=denominators != 0)


def _halves(numbers: Floats) -> tuple[Floats, Bytes]:
    """Return numbers (blocks,) rounded to float16, (blocks, 1) float32, and their bytes (blocks, 2)."""
    halves = numbers.astype("<f2").reshape(-1, 1)
    return halves.astype(np.float32), halves.view(np.uint8)


def q8_0(weights: Floats) -> Bytes:
    """Code blocks (blocks, 32) in 34 bytes: a scale in float16 and integers of 8 bits."""
    scales, stored = _halves(np.abs(weights).max(1) / 127)
    codes = np.rint(_ratio(weights, np.broadcast_to(scales, weights.shape))).clip(-127, 127).astype(np.int8)
    return np.concatenate([stored, codes.view(np.uint8)], 1)


def q4_k(weights: Floats) -> Bytes:
    """Code blocks (blocks, 256) in 144 bytes: groups of 32 have scales and offsets of 6 bits, weights 4 bits."""
    groups = weights.reshape(-1, 8, 32)
    offsets = -groups.min(2).clip(max=0)
    steps = (groups.max(2).clip(min=0) + offsets) / 15
    step, step_bytes = _halves(steps.max(1) / 63)
    offset, offset_bytes = _halves(offsets.max(1) / 63)
    scales = np.rint(_ratio(steps, np.broadcast_to(step, steps.shape))).clip(0, 63).astype(np.uint8)
    mins = np.rint(_ratio(offsets, np.broadcast_to(offset, offsets.shape))).clip(0, 63).astype(np.uint8)
    shifted = groups + (offset * mins)[..., None]
    codes = np.rint(_ratio(shifted, np.broadcast_to((step * scales)[..., None], shifted.shape)))
    fours = codes.clip(0, 15).astype(np.uint8).reshape(-1, 4, 2, 32)
    packed = [
        scales[:, :4] | (scales[:, 4:] >> 4) << 6,
        mins[:, :4] | (mins[:, 4:] >> 4) << 6,
        (scales[:, 4:] & 15) | (mins[:, 4:] & 15) << 4,
    ]
    pairs = (fours[:, :, 0] | fours[:, :, 1] << 4).reshape(-1, 128)
    return np.concatenate([step_bytes, offset_bytes, *packed, pairs], 1)


def q6_k(weights: Floats) -> Bytes:
    """Code blocks (blocks, 256) in 210 bytes: groups of 16 have scales of 8 bits, weights 6 bits."""
    groups = weights.reshape(-1, 16, 16)
    steps = np.abs(groups).max(2) / 31
    step, step_bytes = _halves(steps.max(1) / 127)
    scales = np.rint(_ratio(steps, np.broadcast_to(step, steps.shape))).clip(0, 127).astype(np.int8)
    codes = np.rint(_ratio(groups, np.broadcast_to((step * scales)[..., None], groups.shape)))
    sixes = (codes.clip(-32, 31) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low, high = sixes & 15, sixes >> 4
    lows = np.stack([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], 2)
    highs = functools.reduce(np.bitwise_or, (high[:, :, n] << 2 * n for n in range(4)))
    return np.concatenate(
        [lows.reshape(-1, 128), highs.reshape(-1, 64), scales.view(np.uint8), step_bytes], 1
    )


# Weights of a block, and what codes blocks, by the types' names.
CODERS = {"q4_k": (256, q4_k), "q6_k": (256, q6_k), "q8_0": (32, q8_0)}


def encode(kind: str) -> Encode:
    """Return what codes a matrix in a type as a pool of one array."""
    size, code = CODERS[kind]

    def coded(matrix: Tensor) -> Pool:
        rows, width = matrix.shape
        blocks = code(matrix.reshape(-1, size).numpy())
        return {"": torch.from_numpy(blocks).view(rows, 1, width // size, -1)}

    return coded
