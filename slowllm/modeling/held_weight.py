"""A weight that is in memory only while its unit is held: what autograd keeps of an expert between forward and backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from slowllm.errors import UnsupportedError
from slowllm.streaming.lazy_weight import LazyWeight


class Holder:
    """Says where the weights of one unit are now.

    Attributes:
        weights: of the unit, by name; None while it is not held.
    """

    def __init__(self) -> None:
        self.weights: Mapping[str, Tensor] | None = None


class HeldWeight(Tensor):
    """A matrix of a unit; its views are such weights, too. Every operation but a view reads the matrix that is held then.

    Attributes:
        stored: a meta tensor that says which elements of the matrix are meant.
        holder: of the unit.
        key: the matrix's name there.
    """

    stored: Tensor
    holder: Holder
    key: str

    # Without this, torch would wrap the results of operations in this class as well.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, stored: Tensor, holder: Holder, key: str, device: torch.device) -> HeldWeight:
        """Wrap a meta tensor.

        Args:
            stored: the matrix's shape and strides.
            holder: of its unit.
            key: its name there.
            device: where the weights will be.
        """
        weight: HeldWeight = Tensor._make_wrapper_subclass(
            cls, stored.shape, strides=stored.stride(), storage_offset=stored.storage_offset(),
            dtype=stored.dtype, device=device,
        )  # fmt: skip
        weight.stored, weight.holder, weight.key = stored, holder, key
        return weight

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"HeldWeight({self.key}, {tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        infos = [value.alias_info for value in func._schema.returns]
        if any(info is not None and not info.is_write for info in infos):
            return _view(func, args, kwargs)
        if any(info is not None and info.is_write for info in (a.alias_info for a in func._schema.arguments)):
            first = args[0] if args else None
            if isinstance(first, HeldWeight):
                raise UnsupportedError(f"a streamed weight cannot be written to ({func})")

        def held(value: Any) -> Any:
            return value.now() if isinstance(value, HeldWeight) else value

        return func(*tree_map(held, args), **tree_map(held, kwargs))

    def now(self) -> Tensor:
        """Return what the weight stands for, of the matrix that is held."""
        assert self.holder.weights is not None, "an expert is held while its gradient is computed"
        whole = self.holder.weights[self.key]
        if isinstance(whole, LazyWeight):
            shape = self.stored if whole.coded is not None else whole.stored.as_strided(
                self.stored.shape, self.stored.stride(), whole.stored.storage_offset() + self.stored.storage_offset()
            )  # fmt: skip
            with torch.inference_mode(False):
                return LazyWeight(shape, whole.dtype, whole.buffer, whole.coded)
        return whole.as_strided(
            self.stored.shape, self.stored.stride(), whole.storage_offset() + self.stored.storage_offset()
        )


def _view(func: Any, args: Sequence[Any], kwargs: Any) -> Any:
    result = func.decompose(*args, **kwargs)
    if result is not NotImplemented:
        return result
    weight = args[0]

    def wrap(value: Any) -> Any:
        return (
            HeldWeight(value, weight.holder, weight.key, weight.device)
            if isinstance(value, Tensor)
            else value
        )

    with torch.inference_mode(False):
        return tree_map(wrap, func(weight.stored, *args[1:], **kwargs))
