"""Run a block again for its gradient, from a snapshot of its arguments and cache."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from transformers.cache_utils import Cache

from slowllm.errors import UnsupportedError
from slowllm.modeling.finite import check_finite
from slowllm.streaming.stops import Direction, Weights
from slowllm.streaming.thread_context import current_autocasts


def hidden_of(output: Any) -> Tensor:
    """Return the hidden states (B, T, H) of what a block returned."""
    return cast(Tensor, output[0] if isinstance(output, tuple | list) else output)


def is_cache(value: Any) -> bool:
    """Tell whether a value is a cache, which the flattening of arguments leaves whole."""
    return isinstance(value, Cache)


class Recomputable(Protocol):
    """A block that can be run again at its stop; `StreamedBlock` is one."""

    _prefix: str

    def _visit(
        self, direction: Direction, work: Callable[[Weights], Any], *, comes_back: bool = False
    ) -> Any:
        """Wait for the block's stop, and do some work with its weights."""

    def _run(self, weights: Weights, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute the block with the weights of its stop."""


@dataclass(frozen=True)
class TensorRef:
    """Where a tensor stands: the leaf of that number; or, in the cache there, an attribute of a layer, at a key."""

    leaf: int
    layer: int | None = None
    attribute: str = ""
    key: tuple[Any, ...] = ()

    def get(self, leaves: list[Any]) -> Any:
        """Return the tensor from a list of flattened arguments."""
        if self.layer is None:
            return leaves[self.leaf]
        value = getattr(leaves[self.leaf].layers[self.layer], self.attribute)
        return value[self.key[0]] if self.key else value

    def put(self, leaves: list[Any], value: Any) -> None:
        """Put a tensor, or None, in its place."""
        if self.layer is None:
            leaves[self.leaf] = value
        elif self.key:
            getattr(leaves[self.leaf].layers[self.layer], self.attribute)[self.key[0]] = value
        else:
            setattr(leaves[self.leaf].layers[self.layer], self.attribute, value)


def _snapshot(cache: Cache) -> Cache:
    """Copy a cache's layers and their tables, not their tensors: growing caches replace tensors."""
    clone = copy.copy(cache)
    clone.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in clone.layers:
        for attribute, value in vars(layer).items():
            # Linear attention keeps its states, and whether they are set, in tables of this kind.
            if isinstance(value, dict | list | set):
                setattr(layer, attribute, copy.copy(value))
    return clone


def tensor_refs(leaf: int, cache: Cache) -> Iterator[TensorRef]:
    """Find the tensors of the cache that is the argument of number `leaf`."""
    for number, layer in enumerate(cache.layers):
        for attribute, value in vars(layer).items():
            if isinstance(value, Tensor):
                yield TensorRef(leaf, number, attribute)
            elif isinstance(value, dict | list):
                keys = value if isinstance(value, dict) else range(len(value))
                for key in keys:
                    if isinstance(value[key], Tensor):
                        yield TensorRef(leaf, number, attribute, (key,))


@dataclass
class RecordedCall:
    """One call of a block under autograd: enough to run it again.

    Attributes:
        leaves: the flattened arguments; caches as they were before the call, tensors taken out after it.
        inputs: the tensors that want a gradient; `tensors` are all of them.
    """

    block: Recomputable
    leaves: list[Any]
    spec: TreeSpec
    live: list[Any]
    inputs: list[TensorRef]
    tensors: list[TensorRef]
    outputs: list[TensorRef]
    autocasts: list[Callable[..., torch.autocast]]

    @classmethod
    def record(cls, block: Recomputable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RecordedCall:
        """Record the arguments of a call that is about to be made."""
        live, spec = tree_flatten((args, kwargs), is_leaf=is_cache)
        leaves = [_snapshot(leaf) if isinstance(leaf, Cache) else leaf for leaf in live]
        tensors = [TensorRef(i) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Cache):
                tensors += tensor_refs(i, leaf)
        inputs = [slot for slot in tensors if slot.get(leaves).requires_grad]
        return cls(block, leaves, spec, live, inputs, tensors, [], current_autocasts())

    def apply(self) -> Any:
        """Run the block, and give its results a place in the graph."""
        results: list[Any] = []
        flat = _Replay.apply(self, results, *(slot.get(self.live) for slot in self.inputs))  # type: ignore[no-untyped-call]
        out_leaves, out_spec = results.pop()
        for slot, value in zip(self.outputs, flat, strict=True):
            slot.put(self.live if slot.layer is not None else out_leaves, value)
        # From here on the graph keeps the inputs, where a later write into them is noticed; and not the live cache.
        self.live = []
        return tree_unflatten(out_leaves, out_spec)

    def run_first(self, results: list[Any]) -> tuple[Tensor, ...]:
        """Run the block on the live arguments. Appends its flattened result to `results`."""
        args, kwargs = tree_unflatten(self.live, self.spec)

        def work(weights: Weights) -> Any:
            output = self.block._run(weights, args, kwargs)
            check_finite(self.block._prefix.rstrip("."), hidden_of(output))
            return output

        output = self.block._visit("up", work, comes_back=True)
        out_leaves, out_spec = tree_flatten(output, is_leaf=is_cache)
        results.append((out_leaves, out_spec))
        given = {id(slot.get(self.live)) for slot in self.tensors if slot.layer is None}
        self.outputs = [
            TensorRef(i)
            for i, leaf in enumerate(out_leaves)
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and id(leaf) not in given
        ]
        for i, leaf in enumerate(self.live):
            if isinstance(leaf, Cache):
                known = {slot: id(slot.get(self.leaves)) for slot in tensor_refs(i, self.leaves[i])}
                self.outputs += [
                    slot
                    for slot in tensor_refs(i, leaf)
                    if slot.get(self.live).is_floating_point() and known.get(slot) != id(slot.get(self.live))
                ]
        return tuple(slot.get(self.live if slot.layer is not None else out_leaves) for slot in self.outputs)

    def replay(self, saved: tuple[Tensor, ...], grads: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        """Run the block again on copies of its arguments and return the gradient of each input."""
        leaves = [_snapshot(leaf) if isinstance(leaf, Cache) else leaf for leaf in self.leaves]
        for slot, tensor in zip(self.tensors, saved, strict=True):
            slot.put(leaves, tensor.detach())
        inputs = [slot.get(leaves).requires_grad_(True) for slot in self.inputs]
        args, kwargs = tree_unflatten(leaves, self.spec)

        def work(weights: Weights) -> list[Tensor | None]:
            # Forward and backward within one visit: the weights may be saved for the one, and are still there.
            with torch.enable_grad():
                out_leaves, _ = tree_flatten(self.block._run(weights, args, kwargs), is_leaf=is_cache)
            outputs = [slot.get(leaves if slot.layer is not None else out_leaves) for slot in self.outputs]
            pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
            if not pairs:
                return [None] * len(inputs)
            found = torch.autograd.grad(
                [o for o, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True
            )
            return list(found)

        with contextlib.ExitStack() as stack:
            for autocast in self.autocasts:
                stack.enter_context(autocast())
            result: list[Tensor | None] = self.block._visit("down", work)
        return result


class _Replay(torch.autograd.Function):
    """Forward keeps the arguments of a block; backward visits the block again and recomputes."""

    @staticmethod
    def forward(ctx: Any, call: RecordedCall, results: list[Any], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(slot.get(call.leaves) for slot in call.tensors))
        ctx.call = call
        versions = [slot.get(call.leaves)._version for slot in call.tensors]
        outputs = call.run_first(results)
        if versions != [slot.get(call.leaves)._version for slot in call.tensors]:
            raise UnsupportedError(
                f"{call.block._prefix.rstrip('.')} writes into its cache in place, so it cannot be replayed for a "
                "gradient; pass use_cache=False or a growing cache (DynamicCache)"
            )
        for slot in call.tensors:
            slot.put(call.leaves, None)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, None, *ctx.call.replay(ctx.saved_tensors, grads))
