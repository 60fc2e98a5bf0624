"""Numbers of 8 bits, e4m3, in 7 bits and a little more, bit for bit; only stores have them.

A number's sign and mantissa take four bits, its exponent three, counted from a base that is chosen for every chunk so that the
eight exponents from there cover the most numbers; the others are listed with their places. Weights that are scaled by blocks of
128 x 128 carry 6.5 to 6.7 bits of information in their 8; this keeps half of the difference, and decodes without a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from slowllm.rounding import ceil_div, round_up
from slowllm.storage.codecs.base import TILE_BYTES, Codec, Parts, PartShapes
from slowllm.storage.codecs.fp8 import SCALE_DTYPES, Fp8, decode_rows
from slowllm.storage.codecs.layout_constants import CHUNK
from slowllm.storage.codecs.rounded import Fp8Rounded, decode_fp8_rows
from slowllm.storage.codecs.team import Team

# Numbers that share the words of all arrays.
STEP = 64
# Behind the name of the codec whose numbers are packed.
PACKED = "_packed"


class Fp8Packed(Codec):
    """Another codec's e4m3 numbers, packed; `Coding.group` has the rows and columns of a block, as there.

    Args:
        unpacked: the codec.
    """

    decodes_to_any: ClassVar[bool] = True
    nan_bytes: ClassVar[Mapping[str, tuple[int, ...]]] = Fp8.nan_bytes

    def __init__(self, unpacked: Fp8) -> None:
        self.name = unpacked.name + PACKED  # type: ignore[misc]  # of each object, where other codecs have one of their class
        self._unpacked = unpacked

    def has_parts(self, parts: PartShapes, num_rows: int, width: int, group: tuple[int, ...] = ()) -> bool:
        if len(group) != 2 or min(group) < 1 or "scales" not in parts:
            return False
        dtype = parts["scales"][0]
        chunks, num_escapes = ceil_div(num_rows * width, CHUNK), parts.get("escapes", ("", ()))[1]
        wanted = {
            "scales": (dtype, (ceil_div(num_rows, group[0]), ceil_div(width, group[1]))),
            **known_parts(num_rows * width),
            "starts": ("I64", (chunks + 1,)), "bases": ("U8", (chunks,)), "escapes": ("I16", num_escapes),
        }  # fmt: skip
        return dtype in SCALE_DTYPES and len(num_escapes) == 1 and dict(parts) == wanted

    def decode(self, parts: Parts, out: Tensor, first: int, last: int, team: Team) -> None:
        step = max(1, TILE_BYTES // parts.width)
        for begin in range(first, last, step):
            end = min(begin + step, last)
            low = begin * parts.width // CHUNK
            codes = unpack(parts.arrays, low, ceil_div(end * parts.width, CHUNK), team)
            tile = _tile(parts, codes, low, begin, end)
            self._unpacked.decode(tile, out[begin - first : end - first], 0, end - begin, team)

    def decode_rows(self, parts: Parts, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Return the rows `first` to `last` in a dtype, by operations of torch, on any device."""
        low = first * parts.width // CHUNK
        codes = _unpack_by_torch(parts, low, ceil_div(last * parts.width, CHUNK))
        decode = decode_fp8_rows if isinstance(self._unpacked, Fp8Rounded) else decode_rows
        return decode(_tile(parts, codes, low, first, last), 0, last - first, dtype)

    def example(self) -> Parts:
        arrays = pack(torch.zeros(CHUNK, dtype=torch.uint8))
        starts = torch.zeros(2, dtype=torch.int64)
        del arrays["counts"]
        return Parts({**arrays, "starts": starts, "scales": torch.ones(2, 1)}, 2, CHUNK // 2, (1, CHUNK // 2))


FP8_PACKED = (Fp8Packed(Fp8()), Fp8Packed(Fp8Rounded()))


def _tile(parts: Parts, codes: Tensor, low: int, begin: int, end: int) -> Parts:
    """Return rows whose numbers are unpacked, from chunk `low` on, each row with scales of its own."""
    at = begin * parts.width - low * CHUNK
    rows = torch.arange(begin, end, device=codes.device) // parts.group[0]
    arrays = {
        "codes": codes[at : at + (end - begin) * parts.width].view(-1, parts.width),
        "scales": parts.arrays["scales"][rows],
    }
    return Parts(arrays, end - begin, parts.width, (1, parts.group[1]))


def known_parts(count: int) -> PartShapes:
    """Return the parts of so many numbers whose sizes are known before they are packed."""
    padded = round_up(count, STEP)
    return {"nibbles": ("U8", (padded // 2,)), "twos": ("U8", (padded // 4,)), "ones": ("U8", (padded // 8,))}


def pack(codes: Tensor) -> dict[str, Tensor]:
    """Pack numbers (N,) uint8; the arrays of successive pieces are joined, of which all but the last are whole chunks.

    `counts` has the number of escapes of each chunk, whose sums are the part `starts`.
    """
    bits = codes.numpy()
    bits = np.concatenate([bits, np.zeros(-len(bits) % STEP, np.uint8)])
    chunks = [_pack_chunk(bits[begin : begin + CHUNK]) for begin in range(0, len(bits), CHUNK)]
    return {name: torch.from_numpy(np.concatenate([chunk[name] for chunk in chunks])) for name in chunks[0]}


def starts_of(counts: Tensor) -> Tensor:
    """Return the index of each chunk's first escape, and their number."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])


def _pack_chunk(bits: np.ndarray) -> dict[str, np.ndarray]:
    exponents = (bits >> 3) & 15
    counts = np.bincount(exponents, minlength=16)
    base = int(np.convolve(counts, np.ones(8, np.int64), "valid").argmax())
    places = np.flatnonzero((exponents < base) | (exponents > base + 7))
    codes = exponents - np.uint8(base)
    codes[places] = 0
    # An escape is found from the last one by a step of at most 255: where they are further apart, others stand between.
    steps = np.diff(places, prepend=0)
    more = [
        place - step + 255 * n
        for place, step in zip(places, steps, strict=True)
        for n in range(1, (step - 1) // 255 + 1)
    ]
    places = np.sort(np.concatenate([places, np.array(more, np.int64)]))
    steps = np.diff(places, prepend=0)
    ends = ((bits >> 4) & 8) | (bits & 7)
    e, c = ends.reshape(2, -1), codes.reshape(4, -1)
    eighths = (codes >> 2).reshape(8, -1)
    low = c & 3
    return {
        "nibbles": e[0] | e[1] << 4,
        "twos": low[0] | low[1] << 2 | low[2] << 4 | low[3] << 6,
        "ones": np.bitwise_or.reduce([eighths[n] << n for n in range(8)]),
        "bases": np.array([base], np.uint8),
        "counts": np.array([len(places)], np.int64),
        "escapes": (steps.astype(np.uint16) | bits[places].astype(np.uint16) << 8).view(np.int16),
    }


def unpack(arrays: Mapping[str, Tensor], first: int, last: int, team: Team) -> Tensor:
    """Return the numbers of some chunks, (last - first) x `CHUNK` uint8, whatever stands behind the last number."""
    from slowllm.storage.codecs import fp8_packed_kernels

    nibbles, twos, ones = (arrays[name].numpy().view(np.uint64) for name in ("nibbles", "twos", "ones"))
    more = arrays["bases"].numpy(), arrays["starts"].numpy(), arrays["escapes"].numpy().view(np.uint16)
    out = np.empty((last - first) * CHUNK, np.uint8)
    team.share(
        lambda low, high: fp8_packed_kernels.unpack_chunks(nibbles, twos, ones, *more, out, first, low, high),
        first,
        last,
    )
    return torch.from_numpy(out)


def _unpack_by_torch(parts: Parts, first: int, last: int) -> Tensor:
    """Return the numbers of some chunks, to the end of the matrix at most; nothing waits for the device."""
    arrays = parts.arrays
    begin, end = first * CHUNK, min(last * CHUNK, 8 * len(arrays["ones"]))
    found = []
    for low, size in ((begin, CHUNK), (begin + (end - begin) // CHUNK * CHUNK, (end - begin) % CHUNK)):
        count = (end - begin) // CHUNK if size == CHUNK else 1
        if not count or not size:  # the last chunk of a matrix may be short
            continue
        nibbles, twos, ones = (
            arrays[name][low // share : (low + count * size) // share].view(count, -1)
            for name, share in (("nibbles", 2), ("twos", 4), ("ones", 8))
        )
        bases = arrays["bases"][low // CHUNK : low // CHUNK + count, None] & 15
        ends = torch.cat([nibbles & 15, nibbles >> 4], 1)
        codes = torch.cat([twos >> shift & 3 for shift in (0, 2, 4, 6)], 1)
        codes |= torch.cat([ones >> shift & 1 for shift in range(8)], 1) << 2
        found.append(((ends & 8) << 4 | (codes + bases) << 3 | ends & 7).view(-1))
    unused = end - begin
    bits = torch.cat([*found, bases.new_empty(1)])
    escapes, starts = arrays["escapes"].int(), arrays["starts"]
    if len(escapes):
        # All escapes of the matrix are scattered, because only the device knows which are of these chunks.
        numbers = torch.arange(len(escapes), device=bits.device)
        chunks = torch.bucketize(numbers, starts, right=True) - 1
        sums = torch.cat([starts.new_zeros(1), (escapes & 255).cumsum(0)])
        at = chunks * CHUNK + sums[1:] - sums[starts[chunks].clamp(0, len(escapes))] - begin
        at = torch.where((at >= 0) & (at < unused), at, unused)
        bits[at] = (escapes >> 8 & 255).to(torch.uint8)
    return bits[:-1]
