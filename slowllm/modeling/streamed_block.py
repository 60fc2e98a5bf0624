"""StreamedBlock: a transformers block whose weights are bound when its stop comes round; or those of its leaves.

A streamed block gets whatever transformers passes and returns what the block returned. It makes no mask, no
rotary table and no cache of its own. Gradients: an autograd Function keeps the block's inputs; backward visits
the stop again and recomputes, from a snapshot of the cache as it was. Blocks always compute in eval mode, and no
weight ever requires grad.

Where memory is too small for whole blocks, a block runs its own code on its rider's thread, and each of its leaves
(linears, fused experts) is a stop: a `LeafwiseBlock` of `StreamedLeaf`s. That way is forward only.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from slowllm.errors import ArchitectureError, NonFiniteError, UnsupportedError
from slowllm.runtime.state import journal
from slowllm.streaming.carousel import Carousel
from slowllm.streaming.riders import Autocast, autocast_here
from slowllm.streaming.stops import Direction, Weights

# Which positions hold text: the (B, T) attention mask of the model call under way, None where all do. A mask of
# another form says nothing that could be read here, and is written as UNKNOWN_MASK.
text_mask: ContextVar[Tensor | None] = ContextVar("text_mask", default=None)
UNKNOWN_MASK = torch.empty(0)


def check_finite(name: str, values: Tensor, *, infinity_is_legal: bool = False) -> None:
    """Check an output at the positions that hold text.

    Args:
        name: of the block, for the error.
        values: (B, T, ...), or anything else, which is then checked as a whole.
        infinity_is_legal: whether only NaN is an error.
    Raises:
        NonFiniteError: with the first position.
    """
    good = ~values.isnan() if infinity_is_legal else values.isfinite()
    if bool(good.all()):
        return
    bad = ~good.flatten(2).all(-1) if values.dim() >= 3 else ~good
    mask = text_mask.get()
    if mask is UNKNOWN_MASK:
        if not bool(bad.all()):
            return
    elif mask is not None and bad.dim() == 2 and len(mask) == len(bad) and mask.shape[1] >= bad.shape[1]:
        bad &= mask[:, -bad.shape[1] :].bool().to(bad.device)
    if bool(bad.any()):
        kind = "NaN" if bool(values.isnan().any()) else "infinity"
        position = bad.nonzero()[0].tolist()
        error = NonFiniteError(
            f"{name}: {kind} in the output at position {position}; "
            "the weights are damaged, or their numbers are too large for the compute dtype (try float32)"
        )
        error.row = position[0] if len(position) > 1 else None
        raise error


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of the model's blocks.

    Raises:
        ArchitectureError: there is no one list of blocks, or blocks share weights.
    """
    family = type(model).__name__
    config = model.config.get_text_config()
    count = getattr(config, "num_hidden_layers", None)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    # Lists inside a block (experts, per-head norms) may happen to be as long.
    outer = [(n, m) for n, m in lists if not any(n.startswith(f"{other}.") for other, _ in lists)]
    if len(outer) != 1:
        found = ", ".join(name for name, _ in outer) or "none"
        raise ArchitectureError(
            f"{family}: its {count} blocks should stand in one ModuleList, but the lists of that length are: {found}"
        )
    name, blocks = outer[0]
    owners: dict[int, int] = {}
    for index, block in enumerate(blocks):
        for parameter in block.parameters():
            if owners.setdefault(id(parameter), index) != index:
                raise ArchitectureError(
                    f"{family}: blocks {owners[id(parameter)]} and {index} share weights, so a block is no stop of its own"
                )
    return name, blocks


class _Streamed(nn.Module):
    """What stands in a module's place, and binds its weights when their stop comes.

    It shares the module's submodules, whose parameters are on the meta device, so names, counts and hooks are
    those of transformers. Subclasses also derive from the module's own class.
    """

    # Not the module's own __call__, which in some releases of transformers checkpoints: blocks are replayed anyway.
    __call__ = nn.Module.__call__

    _plain: nn.Module
    _carousel: Carousel
    _stop: int
    _prefix: str
    _names: tuple[str, ...]

    def train(self, mode: bool = True) -> _Streamed:
        """Set the flag, but leave the submodules in eval mode: what is streamed has no dropout."""
        self.training = mode
        return self

    def _visit(
        self, direction: Direction, work: Callable[[Weights], Any], *, comes_back: bool = False
    ) -> Any:
        return self._carousel.visit(self._stop, direction, work, comes_back=comes_back)

    def _run(self, weights: Weights, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if tuple(name for name, _ in self._plain.named_parameters()) != self._names:
            raise UnsupportedError(
                f"{self._prefix.rstrip('.')} was changed after loading: adapters inside streamed blocks (LoRA and "
                "its like) are not supported; use prompt tuning or prefix tuning"
            )
        bound = {name: weights[self._prefix + name] for name in self._names}
        return functional_call(self._plain, bound, args, kwargs)


@dataclass(frozen=True)
class Home:
    """The device at which a block is computed, where the model is not all on the processor.

    Attributes:
        device: to which what the block is given is moved, its own layer of a cache included.
        after: where its output goes; None where it stays for the next block.
    """

    device: torch.device
    after: torch.device | None = None


class StreamedBlock(_Streamed):
    """What stands in the model in a block's place; made by `stream_block`."""

    _replays = True
    _home: Home | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Pass through the block when its stop comes; see the block's own class for arguments and result."""
        return _at_home(self._home, self._stop, self._pass, args, kwargs)

    def _pass(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._compute(args, kwargs)
        kept = journal.get()
        if kept is not None and self._stop < kept.num_frozen:  # nothing below it wants a gradient
            with torch.no_grad():
                return self._compute(args, kwargs)
        if not self._replays:
            return self._compute(args, kwargs)
        call = _Call.record(self, args, kwargs)
        if not call.inputs:
            return self._compute(args, kwargs)
        return call.apply()

    def _compute(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def work(weights: Weights) -> Any:
            output = self._run(weights, args, kwargs)
            check_finite(self._prefix.rstrip("."), _hidden_of(output))
            return output

        return _kept_in_journal(self._stop, lambda: self._visit("up", work))


class StreamedLeaf(_Streamed):
    """What stands in a block in a leaf's place; made by `stream_leaves`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Pass through the leaf when its stop comes; see the leaf's own class for arguments and result.

        Raises:
            UnsupportedError: a gradient is wanted.
        """
        if torch.is_grad_enabled() and any(
            isinstance(value, Tensor) and value.requires_grad for value in (*args, *kwargs.values())
        ):
            raise UnsupportedError(
                f"{self._prefix.rstrip('.')}: this budget streams blocks in parts, which cannot run backward; "
                "allow enough memory for whole blocks (`slowllm plan` says how much)"
            )
        return self._visit("up", lambda weights: self._run(weights, args, kwargs))


class LeafwiseBlock(nn.Module):
    """Mixin for the class of a block whose leaves are streamed; made by `stream_leaves`."""

    __call__ = nn.Module.__call__

    _name: str
    _number: int
    _home: Home | None = None

    def train(self, mode: bool = True) -> LeafwiseBlock:
        """Set the flag, but leave the submodules in eval mode, as `StreamedBlock` does."""
        self.training = mode
        return self


def stream_leaves(
    block: nn.Module,
    carousel: Carousel,
    stops: Mapping[str, int],
    name: str,
    number: int,
    home: Home | None = None,
) -> None:
    """Turn the leaves of a block into stops, in place.

    Args:
        block: parameters of its leaves on the meta device, all else real.
        carousel: that brings the weights.
        stops: the number of each leaf's stop, by its full name.
        name: of the block in the model.
        number: of the block.
        home: where it is computed; None where all is on the processor.
    """
    block.requires_grad_(False).eval()
    for leaf_name, stop in stops.items():
        parent, _, attribute = leaf_name[len(name) + 1 :].rpartition(".")
        owner = block.get_submodule(parent)
        owner._modules[attribute] = _shell(
            StreamedLeaf, cast(nn.Module, owner._modules[attribute]), carousel, stop, leaf_name
        )
    kind = type(block)

    def forward(self: LeafwiseBlock, *args: Any, **kwargs: Any) -> Any:
        def pass_leaves(*args: Any, **kwargs: Any) -> Any:
            output = kind.forward(self, *args, **kwargs)
            check_finite(self._name, _hidden_of(output))
            return output

        def work(*args: Any, **kwargs: Any) -> Any:
            return _kept_in_journal(self._number, lambda: pass_leaves(*args, **kwargs))

        return _at_home(self._home, self._number, work, args, kwargs)

    names = {"forward": functools.wraps(kind.forward)(forward), "__module__": __name__}
    block.__class__ = type(f"Streamed{kind.__name__}", (LeafwiseBlock, kind), names)
    streamed = cast(LeafwiseBlock, block)
    streamed._name, streamed._number, streamed._home = name, number, home


def stream_block(
    block: nn.Module,
    carousel: Carousel,
    stop: int,
    name: str,
    *,
    replays: bool = True,
    home: Home | None = None,
) -> StreamedBlock:
    """Return the streamed form of a block.

    Args:
        block: parameters on the meta device, buffers real.
        carousel: that brings its weights.
        stop: its number there.
        name: of the block in the model; weights come under their full names.
        replays: whether a backward pass computes the block again, at its stop; else autograd keeps what the block has
            computed and its weights, which must then stay where they are.
        home: where it is computed; None where all is on the processor.
    """
    block.requires_grad_(False).eval()
    streamed = cast(StreamedBlock, _shell(StreamedBlock, block, carousel, stop, name))
    streamed._replays, streamed._home = replays, home
    return streamed


def _shell(mixin: type[_Streamed], plain: nn.Module, carousel: Carousel, stop: int, name: str) -> _Streamed:
    kind = type(plain)
    # A subclass of the module's class: transformers finds the blocks whose outputs it records by isinstance.
    streamed = type(f"Streamed{kind.__name__}", (mixin, kind), {"__module__": __name__})
    shell = cast(_Streamed, nn.Module.__new__(streamed))
    for key, value in plain.__dict__.items():
        # Submodules, parameters and buffers are shared; hooks are not, or they would run twice.
        shell.__dict__[key] = copy.copy(value) if "_hooks" in key else value
    shell.__dict__["_plain"] = plain  # past nn.Module's __setattr__: it is not a submodule
    shell._carousel, shell._stop, shell._prefix = carousel, stop, f"{name}."
    shell._names = tuple(parameter for parameter, _ in plain.named_parameters())
    return shell


def _at_home(
    home: Home | None, layer: int, work: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Do the work of a block on what it is given, moved to where it is computed."""
    if home is None:
        return work(*args, **kwargs)
    args, kwargs = _moved((args, kwargs), home.device, layer)
    output = work(*args, **kwargs)
    return output if home.after is None else _moved(output, home.after)


def _moved(value: Any, device: torch.device, layer: int | None = None) -> Any:
    """Return tensors moved to a device; in caches those of one layer are moved in place."""

    def move(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(device)
        if isinstance(leaf, Cache) and layer is not None:
            for slot in _slots(0, leaf):
                if slot.layer == layer:
                    slot.put([leaf], slot.get([leaf]).to(device))
        return leaf

    return tree_map(move, value, is_leaf=_is_leaf)


def _kept_in_journal(block: int, work: Callable[[], Any]) -> Any:
    """Do the work of a block, unless the rider's journal says that it was done before the process was killed."""
    kept = journal.get()
    if kept is None:
        return work()
    output = kept.output_of(block)
    if output is None:
        output = work()
        kept.pass_block(block, output)
    return output


def _hidden_of(output: Any) -> Tensor:
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)


def _is_leaf(value: Any) -> bool:
    return isinstance(value, Cache)


@dataclass(frozen=True)
class _Slot:
    """Where a tensor stands: the leaf of that number; or, in the cache there, an attribute of a layer, at a key."""

    leaf: int
    layer: int | None = None
    attribute: str = ""
    key: tuple[Any, ...] = ()

    def get(self, leaves: list[Any]) -> Any:
        if self.layer is None:
            return leaves[self.leaf]
        value = getattr(leaves[self.leaf].layers[self.layer], self.attribute)
        return value[self.key[0]] if self.key else value

    def put(self, leaves: list[Any], value: Any) -> None:
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


def _slots(leaf: int, cache: Cache) -> Iterator[_Slot]:
    """Find the tensors of the cache that is the argument of number `leaf`."""
    for number, layer in enumerate(cache.layers):
        for attribute, value in vars(layer).items():
            if isinstance(value, Tensor):
                yield _Slot(leaf, number, attribute)
            elif isinstance(value, dict | list):
                keys = value if isinstance(value, dict) else range(len(value))
                for key in keys:
                    if isinstance(value[key], Tensor):
                        yield _Slot(leaf, number, attribute, (key,))


@dataclass
class _Call:
    """One call of a block under autograd: enough to run it again.

    Attributes:
        leaves: the flattened arguments; caches as they were before the call, tensors taken out after it.
        inputs: the tensors that want a gradient; `tensors` are all of them.
    """

    block: StreamedBlock
    leaves: list[Any]
    spec: TreeSpec
    live: list[Any]
    inputs: list[_Slot]
    tensors: list[_Slot]
    outputs: list[_Slot]
    autocasts: list[Autocast]

    @classmethod
    def record(cls, block: StreamedBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        live, spec = tree_flatten((args, kwargs), is_leaf=_is_leaf)
        leaves = [_snapshot(leaf) if isinstance(leaf, Cache) else leaf for leaf in live]
        tensors = [_Slot(i) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Cache):
                tensors += _slots(i, leaf)
        inputs = [slot for slot in tensors if slot.get(leaves).requires_grad]
        return cls(block, leaves, spec, live, inputs, tensors, [], autocast_here())

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
            check_finite(self.block._prefix.rstrip("."), _hidden_of(output))
            return output

        output = self.block._visit("up", work, comes_back=True)
        out_leaves, out_spec = tree_flatten(output, is_leaf=_is_leaf)
        results.append((out_leaves, out_spec))
        given = {id(slot.get(self.live)) for slot in self.tensors if slot.layer is None}
        self.outputs = [
            _Slot(i)
            for i, leaf in enumerate(out_leaves)
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and id(leaf) not in given
        ]
        for i, leaf in enumerate(self.live):
            if isinstance(leaf, Cache):
                known = {slot: id(slot.get(self.leaves)) for slot in _slots(i, self.leaves[i])}
                self.outputs += [
                    slot
                    for slot in _slots(i, leaf)
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
                out_leaves, _ = tree_flatten(self.block._run(weights, args, kwargs), is_leaf=_is_leaf)
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
                stack.enter_context(autocast.again())
            result: list[Tensor | None] = self.block._visit("down", work)
        return result


class _Replay(torch.autograd.Function):
    """Forward keeps the arguments of a block; backward visits the block again and recomputes."""

    @staticmethod
    def forward(ctx: Any, call: _Call, results: list[Any], *inputs: Tensor) -> tuple[Tensor, ...]:
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
