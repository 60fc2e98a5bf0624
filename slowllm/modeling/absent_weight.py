"""What stands in a model for a streamed weight between visits: its shape and dtype, and no values."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map
from transformers import PreTrainedModel

from slowllm.errors import UnsupportedError


class AbsentWeight(Tensor):
    """A weight that has no values outside a visit of its stop, and says so where an operation reads it.

    It is on the meta device. Its shape, dtype and views can be had.

    Attributes:
        parameter_name: its name in the model.
    """

    parameter_name: str

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, like: Tensor, name: str) -> AbsentWeight:
        """Stand for a tensor with the shape, strides and dtype of `like`."""
        weight: AbsentWeight = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=torch.device("meta")
        )
        weight.parameter_name = name
        return weight

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"AbsentWeight({self.parameter_name}, {tuple(self.shape)}, {self.dtype})"

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UnsupportedError(
            f"{self.parameter_name} has values only while the model reads it; `lm.weights({self.parameter_name!r})` reads it and returns a copy"
        )

    # These do not pass through torch's dispatcher.
    numpy = tolist = item = data_ptr = __array__ = _refuse

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        absent = next(value for value in tree_flatten((args, kwargs))[0] if isinstance(value, AbsentWeight))
        returns = func._schema.returns
        if not returns or any(value.alias_info is None or value.alias_info.is_write for value in returns):
            absent._refuse()

        def shape_of(value: Any) -> Any:
            if not isinstance(value, AbsentWeight):
                return value
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")

        views = func(*tree_map(shape_of, args), **tree_map(shape_of, kwargs or {}))
        return tree_map(lambda view: AbsentWeight(view, absent.parameter_name), views)


def mark_absent(model: PreTrainedModel, names: Collection[str]) -> None:
    """Put an `AbsentWeight` in the place of parameters that stops bring.

    Args:
        model: whose blocks and head are streamed.
        names: of the parameters. One that is tied to a parameter of another name is replaced under its own name only.
    """
    for path, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            name = f"{path}.{attribute}" if path else attribute
            if parameter is not None and name in names:
                module._parameters[attribute] = nn.Parameter(
                    AbsentWeight(parameter, name), requires_grad=False
                )
