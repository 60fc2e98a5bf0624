"""Which tensors make which stop: the blocks, the chunks of the head, and what always stays in memory.

Knows transformers' models by their parts, and sizes; reads no weight.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from slowllm.blocks import find_blocks
from slowllm.checkpoint import Placement
from slowllm.errors import ArchitectureError, CheckpointError
from slowllm.head import TILE_COLUMNS, cut_head
from slowllm.plan import Sizes
from slowllm.reader import ring_bytes_of, smallest_ring
from slowllm.swap import swap_bytes

# Sequences are assumed no longer than this when scratch memory of attention is counted.
ASSUMED_LENGTH = 1024


@dataclass(frozen=True)
class Layout:
    """The parts of a model, and where the tensors of each stop come from.

    Attributes:
        blocks_name: of the list of blocks.
        blocks: the list.
        embedding: the input embedding, whose rows are looked up in `embedding_placement`.
        head: the output embedding, cut into `chunks`.
        stops: tensors of each block, then each chunk of the head.
        kept: tensors that always stay: norms, position tables, what stands outside the blocks.
        dtypes: compute dtype of every tensor, by name.
        streamed_names: parameters that are never filled, because their stops bring them.
    """

    blocks_name: str
    blocks: nn.ModuleList
    embedding: nn.Module
    embedding_placement: Placement
    head: nn.Linear
    chunks: tuple[Placement, ...]
    stops: tuple[tuple[Placement, ...], ...]
    kept: tuple[Placement, ...]
    dtypes: Mapping[str, torch.dtype]
    streamed_names: frozenset[str]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all stops, as stored."""
        return sum(placement.num_bytes for stop in self.stops for placement in stop)


def lay_out(model: PreTrainedModel, placements: Mapping[str, Placement]) -> Layout:
    """Divide a model's tensors among stops.

    Args:
        model: from `build_skeleton`.
        placements: from `naming.place`.
    Raises:
        ArchitectureError: the model has no one list of blocks, or no linear head.
        CheckpointError: a tensor is missing or stored in a dtype that cannot be computed with.
    """
    blocks_name, blocks = find_blocks(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ArchitectureError(
            f"{type(model).__name__}: has no linear head (found {type(head).__name__}); only causal LMs stream"
        )
    embedding_name, head_name = _name_of(model, embedding, placements), _name_of(model, head, placements)
    dtypes = _compute_dtypes(model, placements)

    parameters = dict(model.named_parameters(remove_duplicate=False))
    groups: list[list[Placement]] = [[] for _ in blocks]
    kept: list[Placement] = []
    for name, placement in placements.items():
        block = _block_of(name, blocks_name)
        if block is not None and name in parameters:
            groups[block].append(placement)
        elif name not in (embedding_name, head_name):
            kept.append(placement)
    for index, block_module in enumerate(blocks):
        brought = {placement.name for placement in groups[index]}
        for name, _ in block_module.named_parameters():
            full = f"{blocks_name}.{index}.{name}"
            if full not in brought:
                raise ArchitectureError(f"{full}: is tied to a tensor of another name, which is not streamed")
    chunks = cut_head(placements[head_name], max(sum(map(ring_bytes_of, group)) for group in groups))
    dtypes.update({chunk.name: dtypes[head_name] for chunk in chunks})
    streamed = {name for name in parameters if _block_of(name, blocks_name) is not None}
    streamed.add(next(name for name, module in model.named_modules() if module is head) + ".weight")
    return Layout(
        blocks_name=blocks_name,
        blocks=blocks,
        embedding=embedding,
        embedding_placement=placements[embedding_name],
        head=head,
        chunks=tuple(chunks),
        stops=(*map(tuple, groups), *((chunk,) for chunk in chunks)),
        kept=tuple(kept),
        dtypes=dtypes,
        streamed_names=frozenset(streamed),
    )


def sizes_of(model: PreTrainedModel, layout: Layout) -> Sizes:
    """Return what the plan needs to know of a model.

    Scratch memory is an estimate: each matrix of a block leaves one output, and about as much again in
    activations and residuals; attention written out in full (BLOOM) holds its scores in fp32 and in the compute
    dtype.
    """
    config = model.config.get_text_config()
    itemsize = max((layout.dtypes[p.name].itemsize for stop in layout.stops for p in stop), default=4)
    hidden = int(config.hidden_size)
    blocks = layout.stops[: len(layout.blocks)]
    widest = max(sum(max(p.shape[-2:]) for p in block if len(p.shape) >= 2) for block in blocks)
    num_heads = int(getattr(config, "num_attention_heads", 1) or 1)
    attention = num_heads * ASSUMED_LENGTH * (2 * 4 + 2 * itemsize)
    head_tile = TILE_COLUMNS * (itemsize + 3 * 4)
    kept = sum(
        p.num_bytes + p.num_bytes // p.dtype.itemsize * layout.dtypes[p.name].itemsize for p in layout.kept
    )
    return Sizes(
        stop_bytes=tuple(sum(map(ring_bytes_of, stop)) for stop in layout.stops),
        smallest_ring_bytes=smallest_ring(layout.stops),
        kept_bytes=kept + sum(swap_bytes(layout.stops, layout.dtypes)),
        block_token_bytes=max(2 * itemsize * (widest + 4 * hidden) + attention, head_tile),
        rider_token_bytes=6 * itemsize * hidden + 1024,
    )


def _compute_dtypes(model: PreTrainedModel, placements: Mapping[str, Placement]) -> dict[str, torch.dtype]:
    """Return the compute dtype of every placed tensor: the model's, or float32 where its class insists."""
    state = model.state_dict()
    strict = model._keep_in_fp32_modules_strict or ()
    patterns = [pattern.replace("*", ".*") for pattern in strict]
    dtypes = {}
    for name, placement in placements.items():
        dtype = state[name].dtype
        if dtype.is_floating_point != placement.dtype.is_floating_point:
            raise CheckpointError(
                f"{name}: is stored as {placement.dtype}, but the model computes it in {dtype}"
            )
        keep = dtype in (torch.float16, torch.bfloat16) and any(re.search(p, name) for p in patterns)
        dtypes[name] = torch.float32 if keep else dtype
    return dtypes


def _name_of(model: PreTrainedModel, module: nn.Module, placements: Mapping[str, Placement]) -> str:
    """Return the name under which the checkpoint has a module's weight: its own, or one that is tied to it."""
    own: str = next(name for name, candidate in model.named_modules() if candidate is module) + ".weight"
    if own in placements:
        return own
    tied = model.all_tied_weights_keys
    names = [tied[own]] if own in tied else [target for target, source in tied.items() if source == own]
    for name in names:
        if name in placements:
            return str(name)
    raise CheckpointError(f"{own}: missing from the checkpoint")


def _block_of(name: str, blocks_name: str) -> int | None:
    if not name.startswith(f"{blocks_name}."):
        return None
    return int(name[len(blocks_name) + 1 :].partition(".")[0])
