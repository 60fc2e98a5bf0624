"""Hidden states behind chosen blocks, of every token of texts or pooled over each text.

A block's hidden states are those that transformers returns with `output_hidden_states`: behind the last block, they
have passed the model's last norm.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from slowllm.errors import InputError, forward_errors
from slowllm.inference.text_batches import SWEEPS_HELD, Result, TextPasses, TokenBatch
from slowllm.inference.text_files import Text, Texts
from slowllm.modeling.layout import block_numbers
from slowllm.modeling.parts import Part
from slowllm.modeling.recompute import hidden_of
from slowllm.planning.host_plan import padding_worth
from slowllm.planning.job import Job, Rates
from slowllm.runtime.run_identity import batch_identity, packed_as_begun, saved_packing
from slowllm.runtime.state import State
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.streaming.call_context import call_context
from slowllm.streaming.hints import Reach
from slowllm.streaming.way import StopForward, Way

Pool = Literal["last", "mean", "all"]
POOLS: tuple[Pool, ...] = ("last", "mean", "all")
# Bytes of a number before it is written: none is larger.
_NUMBER_BYTES = 4


def parse_block_numbers(text: str, num_blocks: int) -> tuple[int, ...]:
    """Return the numbers in a list such as ``10,20``, in ascending order.

    Raises:
        InputError: they are no numbers of blocks, or one is there twice.
    """
    try:
        numbers = sorted(int(word) for word in text.split(","))
    except ValueError as error:
        raise InputError(f"--blocks {text!r} is no list of numbers, such as 10,20") from error
    if numbers[0] < 0 or numbers[-1] >= num_blocks:
        wrong = numbers[0] if numbers[0] < 0 else numbers[-1]
        raise InputError(
            f"--blocks {text}: there is no block {wrong}; they are numbered from 0 to {num_blocks - 1}"
        )
    if len(set(numbers)) < len(numbers):
        raise InputError(f"--blocks {text}: names a block twice")
    return tuple(numbers)


def part_of_blocks(blocks: Sequence[int], num_blocks: int) -> Part | None:
    """Return the part of a model that is needed for the hidden states behind blocks; None for all of it."""
    return None if blocks[-1] == num_blocks - 1 else Part(0, blocks[-1] + 1, has_ends=True)


def tensor_names(blocks: Sequence[int]) -> tuple[str, ...]:
    """Return the names of the hidden states behind blocks."""
    return tuple(f"hidden_{block}" for block in blocks)


def job_of(
    texts: Texts,
    num_blocks: int,
    width: int,
    pool: Pool,
    rates: Rates,
    begun: Mapping[str, Any] | None = None,
) -> Job:
    """Return what the plan must know of a job.

    Args:
        texts: all of them.
        num_blocks: whose hidden states are kept.
        width: of a hidden state.
        pool: over each text.
        rates: of the machine.
        begun: from `state.read_job`: micro-batches are then packed as when the job was begun.
    Raises:
        StateError: the state is another version's.
    """
    packing = saved_packing(begun or {})
    num_tokens = texts.padded_tokens(0, packing[2] if packing else padding_worth(rates))
    # A rider holds the hidden states of every token until it has left, and copies that are kept.
    copies = 2 + (SWEEPS_HELD if pool == "all" else 1)
    job = Job(
        num_tokens=num_tokens,
        longest=texts.longest,
        forward_only=True,
        keeps_results=False,
        held_token_bytes=copies * num_blocks * width * _NUMBER_BYTES,
    )
    return packed_as_begun(job, begun)


def describe(lm: StreamedLM, texts: Texts, **settings: Any) -> dict[str, Any]:
    """Return what the rows depend on, for `State`."""
    return batch_identity("hidden", lm, texts=texts.digest, **settings)


def hidden_states(lm: StreamedLM, blocks: Sequence[int], **inputs: Any) -> list[Tensor]:
    """Return the hidden states (B, T, H) behind blocks, by one call of a streamed model; nothing behind them is computed.

    Args:
        lm: has these blocks and those below them.
        blocks: in ascending order, from 0.
        inputs: of the model's forward.
    Raises:
        NonFiniteError: a block returned NaN.
    """
    num_blocks, last = len(lm.layout.blocks), blocks[-1]
    way = _KeepBlocks(blocks, ends=last < num_blocks - 1)
    end = (
        max((stop for stop, block in enumerate(block_numbers(lm.layout)) if 0 <= block <= last), default=0)
        + 1
    )
    owner = lm.model.get_submodule(lm.layout.blocks_name.rpartition(".")[0])
    output: Any = None
    with torch.no_grad(), call_context(way=way, reach=Reach(end=end)), contextlib.suppress(StopForward):
        output = owner(use_cache=False, **inputs)
    if last == num_blocks - 1:  # as transformers has it, behind the last norm
        way.kept[last] = output.last_hidden_state
    return [way.kept[block].cpu() for block in blocks]


class _KeepBlocks(Way):
    """Keep what some blocks return, and compute nothing behind the last of them if the call `ends` there."""

    def __init__(self, blocks: Sequence[int], *, ends: bool) -> None:
        self.kept: dict[int, Tensor] = {}
        self._blocks, self._ends = blocks, ends

    def pass_block(self, block: int, output: Any) -> None:
        """Keep the output of a chosen block.

        Raises:
            StopForward: it was the last.
        """
        if block in self._blocks:
            self.kept[block] = hidden_of(output)
        if self._ends and block == self._blocks[-1]:
            raise StopForward


def pass_hidden(
    lm: StreamedLM,
    texts: Iterable[Text],
    blocks: Sequence[int],
    pool: Pool,
    *,
    state: State | None = None,
    num_done: int = 0,
) -> TextPasses:
    """Return the passes of texts that keep hidden states behind blocks.

    Of a text of L tokens, prefix included, the result has `input_ids` (L,) int32 and for each block ``hidden_N``: (L, H)
    of all tokens, or (H,) of the ``last`` one, or their ``mean``, in the compute dtype; a mean in float32.

    Args:
        lm: a model that has the blocks.
        texts: see `TextPasses`.
        blocks: in ascending order, from 0.
        pool: over each text.
        state: see `TextPasses`.
        num_done: see `TextPasses`.
    """

    def compute(batch: TokenBatch) -> list[Result]:
        with forward_errors(lm.model):
            found = hidden_states(lm, blocks, **batch.inputs)
        results: list[Result] = []
        for row, ids in enumerate(batch.texts):
            own = {"input_ids": torch.tensor(ids, dtype=torch.int32)}
            own |= {
                name: _pooled(hidden[row, : len(ids)], pool)
                for name, hidden in zip(tensor_names(blocks), found, strict=True)
            }
            results.append(own)
        return results

    return TextPasses(lm, texts, compute, state=state, num_done=num_done)


def _pooled(hidden: Tensor, pool: Pool) -> Tensor:
    """Return what is kept of the hidden states (L, H) of a text; a copy, so that the padded batch can go."""
    if pool == "all":
        return hidden.clone()
    return hidden[-1].clone() if pool == "last" else hidden.float().mean(0)
