"""What stands in a model for what its part lacks: blocks that others compute, and ends that cost no memory.

transformers' own forward runs through all of it. An absent block gives the output that the call's way has. Outside
the blocks, a part without ends computes with zeros, and whoever calls the model throws the results away.
"""

from __future__ import annotations

from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slowllm.errors import UnsupportedError
from slowllm.modeling.layout import Layout
from slowllm.modeling.parts import Part, block_of
from slowllm.streaming.call_context import current_call


class AbsentBlock(nn.Module):
    """A block that is not here: it has the class and the settings of the block, and no parameters.

    Attributes:
        number: of the block.
    """

    __call__ = nn.Module.__call__

    number: int
    _name: str
    _part: Part

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the block that the call's way has.

        Raises:
            UnsupportedError: the way has none.
        """
        output = current_call().way.output_of(self.number)
        if output is None:
            raise UnsupportedError(f"{self._name}: is not in this part of the model, which has {self._part}")
        return output


class AbsentHead(nn.Linear):
    """Mixin for the head of a part without ends."""

    __call__ = nn.Module.__call__

    _name: str
    _part: Part

    def forward(self, input: Tensor) -> NoReturn:
        """Refuse to make logits.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            f"{self._name}: the head is not in this part of the model, which has {self._part}; it gives hidden states only"
        )


def leave_out(model: PreTrainedModel, layout: Layout, device: torch.device | None = None) -> None:
    """Put stand-ins in the place of everything that a part of a model lacks.

    Args:
        model: a skeleton.
        layout: of the part.
        device: where a pass begins and ends; None for the processor.
    """
    part = layout.part
    for number, block in enumerate(layout.blocks):
        if number not in part.blocks:
            layout.blocks[number] = _absent(block, number, f"{layout.blocks_name}.{number}", part)
    if part.has_ends:
        return
    made: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        if block_of(f"{path}.", layout.blocks_name) is not None:
            continue
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:  # tied ones stay tied
                zero = torch.zeros((), dtype=parameter.dtype, device=device or "cpu")
                made[id(parameter)] = nn.Parameter(zero.expand(parameter.shape), requires_grad=False)
            module._parameters[attribute] = made[id(parameter)]
    head = layout.head
    kind = type(head)
    head.__class__ = type(f"Absent{kind.__name__}", (AbsentHead, kind), {"__module__": __name__})
    absent = cast(AbsentHead, head)
    absent._name, absent._part = layout.head_parameter.rpartition(".")[0], part


def _absent(block: nn.Module, number: int, name: str, part: Part) -> AbsentBlock:
    kind = type(block)
    # Of the block's own class, by which transformers finds the outputs that it records.
    made = type(f"Absent{kind.__name__}", (AbsentBlock, kind), {"__module__": __name__})
    absent = cast(AbsentBlock, nn.Module.__new__(made))
    nn.Module.__init__(absent)
    # A model's forward looks at settings of its blocks, such as the kind of attention.
    absent.__dict__.update(
        {key: value for key, value in vars(block).items() if isinstance(value, bool | int | float | str)}
    )
    absent.number, absent._name, absent._part = number, name, part
    return absent.eval()
