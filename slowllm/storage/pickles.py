"""Find the tensors of `pytorch_model*.bin` files, without running the code that such files may contain.

Such a file is a zip archive of raw tensors beside a pickle that names them. torch's restricted unpickler
(``weights_only``), which builds nothing but tensors, reads the pickle and notes where in the file each tensor lies;
the weights are not read. Later they are read like those of any shard.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from slowllm.errors import CheckpointError, first_line
from slowllm.storage.checkpoint import Checkpoint, read_weight_map
from slowllm.storage.shard import stamp_of
from slowllm.storage.spans import DTYPE_NAMES, Span

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
    try:
        state = os.stat(path)
        with FakeTensorMode():
            tensors: Any = torch.load(path, map_location="cpu", weights_only=True)
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
        begin = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        if begin is None:
            raise CheckpointError(
                f"{path.name}: was written in the old format of torch.save; save it again with a newer torch"
            )
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
