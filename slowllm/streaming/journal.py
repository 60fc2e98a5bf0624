"""Which blocks and chunks of the head a call of the model need not, or must not, compute."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class StopForward(Exception):
    """Ends a forward pass early: nothing behind its last block is wanted."""


class Journal:
    """What a call takes from earlier work instead of computing it. This class: nothing; subclasses say more.

    Attributes:
        num_frozen: blocks from the first that want no gradient.
    """

    num_frozen = 0

    def output_of(self, block: int) -> Any:
        """Return the output to use for a block, or for a later block; None where it has to be computed."""
        return None

    def pass_block(self, block: int, output: Any) -> None:
        """Note the output of a block that was computed."""

    def sums_of(self, chunk: int) -> tuple[Tensor, ...]:
        """Return the sums after a chunk of the head; an empty tuple where it has to be computed."""
        return ()

    def pass_chunk(self, chunk: int, sums: tuple[Tensor, ...]) -> None:
        """Note the sums after a chunk of the head that was computed."""


class SkipBlocks(Journal):
    """Skip the first blocks, whose last output is known."""

    def __init__(self, num_blocks: int, output: Any) -> None:
        self.num_frozen, self._output = num_blocks, output

    def output_of(self, block: int) -> Any:
        """Return the known output, which is the next block's input; None for the blocks that are not skipped."""
        return self._output if block < self.num_frozen else None


class StopAfterBlocks(Journal):
    """Keep the output of the last of the first blocks, and compute nothing after it."""

    def __init__(self, num_blocks: int) -> None:
        self.num_frozen = num_blocks
        self.output: Any = None

    def pass_block(self, block: int, output: Any) -> None:
        """Keep the output of the last block.

        Raises:
            StopForward: it was the last.
        """
        if block == self.num_frozen - 1:
            self.output = output
            raise StopForward
