"""Which tensors make which stop: blocks or their leaves, the chunks of the head, and what always stays in memory.

Knows transformers' models by their parts, and sizes; reads no weight.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slowllm.errors import ArchitectureError, CheckpointError
from slowllm.modeling.head import TILE_COLUMNS, cut_head
from slowllm.modeling.streamed_block import find_blocks
from slowllm.planning.forecast import Granularity, Sizes, StopSize
from slowllm.storage.codecs.registry import codec_of
from slowllm.storage.spans import Placement
from slowllm.streaming.cast_stops import swap_bytes
from slowllm.streaming.reader import ring_bytes_of

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
        embedding: the input embedding, whose rows are looked up in `embedding_placement`.
        head: the output embedding, cut into `chunks`.
        modules: the name of the block or leaf that each stop is for, those of the head left out.
        stops: tensors of each block or leaf, then each chunk of the head.
        kept: tensors that always stay: norms, position tables, what stands outside the blocks.
        dtypes: compute dtype of every tensor, by name.
        streamed_names: parameters that are never filled, because their stops bring them.
    """

    granularity: Granularity
    blocks_name: str
    blocks: nn.ModuleList
    embedding: nn.Module
    embedding_placement: Placement
    head: nn.Linear
    chunks: tuple[Placement, ...]
    modules: tuple[str, ...]
    stops: tuple[tuple[Placement, ...], ...]
    kept: tuple[Placement, ...]
    dtypes: Mapping[str, torch.dtype]
    streamed_names: frozenset[str]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all stops, as stored."""
        return sum(placement.num_bytes for stop in self.stops for placement in stop)


def lay_out(
    model: PreTrainedModel, placements: Mapping[str, Placement], granularity: Granularity = "blocks"
) -> Layout:
    """Divide a model's tensors among stops.

    Args:
        model: from `build_skeleton`.
        placements: from `naming.place`.
        granularity: what a stop is.
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

    for number, block in enumerate(blocks):
        for name, _ in block.named_parameters():
            if f"{blocks_name}.{number}.{name}" not in placements:
                raise ArchitectureError(
                    f"{blocks_name}.{number}.{name}: is tied to a tensor of another name, which is not streamed"
                )
    modules = [f"{blocks_name}.{number}" for number in range(len(blocks))]
    if granularity == "leaves":
        leaves = _leaves(model, modules, placements)
        if not any(leaves):
            raise ArchitectureError(f"{type(model).__name__}: its blocks have no part that is worth a stop")
        modules = _in_order_of_use(model, modules, leaves)
    owners = {name: number for number, module in enumerate(modules) for name in _names_in(model, module)}
    groups: list[list[Placement]] = [[] for _ in modules]
    kept: list[Placement] = []
    for name, placement in placements.items():
        if name in owners:
            groups[owners[name]].append(placement)
        elif name not in (embedding_name, head_name):
            kept.append(placement)
    largest = max(ring_bytes_of(placement) for group in groups for placement in group)
    chunks = cut_head(placements[head_name], largest)
    dtypes.update({chunk.name: dtypes[head_name] for chunk in chunks})
    streamed = {*owners, next(name for name, module in model.named_modules() if module is head) + ".weight"}
    return Layout(
        granularity=granularity,
        blocks_name=blocks_name,
        blocks=blocks,
        embedding=embedding,
        embedding_placement=placements[embedding_name],
        head=head,
        chunks=tuple(chunks),
        modules=tuple(modules),
        stops=(*map(tuple, groups), *((chunk,) for chunk in chunks)),
        kept=tuple(kept),
        dtypes=dtypes,
        streamed_names=frozenset(streamed),
    )


def granularities(model: PreTrainedModel, placements: Mapping[str, Placement]) -> tuple[Granularity, ...]:
    """Return how a model can be cut: into blocks, and into leaves where any is worth a stop."""
    name, blocks = find_blocks(model)
    leaves = _leaves(model, [f"{name}.{number}" for number in range(len(blocks))], placements)
    return ("blocks", "leaves") if any(leaves) else ("blocks",)


def in_order_of_use(model: PreTrainedModel, placements: Mapping[str, Placement]) -> list[str]:
    """Return the names of the blocks' matrices, each block's in the order in which a forward pass comes to them."""
    blocks_name, blocks = find_blocks(model)
    modules = [f"{blocks_name}.{number}" for number in range(len(blocks))]
    leaves = _leaves(model, modules, placements, least_bytes=0)
    return [name for leaf in _in_order_of_use(model, modules, leaves) for name in _names_in(model, leaf)]


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
            if sum(placements[inner].num_bytes for inner in _names_in(model, name)) >= least:
                yield name
            return
        for child, inner in module.named_children():
            yield from walk(f"{name}.{child}", inner)

    return [list(walk(block, model.get_submodule(block))) for block in blocks]


def _in_order_of_use(
    model: PreTrainedModel, blocks: Sequence[str], leaves: Sequence[Sequence[str]]
) -> list[str]:
    """Return the leaves in the order in which a forward pass comes to them.

    Found by a pass of two tokens through a model whose every module with parameters only gives zeros. Where a
    model does not take that, the order is that of their definition, and the reader may read a stop in vain.
    """
    defined = [name for block in leaves for name in block]
    used: list[str] = []
    stubbed: list[nn.Module] = []

    def stub(name: str, module: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if name in wanted and name not in used:
                used.append(name)
            given = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            if isinstance(module, nn.Embedding):
                return torch.zeros(*given.shape, module.embedding_dim, dtype=model.dtype)
            width = getattr(module, "out_features", None) or getattr(module, "nf", None)
            return given if width is None else given.new_zeros(*given.shape[:-1], width)

        return forward

    wanted = set(defined)
    try:
        for name, module in model.named_modules():
            is_inner = any(prefix in wanted for prefix in _prefixes(name))
            if module._parameters and not is_inner:
                module.forward = stub(name, module)
                stubbed.append(module)
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False)
    except Exception as error:  # whatever a model's forward may trip over on such stubs
        log.info("%s: %r; its leaves are read in the order of their definition", type(model).__name__, error)
        return defined
    finally:
        for module in stubbed:
            del module.__dict__["forward"]
    places = {name: number for number, name in enumerate(used)}
    # Sorting is stable: what the pass did not come to keeps its order, after the others.
    return [
        name for block in leaves for name in sorted(block, key=lambda name: places.get(name, len(places)))
    ]


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    for length in range(1, len(parts)):
        yield ".".join(parts[:length])


def block_numbers(layout: Layout) -> list[int]:
    """Return the block that each stop belongs to, -1 for a chunk of the head."""
    names = [module[len(layout.blocks_name) + 1 :].partition(".")[0] for module in layout.modules]
    return [int(name) for name in names] + [-1] * len(layout.chunks)


def sizes_of(model: PreTrainedModel, layout: Layout) -> Sizes:
    """Return what the plan needs to know of a model.

    Scratch memory is an estimate: each matrix of a block leaves one output, and about as much again in
    activations and residuals; attention written out in full (BLOOM) holds its scores in fp32 and in the compute
    dtype.
    """
    config = model.config.get_text_config()
    itemsize = max((layout.dtypes[p.name].itemsize for stop in layout.stops for p in stop), default=4)
    hidden = int(config.hidden_size)
    per_block: dict[str, list[Placement]] = {}
    for module, stop in zip(layout.modules, layout.stops, strict=False):
        number = module[len(layout.blocks_name) + 1 :].partition(".")[0]
        per_block.setdefault(number, []).extend(stop)
    sides = [[max(p.shape[-2:]) for p in block if len(p.shape) >= 2] for block in per_block.values()]
    num_heads = int(getattr(config, "num_attention_heads", 1) or 1)
    num_kv_heads = int(getattr(config, "num_key_value_heads", None) or num_heads)
    head_dim = int(getattr(config, "head_dim", None) or hidden // num_heads)
    cache = len(layout.blocks) * 2 * num_kv_heads * head_dim
    is_eager = getattr(config, "_attn_implementation", "eager") == "eager"
    head_tile = TILE_COLUMNS * (itemsize + 3 * 4)
    kept = sum(
        p.num_bytes + p.num_bytes // p.dtype.itemsize * layout.dtypes[p.name].itemsize for p in layout.kept
    )
    # Between two leaves a rider holds what the block has made so far; between two blocks only its hidden states.
    inside = 2 * max(map(max, sides)) if layout.granularity == "leaves" else 0
    return Sizes(
        granularity=layout.granularity,
        stops=tuple(_size_of(stop, config) for stop in layout.stops),
        kept_bytes=kept + sum(swap_bytes(layout.stops, layout.dtypes)),
        block_token_bytes=max(2 * itemsize * (max(map(sum, sides)) + 4 * hidden), head_tile),
        attention_token_bytes=num_heads * (2 * 4 + 2 * itemsize) if is_eager else 0,
        rider_token_bytes=itemsize * (6 * hidden + inside) + 1024,
        result_token_bytes=itemsize * (cache + layout.head.out_features),
        checkpoint_token_bytes=itemsize * len(layout.blocks) * hidden,
        # What autograd keeps of one block, and its gradients (measured: 1.2 MB a token for Llama-70B).
        replay_token_bytes=4 * itemsize * (max(map(sum, sides)) + 4 * hidden),
        replay_attention_bytes=num_heads * (2 * 4 + 2 * itemsize) if is_eager else 0,
        num_head_stops=len(layout.chunks),
    )


def _size_of(stop: Sequence[Placement], config: Any) -> StopSize:
    num_experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
    used = min(1.0, (getattr(config, "num_experts_per_tok", None) or num_experts) / num_experts)
    flops = 0.0
    for p in stop:
        if len(p.shape) >= 2:
            # A tensor of three dimensions holds every expert, of which a token takes a few.
            flops += 2 * math.prod(p.shape) * (used if len(p.shape) == 3 else 1.0)
    decoded = sum(p.decoded_bytes * codec_of(p.coding).passes for p in stop if p.coding is not None)
    return StopSize(
        num_bytes=sum(map(ring_bytes_of, stop)),
        largest_bytes=max(map(ring_bytes_of, stop), default=0),
        flops=flops,
        decoded_bytes=int(decoded),
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
