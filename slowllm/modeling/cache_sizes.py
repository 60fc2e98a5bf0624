"""Measure the cache that a model returns, and see how it attends, by forward passes on the meta device, which computes only shapes.

No formula covers it: a cache may hold full keys and values, compressed latents (MLA), windows, recurrent states, or
nothing for blocks that use another's keys and values.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from slowllm.modeling.blocks import find_blocks
from slowllm.modeling.parts import Part
from slowllm.modeling.recompute import is_cache, tensor_refs
from slowllm.modeling.unfused_attention import UnfusedAttention
from slowllm.rounding import ceil_div

log = logging.getLogger(__name__)

# Tokens of the passes. One more token shows what each token adds; many more, what is added by blocks that keep one entry
# for several tokens.
LENGTHS = (13, 14, 46)
# Fields of a model's output that hold no part of its cache.
_NO_CACHE = {"loss", "logits", "last_hidden_state", "hidden_states", "attentions", "router_logits"}


@dataclass(frozen=True)
class CacheSize:
    """Bytes of a model's cache after a call, by its tensors' storage.

    A block with a window keeps a view of all keys and values until the next call, so these count in full.

    Attributes:
        token_bytes: that each token of a row adds.
        row_bytes: that each row takes besides, however long it is: recurrent states.
        unfused_heads: of the block with the most for which torch has no fused attention; see `unfused_attention`.
    """

    token_bytes: int
    row_bytes: int
    unfused_heads: int = 0


_measured: dict[tuple[type, str, torch.dtype, Part | None], CacheSize] = {}


def cache_size_of(model: PreTrainedModel, part: Part | None = None) -> CacheSize:
    """Return what `measure_cache` finds, measured once in a process for each class, config, dtype and part."""
    key = type(model), model.config.to_json_string(use_diff=False), model.dtype, part
    if key not in _measured:
        _measured[key] = measure_cache(model, part)
    return _measured[key]


def measure_cache(model: PreTrainedModel, part: Part | None = None) -> CacheSize:
    """Return the size of a skeleton's cache; that of full keys and values if the model does not run on meta.

    Args:
        model: the skeleton.
        part: whose blocks are counted; None for all.
    """
    blocks_name, blocks = find_blocks(model.eval())
    counted = range(len(blocks)) if part is None else part.blocks
    experts = model.get_experts_implementation()
    can_set_experts = model._can_set_experts_implementation()
    # The module that owns the blocks does not need images; if it takes no ids, as in BERT, the whole model does.
    for module in (model.get_submodule(blocks_name.rpartition(".")[0]), model):
        try:
            if can_set_experts:  # transformers' default has no meta kernel for float32
                model.set_experts_implementation("batched_mm")
            kinds = _kinds_of(model, blocks)
            with UnfusedAttention() as unfused:
                sizes = [_row_bytes(module, blocks, kinds, length, counted) for length in LENGTHS]
            token_bytes = max(sizes[1] - sizes[0], ceil_div(sizes[2] - sizes[1], LENGTHS[2] - LENGTHS[1]))
            rest = [size - length * token_bytes for size, length in zip(sizes, LENGTHS, strict=True)]
            return CacheSize(token_bytes, max(0, *rest), unfused.num_heads)
        except Exception as error:  # whatever a model's forward may raise where tensors have no numbers
            log.info("%s: its cache is not measured: %r", type(module).__name__, error)
        finally:
            if can_set_experts:
                model.set_experts_implementation(experts)
    config = model.config.get_text_config()
    num_heads = number_of(config, "num_attention_heads") or 1
    num_kv_heads = number_of(config, "num_key_value_heads") or num_heads
    head_dim = number_of(config, "head_dim") or config.hidden_size // num_heads
    return CacheSize(len(counted) * 2 * num_kv_heads * head_dim * model.dtype.itemsize, 0)


def number_of(config: Any, name: str) -> int | None:
    """Return a number of a config; None where it has none, or one for each block."""
    try:
        return getattr(config, name, None)
    except Exception:  # transformers' own, for a number that differs from block to block
        return None


def _kinds_of(model: PreTrainedModel, blocks: nn.ModuleList) -> list[Any]:
    """Return a key for each block; blocks of one key cache equally much, so one of them is enough."""

    def settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
        for key, value in vars(module).items():
            if isinstance(value, bool | int | float | str) and key != "layer_idx":
                yield key, value
        for key, parameter in module._parameters.items():
            yield key, None if parameter is None else parameter.shape

    layers = DynamicCache(config=model.config.get_text_config()).layers
    return [
        (
            type(layers[number]) if number < len(layers) else None,
            *((name, type(module), *settings(module)) for name, module in block.named_modules()),
        )
        for number, block in enumerate(blocks)
    ]


def _row_bytes(
    module: nn.Module, blocks: nn.ModuleList, kinds: Sequence[Any], num_tokens: int, counted: range
) -> int:
    """Return the bytes of the cache after a call with one row.

    Args:
        module: that is called.
        blocks: of the module.
        kinds: of the blocks; the first of each kind is run.
        num_tokens: of the row.
        counted: the blocks whose layers are counted.
    """
    tensors = {
        name: tensor.to("meta") for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }
    inputs: dict[str, Any] = {"input_ids": torch.zeros(1, num_tokens, dtype=torch.int64, device="meta")}
    if "use_cache" in inspect.signature(module.forward).parameters:
        inputs["use_cache"] = True
    outputs: dict[Any, Any] = {}
    before = [(inner, {**vars(inner), "_buffers": dict(inner._buffers)}) for inner in module.modules()]
    try:
        for block, kind in zip(blocks, kinds, strict=True):
            block.forward = functools.partial(_run_once, kind, block.forward, outputs)
        with torch.no_grad():
            output = functional_call(module, tensors, kwargs={**inputs, "return_dict": True})
    finally:  # a forward pass may leave meta tensors in its modules
        for inner, attributes in before:
            vars(inner).clear()
            vars(inner).update(attributes)
    held: list[list[Tensor]] = []
    for leaf in tree_leaves(
        [value for key, value in output.items() if key not in _NO_CACHE], is_leaf=is_cache
    ):
        if isinstance(leaf, Cache):
            layers: dict[int | None, list[Tensor]] = defaultdict(list)
            for ref in tensor_refs(0, leaf):
                layers[ref.layer].append(ref.get([leaf]))
            # Of the blocks of one kind only the first has filled its layer.
            held += [layers[kinds.index(kinds[number])] for number in counted]
        elif isinstance(leaf, Tensor):
            held.append([leaf])
    return sum(map(_storage_bytes, held))


def _storage_bytes(tensors: Sequence[Tensor]) -> int:
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _run_once(
    kind: Any, forward: Callable[..., Any], outputs: dict[Any, Any], *args: Any, **kwargs: Any
) -> Any:
    if kind not in outputs:
        outputs[kind] = forward(*args, **kwargs)
    return outputs[kind]
