"""Compare what a store was made of with what `torch.load` gives of the same pickled files.

The conversion reads pickled weights by a reader of its own. The record of each file that it wrote has the hash of every
tensor's source bytes; here the same bytes are taken from torch, tensor by tensor, on memory maps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from slowllm.errors import CheckpointError, StoreError
from slowllm.prepare.encode import PIECE_BYTES, finished, record_path
from slowllm.prepare.tasks import FileTask
from slowllm.storage.pickles import load_mapped
from slowllm.storage.spans import Run


def check_against_torch(tasks: Sequence[FileTask]) -> None:
    """Compare the sources of finished files with `torch.load`; a file that differs counts as not finished.

    Raises:
        StoreError: a tensor's bytes are not those that torch reads.
        CheckpointError: torch cannot map a source.
    """
    mapped: dict[Path, Mapping[str, Tensor]] = {}
    for task in tasks:
        stored = finished(task.path)
        assert stored is not None, "every file of the share is written"
        for tensor in task.tensors:
            name, digest = tensor.placement.name, hashlib.sha256()
            for run in sorted(tensor.placement.runs, key=lambda run: run.target):
                path = run.span.path
                if path not in mapped:
                    mapped[path] = load_mapped(path)
                _add_run(digest, mapped[path], run)
            if digest.hexdigest() != stored.tensors[name].source_sha256:
                record_path(task.path).unlink(missing_ok=True)
                raise StoreError(
                    f"{name}: was read otherwise than torch.load reads it from {run.span.path.name}; the store is not "
                    "finished, and this is a fault of slowllm or of this machine's memory"
                )


def _add_run(digest: hashlib._Hash, tensors: Mapping[str, Tensor], run: Run) -> None:
    tensor = tensors.get(run.span.name)
    if tensor is None or tuple(tensor.shape) != run.span.shape or tensor.dtype != run.span.torch_dtype:
        raise CheckpointError(
            f"{run.span.path.name}: torch.load gives no {run.span.name} of shape {list(run.span.shape)} and dtype "
            f"{run.span.dtype}"
        )
    data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
    for begin in range(run.source, run.source + run.num_bytes, PIECE_BYTES):
        digest.update(data[begin : min(begin + PIECE_BYTES, run.source + run.num_bytes)])
