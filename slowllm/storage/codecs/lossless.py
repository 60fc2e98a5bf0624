"""Lossless bf16 in 12 bits: sign and mantissa in a byte, four bits of exponent, escapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from slowllm.rounding import ceil_div, round_up
from slowllm.storage.codecs.base import Parts, PartShapes, StoreCodec
from slowllm.storage.codecs.layout_constants import CHUNK, STEP
from slowllm.storage.codecs.team import Team


class Lossless(StoreCodec):
    """bfloat16 in 12 bits and a little more, bit for bit.

    A weight's sign and mantissa take a byte. Its exponent takes four bits, counted from a base that is chosen for
    every chunk so that the 16 exponents from there cover the most weights; the others are kept whole, with their
    places ("escapes"). Exponents of trained weights carry about 2.6 bits of information (as DFloat11 measured too,
    Zhang et al., 2025); four bits waste some of it and decode at memory's speed.
    """

    name: ClassVar[str] = "lossless"
    is_exact: ClassVar[bool] = True
    passes: ClassVar[float] = 2.0

    def unit(self, width: int) -> int:
        return CHUNK

    def layout(self, num_rows: int, width: int) -> PartShapes:
        padded = round_up(num_rows * width, STEP)
        return {"signs": ("U8", (padded,)), "exponents": ("U8", (padded // 2,))}

    def encode(self, piece: Tensor, width: int) -> dict[str, Tensor]:
        bits = piece.view(torch.int16).numpy().view(np.uint16)
        bits = np.concatenate([bits, np.zeros(-len(bits) % STEP, np.uint16)])
        chunks = [_encode_chunk(bits[begin : begin + CHUNK]) for begin in range(0, len(bits), CHUNK)]
        return {
            name: torch.from_numpy(np.concatenate([chunk[name] for chunk in chunks])) for name in chunks[0]
        }

    def finish(self, loose: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
        joined = {name: torch.cat(pieces) for name, pieces in loose.items()}
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), joined.pop("counts").cumsum(0)])
        return {"starts": starts, **{name: joined[name] for name in ("bases", "places", "values")}}

    def has_parts(self, parts: PartShapes, num_rows: int, width: int, group: tuple[int, ...] = ()) -> bool:
        chunks = ceil_div(num_rows * width, CHUNK)
        num_escapes = parts.get("places", ("", ()))[1]
        wanted = {
            **self.layout(num_rows, width),
            "starts": ("I64", (chunks + 1,)), "bases": ("U8", (chunks,)),
            "places": ("I16", num_escapes), "values": ("I16", num_escapes),
        }  # fmt: skip
        return len(num_escapes) == 1 and dict(parts) == wanted

    def decode(self, parts: Parts, out: Tensor, first: int, last: int, team: Team) -> None:
        from slowllm.storage.codecs import cpu_kernels

        arrays = {name: part.numpy() for name, part in parts.arrays.items()}
        begin, end = first * parts.width, last * parts.width
        flat = out.view(-1).view(torch.int16).numpy().view(np.uint16)
        stored = (
            arrays["signs"].view(np.uint64), arrays["exponents"].view(np.uint64), arrays["bases"],
            arrays["starts"], arrays["places"].view(np.uint16), arrays["values"].view(np.uint16),
        )  # fmt: skip

        def join(chunk: int, stop: int) -> None:
            """Decode chunks that lie wholly in the range straight into `out`, others by way of a buffer."""
            inner, outer = max(chunk, ceil_div(begin, CHUNK)), min(stop, end // CHUNK)
            if (out.data_ptr() - 2 * begin) % 8:  # not aligned for 64-bit words
                inner = outer = stop
            if inner < outer:
                whole = flat[inner * CHUNK - begin : outer * CHUNK - begin]
                cpu_kernels.join_chunks(*stored, whole, inner, inner, outer)
            for edge in (*range(chunk, min(inner, stop)), *range(max(outer, inner, chunk), stop)):
                whole = np.empty(CHUNK, np.uint16)
                cpu_kernels.join_chunks(*stored, whole, edge, edge, edge + 1)
                low, high = max(begin, edge * CHUNK), min(end, (edge + 1) * CHUNK)
                flat[low - begin : high - begin] = whole[low - edge * CHUNK : high - edge * CHUNK]

        team.share(join, begin // CHUNK, ceil_div(end, CHUNK))


def _encode_chunk(bits: np.ndarray) -> dict[str, np.ndarray]:
    exponents = (bits >> 7) & 0xFF
    counts = np.bincount(exponents, minlength=256)
    base = int(np.convolve(counts, np.ones(16, np.int64), "valid").argmax())
    escapes = np.flatnonzero((exponents < base) | (exponents > base + 15))
    codes = exponents - np.uint16(base)
    codes[escapes] = 0
    signs = ((bits >> 8) & 0x80) | (bits & 0x7F)
    s, c = signs.reshape(4, -1), codes.reshape(4, -1)
    return {
        "signs": np.concatenate([s[0] | s[1] << 8, s[2] | s[3] << 8]).view(np.uint8),
        "exponents": (c[0] | c[1] << 4 | c[2] << 8 | c[3] << 12).view(np.uint8),
        "bases": np.array([base], np.uint8),
        "counts": np.array([len(escapes)], np.int64),
        "places": escapes.astype(np.uint16).view(np.int16),
        "values": bits[escapes].view(np.int16),
    }
