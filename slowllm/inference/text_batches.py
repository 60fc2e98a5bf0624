"""Pass texts through a model in micro-batches and yield tensors of each text: in order, resumable, with little memory.

Knows token ids, micro-batches and state folders; does not know what is computed of a micro-batch, or where it goes.
Texts are packed window by window, so that what is held does not grow with their number.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slowllm.inference.scoring import WINDOW_QUERIES, WINDOW_SWEEPS
from slowllm.inference.text_files import Text
from slowllm.modeling.batching import batch_rule
from slowllm.planning.packing import pack
from slowllm.runtime.state import State
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.streaming.call_context import call_context
from slowllm.streaming.riders import MAX_AHEAD, Sized
from slowllm.streaming.way import Way

# Riders of a sweep, times those of full micro-batches: the last ones of a window are seldom full.
SEATS = 2
# Sweeps whose results may be in memory: those of riders that are ahead, and of a window that is handed over in order.
SWEEPS_HELD = SEATS * MAX_AHEAD + WINDOW_SWEEPS

# What is computed of one text, by name.
Result = Mapping[str, Tensor]


@dataclass(frozen=True)
class TokenBatch:
    """The texts of one micro-batch.

    Attributes:
        ids: (B, T) int64, padded on the right.
        mask: (B, T) int64, 1 where there is text.
        texts: the token ids of each text, of which `ids` may leave out the last.
    """

    ids: Tensor
    mask: Tensor
    texts: Sequence[tuple[int, ...]]

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the model is called with."""
        return {"input_ids": self.ids, "attention_mask": self.mask}


def batch_of(texts: Sequence[tuple[int, ...]], num_dropped: int = 0) -> TokenBatch:
    """Return texts as a micro-batch, without the last tokens of each, but with its first one."""
    lengths = [max(1, len(ids) - num_dropped) for ids in texts]
    ids = torch.zeros(len(texts), max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, (own, length) in enumerate(zip(texts, lengths, strict=True)):
        # Padded on the right: a causal model never attends to it, and positions count from the first token.
        ids[row, :length] = torch.tensor(own[:length])
        mask[row, :length] = 1
    return TokenBatch(ids, mask, texts)


@dataclass
class _Pending:
    """A text, and what was computed of it, if it was."""

    text: Text
    result: Result | None = None


@dataclass(frozen=True, kw_only=True)
class _Batch(Sized):
    """The job of passing one micro-batch through the model.

    Attributes:
        number: of the micro-batch, for the state.
        members: its texts.
        last: the number of the last of them.
        window: all texts of the window, if this is its first micro-batch.
        is_saved: whether an earlier process has computed it.
    """

    number: int
    members: Sequence[_Pending]
    last: int
    window: Sequence[_Pending]
    is_saved: bool


class TextPasses:
    """Passes of any number of texts through a model.

    Args:
        lm: a loaded model.
        texts: drawn on the carousel's thread as riders leave, so the iterable must not call the model.
        compute: called as a rider with one micro-batch; returns tensors of each text.
        num_dropped: tokens at the end of each text that the model need not see.
        state: keeps the tensors of finished micro-batches until `forget`, and the activations of those under way.
        num_done: texts from the first that are not asked for; micro-batches of no others are left out.
    """

    def __init__(
        self,
        lm: StreamedLM,
        texts: Iterable[Text],
        compute: Callable[[TokenBatch], Sequence[Result]],
        *,
        num_dropped: int = 0,
        state: State | None = None,
        num_done: int = 0,
    ) -> None:
        self._lm, self._texts, self._compute, self._num_dropped = lm, texts, compute, num_dropped
        self._state, self._num_done = state, num_done
        self._saved: deque[tuple[int, int]] = deque()  # the last text and the number of saved micro-batches

    def __iter__(self) -> Iterator[tuple[Text, Result]]:
        """Yield texts, in order, with what was computed of them, in as few sweeps as the plan allows.

        Raises:
            StateError: the state cannot be written.
        """
        plan = self._lm.plan
        max_riders = SEATS * max(1, plan.sweep_tokens // plan.rider_tokens)
        pending: deque[_Pending] = deque()
        for batch, results in self._lm.stream(self._batches(), max_riders, plan.sweep_tokens):
            pending.extend(batch.window)
            if self._state is not None:
                if not batch.is_saved:
                    self._save(self._state, batch.number, results)
                self._saved.append((batch.last, batch.number))
            for one, result in zip(batch.members, results, strict=True):
                one.result = result
            while pending and (result := pending[0].result) is not None:
                yield pending.popleft().text, result

    def forget(self, num_texts: int) -> None:
        """Delete the saved micro-batches that have none but the first so many texts, which are kept elsewhere now."""
        if self._state is None:
            return
        for last, number in list(self._saved):
            if last < num_texts:
                self._state.forget(_saved_name(number))
                self._saved.remove((last, number))

    def _batches(self) -> Iterator[_Batch]:
        plan, rule = self._lm.plan, batch_rule(self._lm.config)
        rider_tokens = 1 if rule.rides_alone else plan.rider_tokens
        number = first = 0
        for texts in self._windows():
            lengths = [max(1, len(text.ids) - self._num_dropped) for text in texts]
            classes: list[Hashable] = [rule.length_class(length) for length in lengths]
            window = [_Pending(text) for text in texts]
            asked = window[max(0, self._num_done - first) :]
            for members in pack(lengths, rider_tokens, plan.padding_tokens, classes=classes):
                last = first + max(members)
                if last >= self._num_done:
                    yield self._batch(number, [window[n] for n in members], last, asked)
                    asked = []
                elif (
                    self._state is not None
                ):  # its texts are kept elsewhere, but there was no time to forget it
                    self._state.forget(_saved_name(number))
                number += 1
            first += len(texts)

    def _batch(
        self, number: int, members: Sequence[_Pending], last: int, window: Sequence[_Pending]
    ) -> _Batch:
        num_rows, saved = len(members), None
        batch = batch_of([one.text.ids for one in members], self._num_dropped)
        if self._state is not None:
            saved = self._state.saved_tensors(_saved_name(number))
        job: Callable[[], Any] = functools.partial(self._pass, batch, number)
        num_tokens = batch.ids.numel()
        if saved is not None:
            job, num_tokens = functools.partial(_unpacked, saved[0], num_rows), 0
        return _Batch(
            job, num_tokens, number=number, members=members, last=last, window=window,
            is_saved=saved is not None,
        )  # fmt: skip

    def _pass(self, batch: TokenBatch, number: int) -> Sequence[Result]:
        """Pass one micro-batch through the model; runs as a rider."""
        # Read only now that the rider runs: a way may hold the output of a block.
        way = Way() if self._state is None else self._state.way(number)
        with call_context(way=way):
            return self._compute(batch)

    def _save(self, state: State, number: int, results: Sequence[Result]) -> None:
        tensors = {
            f"{row}.{name}": tensor.contiguous()
            for row, result in enumerate(results)
            for name, tensor in result.items()
        }
        state.save_tensors(_saved_name(number), tensors, {})
        state.forget(number)

    def _windows(self) -> Iterator[list[Text]]:
        """Yield texts in windows of a few sweeps' tokens."""
        window: list[Text] = []
        num_tokens = 0
        for text in self._texts:
            is_full = num_tokens + len(text.ids) > self._lm.plan.sweep_tokens * WINDOW_SWEEPS
            if window and (is_full or len(window) == WINDOW_QUERIES):
                yield window
                window, num_tokens = [], 0
            window.append(text)
            num_tokens += len(text.ids)
        if window:
            yield window


def _saved_name(number: int) -> str:
    return f"done-{number:08d}"


def _unpacked(tensors: Mapping[str, Tensor], num_rows: int) -> list[Result]:
    """Return the results of each row from the tensors of a saved micro-batch."""
    results: list[dict[str, Tensor]] = [{} for _ in range(num_rows)]
    for key, tensor in tensors.items():
        row, _, name = key.partition(".")
        results[int(row)][name] = tensor
    return list(results)
