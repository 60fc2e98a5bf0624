"""Which files does a store have, and which tensors are coded in them?

Knows models by their parts; reads no weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from slowllm.errors import StoreError
from slowllm.modeling.layout import Layout, in_order_of_use, lay_out
from slowllm.modeling.linear_maps import linear_maps
from slowllm.prepare.decoded import is_quantised
from slowllm.prepare.pack_fp8 import is_packable
from slowllm.prepare.tasks import FileTask, TensorTask
from slowllm.storage.gguf import codec_name
from slowllm.storage.spans import Coding, Placement

# Smaller matrices gain nothing that can be noticed.
MIN_WEIGHTS = 4096
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def plan_files(
    model: PreTrainedModel,
    placements: Mapping[str, Placement],
    out: Path,
    store: str,
    job: Mapping[str, Any],
    *,
    requantise: bool = False,
) -> list[FileTask]:
    """Return the files of a store: one for all outside the blocks, one a block in order of use, and the head's.

    Args:
        model: a skeleton.
        placements: of its parameters.
        out: folder of the store.
        store: its kind.
        job: what the conversion is known by.
        requantise: whether matrices that are quantised already are decoded and coded as the store has it.
    """
    blocks = lay_out(model, placements)
    order = {name: number for number, name in enumerate(in_order_of_use(model, placements))}
    coded = _coded_names(model, placements, blocks, _FLOATS if store != "lossless" else (torch.bfloat16,))
    codec = None if store == "bf16" else store
    in_blocks = {p.name for stop in blocks.stops[: len(blocks.blocks)] for p in stop}

    def task(name: str) -> TensorTask:
        placement = placements[name]
        if placement.coding is not None:
            return coded_task(name, placement, placement.coding)
        cast = store == "bf16" and placement.dtype in _FLOATS
        return TensorTask(
            placement, codec if name in coded else None, torch.bfloat16 if cast else placement.dtype
        )

    def coded_task(name: str, placement: Placement, coding: Coding) -> TensorTask:
        decodes = name in coded and (requantise or not is_quantised(coding))
        if store == "lossless":  # no other plain numbers are in bfloat16
            decodes = name in coded and coding.codec == codec_name("bf16")
        packs = store == "lossless" and not decodes and is_packable(coding)
        return TensorTask(placement, codec if decodes else None, placement.dtype, decodes, packs)

    def file(name: str, tensors: Sequence[str]) -> FileTask:
        # The hash makes the header differ from that of another model of the same shape.
        metadata = (
            ("format", "pt"),
            ("slowllm_store", str(job["store"])),
            ("source", str(job["source_hash"])),
        )
        return FileTask(out / name, tuple(map(task, tensors)), metadata)

    head_name = blocks.chunks[0].name.rpartition("[")[0]
    has_head = blocks.embedding_placement is None or head_name != blocks.embedding_placement.name
    outside = [name for name in placements if name not in in_blocks and not (has_head and name == head_name)]
    files = [file("outside.safetensors", outside)]
    for number, stop in enumerate(blocks.stops[: len(blocks.blocks)]):
        names = sorted((p.name for p in stop), key=lambda name: order.get(name, len(order)))
        files.append(file(f"block-{number:05d}.safetensors", names))
    if has_head:
        files.append(file("head.safetensors", [head_name]))
    return files


def _coded_names(
    model: PreTrainedModel,
    placements: Mapping[str, Placement],
    layout: Layout,
    dtypes: Sequence[torch.dtype],
) -> frozenset[str]:
    """Return the parameters that are coded: the linear maps of blocks and fused experts, but no routers."""
    coded = set()
    for name, parameter in linear_maps(model, layout.blocks_name, layout.blocks):
        placement = placements.get(name)
        if placement is not None and placement.dtype in dtypes and parameter.numel() >= MIN_WEIGHTS:
            coded.add(name)
    return frozenset(coded)


def refuse_other_dtypes(placements: Mapping[str, Placement]) -> None:
    """Check that a checkpoint is in bfloat16, as the lossless codec needs it.

    One that is quantised already is kept as it is, whatever its other tensors are.

    Raises:
        StoreError: its largest tensor has another dtype.
    """
    if any(p.coding is not None and is_quantised(p.coding) for p in placements.values()):
        return
    largest = max(placements.values(), key=lambda placement: placement.num_bytes)
    if largest.dtype != torch.bfloat16:
        name = str(largest.dtype).removeprefix("torch.")
        raise StoreError(
            f"{largest.name}: is {name}, but the lossless store is for bfloat16; use --store bf16, int8 or int4"
        )
