"""Fill a model's skeleton with what always stays in memory: small tensors, and the maps of the embedding and the head.

Knows transformers' models by their parts, and checkpoints; knows nothing of stops.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slowllm.errors import ArchitectureError
from slowllm.modeling.embedding import stream_embedding
from slowllm.modeling.head import RowReader
from slowllm.modeling.layout import Layout
from slowllm.modeling.parts import block_of
from slowllm.storage.checkpoint import Checkpoint
from slowllm.storage.codecs.team import OneThread
from slowllm.storage.spans import Placement, is_coded_by_rows
from slowllm.streaming.cast_stops import coded_matrix, coded_weight
from slowllm.streaming.reader import Reader


def head_rows(checkpoint: Checkpoint, chunks: Sequence[Placement]) -> RowReader | None:
    """Return a function that reads single rows of the head from its memory map; None where there is no such map."""
    maps = [checkpoint.mapped(chunk) for chunk in chunks]
    rows_per_chunk = max(chunk.shape[0] for chunk in chunks)  # the last chunk may have fewer

    def read_rows(ids: Tensor) -> Tensor:
        rows = []
        for token in ids.tolist():
            chunk, row = divmod(token, rows_per_chunk)
            checkpoint.check_length(chunks[chunk])
            matrix = maps[chunk]
            assert matrix is not None, "checked below"
            if chunks[chunk].coding is not None:
                coded = coded_matrix(chunks[chunk], matrix, OneThread())
                picked = coded.pick(torch.tensor([row]), torch.float32)
                assert picked is not None, "checked below"
                rows.append(picked[0])
                continue
            rows.append(matrix[row])
        return torch.stack(rows)

    can_pick = all(chunk.coding is None or is_coded_by_rows(chunk) for chunk in chunks)
    return read_rows if can_pick and all(matrix is not None for matrix in maps) else None


def fill(
    model: PreTrainedModel,
    layout: Layout,
    checkpoint: Checkpoint,
    compute_dtype: torch.dtype,
    device: torch.device | None = None,
) -> None:
    """Read the tensors that always stay, map the embedding, and put both into the model.

    Args:
        model, layout: to fill. What the layout's part lacks has been left out (`absent_parts`).
        checkpoint: to read.
        compute_dtype: of the model.
        device: that rows of the embedding are moved to; None for the processor.
    Raises:
        ArchitectureError: a parameter is left that no stop brings and that was not read.
    """
    dtypes = dict(layout.dtypes)
    to_read = list(layout.kept)
    placement = layout.embedding_placement
    embedding = None if placement is None else checkpoint.mapped(placement)
    if placement is not None and embedding is None:  # in pieces, or at an odd address: it has to be read
        to_read.append(placement)
        dtypes[placement.name] = placement.dtype if placement.coding is None else compute_dtype
    filled: set[int] = set()
    with (
        contextlib.closing(Reader([to_read], ring_bytes=4096, resident=frozenset([0]))) as reader,
        reader.visit(0) as weights,
    ):
        coded = {p.name: p for p in to_read if p.coding is not None}
        copies = {
            name: _decoded(coded[name], tensor, dtypes[name])
            if name in coded
            else tensor.to(dtypes[name], copy=True)
            for name, tensor in weights.items()
        }
    if placement is not None:
        mapped = embedding
        if embedding is None:
            embedding = copies.pop(placement.name)
        elif placement.coding is not None:
            nothing = torch.empty(0, dtype=torch.uint8)
            embedding = coded_weight(placement, embedding, compute_dtype, nothing, OneThread())
        head_is_tied = layout.head.weight is layout.embedding.weight
        old = layout.embedding._parameters["weight"]
        stream_embedding(layout.embedding, embedding, compute_dtype, device, mapped)
        _replace(model, old, layout.embedding._parameters["weight"], filled)
        assert head_is_tied == (layout.head.weight is layout.embedding.weight), "tied weights stay tied"
    for name, tensor in copies.items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        if attribute in module._buffers:
            module._buffers[attribute] = tensor
        else:
            _replace(model, module._parameters[attribute], nn.Parameter(tensor, requires_grad=False), filled)
    for name, parameter in model.named_parameters():
        is_here = layout.part.has_ends or block_of(name, layout.blocks_name) is not None
        if is_here and name not in layout.streamed_names and id(parameter) not in filled:
            raise ArchitectureError(
                f"{type(model).__name__}: {name} is tied in a way that is not streamed; no weight was read for it"
            )


def _decoded(placement: Placement, stored: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a coded tensor as it is computed with."""
    return (
        coded_weight(placement, stored, dtype, torch.empty(0, dtype=torch.uint8), OneThread())
        .cast()
        .contiguous()
    )


def _replace(
    model: PreTrainedModel, old: nn.Parameter | None, new: nn.Parameter | None, filled: set[int]
) -> None:
    """Put one parameter in the place of another, in every module that is tied to it."""
    filled.add(id(new))
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[attribute] = new
