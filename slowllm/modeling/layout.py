"""Which tensors make up which stop: blocks or their leaves, and chunks of the head; and which always stay in memory.

Knows transformers' models by their parts, and sizes; reads no weight.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slowllm.errors import ArchitectureError, CheckpointError
from slowllm.modeling.blocks import find_blocks, prefixes_of
from slowllm.modeling.expert_units import ExpertUnits, can_cut, find_units
from slowllm.modeling.experts import picked_experts
from slowllm.modeling.parts import Part, block_of
from slowllm.planning.job import Granularity
from slowllm.rounding import ceil_div, round_up
from slowllm.storage.spans import Placement, is_coded_by_rows, take_rows
from slowllm.streaming.read_requests import ring_bytes_of

log = logging.getLogger(__name__)

# A leaf smaller than this (a router, say) always stays in memory.
MIN_LEAF_BYTES = 1 << 20


@dataclass(frozen=True)
class Layout:
    """The parts of a model, and where the tensors of each stop come from.

    Attributes:
        granularity: whether a stop is a whole block or a leaf of one.
        blocks_name: of the list of blocks.
        blocks: the list.
        embedding: the input embedding, whose rows are looked up in `embedding_placement`; None where a part has no ends.
        head: the output embedding, cut into `chunks`, of which a part without ends has none.
        head_parameter: the name of its matrix in the model.
        head_name: the name of its matrix in the checkpoint; None where a part has no ends.
        modules: the name of each stop's block or leaf, without the stops of the head.
        stops: the tensors of each block or leaf, then each chunk of the head.
        kept: the tensors that always stay in memory: norms, position tables, whatever is outside the blocks.
        dtypes: the compute dtype of every tensor, by name.
        streamed_names: the parameters that stay empty, because their stops bring them.
        part: that is laid out; the stops of other blocks are empty.
        placements: of the part's parameters and persistent buffers, by name.
        picked: the parameters of experts that are used one at a time.
        experts: of each module of experts that is read on demand, beside the stops.
    """

    granularity: Granularity
    blocks_name: str
    blocks: nn.ModuleList
    embedding: nn.Module
    embedding_placement: Placement | None
    head: nn.Linear
    head_parameter: str
    head_name: str | None
    chunks: tuple[Placement, ...]
    modules: tuple[str, ...]
    stops: tuple[tuple[Placement, ...], ...]
    kept: tuple[Placement, ...]
    dtypes: Mapping[str, torch.dtype]
    streamed_names: frozenset[str]
    part: Part
    placements: Mapping[str, Placement]
    picked: frozenset[str]
    experts: tuple[ExpertUnits, ...] = ()

    @property
    def absent_names(self) -> frozenset[str]:
        """The streamed parameters, without a head whose matrix is the embedding's, which is mapped."""
        embedding = self.embedding_placement
        is_mapped = embedding is not None and self.head_name == embedding.name
        return self.streamed_names - ({self.head_parameter} if is_mapped else set())

    @property
    def weight_bytes(self) -> int:
        """Bytes of all stops, as stored, and of experts that are read on demand."""
        return sum(placement.num_bytes for stop in (*self.stops, *self.units) for placement in stop)

    @property
    def units(self) -> tuple[tuple[Placement, ...], ...]:
        """The tensors of each expert that is read on demand, in the order of the blocks."""
        return tuple(unit for experts in self.experts for unit in experts.units)

    @property
    def expert_blocks(self) -> list[int]:
        """The block of each module of experts that is read on demand."""
        found = [block_of(f"{experts.name}.", self.blocks_name) for experts in self.experts]
        return [number for number in found if number is not None]

    @property
    def unit_dtypes(self) -> Mapping[str, torch.dtype]:
        """The compute dtype of each tensor of a unit, by name."""
        return {
            placement.name: self.dtypes[name]
            for experts in self.experts
            for unit in experts.units
            for placement, name in zip(unit, experts.full_names, strict=True)
        }


def lay_out(
    model: PreTrainedModel,
    placements: Mapping[str, Placement],
    granularity: Granularity = "blocks",
    part: Part | None = None,
) -> Layout:
    """Divide a model's tensors among stops.

    Stops are numbered as those of the whole model. A block outside the part has one stop, which is empty.

    Args:
        model: from `build_skeleton`.
        placements: from `parameter_map.place`, of the same part.
        granularity: of the stops.
        part: None for the whole model.
    Raises:
        ArchitectureError: the model does not have one list of blocks, or no linear head.
        CheckpointError: a tensor is missing, or stored as integers where floats are computed with.
    """
    blocks_name, blocks = find_blocks(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ArchitectureError(
            f"{type(model).__name__}: has no linear head (found {type(head).__name__}); only causal LMs stream"
        )
    part = part or Part.whole(len(blocks))
    embedding_name = head_name = None
    if part.has_ends:
        embedding_name, head_name = _name_of(model, embedding, placements), _name_of(model, head, placements)
    dtypes = _compute_dtypes(model, placements)

    modules = _block_names(model)
    here = [modules[number] for number in part.blocks]
    for name in (name for module in here for name in _names_in(model, module)):
        if name not in placements:
            raise ArchitectureError(f"{name}: is tied to a tensor of another name, which is not streamed")
    if granularity == "leaves":
        leaves = _leaves(model, here, placements)
        if not any(leaves):
            raise ArchitectureError(f"{type(model).__name__}: its blocks have no part that is worth a stop")
        modules = [*modules[: part.first], *_in_order_of_use(model, leaves), *modules[part.end :]]
    experts = find_units(model, here, placements) if granularity == "experts" else []
    on_demand = {name for one in experts for name in one.full_names}
    if granularity == "experts" and not experts:
        raise ArchitectureError(f"{type(model).__name__}: has no experts that are computed one by one")
    elsewhere = {name for number, name in enumerate(_block_names(model)) if number not in part.blocks}
    owners = {
        name: number
        for number, module in enumerate(modules)
        if module not in elsewhere
        for name in _names_in(model, module)
    }
    groups: list[list[Placement]] = [[] for _ in modules]
    kept: list[Placement] = []
    for name, placement in placements.items():
        if name in on_demand:
            continue
        if name in owners:
            groups[owners[name]].append(placement)
        elif name not in (embedding_name, head_name):
            kept.append(placement)
    chunks: list[Placement] = []
    if head_name is not None:
        sizes = [ring_bytes_of(placement) for group in groups for placement in group]
        head_bytes = placements[head_name].num_bytes // placements[head_name].shape[0] * MIN_CHUNK_ROWS
        chunks = cut_head(placements[head_name], max(sizes, default=head_bytes))
        dtypes.update({chunk.name: dtypes[head_name] for chunk in chunks})
    head_parameter = next(name for name, module in model.named_modules() if module is head) + ".weight"
    return Layout(
        granularity=granularity,
        blocks_name=blocks_name,
        blocks=blocks,
        embedding=embedding,
        embedding_placement=None if embedding_name is None else placements[embedding_name],
        head=head,
        head_parameter=head_parameter,
        head_name=head_name,
        chunks=tuple(chunks),
        modules=tuple(modules),
        stops=(*map(tuple, groups), *((chunk,) for chunk in chunks)),
        kept=tuple(kept),
        dtypes=dtypes,
        streamed_names=frozenset((*owners, *([head_parameter] if part.has_ends else []))),
        part=part,
        placements=placements,
        picked=picked_experts(model),
        experts=tuple(experts),
    )


def granularities(
    model: PreTrainedModel, placements: Mapping[str, Placement], part: Part | None = None
) -> tuple[Granularity, ...]:
    """Return how a part of a model can be cut: into blocks, experts beside them, and leaves where any is worth a stop."""
    names = _block_names(model)
    here = names if part is None else names[part.first : part.end]
    ways: list[Granularity] = ["blocks"]
    if can_cut(model, here, placements):
        ways.append("experts")
    if any(_leaves(model, here, placements)):
        ways.append("leaves")
    return tuple(ways)


def in_order_of_use(model: PreTrainedModel, placements: Mapping[str, Placement]) -> list[str]:
    """Return the names of the blocks' matrices, each block's in the order in which a forward pass uses them."""
    leaves = _leaves(model, _block_names(model), placements, least_bytes=0)
    return [name for leaf in _in_order_of_use(model, leaves) for name in _names_in(model, leaf)]


def _block_names(model: PreTrainedModel) -> list[str]:
    name, blocks = find_blocks(model)
    return [f"{name}.{number}" for number in range(len(blocks))]


def _names_in(model: PreTrainedModel, module: str) -> Iterator[str]:
    for name, _ in model.get_submodule(module).named_parameters():
        yield f"{module}.{name}"


def _leaves(
    model: PreTrainedModel,
    blocks: Sequence[str],
    placements: Mapping[str, Placement],
    least_bytes: int | None = None,
) -> list[list[str]]:
    """Find, in each block, the outermost modules that own a matrix and are worth a stop of their own."""
    least = MIN_LEAF_BYTES if least_bytes is None else least_bytes

    def walk(name: str, module: nn.Module) -> Iterator[str]:
        if any(parameter.dim() >= 2 for parameter in module._parameters.values() if parameter is not None):
            # Linear attention reads its convolution's weight without a call of the module, which brings no stop.
            is_called = least_bytes is not None or not isinstance(module, nn.Conv1d)
            if is_called and sum(placements[inner].num_bytes for inner in _names_in(model, name)) >= least:
                yield name
            return
        for child, inner in module.named_children():
            yield from walk(f"{name}.{child}", inner)

    return [list(walk(block, model.get_submodule(block))) for block in blocks]


def _in_order_of_use(model: PreTrainedModel, leaves: Sequence[Sequence[str]]) -> list[str]:
    """Return the leaves of all blocks, each block's in the order in which a forward pass uses them.

    Found by a pass of two tokens through a model in which each module with parameters returns zeros. If that fails,
    the order is that of their definition, and the reader may prefetch a stop in vain.
    """
    in_order_of_definition = [name for block in leaves for name in block]
    used: list[str] = []
    stubbed: list[nn.Module] = []

    def stub(name: str, module: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if name in all_leaves and name not in used:
                used.append(name)
            input = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            if isinstance(module, nn.Embedding):
                return torch.zeros(*input.shape, module.embedding_dim, dtype=model.dtype)
            width = getattr(module, "out_features", None) or getattr(module, "nf", None)
            return input if width is None else input.new_zeros(*input.shape[:-1], width)

        return forward

    all_leaves = set(in_order_of_definition)
    try:
        for name, module in model.named_modules():
            is_inner = any(prefix in all_leaves for prefix in prefixes_of(name))
            if module._parameters and not is_inner:
                module.forward = stub(name, module)
                stubbed.append(module)
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False)
    except Exception as error:  # whatever a model's forward may raise on such stubs
        log.debug("%s: %r; its leaves are read in the order of their definition", type(model).__name__, error)
        return in_order_of_definition
    finally:
        for module in stubbed:
            del module.__dict__["forward"]
    places = {name: number for number, name in enumerate(used)}
    # Sorting is stable: leaves that the pass did not use keep their order, after the others.
    return [
        name for block in leaves for name in sorted(block, key=lambda name: places.get(name, len(places)))
    ]


def block_numbers(layout: Layout) -> list[int]:
    """Return the block that each stop belongs to, -1 for a chunk of the head."""
    names = [module[len(layout.blocks_name) + 1 :].partition(".")[0] for module in layout.modules]
    return [int(name) for name in names] + [-1] * len(layout.chunks)


def _compute_dtypes(model: PreTrainedModel, placements: Mapping[str, Placement]) -> dict[str, torch.dtype]:
    """Return the compute dtype of every placed tensor: the model's, or float32 where its class insists."""
    state = model.state_dict()
    strict = [pattern.replace("*", ".*") for pattern in model._keep_in_fp32_modules_strict or ()]
    in_float16 = [pattern.replace("*", ".*") for pattern in model._keep_in_fp32_modules or ()]
    dtypes = {}
    for name, placement in placements.items():
        dtype = state[name].dtype
        if dtype.is_floating_point != placement.dtype.is_floating_point:
            raise CheckpointError(
                f"{name}: is stored as {placement.dtype}, but the model computes it in {dtype}"
            )
        patterns = {torch.float16: strict + in_float16, torch.bfloat16: strict}.get(dtype, [])
        dtypes[name] = torch.float32 if any(re.search(p, name) for p in patterns) else dtype
    return dtypes


def _name_of(model: PreTrainedModel, module: nn.Module, placements: Mapping[str, Placement]) -> str:
    """Return the name under which the checkpoint has a module's weight: its own, or one that is tied to it."""
    own_name = next(name for name, candidate in model.named_modules() if candidate is module) + ".weight"
    tied = model.all_tied_weights_keys
    tied_names = (
        [tied[own_name]] if own_name in tied else [n for n, source in tied.items() if source == own_name]
    )
    for name in (own_name, *tied_names):
        if name in placements:
            return str(name)
    raise CheckpointError(f"{own_name}: missing from the checkpoint")


# The head is not cut into chunks smaller than this: a GEMM of few columns is slow, and its rounding differs from
# that of the whole (measured: chunks of 6,000 columns and more give the bits of the whole at a width of 4096).
MIN_CHUNK_BYTES = 64 << 20
# Of a chunk where no block says how large a tensor the ring has to hold anyway.
MIN_CHUNK_ROWS = 8192


def cut_head(placement: Placement, max_bytes: int) -> list[Placement]:
    """Cut the head's matrix (V, H) into the fewest equal chunks of rows that are at most `max_bytes`.

    One that is coded otherwise than row by row stays whole.
    """
    num_rows = placement.shape[0]
    if placement.coding is not None and not is_coded_by_rows(placement):
        return [replace(placement, name=f"{placement.name}[0:]")]
    num_chunks = max(1, ceil_div(placement.num_bytes, max(max_bytes, MIN_CHUNK_BYTES)))
    chunk_rows = round_up(ceil_div(num_rows, num_chunks), 64)
    return [
        take_rows(placement, f"{placement.name}[{start}:]", start, min(start + chunk_rows, num_rows))
        for start in range(0, num_rows, chunk_rows)
    ]
