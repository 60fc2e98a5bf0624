"""Find the tensors of `pytorch_model*.bin` files, without running the code that such files may contain.

Such a file is a zip archive of raw tensors beside a pickle that names them. torch's restricted unpickler
(``weights_only``), which builds nothing but tensors, reads the pickle; where in the file each tensor lies is read from
the zip's headers. Later the weights are read like those of any shard.
"""

from __future__ import annotations

import io
import logging
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, _weights_only_unpickler

from slowllm.errors import CheckpointError, first_line
from slowllm.storage.checkpoint import Checkpoint, read_weight_map
from slowllm.storage.shard import stamp_of
from slowllm.storage.spans import DTYPE_NAMES, Span

log = logging.getLogger(__name__)

INDEX, SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"


def is_pickled(folder: Path) -> bool:
    """Whether a folder has its weights in `pytorch_model*.bin` files."""
    return (folder / INDEX).is_file() or (folder / SINGLE).is_file()


def open_pickled(folder: Path) -> Checkpoint:
    """Open a folder of `pytorch_model*.bin` files, to be converted.

    Raises:
        CheckpointError: a file is missing, holds more than tensors, or tensors that lie elsewhere than in one run.
    """
    weight_map = read_weight_map(folder / INDEX)
    names = [SINGLE] if weight_map is None else sorted(set(weight_map.values()))
    if not names:
        raise CheckpointError(f"{INDEX}: names no files")
    spans: dict[str, Span] = {}
    for name in names:
        if Path(name).name != name or not os.path.isfile(folder / name):
            raise CheckpointError(f"{name}: named by {INDEX} but missing; fetch this file")
        for tensor, span in _read_spans(folder / name).items():
            if tensor in spans:
                raise CheckpointError(f"{tensor} stands in {spans[tensor].path.name} and again in {name}")
            spans[tensor] = span
    for tensor, name in (weight_map or {}).items():
        if tensor not in spans:
            raise CheckpointError(f"{name}: {tensor} is missing, though {INDEX} names it there")
    return Checkpoint(folder, spans)


def _read_spans(path: Path) -> dict[str, Span]:
    state = os.stat(path)
    try:
        tensors, begins = _load(path)
    except CheckpointError:
        raise
    except Exception as error:  # the unpickler refuses something, or the archive is damaged
        raise CheckpointError(f"{path.name}: its tensors cannot be read ({first_line(error)})") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in tensors.items()
    ):
        raise CheckpointError(f"{path.name}: is not a table of tensors by name")
    if not tensors:
        raise CheckpointError(f"{path.name}: holds no tensors")
    spans = {}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided:
            raise CheckpointError(f"{path.name}: {name} is sparse, which cannot be streamed")
        begin = begins[tensor.untyped_storage()._cdata]
        if not tensor.is_contiguous() or tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(
                f"{path.name}: {name} ({tensor.dtype}) does not lie in one run; save the model with save_pretrained()"
            )
        offset = begin + tensor.storage_offset() * tensor.dtype.itemsize
        if offset + tensor.nbytes > state.st_size:
            raise CheckpointError(
                f"{path.name}: {name} ends at byte {offset + tensor.nbytes:,} but the file has {state.st_size:,}; "
                "fetch it again"
            )
        dtype, shape = DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)
        spans[name] = Span(name, path, dtype, shape, offset, tensor.nbytes, stamp_of(state))
    return spans


def _load(path: Path) -> tuple[Any, dict[int, int]]:
    """Return what the pickle of an archive holds, tensors on the meta device, and where each storage begins in the file.

    The bytes' places are those of the zip's own headers: whoever packs an archive anew may align it otherwise than torch.
    """
    with open(path, "rb") as file:
        is_old = file.read(2) != b"PK"
    if is_old:
        raise CheckpointError(
            f"{path.name}: was written in the old format of torch.save; save it again with a newer torch"
        )
    begins: dict[int, int] = {}
    storages: dict[str, torch.storage.TypedStorage] = {}  # by key; a storage may have several tensors
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        records = {name.partition("/")[2]: archive.getinfo(name) for name in archive.namelist()}
        if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
            raise CheckpointError(
                f"{path.name}: was written on a big-endian machine; save it again on a little-endian one"
            )

        def load_storage(saved_id: Any) -> torch.storage.TypedStorage:
            _, kind, key, _, count = saved_id
            dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
            if key not in storages:
                record, num_bytes = records[f"data/{key}"], count * dtype.itemsize
                if record.compress_type != zipfile.ZIP_STORED:
                    raise CheckpointError(
                        f"{path.name}: is compressed, so its tensors cannot be read in place; load it with torch.load "
                        "and save it again with torch.save"
                    )
                if record.file_size < num_bytes:
                    raise ValueError(f"data/{key} has {record.file_size} bytes, not {num_bytes}")
                storage = torch.UntypedStorage(num_bytes, device="meta")
                begins[storage._cdata] = _begin_of(file, record)
                storages[key] = torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)
            return storages[key]

        unpickler = _weights_only_unpickler.Unpickler(io.BytesIO(archive.read(records["data.pkl"])))
        unpickler.persistent_load = load_storage  # type: ignore[method-assign]
        return unpickler.load(), begins


def _begin_of(file: BinaryIO, record: zipfile.ZipInfo) -> int:
    """Return where the bytes of a record begin, behind its local header, whose length the central directory does not say."""
    file.seek(record.header_offset)
    header = file.read(30)
    if header[:4] != b"PK\x03\x04":
        raise ValueError("a local header is damaged")
    name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
    return record.header_offset + 30 + int(name_bytes) + int(extra_bytes)


def load_mapped(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file as torch's own `torch.load` gives them, on a memory map of the file.

    Raises:
        CheckpointError: torch cannot map it.
    """
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever torch may raise on an archive that it does not like
        raise CheckpointError(
            f"{path.name}: torch.load cannot map it ({first_line(error)}), so the store cannot be compared with what torch "
            "reads; load it with torch.load and save it again with torch.save"
        ) from error
    return dict(tensors)


def check_crcs(checkpoint: Checkpoint) -> None:
    """Read the files of a checkpoint from `open_pickled`, and compare every record with its checksum in the archive.

    An archive that torch wrote without checksums has zeros there, which are passed by.

    Raises:
        CheckpointError: a tensor's bytes are not those that were written.
    """
    for path in sorted({span.path for span in checkpoint.spans.values()}):
        log.info("%s: comparing its checksums", path.name)
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            for record in archive.infolist():
                file.seek(_begin_of(file, record))
                crc, left = 0, record.compress_size
                while left and (piece := file.read(min(left, 1 << 22))):
                    crc, left = zlib.crc32(piece, crc), left - len(piece)
                if record.CRC and (left or crc != record.CRC):
                    raise CheckpointError(
                        f"{path.name}: {record.filename} is damaged (its checksum differs); fetch the file again"
                    )
