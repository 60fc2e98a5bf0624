"""Pack e4m3 numbers that a store keeps without loss, where that saves bytes, piece by piece."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from slowllm.errors import StoreError
from slowllm.prepare.decoded import coded_pieces
from slowllm.rounding import ceil_div, round_up
from slowllm.storage.codecs.fp8_packed import FP8_PACKED, PACKED, known_parts, pack, starts_of, unpack
from slowllm.storage.codecs.layout_constants import CHUNK
from slowllm.storage.codecs.team import OneThread
from slowllm.storage.spans import DTYPE_NAMES, TORCH_DTYPES, CodedArray, Coding, Placement, Run

# Of the bytes of a tensor; with less, packing is not worth its decoding, and the tensor is kept as it is.
MIN_GAIN = 0.05
_PACKABLE = frozenset(codec.name.removesuffix(PACKED) for codec in FP8_PACKED)

# Given an offset from the tensor's first byte, begins an array there; what it returns writes on.
Begin = Callable[[int], Callable[[Tensor], None]]


def is_packable(coding: Coding) -> bool:
    """Whether a tensor, or each of those that it is put together of, has e4m3 numbers."""
    return coding.codecs - {"stacked"} <= _PACKABLE


def cut_to_pack(placement: Placement, piece_bytes: int) -> Iterator[Placement]:
    """Yield, for each matrix of a tensor, its scales and then its numbers in pieces of whole chunks, as bytes."""
    step = max(1, piece_bytes // CHUNK) * CHUNK
    for own in coded_pieces(placement):
        scales, codes = _arrays_of(own)
        yield _bytes_of_array(own, scales.offset, _num_bytes(scales))
        for begin in range(0, _num_bytes(codes), step):
            yield _bytes_of_array(own, codes.offset + begin, min(step, _num_bytes(codes) - begin))


def write_packed(placement: Placement, pieces: Iterator[Tensor], begin: Begin) -> tuple[Coding, int] | None:
    """Pack a tensor and write it, each array at a multiple of 64 bytes.

    Args:
        placement: of a tensor that `is_packable`.
        pieces: of `cut_to_pack`, read.
        begin: an array of what is written.
    Returns:
        how the tensor is coded then, and its bytes; None where that saves less than `MIN_GAIN` so far: what was written is of no
        use.
    Raises:
        StoreError: what was packed does not come out again, by a fault of this machine.
    """
    writers: list[tuple[Callable[[Tensor], None], int]] = []
    at = 0

    def array(name: str, dtype: str, shape: tuple[int, ...]) -> CodedArray:
        nonlocal at
        found = CodedArray(name, dtype, shape, at)
        writers.append((begin(at), _num_bytes(found)))
        at += round_up(_num_bytes(found), 64)
        return found

    codings = []
    for own in coded_pieces(placement):
        scales, codes = _arrays_of(own)
        parts = [array("scales", scales.dtype, scales.shape)]
        writers[-1][0](next(pieces))
        known = [array(name, *shape) for name, shape in known_parts(_num_bytes(codes)).items()]
        targets = {part.name: write for part, (write, _) in zip(known, writers[-len(known) :], strict=True)}
        loose: dict[str, list[Tensor]] = {"counts": [], "bases": [], "escapes": []}
        done = packed_bytes = 0
        while done < _num_bytes(codes):
            piece = next(pieces)
            done += len(piece)
            for name, packed in _pack_checked(placement.name, piece).items():
                packed_bytes += packed.nbytes
                if name in targets:
                    targets[name](packed)
                else:
                    loose[name].append(packed)
            if packed_bytes > (1 - MIN_GAIN) * done:
                return None
        counts, bases, escapes = (torch.cat(own_pieces) for own_pieces in loose.values())
        parts += known
        for name, values in (("starts", starts_of(counts)), ("bases", bases), ("escapes", escapes)):
            parts.append(array(name, DTYPE_NAMES[values.dtype], tuple(values.shape)))
            writers[-1][0](values)
        assert own.coding is not None, "it is coded"
        codings.append(replace(own.coding, codec=own.coding.codec + PACKED, parts=tuple(parts)))
    for write, num_bytes in writers:
        write(torch.zeros(-num_bytes % 64, dtype=torch.uint8))
    assert placement.coding is not None, "it is coded"
    if not placement.coding.rows:
        return codings[0], at
    rows = zip(placement.coding.rows, codings, strict=True)
    return replace(placement.coding, rows=tuple(replace(one, coding=own) for one, own in rows)), at


def _arrays_of(placement: Placement) -> tuple[CodedArray, CodedArray]:
    assert placement.coding is not None, "it is coded"
    by_name = {part.name: part for part in placement.coding.parts}
    return by_name["scales"], by_name["codes"]


def _num_bytes(array: CodedArray) -> int:
    return math.prod(array.shape) * TORCH_DTYPES[array.dtype].itemsize


def _bytes_of_array(placement: Placement, begin: int, num_bytes: int) -> Placement:
    """Return some bytes of a coded tensor as a placement of their own."""
    runs = []
    for run in placement.runs:
        low, high = max(run.target, begin), min(run.target + run.num_bytes, begin + num_bytes)
        if low < high:
            runs.append(Run(run.span, run.source + low - run.target, low - begin, high - low))
    return Placement(placement.name, (num_bytes,), torch.uint8, tuple(runs))


def _pack_checked(name: str, piece: Tensor) -> dict[str, Tensor]:
    """Pack a piece, and check that it comes out again before anybody relies on it."""
    packed = pack(piece)
    arrays = {**packed, "starts": starts_of(packed["counts"])}
    if not torch.equal(unpack(arrays, 0, ceil_div(len(piece), CHUNK), OneThread())[: len(piece)], piece):
        raise StoreError(
            f"{name}: does not decode to what it was made from; this machine's memory may be faulty"
        )
    return packed
