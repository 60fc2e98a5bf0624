"""Describe tensors before they are read: where their bytes lie, and how they are coded. Opens no file."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from slowllm.errors import CheckpointError

# Bits, not bytes: the format has sub-byte dtypes, which are valid in a header even if we cannot compute with them.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

# Of the tensors that are computed with.
TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

# Of 8 bits, or of pairs of 4, in a codec's care, which reads bytes as numbers of its own.
BYTES = {"U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4"}

# Identifies one state of a file: device, inode, size, and time of the last change.
Stamp = tuple[int, int, int, int]

# Of memory that torch allocates.
ALIGNMENT = 64


@dataclass(frozen=True)
class CodedArray:
    """One of the arrays that a coded tensor is stored as.

    Attributes:
        name: such as ``scales``.
        dtype: safetensors' name of the dtype.
        shape: of the array.
        offset: of its first byte, from the first byte of the coded tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Coding:
    """How a tensor is coded.

    Attributes:
        codec: name of the codec, see `slowllm.storage.codecs`.
        parts: the arrays that the tensor is stored as.
        group: how many rows and columns share a scale, where the arrays' shapes do not say so.
        rows: of a tensor that is put together of several coded ones, their rows; it has no parts of its own.
        is_transposed: whether the matrices of the tensor are coded transposed.
        offset: a number that the codec needs and that no array has.
    """

    codec: str
    parts: tuple[CodedArray, ...]
    group: tuple[int, ...] = ()
    rows: tuple[CodedRows, ...] = ()
    is_transposed: bool = False
    offset: float = 0.0

    @property
    def arrays(self) -> tuple[CodedArray, ...]:
        """The arrays of all its parts."""
        return self.parts + tuple(array for rows in self.rows for array in rows.coding.arrays)

    @property
    def codecs(self) -> frozenset[str]:
        """The names of its codec and of those of its rows."""
        return frozenset((self.codec, *(rows.coding.codec for rows in self.rows)))


@dataclass(frozen=True)
class CodedRows:
    """Rows of a matrix that are coded by themselves.

    Attributes:
        first: number of the first row.
        num_rows: of them.
        coding: of these rows; its offsets count from the first byte of the whole.
    """

    first: int
    num_rows: int
    coding: Coding


@dataclass(frozen=True)
class Span:
    """The bytes of one tensor.

    Attributes:
        name: the tensor's name in the file.
        path: the shard that holds it.
        dtype: safetensors' name of the dtype, such as ``BF16``.
        shape: as in the header.
        offset: of the first byte, from the start of the file.
        num_bytes: length.
        stamp: of the shard when its header was read; None where none was read.
        coding: of a coded tensor, whose dtype and shape are then those after decoding.
        in_store: whether it is of a store, where each tensor is a parameter of the model, under the name that it has there.
    """

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
    stamp: Stamp | None = field(default=None, repr=False)
    coding: Coding | None = None
    in_store: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype of the stored elements.

        Raises:
            CheckpointError: torch on the CPU has no such dtype.
        """
        if self.dtype not in TORCH_DTYPES:
            raise CheckpointError(
                f"{self.path.name}: {self.name} is stored as {self.dtype}, which cannot be computed with; "
                "use a checkpoint in bfloat16, float16 or float32"
            )
        return TORCH_DTYPES[self.dtype]


@dataclass(frozen=True)
class Run:
    """Bytes that lie together in a file and together in a parameter.

    Attributes:
        span: the tensor on disk.
        source: first byte, from the start of the span.
        target: first byte, from the start of the parameter's storage.
        num_bytes: length.
    """

    span: Span
    source: int
    target: int
    num_bytes: int

    @property
    def end(self) -> int:
        """The byte of the file after the last."""
        return self.span.offset + self.source + self.num_bytes


@dataclass(frozen=True)
class Placement:
    """Where the bytes of one parameter or buffer come from; the runs cover it exactly once.

    Attributes:
        name: of the parameter, as in `named_parameters`.
        shape: of the parameter.
        dtype: as stored, or after decoding.
        runs: in order of `target`.
        coding: of a coded parameter.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    runs: tuple[Run, ...]
    coding: Coding | None = None

    @property
    def decoded_bytes(self) -> int:
        """Bytes of the decoded parameter."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of the parameter as stored."""
        return self.decoded_bytes if self.coding is None else sum(run.num_bytes for run in self.runs)

    @property
    def needs_alignment(self) -> bool:
        """Whether the rounding of products with it depends on its address modulo `ALIGNMENT`.

        Experts in float32, by MKL's products of a few rows; resident ones begin on a cache line.
        """
        return len(self.shape) == 3 and self.dtype == torch.float32 and self.coding is None

    @property
    def unit(self) -> int:
        """The number of bytes of which the address of its first byte must be a multiple."""
        if self.needs_alignment:
            return ALIGNMENT
        if self.coding is None:
            return self.dtype.itemsize
        # Its arrays are views of other dtypes than that of the whole.
        return max((TORCH_DTYPES[array.dtype].itemsize for array in self.coding.arrays), default=1)

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of the tensor that holds the stored bytes: uint8 where they are coded."""
        return self.dtype if self.coding is None else torch.uint8

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the tensor that holds the stored bytes."""
        return self.shape if self.coding is None else (self.num_bytes,)


def take_rows(placement: Placement, name: str, start: int, stop: int) -> Placement:
    """Return the placement of the rows `start` to `stop` of a parameter.

    A coded one has to be coded row by row, in one array.
    """
    row_bytes = placement.num_bytes // placement.shape[0]
    low, high = start * row_bytes, stop * row_bytes
    runs = []
    for run in placement.runs:
        begin, end = max(run.target, low), min(run.target + run.num_bytes, high)
        if begin < end:
            runs.append(Run(run.span, run.source + begin - run.target, begin - low, end - begin))
    coding = placement.coding
    if coding is not None:
        assert is_coded_by_rows(placement), "asked before"
        (array,) = coding.parts
        coding = replace(coding, parts=(replace(array, shape=(stop - start, *array.shape[1:])),))
    return Placement(name, (stop - start, *placement.shape[1:]), placement.dtype, tuple(runs), coding)


def is_coded_by_rows(placement: Placement) -> bool:
    """Whether each row of a coded parameter is a row of its only array, at the same place."""
    coding = placement.coding
    return (
        coding is not None
        and len(coding.parts) == 1
        and not (coding.rows or coding.group or coding.is_transposed)
        and len(placement.shape) == 2
        and coding.parts[0].shape[0] == placement.shape[0]
    )
