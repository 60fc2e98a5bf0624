"""Write one file of a store: read its tensors piece by piece, encode them, and read back what was written.

Knows where bytes are and codecs; knows nothing of models, so that a process that does only this starts quickly. Only
a few pieces are in memory at a time. A file gets its name when it is complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from slowllm.errors import StoreError
from slowllm.files import replace_file, replacing_alone, sync
from slowllm.prepare.decoded import coded_pieces, decoded
from slowllm.prepare.pack_fp8 import cut_to_pack, write_packed
from slowllm.prepare.tasks import FileTask, TensorTask
from slowllm.rounding import round_up
from slowllm.storage.codecs.base import StoreCodec
from slowllm.storage.codecs.registry import STORE_CODECS
from slowllm.storage.codecs.team import Team
from slowllm.storage.manifest import KEPT, PADDING, StoredFile, StoredTensor, file_from_json, header_sha256
from slowllm.storage.spans import DTYPE_NAMES, TORCH_DTYPES, Coding, Placement, take_rows
from slowllm.streaming.buffers import PAGE
from slowllm.streaming.reader import Reader
from slowllm.streaming.ring import smallest_ring

# Bytes read, encoded and written at a time; a worker holds about eight times as much.
PIECE_BYTES = 16 << 20
# Escapes of a losslessly coded tensor are kept in memory until its end. Where their bytes exceed this share of the
# tensor's, coding saves nothing, and the tensor is written as it is.
MAX_LOOSE_SHARE = 1 / 8


def record_path(path: Path) -> Path:
    """Return the path of a file's record, which is written when the file is finished."""
    return path.with_name(path.name + ".json")


def finished(path: Path) -> StoredFile | None:
    """Return the record of a file; None where the file is not finished."""
    try:
        record = file_from_json(json.loads(record_path(path).read_text(encoding="utf-8")))
        return record if path.stat().st_size == record.num_bytes else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_file(task: FileTask) -> StoredFile:
    """Write a file and then its record, unless the file is finished already.

    Raises:
        StoreError: another run writes it, the disk is full, or the bytes read back are not those written.
        CheckpointError: the source is damaged.
    """
    done = finished(task.path)
    if done is not None:
        return done
    try:
        with replacing_alone(task.path, StoreError) as file:
            writer = _Writer(file, task)
            writer.write()
            sync(file)
            sha256 = _read_back(file, task.path.name, writer.arrays)
        done = StoredFile(task.path.stat().st_size, sha256, header_sha256(task.path), writer.tensors)
        replace_file(record_path(task.path), json.dumps(dataclasses.asdict(done)))
        return done
    except OSError as error:
        if error.filename is not None and str(task.path.parent) not in str(error.filename):
            raise
        raise StoreError(
            f"{task.path}: {error.strerror or error}; what is finished is kept, and the same command goes on from there"
        ) from error


class _Array:
    """A range of the file that is filled from its beginning to its end, and the checksum of its bytes."""

    def __init__(self, fd: int, begin: int) -> None:
        self._fd, self.begin = fd, begin
        self.num_bytes = self.crc32 = 0

    def append(self, tensor: Tensor) -> None:
        data = _bytes_of(tensor.contiguous())
        self.crc32 = zlib.crc32(data, self.crc32)
        done = 0
        while done < len(data):
            done += os.pwrite(self._fd, data[done:], self.begin + self.num_bytes + done)
        self.num_bytes += len(data)


class _Writer:
    """Lay out one file and fill it. The header comes first but is written last, so space is reserved for it."""

    def __init__(self, file: IO[bytes], task: FileTask) -> None:
        self._fd, self._task = file.fileno(), task
        # An upper bound of the header: an entry for every part and every padding, offsets of up to 15 digits.
        names = sum(len(json.dumps(t.placement.name)) + 24 * len(t.placement.shape) for t in task.tensors)
        names += sum(map(len, map(str, task.metadata)))
        self._data = round_up(4096 + 8 * (names + 256 * len(task.tensors)), PAGE)
        self._at = self._data
        self._header: dict[str, Any] = {"__metadata__": dict(task.metadata)}
        self.arrays: list[_Array] = []
        self.tensors: dict[str, StoredTensor] = {}

    def write(self) -> None:
        pieces: list[list[Placement]] = []
        plans = []
        for tensor in self._task.tensors:
            ways = []
            for cut in (
                list(_cut(tensor)),
                list(cut_to_pack(tensor.placement, PIECE_BYTES) if tensor.packs else ()),
            ):
                ways.append((len(pieces), len(cut)))
                pieces += [[piece] for piece in cut]
            plans.append((tensor, ways))
        if pieces:
            ring = smallest_ring(pieces) + 2 * PIECE_BYTES
            with contextlib.closing(Reader(pieces, ring_bytes=ring, num_threads=4)) as reader:
                for tensor, (plain, to_pack) in plans:
                    if not (tensor.packs and self._packed(tensor, _read(reader, *to_pack))):
                        self._tensor(tensor, functools.partial(_read, reader, *plain))
        os.ftruncate(self._fd, self._at)
        self._write_header()

    def _tensor(self, task: TensorTask, read: Callable[[], Iterator[Tensor]]) -> None:
        placement, source = task.placement, hashlib.sha256()

        def hashed() -> Iterator[Tensor]:
            numbers = _cut(task)
            for piece in read():
                source.update(_bytes_of(piece))
                if task.decodes:
                    dtype = torch.float32 if task.codec and not task.is_exact else torch.bfloat16
                    unit = 1 if task.codec is None else STORE_CODECS[task.codec].unit(placement.shape[-1])
                    yield from decoded(next(numbers), piece, dtype, unit, PIECE_BYTES)
                else:
                    yield piece

        self._align()
        if task.is_kept:
            assert placement.coding is not None, "it is coded"
            data = self._filled(hashed())
            name = self._keep(placement, placement.coding, source.hexdigest())
            self._add(name, "U8", (placement.num_bytes,), data)
            return
        codec, dtype = task.codec, "BF16"
        parts = None if codec is None else self._coded(placement, STORE_CODECS[codec], hashed())
        if parts is None:
            codec, dtype, parts, source = None, DTYPE_NAMES[task.dtype], (), hashlib.sha256()
            self._add(
                placement.name, dtype, placement.shape, self._filled(p.to(task.dtype) for p in hashed())
            )
        self.tensors[placement.name] = StoredTensor(placement.shape, dtype, codec, parts, source.hexdigest())

    def _coded(
        self, placement: Placement, codec: StoreCodec, pieces: Iterator[Tensor]
    ) -> tuple[str, ...] | None:
        """Write a tensor coded, and return the names of its parts; None, to write it uncoded, where that saves nothing."""
        num_rows, width = math.prod(placement.shape[:-1]), placement.shape[-1]
        layout = codec.layout(num_rows, width)
        arrays: dict[str, _Array] = {}
        at = self._at
        for name, (dtype, shape) in layout.items():
            arrays[name] = _Array(self._fd, at)
            at += round_up(math.prod(shape) * TORCH_DTYPES[dtype].itemsize, 64)
        loose: dict[str, list[Tensor]] = {}
        loose_bytes = 0
        for piece in pieces:
            if not (codec.is_exact or bool(piece.isfinite().all())):
                raise StoreError(
                    f"{placement.name}: has NaN or infinities, which {codec.name} cannot hold; the source is damaged"
                )
            encoded = codec.encode(piece, width)
            if codec.is_exact:
                _check_exact(placement.name, codec, piece, encoded)
            for name, tensor in encoded.items():
                if name in layout:
                    arrays[name].append(tensor)
                else:
                    loose.setdefault(name, []).append(tensor)
                    loose_bytes += tensor.nbytes
            if loose_bytes > max(PAGE, MAX_LOOSE_SHARE * placement.decoded_bytes):
                return None
        prefix = f"{placement.name}.{codec.name}."
        for name, (dtype, shape) in layout.items():
            self._align(64)
            self._add(prefix + name, dtype, shape, arrays[name])
        further = codec.finish(loose)
        for name, tensor in further.items():
            self._align(64)
            self._add(prefix + name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), self._filled([tensor]))
        return (*layout, *further)

    def _packed(self, task: TensorTask, pieces: Generator[Tensor, None, None]) -> bool:
        """Write a tensor of e4m3 numbers packed; return False, and nothing is written, where that saves little."""
        self._align()
        source, at = hashlib.sha256(), self._at
        arrays: list[_Array] = []

        def begin(offset: int) -> Callable[[Tensor], None]:
            arrays.append(_Array(self._fd, at + offset))
            return arrays[-1].append

        def hashed() -> Generator[Tensor, None, None]:
            with contextlib.closing(pieces):  # or the reader would hold the last one
                for piece in pieces:
                    source.update(_bytes_of(piece))
                    yield piece

        with contextlib.closing(hashed()) as bytes_read:
            packed = write_packed(task.placement, bytes_read, begin)
        if packed is None:
            return False
        coding, num_bytes = packed
        name = self._keep(task.placement, coding, source.hexdigest())
        self._header[name] = self._entry("U8", (num_bytes,), num_bytes)
        self._at += num_bytes
        self.arrays += arrays
        return True

    def _keep(self, placement: Placement, coding: Coding, sha256: str) -> str:
        """Enter a tensor that stays coded as it is, and return the name of its bytes in the file."""
        self.tensors[placement.name] = StoredTensor(
            placement.shape, DTYPE_NAMES[placement.dtype], coding.codec, (KEPT,), sha256, coding
        )
        return f"{placement.name}.{coding.codec}.{KEPT}"

    def _entry(self, dtype: str, shape: Sequence[int], num_bytes: int) -> dict[str, Any]:
        begin = self._at - self._data
        return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + num_bytes]}

    def _filled(self, pieces: Iterable[Tensor]) -> _Array:
        array = _Array(self._fd, self._at)
        for piece in pieces:
            array.append(piece)
        return array

    def _add(self, name: str, dtype: str, shape: Sequence[int], array: _Array) -> None:
        assert array.begin == self._at, "arrays are written where they were laid out"
        self._header[name] = self._entry(dtype, shape, array.num_bytes)
        self._at += array.num_bytes
        self.arrays.append(array)

    def _align(self, boundary: int = PAGE) -> None:
        if missing := round_up(self._at, boundary) - self._at:
            padding = self._filled([torch.zeros(missing, dtype=torch.uint8)])
            self._add(f"{PADDING}{len(self._header)}", "U8", [missing], padding)

    def _write_header(self) -> None:
        text = json.dumps(self._header, separators=(",", ":")).encode()
        room = self._data - 8
        assert len(text) <= room, "the space reserved for the header is too small"
        header = room.to_bytes(8, "little") + text.ljust(room)
        array = _Array(self._fd, 0)
        array.append(torch.frombuffer(bytearray(header), dtype=torch.uint8))
        self.arrays.append(array)


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")


def _cut(task: TensorTask) -> Iterator[Placement]:
    """Cut a tensor into flat pieces of about `PIECE_BYTES`, each a multiple of its codec's unit.

    One that is to be decoded is cut only where its arrays begin and end.
    """
    placement = task.placement
    if task.decodes:
        yield from coded_pieces(placement)
        return
    count, dtype = math.prod(placement.stored_shape), placement.stored_dtype
    flat = Placement(placement.name, (count,), dtype, placement.runs)
    unit = 1 if task.codec is None else STORE_CODECS[task.codec].unit(placement.shape[-1])
    piece = max(1, PIECE_BYTES // dtype.itemsize // unit) * unit
    for start in range(0, count, piece):
        yield take_rows(flat, placement.name, start, min(start + piece, count))


def _read(reader: Reader, first: int, count: int) -> Generator[Tensor, None, None]:
    for number in range(first, first + count):
        ahead = range(number + 1, min(number + 3, reader.num_stops))
        with reader.visit(number, ahead) as weights:
            (tensor,) = weights.values()
            yield tensor


def _check_exact(name: str, codec: StoreCodec, piece: Tensor, arrays: Mapping[str, Tensor]) -> None:
    """Check that a piece decodes to itself, before anybody relies on it.

    Raises:
        StoreError: it does not, by a fault of the machine or of ours.
    """
    out = torch.empty(1, len(piece), dtype=torch.bfloat16)
    with contextlib.closing(Team(1)) as team:
        codec.decode(codec.join([arrays], 1, len(piece)), out, 0, 1, team)
    if not torch.equal(out[0].view(torch.int16), piece.view(torch.int16)):
        raise StoreError(
            f"{name}: does not decode to what it was made from; this machine's memory may be faulty"
        )


def _read_back(file: IO[bytes], name: str, arrays: Sequence[_Array]) -> str:
    """Hash the file as it lies on the disk, and compare every part with its checksum from before."""
    fd = file.fileno()
    whole = hashlib.sha256()
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    for array in sorted(arrays, key=lambda array: array.begin):
        crc32 = 0  # against what a disk does by mistake; twice as fast as a hash against what somebody does on purpose
        for data in read_pieces(fd, array.begin, array.num_bytes):
            crc32 = zlib.crc32(data, crc32)
            whole.update(data)
        if crc32 != array.crc32:
            raise StoreError(
                f"{name}: the disk gives back other bytes than were written, from byte {array.begin:,} on"
            )
    assert os.fstat(fd).st_size == sum(a.num_bytes for a in arrays), "every byte belongs to one array"
    return whole.hexdigest()


def read_pieces(fd: int, begin: int, num_bytes: int) -> Iterator[bytes]:
    """Yield bytes of an open file, a piece at a time, and drop them from the page cache."""
    at, end = begin, begin + num_bytes
    while at < end:
        data = os.pread(fd, min(PIECE_BYTES, end - at), at)
        if not data:
            return
        yield data
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, at, len(data), os.POSIX_FADV_DONTNEED)
        at += len(data)
