"""Which part of a model does this process hold: some of its blocks, what is outside them, or everything?

Knows numbers of blocks and names of parameters; reads nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self

from transformers import PreTrainedModel

from slowllm.errors import InputError, counted
from slowllm.modeling.blocks import find_blocks
from slowllm.options import AUTO, parse_span


@dataclass(frozen=True)
class Part:
    """Blocks `first` to `end - 1` of a model, with or without its ends.

    Attributes:
        first: the first block.
        end: the block after the last; `first` where the part has no block.
        has_ends: whether what is outside the blocks belongs to it: embedding, norms, projections, head.
    Raises:
        InputError: these are no blocks, or nothing belongs to the part.
    """

    first: int
    end: int
    has_ends: bool

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.end:
            raise InputError(
                f"{self.first}:{self.end} names no blocks; give the first and the one after the last"
            )
        if self.first == self.end and not self.has_ends:
            raise InputError(f"{self.first}:{self.end} names no blocks; a part has at least one, or the ends")

    @classmethod
    def whole(cls, num_blocks: int) -> Self:
        """Return the part that is everything."""
        return cls(0, num_blocks, has_ends=True)

    @classmethod
    def span(cls, first: int, end: int) -> Self:
        """Return a server's part: blocks and nothing else."""
        return cls(first, end, has_ends=False)

    @classmethod
    def ends(cls, num_blocks: int) -> Self:
        """Return a client's part: what is outside the blocks of a model that has `num_blocks`."""
        return cls(num_blocks, num_blocks, has_ends=True)

    @property
    def blocks(self) -> range:
        """The numbers of its blocks."""
        return range(self.first, self.end)

    def is_whole(self, num_blocks: int) -> bool:
        """Whether it is everything of a model of `num_blocks`."""
        return self.has_ends and len(self.blocks) == num_blocks

    def check(self, num_blocks: int) -> None:
        """Refuse a part that reaches out of a model of `num_blocks`.

        Raises:
            InputError: it does.
        """
        if self.end > num_blocks:
            raise InputError(
                f"{self}: the model has {counted(num_blocks, 'block')}, numbered from 0 to {num_blocks - 1}"
            )

    def __str__(self) -> str:
        ends = "what is outside the blocks"
        if not self.blocks:
            return ends
        last = self.end - 1
        blocks = f"block {last}" if len(self.blocks) == 1 else f"blocks {self.first} to {last}"
        return f"{blocks} and {ends}" if self.has_ends else blocks


def parse_blocks(text: str, num_blocks: int) -> Part | int | Literal["auto"]:
    """Return what an option says of blocks; see `options.parse_span`.

    Raises:
        InputError: it names no blocks, or the model has not as many.
    """
    said = parse_span(text)
    if said == AUTO:
        return AUTO
    if isinstance(said, tuple):
        part = Part.span(*said)
        part.check(num_blocks)
        return part
    count = said
    if not 1 <= count <= num_blocks:
        raise InputError(f"{counted(count, 'block')}: the model has {num_blocks}, of which 1 at least")
    return count


def names_in(model: PreTrainedModel, part: Part | None) -> Callable[[str], bool]:
    """Return a function that says whether a parameter or buffer, by its name in the model, belongs to a part.

    Args:
        model: a skeleton.
        part: None for the whole model.
    Raises:
        InputError: the part reaches out of the model.
        ArchitectureError: the model does not have one list of blocks.
    """
    if part is None:
        return lambda name: True
    blocks_name, blocks = find_blocks(model)
    part.check(len(blocks))

    def is_in(name: str) -> bool:
        number = block_of(name, blocks_name)
        return part.has_ends if number is None else number in part.blocks

    return is_in


def block_of(name: str, blocks_name: str) -> int | None:
    """Return the number of the block that a parameter is in; None where it is outside the blocks.

    Args:
        name: of the parameter in the model.
        blocks_name: of the list of blocks.
    """
    if not name.startswith(f"{blocks_name}."):
        return None
    number = name[len(blocks_name) + 1 :].partition(".")[0]
    return int(number) if number.isdigit() else None
