"""How a matrix of a block may be stored: coded without loss, in 8 bits, or in 4.

Knows matrices and their parts; knows nothing of files or models. A codec says which parts a matrix becomes, encodes
it piece by piece, and decodes any range of rows to bfloat16; one that can multiply without decoding does so. A
matrix is seen as rows: of three dimensions (experts) the first two are one.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from slowllm.errors import StoreError
from slowllm.storage.codecs import layout_constants, torch_kernels
from slowllm.storage.codecs.layout_constants import CHUNK, STEP
from slowllm.storage.spans import TORCH_DTYPES, Coding

log = logging.getLogger(__name__)

# Where a codec decodes before it multiplies, each thread does so in tiles that stay in the processor's cache.
TILE_BYTES = 4 << 20
TILE_COLUMNS = 4096
# Activations this large are multiplied in 16 bit (Dettmers et al., LLM.int8(), 2022, section 3.2).
OUTLIER = 6.0
# From so many rows on, integer products are faster than bf16 products of the same numbers.
MIN_INTEGER_ROWS = 48


class Team:
    """Threads that share a loop over rows, each with a processor to itself. Owned by who makes it; close it.

    Args:
        num_threads: of the team.
    """

    def __init__(self, num_threads: int) -> None:
        self.num_threads = max(1, num_threads)
        self._pool = ThreadPoolExecutor(self.num_threads, thread_name_prefix="slowllm-decode")
        # A product of one of these threads must not wait for torch's threads, which wait for more work on the same
        # processors. The number is the thread's own, but for threads that are still to come: hence the second call.
        before = torch.get_num_threads()
        together = threading.Barrier(self.num_threads)
        for ready in [self._pool.submit(_work_alone, together) for _ in range(self.num_threads)]:
            ready.result()
        torch.set_num_threads(before)

    def share(self, work: Callable[[int, int], object], first: int, last: int) -> None:
        """Call `work` for parts of the range that cover it once, on all threads."""
        parts = min(self.num_threads, max(1, last - first))
        cuts = [first + (last - first) * number // parts for number in range(parts + 1)]
        for one in [self._pool.submit(work, *pair) for pair in itertools.pairwise(cuts)]:
            one.result()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True)


def _work_alone(together: threading.Barrier) -> None:
    torch.get_num_threads()  # a thread's first product would set the number again
    torch.set_num_threads(1)
    together.wait()


@dataclass(frozen=True)
class Parts:
    """The stored arrays of one matrix, in memory.

    Attributes:
        arrays: by the name of the part.
        num_rows: of the matrix.
        width: of a row.
    """

    arrays: Mapping[str, Tensor]
    num_rows: int
    width: int

    @classmethod
    def of(cls, stored: Tensor, coding: Coding, shape: tuple[int, ...]) -> Parts:
        """See the parts in the bytes that hold them; nothing is copied.

        Args:
            stored: (num_bytes,) uint8.
            coding: that says where each part lies.
            shape: of the matrix.
        """
        arrays = {}
        for part in coding.parts:
            dtype = TORCH_DTYPES[part.dtype]
            num_bytes = math.prod(part.shape) * dtype.itemsize
            arrays[part.name] = (
                stored[part.offset : part.offset + num_bytes].view(dtype).view(part.shape)
                if num_bytes
                else torch.empty(part.shape, dtype=dtype, device=stored.device)
            )
        return cls(arrays, math.prod(shape[:-1]), shape[-1])


class Codec(Protocol):
    """One way to store a matrix."""

    name: ClassVar[str]
    is_exact: ClassVar[bool]
    # How often the bytes of the decoded matrix go through memory in a product of a few rows, those of the stored one
    # aside. For plans: decoding is as fast as memory where it is compiled.
    passes: ClassVar[float]

    def unit(self, width: int) -> int:
        """Return the number of weights that pieces given to `encode` must be a multiple of, but for the last."""

    def layout(self, num_rows: int, width: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return the dtype (safetensors' name) and shape of each part whose size is known before; in order."""

    def encode(self, piece: Tensor, width: int) -> dict[str, Tensor]:
        """Encode a flat piece of a matrix; the arrays of successive pieces are joined along their first axis."""

    def finish(self, loose: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
        """Return the further parts, in order, from the arrays of all pieces that `layout` does not name."""

    def has_parts(self, parts: Mapping[str, tuple[str, tuple[int, ...]]], num_rows: int, width: int) -> bool:
        """Whether these are the parts, with dtypes and shapes, of such a matrix: decoding trusts it."""

    def decode(self, parts: Parts, out: Tensor, first: int, last: int, team: Team) -> None:
        """Write the rows `first` to `last` to `out` (last - first, K), bfloat16 and contiguous."""

    def multiply(self, x: Tensor, parts: Parts, first: int, last: int, team: Team) -> Tensor | None:
        """Return `x` (M, K), bfloat16, times the rows `first` to `last`, transposed; None where it is to decode."""


class Lossless:
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
        """See `Codec.unit`."""
        return CHUNK

    def layout(self, num_rows: int, width: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """See `Codec.layout`."""
        padded = -(-num_rows * width // STEP) * STEP
        return {"signs": ("U8", (padded,)), "exponents": ("U8", (padded // 2,))}

    def encode(self, piece: Tensor, width: int) -> dict[str, Tensor]:
        """See `Codec.encode`; of bfloat16, whose bits are kept, whatever they mean."""
        bits = piece.view(torch.int16).numpy().view(np.uint16)
        bits = np.concatenate([bits, np.zeros(-len(bits) % STEP, np.uint16)])
        found: dict[str, list[np.ndarray]] = {
            name: [] for name in ("signs", "exponents", "bases", "counts", "places", "values")
        }
        for begin in range(0, len(bits), CHUNK):
            for name, array in _encode_chunk(bits[begin : begin + CHUNK]).items():
                found[name].append(array)
        return {name: torch.from_numpy(np.concatenate(arrays)) for name, arrays in found.items()}

    def finish(self, loose: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
        """See `Codec.finish`."""
        joined = {name: torch.cat(pieces) for name, pieces in loose.items()}
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), joined.pop("counts").cumsum(0)])
        return {"starts": starts, **{name: joined[name] for name in ("bases", "places", "values")}}

    def has_parts(self, parts: Mapping[str, tuple[str, tuple[int, ...]]], num_rows: int, width: int) -> bool:
        """See `Codec.has_parts`."""
        chunks = -(-num_rows * width // CHUNK)
        num_escapes = parts.get("places", ("", ()))[1]
        wanted = {
            **self.layout(num_rows, width),
            "starts": ("I64", (chunks + 1,)), "bases": ("U8", (chunks,)),
            "places": ("I16", num_escapes), "values": ("I16", num_escapes),
        }  # fmt: skip
        return len(num_escapes) == 1 and dict(parts) == wanted

    def decode(self, parts: Parts, out: Tensor, first: int, last: int, team: Team) -> None:
        """See `Codec.decode`."""
        from slowllm.storage.codecs import cpu_kernels

        arrays = {name: part.numpy() for name, part in parts.arrays.items()}
        begin, end = first * parts.width, last * parts.width
        flat = out.view(-1).view(torch.int16).numpy().view(np.uint16)
        given = (
            arrays["signs"].view(np.uint64), arrays["exponents"].view(np.uint64), arrays["bases"],
            arrays["starts"], arrays["places"].view(np.uint16), arrays["values"].view(np.uint16),
        )  # fmt: skip

        def join(chunk: int, stop: int) -> None:
            """Decode chunks that lie wholly in the range straight to their place, others by way of a buffer."""
            inner, outer = max(chunk, -(-begin // CHUNK)), min(stop, end // CHUNK)
            if (out.data_ptr() - 2 * begin) % 8:  # no place for 64-bit words
                inner = outer = stop
            if inner < outer:
                whole = flat[inner * CHUNK - begin : outer * CHUNK - begin]
                cpu_kernels.join_chunks(*given, whole, inner, inner, outer)
            for edge in (*range(chunk, min(inner, stop)), *range(max(outer, inner, chunk), stop)):
                whole = np.empty(CHUNK, np.uint16)
                cpu_kernels.join_chunks(*given, whole, edge, edge, edge + 1)
                low, high = max(begin, edge * CHUNK), min(end, (edge + 1) * CHUNK)
                flat[low - begin : high - begin] = whole[low - edge * CHUNK : high - edge * CHUNK]

        team.share(join, begin // CHUNK, -(-end // CHUNK))

    def multiply(self, x: Tensor, parts: Parts, first: int, last: int, team: Team) -> Tensor | None:
        """Return None: the product of tiles might round otherwise than that of the whole."""
        return None


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


class Int8:
    """LLM.int8() (Dettmers et al., 2022): a scale for each row of the matrix and for each row of activations.

    Products are of 8-bit integers, summed in 32 bits. An activation of 6 or more is an outlier: it stays in 16 bit and
    is multiplied with the decoded column, so that it does not coarsen its row. Which are outliers is said row by
    row, so that an outlier coarsens no other row.
    """

    name: ClassVar[str] = "int8"
    is_exact: ClassVar[bool] = False
    passes: ClassVar[float] = 0.8

    def unit(self, width: int) -> int:
        """See `Codec.unit`."""
        return width

    def layout(self, num_rows: int, width: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """See `Codec.layout`."""
        return {"codes": ("I8", (num_rows, width)), "scales": ("F32", (num_rows,))}

    def encode(self, piece: Tensor, width: int) -> dict[str, Tensor]:
        """See `Codec.encode`."""
        codes, scales = quantise_rows(piece.view(-1, width))
        return {"codes": codes, "scales": scales}

    def finish(self, loose: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
        """See `Codec.finish`; there are none."""
        return {}

    def has_parts(self, parts: Mapping[str, tuple[str, tuple[int, ...]]], num_rows: int, width: int) -> bool:
        """See `Codec.has_parts`."""
        return dict(parts) == self.layout(num_rows, width)

    def decode(self, parts: Parts, out: Tensor, first: int, last: int, team: Team) -> None:
        """See `Codec.decode`."""
        from slowllm.storage.codecs import cpu_kernels

        codes, scales = (parts.arrays[name][first:last].numpy() for name in ("codes", "scales"))
        bits = _bits(out)
        team.share(lambda low, high: cpu_kernels.int8_rows(codes, scales, bits, low, high), 0, last - first)

    def multiply(self, x: Tensor, parts: Parts, first: int, last: int, team: Team) -> Tensor | None:
        """See `Codec.multiply`."""
        codes, scales = (parts.arrays[name][first:last] for name in ("codes", "scales"))
        is_outlier = x.abs() >= OUTLIER
        columns = is_outlier.any(0).nonzero()[:, 0]
        if len(columns) > parts.width // 8:  # so many that decoding costs less
            return None
        inner = x.masked_fill(is_outlier, 0.0) if len(columns) else x
        small, factors = quantise_rows(inner)
        outer = torch.where(is_outlier[:, columns], x[:, columns], 0.0).float()
        found = x.new_empty(len(x), last - first)

        def finish(tile: slice, sums: Tensor) -> None:
            y = sums.mul_(factors[:, None]).mul_(scales[tile])
            if len(columns):
                y += outer @ (codes[tile, columns].float() * scales[tile, None]).T
            found[:, tile] = y

        if x.device.type != "cpu":
            finish(slice(0, last - first), torch_kernels.int8_product(small, codes))
        elif len(x) >= MIN_INTEGER_ROWS and _has_integer_products():
            # In tiles, so that the sums of 32 bits stay near the processor until they are scaled.
            for begin in range(0, last - first, TILE_COLUMNS):
                tile = slice(begin, min(begin + TILE_COLUMNS, last - first))
                finish(tile, torch._int_mm(small, codes[tile].T).float())
        else:
            _multiply_tiles(small.to(x.dtype), codes, finish, team)
        return found


def _multiply_tiles(x: Tensor, codes: Tensor, finish: Callable[[slice, Tensor], None], team: Team) -> None:
    """Multiply a few rows of integers with a matrix (R, K) of them, in the dtype of `x`, which holds both exactly.

    Only the sums are rounded to it, as the result will be.
    """
    from slowllm.storage.codecs import cpu_kernels

    def work(low: int, high: int) -> None:
        for tile, buffer in _tiles(low, high, codes.shape[1], x.dtype):
            if x.dtype == torch.bfloat16:  # torch's own cast is ten times slower on some processors
                cpu_kernels.int8_codes(codes[tile].numpy(), _bits(buffer))
            else:
                buffer.copy_(codes[tile])
            finish(tile, F.linear(x, buffer).float())

    team.share(work, 0, len(codes))


def _tiles(low: int, high: int, width: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield ranges of rows, each with room for it that stays in the cache."""
    rows = max(1, TILE_BYTES // (dtype.itemsize * width))
    room = torch.empty(min(rows, high - low), width, dtype=dtype)
    for begin in range(low, high, rows):
        end = min(begin + rows, high)
        yield slice(begin, end), room[: end - begin]


def quantise_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes (R, K) of a matrix, and the float32 scale (R,) of each row: its largest number over 127."""
    values = rows.float()
    scales = values.abs().amax(1) / 127
    codes = (values / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round_().clamp_(-127, 127)
    return codes.to(torch.int8), scales


def _has_integer_products() -> bool:
    """Whether this processor multiplies int8 faster than bf16."""
    return bool(torch.cpu._is_vnni_supported())


class Int4:
    """Four bits a weight, with a scale and a lowest value in bfloat16 for every 64 weights of a row.

    The range of a group is shrunk a little where that lowers its squared error.
    """

    name: ClassVar[str] = "int4"
    is_exact: ClassVar[bool] = False
    passes: ClassVar[float] = 0.8
    group: ClassVar[int] = 64
    shrinks: ClassVar[tuple[float, ...]] = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)

    def unit(self, width: int) -> int:
        """See `Codec.unit`."""
        return width

    def layout(self, num_rows: int, width: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """See `Codec.layout`."""
        groups = -(-width // self.group)
        return {
            "codes": ("U8", (num_rows, groups * self.group // 2)),
            "scales": ("BF16", (num_rows, groups)),
            "lows": ("BF16", (num_rows, groups)),
        }

    def encode(self, piece: Tensor, width: int) -> dict[str, Tensor]:
        """See `Codec.encode`."""
        groups = -(-width // self.group)
        values = piece.view(-1, width).float()
        # A last group that is not full is filled with its own last weight, which does not widen its range.
        missing = groups * self.group - width
        values = torch.cat([values, values[:, -1:].expand(-1, missing)], 1).view(-1, groups, self.group)
        if layout_constants.IS_COMPILED:
            return self._encode_compiled(values)
        low, high = values.aminmax(dim=-1)
        middle, half = (low + high) / 2, (high - low) / 2
        best = torch.full_like(low, math.inf)
        scales, lows = torch.zeros_like(low), torch.zeros_like(low)
        for shrink in self.shrinks:
            step = (2 * shrink * half / 15).bfloat16().float()
            start = (middle - shrink * half).bfloat16().float()
            error = (self._codes(values, step, start) * step[..., None] + start[..., None] - values).square_()
            total = error.sum(-1)
            is_better = total < best
            best = torch.where(is_better, total, best)
            scales, lows = torch.where(is_better, step, scales), torch.where(is_better, start, lows)
        codes = self._codes(values, scales, lows).to(torch.uint8)
        half_group = self.group // 2
        packed = codes[..., :half_group] | codes[..., half_group:] << 4
        return {"codes": packed.flatten(1), "scales": scales.bfloat16(), "lows": lows.bfloat16()}

    def _encode_compiled(self, values: Tensor) -> dict[str, Tensor]:
        from slowllm.storage.codecs import cpu_kernels

        num_rows, groups, _ = values.shape
        packed = torch.zeros(num_rows, groups * self.group // 2, dtype=torch.uint8)
        scales, lows = torch.zeros(num_rows, groups), torch.zeros(num_rows, groups)
        cpu_kernels.int4_encode(
            values.view(num_rows, -1).numpy(), np.array(self.shrinks, np.float32), packed.numpy(), scales.numpy(),
            lows.numpy(), 0, num_rows,
        )  # fmt: skip
        return {"codes": packed, "scales": scales.bfloat16(), "lows": lows.bfloat16()}

    @staticmethod
    def _codes(values: Tensor, scales: Tensor, lows: Tensor) -> Tensor:
        tiny = torch.finfo(torch.float32).tiny
        return ((values - lows[..., None]) / scales.clamp(min=tiny)[..., None]).round_().clamp_(0, 15)

    def finish(self, loose: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
        """See `Codec.finish`; there are none."""
        return {}

    def has_parts(self, parts: Mapping[str, tuple[str, tuple[int, ...]]], num_rows: int, width: int) -> bool:
        """See `Codec.has_parts`."""
        return dict(parts) == self.layout(num_rows, width)

    def decode(self, parts: Parts, out: Tensor, first: int, last: int, team: Team) -> None:
        """See `Codec.decode`."""

        def work(low: int, high: int) -> None:
            self._decode_rows(parts, out[low - first : high - first], low, high)

        team.share(work, first, last)

    def multiply(self, x: Tensor, parts: Parts, first: int, last: int, team: Team) -> Tensor | None:
        """See `Codec.multiply`: few rows with tiles that are decoded in the cache."""
        if x.device.type != "cpu" or x.dtype != torch.bfloat16 or len(x) >= MIN_INTEGER_ROWS:
            return None
        found = x.new_empty(len(x), last - first)

        def work(low: int, high: int) -> None:
            for tile, buffer in _tiles(low, high, parts.width, x.dtype):
                self._decode_rows(parts, buffer, tile.start, tile.stop)
                found[:, tile.start - first : tile.stop - first] = F.linear(x, buffer)

        team.share(work, first, last)
        return found

    def _decode_rows(self, parts: Parts, out: Tensor, first: int, last: int) -> None:
        from slowllm.storage.codecs import cpu_kernels

        codes = parts.arrays["codes"][first:last].numpy()
        scales, lows = (parts.arrays[name][first:last].float().numpy() for name in ("scales", "lows"))
        cpu_kernels.int4_rows(codes, scales, lows, _bits(out), 0, last - first)


def _bits(out: Tensor) -> np.ndarray:
    bits: np.ndarray = out.view(torch.int16).numpy().view(np.uint16)
    return bits


CODECS: Mapping[str, Codec] = {codec.name: codec for codec in (Lossless(), Int8(), Int4())}


def codec_of(coding: Coding) -> Codec:
    """Return the codec of a stored matrix, which `check_coding` has seen."""
    return CODECS[coding.codec]


def warm_up(names: Iterable[str]) -> None:
    """Load the loops of some codecs, or have them compiled, before memory is counted and time is taken."""
    team = Team(1)
    try:
        for name in sorted(set(names)):
            codec, matrix = CODECS[name], torch.ones(2, CHUNK // 2, dtype=torch.bfloat16)
            found = codec.encode(matrix.view(-1), CHUNK // 2)
            named = {key: found[key] for key in codec.layout(2, CHUNK // 2)}
            loose = {key: [array] for key, array in found.items() if key not in named}
            parts = Parts({**named, **codec.finish(loose)}, 2, CHUNK // 2)
            codec.decode(parts, matrix, 0, 2, team)
    finally:
        team.close()


def check_coding(name: str, coding: Coding, shape: tuple[int, ...]) -> None:
    """See that a coded matrix has the parts that its codec will look for.

    Raises:
        StoreError: it has others.
    """
    if coding.codec not in CODECS:
        raise StoreError(f"{name}: its codec {coding.codec!r} is unknown; a newer slowllm may know it")
    parts = {part.name: (part.dtype, part.shape) for part in coding.parts}
    # Loops over 64-bit words begin at the parts.
    aligned = all(part.offset % 8 == 0 for part in coding.parts)
    if (
        len(shape) < 2
        or not aligned
        or not CODECS[coding.codec].has_parts(parts, math.prod(shape[:-1]), shape[-1])
    ):
        raise StoreError(
            f"{name}: its parts do not make a matrix of shape {list(shape)}; delete the store and convert the model again"
        )
