"""Run a block again for its gradient (activation recomputation), from a snapshot of its arguments and cache."""

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
from slowllm.streaming.call_context import call_context
from slowllm.streaming.stops import Direction, Weights
from slowllm.streaming.thread_context import current_autocasts


def hidden_of(output: Any) -> Tensor:
    """Return the hidden states (B, T, H) of what a block returned."""
    return cast(Tensor, output[0] if isinstance(output, tuple | list) else output)


def is_cache(value: Any) -> bool:
    """Return whether a value is a cache, which is not flattened with the other arguments."""
    return isinstance(value, Cache)


class Recomputable(Protocol):
    """A block that can be run again at its stop; `StreamedBlock` is one."""

    _name: str

    def _visit(
        self, direction: Direction, work: Callable[[Weights], Any], *, comes_back: bool = False
    ) -> Any:
        """Visit the block's stop, and do some work with its weights."""

    def _run(self, weights: Weights, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute the block with its weights."""


class LateNode(Protocol):
    """A node of a block's graph whose gradients are not computed by autograd's own run, during which nobody may wait."""

    output: Tensor

    def compute_gradients(self, gradient: Tensor) -> None:
        """Compute what the node will return when autograd comes to it, given the gradient of its output."""


@dataclass(frozen=True)
class TensorRef:
    """A tensor's place: a leaf of flattened arguments or results; or, in the cache there, a layer's attribute, at a key."""

    leaf: int
    layer: int | None = None
    attribute: str = ""
    key: tuple[Any, ...] = ()

    def side(self, arguments: list[Any], results: list[Any]) -> list[Any]:
        """Return the leaves that an output stands in: a cache is an argument."""
        return results if self.layer is None else arguments

    def get(self, leaves: list[Any]) -> Any:
        """Return the tensor from a list of leaves."""
        if self.layer is None:
            return leaves[self.leaf]
        value = getattr(leaves[self.leaf].layers[self.layer], self.attribute)
        return value[self.key[0]] if self.key else value

    def put(self, leaves: list[Any], value: Any) -> None:
        """Put a tensor, or None, into this place."""
        if self.layer is None:
            leaves[self.leaf] = value
        elif self.key:
            getattr(leaves[self.leaf].layers[self.layer], self.attribute)[self.key[0]] = value
        else:
            setattr(leaves[self.leaf].layers[self.layer], self.attribute, value)


def _snapshot(cache: Cache) -> Cache:
    """Copy a cache's layers and their tables but not their tensors, which growing caches replace."""
    clone = copy.copy(cache)
    clone.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in clone.layers:
        for attribute, value in vars(layer).items():
            # Linear attention keeps its states, and whether they are set, in dicts.
            if isinstance(value, dict | list | set):
                setattr(layer, attribute, copy.copy(value))
    return clone


def tensor_refs(leaf: int, cache: Cache) -> Iterator[TensorRef]:
    """Yield the places of a cache's tensors; the cache is the leaf of number `leaf`."""
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
    """One call of a block under autograd, recorded so that it can be run again.

    Attributes:
        leaves: the flattened arguments; caches as they were before the call, tensors removed after it.
        live: the flattened arguments themselves, until the call is over.
        inputs: the tensors among the arguments that want a gradient.
        tensors: all tensors among the arguments.
        outputs: the tensors that the call returns or puts into a cache.
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
        """Record the arguments before a call."""
        live, spec = tree_flatten((args, kwargs), is_leaf=is_cache)
        leaves = [_snapshot(leaf) if isinstance(leaf, Cache) else leaf for leaf in live]
        tensors = [TensorRef(i) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Cache):
                tensors += tensor_refs(i, leaf)
        inputs = [ref for ref in tensors if ref.get(leaves).requires_grad]
        return cls(block, leaves, spec, live, inputs, tensors, [], current_autocasts())

    def apply(self) -> Any:
        """Run the block as one node of autograd's graph; return what the block returns."""
        results: list[Any] = []
        flat = _Replay.apply(self, results, *(ref.get(self.live) for ref in self.inputs))  # type: ignore[no-untyped-call]
        out_leaves, out_spec = results.pop()
        for ref, value in zip(self.outputs, flat, strict=True):
            ref.put(ref.side(self.live, out_leaves), value)
        # From here on autograd keeps the inputs, and notices a later write into them; nothing keeps the live cache.
        self.live = []
        return tree_unflatten(out_leaves, out_spec)

    def run_first(self, results: list[Any]) -> tuple[Tensor, ...]:
        """Run the block on the live arguments, and append its flattened result to `results`."""
        args, kwargs = tree_unflatten(self.live, self.spec)

        def work(weights: Weights) -> Any:
            output = self.block._run(weights, args, kwargs)
            check_finite(self.block._name, hidden_of(output))
            return output

        output = self.block._visit("up", work, comes_back=True)
        out_leaves, out_spec = tree_flatten(output, is_leaf=is_cache)
        results.append((out_leaves, out_spec))
        given = {id(ref.get(self.live)) for ref in self.tensors if ref.layer is None}
        self.outputs = [
            TensorRef(i)
            for i, leaf in enumerate(out_leaves)
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and id(leaf) not in given
        ]
        for i, leaf in enumerate(self.live):
            if isinstance(leaf, Cache):
                before = {ref: id(ref.get(self.leaves)) for ref in tensor_refs(i, self.leaves[i])}
                self.outputs += [
                    ref
                    for ref in tensor_refs(i, leaf)
                    if ref.get(self.live).is_floating_point() and before.get(ref) != id(ref.get(self.live))
                ]
        return tuple(ref.get(ref.side(self.live, out_leaves)) for ref in self.outputs)

    def replay(self, saved: tuple[Tensor, ...], grads: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        """Run the block again on copies of its arguments and return the gradient of each input."""
        leaves = [_snapshot(leaf) if isinstance(leaf, Cache) else leaf for leaf in self.leaves]
        for ref, tensor in zip(self.tensors, saved, strict=True):
            ref.put(leaves, tensor.detach())
        inputs = [ref.get(leaves).requires_grad_(True) for ref in self.inputs]
        args, kwargs = tree_unflatten(leaves, self.spec)

        def work(weights: Weights) -> list[Tensor | None]:
            # Forward and backward in one visit: autograd may save the weights, which are valid until the visit ends.
            nodes: list[LateNode] = []
            with torch.enable_grad(), call_context(late_nodes=nodes):
                out_leaves, _ = tree_flatten(self.block._run(weights, args, kwargs), is_leaf=is_cache)
            outputs = [ref.get(ref.side(leaves, out_leaves)) for ref in self.outputs]
            pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
            if not pairs:
                return [None] * len(inputs)
            reached, reached_grads = zip(*pairs, strict=True)
            for node in reversed(nodes):
                (grad,) = torch.autograd.grad(
                    reached, [node.output], reached_grads, retain_graph=True, allow_unused=True
                )
                if grad is not None:
                    node.compute_gradients(grad)
            return list(torch.autograd.grad(reached, inputs, reached_grads, allow_unused=True))

        with contextlib.ExitStack() as stack:
            for autocast in self.autocasts:
                stack.enter_context(autocast())
            result: list[Tensor | None] = self.block._visit("down", work)
        return result


class _Replay(torch.autograd.Function):
    """Keep the arguments of a block in forward; visit the block again and recompute in backward."""

    @staticmethod
    def forward(ctx: Any, call: RecordedCall, results: list[Any], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(ref.get(call.leaves) for ref in call.tensors))
        ctx.call = call
        versions = [ref.get(call.leaves)._version for ref in call.tensors]
        outputs = call.run_first(results)
        if versions != [ref.get(call.leaves)._version for ref in call.tensors]:
            raise UnsupportedError(
                f"{call.block._name} writes into its cache in place, so it cannot be replayed for a "
                "gradient; pass use_cache=False or a growing cache (DynamicCache)"
            )
        for ref in call.tensors:
            ref.put(call.leaves, None)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, None, *ctx.call.replay(ctx.saved_tensors, grads))
