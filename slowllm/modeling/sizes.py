"""Count what each stop of a model takes: bytes, flops, activations and caches."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from slowllm.modeling.cache_sizes import CacheSize, number_of
from slowllm.modeling.layout import Layout, block_numbers
from slowllm.modeling.online_softmax import TILE_COLUMNS
from slowllm.modeling.routers import find_router
from slowllm.planning.job import ExpertSizes, Sizes, StopSize
from slowllm.rounding import ceil_div
from slowllm.storage.codecs.registry import codec_of
from slowllm.storage.spans import Placement
from slowllm.streaming.cast_stops import cast_buffer_bytes, kept_buffer_bytes
from slowllm.streaming.read_requests import ring_bytes_of

# A row's recurrent states are shared out among this many tokens of it, so rows of fewer are counted too low.
MIN_ROW_TOKENS = 16
# How much more often than on average the most popular expert is chosen.
CROWDED = 8
# Of the keys and the values of one position, int64 each.
_LABEL_BYTES = 16
# Machines that share the blocks of a client's model. Fewer take less memory; with more, the budget is exceeded by the
# inputs of their hops.
ASSUMED_HOPS = 8


def sizes_of(model: PreTrainedModel, layout: Layout, cache: CacheSize) -> Sizes:
    """Return the sizes of a model's stops, and estimates of the memory that tokens take.

    Each matrix of a block leaves one output, and about as much again in activations and residuals; attention written
    out in full (BLOOM, DeepSeek) holds its scores in fp32 and in the compute dtype.

    Args:
        model: a skeleton.
        layout: of it.
        cache: of the layout's part, from `cache_size_of`.
    """
    config = model.config.get_text_config()
    itemsize = max((layout.dtypes[p.name].itemsize for stop in layout.stops for p in stop), default=4)
    hidden = int(config.hidden_size)
    blocks: dict[int, list[Placement]] = {}
    for number, stop in zip(block_numbers(layout), layout.stops, strict=True):
        if number >= 0:
            blocks.setdefault(number, []).extend(stop)
    sides = [[max(p.shape[-2:]) for p in block if len(p.shape) >= 2] for block in blocks.values()]
    unit = max(layout.units, key=lambda unit: sum(p.num_bytes for p in unit), default=())
    expert_sides = [max(p.shape[-2:]) for p in unit]
    activations = max(map(sum, sides), default=0) + sum(expert_sides) + 4 * hidden
    logits = layout.head.out_features if layout.part.has_ends else 0
    is_eager = getattr(config, "_attn_implementation", "eager") == "eager"
    num_heads = number_of(config, "num_attention_heads") or 1
    scores_bytes = (num_heads if is_eager else cache.unfused_heads) * (2 * 4 + 2 * itemsize)
    head_tile_bytes = TILE_COLUMNS * (itemsize + 3 * 4)
    kept_bytes = sum(
        p.num_bytes + p.num_bytes // p.dtype.itemsize * layout.dtypes[p.name].itemsize for p in layout.kept
    )
    # Between two leaves a rider holds what the block has computed so far; between two blocks only its hidden states.
    inside = (
        2 * max((max(side) for side in sides if side), default=0) if layout.granularity == "leaves" else 0
    )
    experts = _experts_of(layout, config)
    if experts is not None:
        # Whoever waits for experts holds what its block has computed, and what comes of them; of one expert, all riders'
        # rows are computed together.
        inside = 4 * hidden + round(
            sum(expert_sides) * min(1.0, CROWDED * experts.top_k / experts.num_experts)
        )
    cache_bytes = planned_token_bytes(cache)
    checkpoint_bytes = itemsize * len(layout.part.blocks) * hidden
    if not layout.part.blocks:
        # A client's cache holds two labels a block, and what each hop was given, from which it could be rebuilt.
        cache_bytes = _LABEL_BYTES * len(layout.blocks) + ASSUMED_HOPS * itemsize * hidden
        checkpoint_bytes = ASSUMED_HOPS * itemsize * hidden
    return Sizes(
        granularity=layout.granularity,
        stops=tuple(_size_of(stop, config) for stop in layout.stops),
        kept_bytes=kept_bytes
        + sum(cast_buffer_bytes(layout.stops, layout.dtypes, layout.picked))
        + sum(unit_buffer_bytes(layout)),
        block_token_bytes=max(2 * itemsize * activations, head_tile_bytes),
        attention_token_bytes=scores_bytes,
        rider_token_bytes=itemsize * (6 * hidden + inside) + 1024,
        # Before the last of its matrices, attention still has what it has made of its scores (BLOOM: three tensors).
        waiting_attention_bytes=3 * itemsize * num_heads
        if is_eager and layout.granularity == "leaves"
        else 0,
        result_token_bytes=cache_bytes + itemsize * logits,
        cache_token_bytes=cache_bytes,
        logits_bytes=4 * logits,
        returns_all_logits="logits_to_keep" not in inspect.signature(model.forward).parameters,
        checkpoint_token_bytes=checkpoint_bytes,
        # What autograd keeps of one block, and its gradients (measured: 1.2 MB a token for Llama-70B).
        replay_token_bytes=4 * itemsize * activations,
        replay_attention_bytes=scores_bytes,
        num_head_stops=len(layout.chunks),
        num_blocks=max(1, len(layout.part.blocks)),
        experts=experts,
        decoded_stop_bytes=kept_buffer_bytes(layout.stops, layout.dtypes),
    )


def unit_buffer_bytes(layout: Layout) -> tuple[int, int]:
    """Return the sizes of the cast buffers for experts that are read on demand: all matrices of one at once."""
    dtypes = layout.unit_dtypes
    small, _ = cast_buffer_bytes(layout.units, dtypes)
    large = max(
        (sum(cast_buffer_bytes([[one]], dtypes)[1] for one in unit) for unit in layout.units), default=0
    )
    return small, large


def _experts_of(layout: Layout, config: Any) -> ExpertSizes | None:
    """Return what the experts take that are read on demand; None where there are none."""
    if not layout.experts:
        return None
    stops = layout.expert_blocks
    count = max(len(one.units) for one in layout.experts)
    sizes = [_size_of(unit, config) for unit in layout.units]
    return ExpertSizes(
        stops=frozenset(stops),
        num_experts=count,
        top_k=min(count, experts_per_token(config) or count),
        unit_bytes=max(size.num_bytes for size in sizes),
        largest_bytes=max(size.largest_bytes for size in sizes),
        unit_flops=max(size.flops for size in sizes),
        decoded_bytes=max(size.decoded_bytes for size in sizes),
        router_bytes=sum(_router_bytes(layout, number) for number in stops),
    )


def _router_bytes(layout: Layout, block: int) -> int:
    """Return the bytes of a copy of what a block's router reads; 0 where it cannot be asked by itself."""
    router = find_router(layout.blocks[block])
    if router is None:
        return 0
    held = {**dict(layout.blocks[block].named_parameters()), **dict(layout.blocks[block].named_buffers())}
    dtypes = {name: layout.dtypes.get(f"{layout.blocks_name}.{block}.{name}") for name in router.parameters}
    return sum(held[name].numel() * (dtype or held[name].dtype).itemsize for name, dtype in dtypes.items())


def experts_per_token(config: Any) -> int | None:
    """Return how many experts a token takes, by whatever name a config has for it; the most, where blocks differ."""
    for name in (
        "num_experts_per_tok",
        "moe_k",
        "moe_topk",
        "top_k_experts",
        "num_experts_per_token",
        "top_k",
    ):
        value = getattr(config, name, None)
        # HunYuan-A13B's has a number for each block.
        most = max(value, default=0) if isinstance(value, list) else value
        if isinstance(most, int) and most > 0:
            return most
    return None


def planned_token_bytes(cache: CacheSize) -> int:
    """Return the bytes that are planned for each token of a cache."""
    return cache.token_bytes + ceil_div(cache.row_bytes, MIN_ROW_TOKENS)


def _size_of(stop: Sequence[Placement], config: Any) -> StopSize:
    top_k = experts_per_token(config)
    flops = 0.0
    for p in stop:
        if len(p.shape) >= 2:
            # A tensor of three dimensions holds every expert, of which a token takes a few.
            used = min(1.0, top_k / p.shape[0]) if top_k and len(p.shape) == 3 else 1.0
            flops += 2 * math.prod(p.shape) * used
    decoded = sum(p.decoded_bytes * codec_of(p.coding).passes for p in stop if p.coding is not None)
    return StopSize(
        num_bytes=sum(map(ring_bytes_of, stop)),
        largest_bytes=max(map(ring_bytes_of, stop), default=0),
        flops=flops,
        decoded_bytes=int(decoded),
    )
