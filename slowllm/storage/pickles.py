"""Where the tensors of `pytorch_model*.bin` files lie, without running what is in them.

Such a file is a zip archive of raw tensors beside a pickle that names them. The pickle is read by torch's restricted
unpickler (``weights_only``), which builds tensors and nothing else, and no weight is touched: torch only notes where
in the file each one is. They are then read like those of any shard.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from slowllm.errors import CheckpointError
from slowllm.storage.checkpoint import Checkpoint, read_json
from slowllm.storage.spans import TORCH_DTYPES, Span

INDEX, SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def is_pickled(folder: Path) -> bool:
    """Whether a folder has its weights in `pytorch_model*.bin` files."""
    return (folder / INDEX).is_file() or (folder / SINGLE).is_file()


def open_pickled(folder: Path) -> Checkpoint:
    """Open a folder of `pytorch_model*.bin` files, to be converted.

    Raises:
        CheckpointError: a file is missing, holds more than tensors, or tensors that lie elsewhere than in one run.
    """
    weight_map: Mapping[str, str] | None = None
    names = [SINGLE]
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(f"{INDEX}: has no weight_map of tensor names to file names")
        names = sorted(set(weight_map.values()))
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
            found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the unpickler refuses, or a damaged archive gives
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise CheckpointError(f"{path.name}: its tensors cannot be read ({reason})") from error
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()
    ):
        raise CheckpointError(f"{path.name}: is not a table of tensors by name")
    if not found:
        raise CheckpointError(f"{path.name}: holds no tensors")
    stamp = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
    spans = {}
    for name, tensor in found.items():
        if tensor.layout != torch.strided:
            raise CheckpointError(f"{path.name}: {name} is sparse, which cannot be streamed")
        begin = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        if begin is None:
            raise CheckpointError(
                f"{path.name}: was written in the old format of torch.save; save it again with a newer torch"
            )
        if not tensor.is_contiguous() or tensor.dtype not in _NAMES:
            raise CheckpointError(
                f"{path.name}: {name} ({tensor.dtype}) does not lie in one run; save the model with save_pretrained()"
            )
        offset = begin + tensor.storage_offset() * tensor.dtype.itemsize
        num_bytes = tensor.numel() * tensor.dtype.itemsize
        if offset + num_bytes > state.st_size:
            raise CheckpointError(
                f"{path.name}: {name} ends at byte {offset + num_bytes:,} but the file has {state.st_size:,}; "
                "fetch it again"
            )
        spans[name] = Span(name, path, _NAMES[tensor.dtype], tuple(tensor.shape), offset, num_bytes, stamp)
    return spans
