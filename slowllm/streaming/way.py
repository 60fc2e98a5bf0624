"""The way of a call through the blocks: where it enters, which blocks return at once, and where it ends.

One protocol for all that compute a part of the model: a resumed rider, a frozen trunk, a span of blocks that a server
computes for others. A way acts the same with and without autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


class StopForward(Exception):
    """Ends a forward pass early: nothing behind its last block is wanted."""


class Way:
    """Which blocks and chunks of the head a call computes. This class: all of them; subclasses say more.

    Attributes:
        num_frozen: blocks from the first that want no gradient.
    """

    num_frozen = 0

    def input_of(self, block: int) -> Tensor | None:
        """Return the hidden states that a block gets; None for those that came from before it."""
        return None

    def output_of(self, block: int) -> Any:
        """Return what a block returns at once, without being computed; None where it has to be computed."""
        return None

    def pass_block(self, block: int, output: Any) -> None:
        """Note the output of a block that was computed.

        Raises:
            StopForward: the way ends here.
        """

    def sums_of(self, chunk: int) -> tuple[Tensor, ...]:
        """Return the sums after a chunk of the head; an empty tuple where it has to be computed."""
        return ()

    def pass_chunk(self, chunk: int, sums: tuple[Tensor, ...]) -> None:
        """Note the sums after a chunk of the head that was computed."""


class SkipBlocks(Way):
    """Skip the first blocks, whose last output is known."""

    def __init__(self, num_blocks: int, output: Any) -> None:
        self.num_frozen, self._output = num_blocks, output

    def output_of(self, block: int) -> Any:
        """Return the known output, which is the next block's input; None for the blocks that are not skipped."""
        return self._output if block < self.num_frozen else None


class StopAfterBlocks(Way):
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


class SpanOfBlocks(Way):
    """Compute the blocks from `first` to `end` - 1 on given hidden states, and nothing else.

    Attributes:
        outputs: what each of these blocks returned, by its number; only the last one's unless all are kept.

    Args:
        first: the first block that is computed.
        end: the number after the last.
        hidden: (B, T, H) that block `first` gets.
        stand_in: what the blocks below return at once; their code and their inputs do not count.
        keeps_all: whether the outputs of all blocks are kept.
        on_block: called with the number of each block that has been computed.
    """

    def __init__(
        self, first: int, end: int, hidden: Tensor, stand_in: Any, *, keeps_all: bool = False,
        on_block: Callable[[int], None] | None = None,
    ) -> None:  # fmt: skip
        # Blocks below `first` are not computed; what is above them may want gradients.
        self.outputs: dict[int, Any] = {}
        self._first, self._end, self._hidden = first, end, hidden
        self._stand_in, self._keeps_all, self._on_block = stand_in, keeps_all, on_block

    def input_of(self, block: int) -> Tensor | None:
        """Return the given hidden states for the first block of the span."""
        return self._hidden if block == self._first else None

    def output_of(self, block: int) -> Any:
        """Return the stand-in for the blocks below the span."""
        return self._stand_in if block < self._first else None

    def pass_block(self, block: int, output: Any) -> None:
        """Keep the output of a block.

        Raises:
            StopForward: it was the last of the span.
        """
        if self._on_block is not None:
            self._on_block(block)
        is_last = block == self._end - 1
        if is_last or self._keeps_all:
            self.outputs[block] = output
        if is_last:
            raise StopForward
