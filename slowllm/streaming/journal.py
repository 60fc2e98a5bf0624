"""What is kept of a rider's way through the stops: blocks that need not, or must not, be computed."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, Protocol

from torch import Tensor


class Passed(Protocol):
    """What is kept of a rider's way.

    Attributes:
        num_frozen: blocks from the first below which no gradient is asked for.
    """

    num_frozen: int

    def output_of(self, block: int) -> Any:
        """Return the output of a block that was passed, or of a later one; None where it is still to come."""

    def pass_block(self, block: int, output: Any) -> None:
        """Note the output of a block."""

    def sums_of(self, chunk: int) -> tuple[Tensor, ...]:
        """Return what a chunk of the head, which was passed, left; nothing where it is still to come."""

    def pass_chunk(self, chunk: int, sums: tuple[Tensor, ...]) -> None:
        """Note what a chunk of the head left."""


# What is kept for the rider that calls the model, None where nothing is.
journal: ContextVar[Passed | None] = ContextVar("journal", default=None)
