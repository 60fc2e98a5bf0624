"""What is to be written into a store: tensors, each with where it comes from and how it is coded, and files of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from slowllm.storage.codecs.registry import STORE_CODECS
from slowllm.storage.gguf import codec_name
from slowllm.storage.spans import TORCH_DTYPES, Placement


@dataclass(frozen=True)
class TensorTask:
    """A tensor to be written.

    Attributes:
        placement: where its bytes come from.
        codec: name of the codec; None to write it uncoded, or as it is coded already.
        dtype: to write it in where there is no codec.
        decodes: whether a tensor that is coded already is decoded; otherwise its bytes are kept.
        packs: whether e4m3 numbers that are kept are packed without loss, where that gains.
    """

    placement: Placement
    codec: str | None
    dtype: torch.dtype
    decodes: bool = False
    packs: bool = False

    @property
    def is_kept(self) -> bool:
        """Whether the tensor is coded already, and stays so."""
        return self.placement.coding is not None and not self.decodes

    @property
    def is_exact(self) -> bool:
        """Whether what is written has the bits of the source."""
        if self.codec is not None:
            return STORE_CODECS[self.codec].is_exact
        if self.decodes:  # of plain numbers, those of bfloat16 are decoded without being rounded
            coding = self.placement.coding
            return coding is not None and coding.codec == codec_name("bf16")
        return self.is_kept or self.dtype == self.placement.dtype


@dataclass(frozen=True)
class FileTask:
    """A file to be written.

    Attributes:
        path: of the file.
        tensors: of the file, in the order in which they are used.
        metadata: for its header.
    """

    path: Path
    tensors: tuple[TensorTask, ...]
    metadata: tuple[tuple[str, str], ...]

    @property
    def source_bytes(self) -> int:
        """Size of the source's tensors."""
        return sum(task.placement.num_bytes for task in self.tensors)

    @property
    def estimated_bytes(self) -> int:
        """Estimate of the file's size."""
        return sum(_estimate(task) for task in self.tensors)


def _estimate(task: TensorTask) -> int:
    placement = task.placement
    if task.is_kept:
        return placement.num_bytes
    if task.codec is None:
        return math.prod(placement.shape) * task.dtype.itemsize
    layout = STORE_CODECS[task.codec].layout(math.prod(placement.shape[:-1]), placement.shape[-1])
    return sum(math.prod(shape) * TORCH_DTYPES[dtype].itemsize for dtype, shape in layout.values())
