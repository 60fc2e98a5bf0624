"""Blocks of a client's own folder, computed one at a time within its budget, to check what servers say of them.

Owns a part of the model, through which one block at a time streams as it is wanted, and the keys and values of sessions that
are checked. Knows no network. The part is opened as a server opens its own, so the room for one block, what it needs to
compute, and the caches are in one plan, which takes its bytes from the client's budget.
"""

from __future__ import annotations

import contextvars
import gc
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from slowllm.modeling.cutting import find_form
from slowllm.modeling.parts import Part
from slowllm.modeling.span import SpanCall, SpanRunner
from slowllm.planning.budget import Budget
from slowllm.planning.job import Job
from slowllm.runtime.blocks_here import runs_of
from slowllm.runtime.description import ModelInfo
from slowllm.runtime.load import open_model
from slowllm.runtime.streamed_lm import StreamedLM

# What blocks are opened for at least, so that they are not opened anew for a few tokens more.
_LEAST_TOKENS = 64


@dataclass(frozen=True)
class _Opened:
    """Blocks that are open, and for how much."""

    blocks: range
    lm: StreamedLM
    runner: SpanRunner
    batch_tokens: int
    longest: int
    cache_tokens: int


@dataclass
class _Held:
    """The keys and values of one block of a session, and how many tokens they are."""

    cache: Any
    num_tokens: int = 0


class OwnBlocks:
    """Computes blocks whose weights are here; one at a time, and on any thread.

    Args:
        info: of the model.
        hashes: of the blocks that are in its folder, by their numbers.
        budget: that is taken from.
        dtype: that the servers compute in.
    Raises:
        PlanError: the budget has no room for a block.
    """

    def __init__(self, info: ModelInfo, hashes: Mapping[int, str], budget: Budget, dtype: str) -> None:
        self.hashes = dict(hashes)
        self.folder = info.folder
        self._info, self._budget, self._dtype = ModelInfo(info.folder), budget, dtype  # without a soft prompt
        self._lock = threading.Lock()
        self._opened: _Opened | None = None
        self._held: dict[str, _Held] = {}
        if self.hashes:
            self._open(min(self.hashes), _LEAST_TOKENS, _LEAST_TOKENS, 0)

    def forward(self, call: SpanCall, session: str | None) -> Tensor:
        """Return the hidden states (B, T, ...) behind a block.

        Args:
            call: of one block, whose weights are here.
            session: whose keys and values are read and kept; None for a call without a past.
        Raises:
            PlanError: the budget has no room for the block, or for what sessions keep.
            CheckpointError: the block cannot be read any more.
            NonFiniteError: NaN or infinity comes out.
            SessionError: the session does not hold what the call says.
        """
        with self._lock:
            num_held = 0 if session is None else len(call.hidden) * (call.length + call.hidden.shape[1])
            others = sum(held.num_tokens for name, held in self._held.items() if name != session)
            opened = self._opened_for(call, others + num_held)
            cache = None
            if session is not None:
                if session not in self._held:
                    new = opened.runner.new_cache(keeps_everything=call.keeps_everything)
                    self._held[session] = _Held(new)
                self._held[session].num_tokens = num_held
                cache = self._held[session].cache
            # The caller is inside a call of its own model, of which this one must know nothing.
            return contextvars.Context().run(opened.runner.forward, call, cache)[call.first]

    def end_session(self, session: str) -> None:
        """Let go of what a session keeps; it need not be there."""
        with self._lock:
            self._held.pop(session, None)

    def _opened_for(self, call: SpanCall, cache_tokens: int) -> _Opened:
        """Return blocks with that of a call, opened for as much as the call and all sessions need."""
        batch_tokens, longest = len(call.hidden) * call.hidden.shape[1], call.length + call.hidden.shape[1]
        opened = self._opened
        if (
            opened is not None
            and call.first in opened.blocks
            and opened.batch_tokens >= batch_tokens
            and opened.longest >= longest
            and opened.cache_tokens >= cache_tokens
        ):
            return opened
        return self._open(call.first, batch_tokens, longest, cache_tokens)

    def _open(self, number: int, batch_tokens: int, longest: int, cache_tokens: int) -> _Opened:
        """Open a block and its neighbours in the place of those that are open."""
        self._release()
        batch_tokens, longest, cache_tokens = map(_rounded, (batch_tokens, longest, cache_tokens))
        job = Job.serving(
            cache_tokens=cache_tokens, batch_tokens=batch_tokens, max_batch_tokens=batch_tokens, backward=False,
            longest=longest,
        )  # fmt: skip
        blocks = next(run for run in runs_of(self.hashes) if number in run)
        lm = open_model(
            StreamedLM,
            self._info,
            ram=self._budget,
            dtype=self._dtype,
            job=job,
            part=Part.span(blocks.start, blocks.stop),
            # The next check may be of any block, and others of this process may want the memory.
            keep_resident=False,
        )
        name = lm.layout.blocks_name
        runner = SpanRunner(lm.model, name, find_form(lm.model, name))
        self._opened = _Opened(blocks, lm, runner, batch_tokens, longest, cache_tokens)
        return self._opened

    def _release(self) -> None:
        """Close the blocks that are open, if any are."""
        if self._opened is None:
            return
        self._opened.lm.close()
        self._opened = None
        gc.collect()  # a model and its handle refer to each other

    def close(self) -> None:
        """Let go of the blocks and of all sessions. Idempotent."""
        with self._lock:
            self._release()
            self._held.clear()


def _rounded(number: int) -> int:
    """Return a power of two that is not smaller than a number, nor than `_LEAST_TOKENS`; 0 for 0."""
    return max(_LEAST_TOKENS, 1 << (number - 1).bit_length()) if number else 0
