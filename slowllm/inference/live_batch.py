"""Rows that share a batch for a while: the first pass over prompts, and a rider that makes one token more for each.

Knows rows and their cache; knows nothing of who asks, and of queues.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from slowllm.errors import NonFiniteError
from slowllm.inference.continuation import with_own_defaults
from slowllm.inference.generation_types import Prompt
from slowllm.inference.live_cache import RowCache, can_merge, empty_cache
from slowllm.inference.live_rows import LiveRow
from slowllm.inference.stopping import special_tokens
from slowllm.modeling.batching import batch_rule
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.streaming.ride import Ride

log = logging.getLogger(__name__)


class BatchModel:
    """A streamed model whose rows come and go; runs as a rider.

    Args:
        lm: a loaded model.
    """

    def __init__(self, lm: StreamedLM) -> None:
        self.tokens = special_tokens(lm)
        self._config = lm.config.get_text_config()
        self._model = with_own_defaults(lm)
        self._takes = set(inspect.signature(lm.model.forward).parameters)

    def start(self, prompts: Sequence[Prompt], kept: RowCache | None = None) -> tuple[RowCache, Tensor]:
        """Pass prompts through the model.

        Args:
            prompts: that share a batch.
            kept: of the first tokens of a single prompt, which are not computed again.
        Returns:
            their keys and values, and the logits (B, V) behind the last token of each.
        """
        if kept is not None:
            (prompt,) = prompts
            ids = torch.tensor([prompt.ids[kept.mask.shape[1] :]])
            mask = torch.ones(1, len(prompt.ids), dtype=torch.int64)
            positions = torch.arange(kept.mask.shape[1], len(prompt.ids))[None]
            return RowCache(kept.cache, mask), self._pass(ids, mask, positions, kept.cache)
        width = max(len(prompt.ids) for prompt in prompts)
        ids = torch.full((len(prompts), width), self.tokens.pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
            mask[row, width - len(prompt.ids) :] = 1
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)  # as `generate` numbers them
        cache = empty_cache(self._config)
        return RowCache(cache, mask), self._pass(ids, mask, positions, cache)

    def go_on(self, cache: RowCache, last_tokens: Sequence[int]) -> Tensor:
        """Pass one token of each row, and return the logits (B, V) behind it; the cache has grown by it then."""
        positions = cache.lengths[:, None]
        cache.extend()
        return self._pass(torch.tensor(last_tokens)[:, None], cache.mask, positions, cache.cache)

    def _pass(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        inputs: dict[str, Any] = {"input_ids": ids, "past_key_values": cache, "use_cache": True}
        given = {"attention_mask": mask, "position_ids": positions, "logits_to_keep": 1}
        inputs |= {name: value for name, value in given.items() if name in self._takes}
        device = self._model.device
        inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        with torch.no_grad():
            logits: Tensor = self._model(**inputs).logits
        return logits[:, -1]


def may_share_a_batch(lm: StreamedLM) -> bool:
    """Return whether rows of different prompts may join one batch while it goes on."""
    rule = batch_rule(lm.config)
    return (
        "past_key_values" in inspect.signature(lm.model.forward).parameters
        and rule.pads_left
        and rule.is_causal
        and not (rule.rides_alone or rule.takes_turns or rule.tables)
        and lm.keeps_caches
        and lm.soft_prompt is None
        and can_merge(lm.config)
    )


@dataclass(frozen=True, eq=False)
class Seat:
    """A row and those who wait for it.

    Attributes:
        row: that grows.
        is_over: returns whether nobody waits for it any more.
        give: called once when it has ended.
        fail: called with the error that has ended it early.
        keep: called with the row's cache when it has ended, before `give`; None where nobody keeps it.
    """

    row: LiveRow
    is_over: Callable[[], bool]
    give: Callable[[], None]
    fail: Callable[[BaseException], None]
    keep: Callable[[RowCache], None] | None = None

    def give_if_ended(self, cache: RowCache, place: int) -> bool:
        """Hand the row over if it has ended; return whether it goes no further.

        Args:
            cache: of the rows that were passed with it.
            place: of the row there.
        """
        if self.row.has_ended:
            if self.keep is not None:
                self.keep(cache.rows([place]))
            self.give()
        return self.row.has_ended or self.is_over()


class LiveBatch:
    """Rows that are continued together by one rider, which rides as long as there are any.

    Args:
        lm: that the rider boards.
        model: of it.
        lock: guards what rows there are; is not held when anything is called.
        has_passed: called after each pass with the number of rows that got a token, and with 0 when the rider has left.
    """

    def __init__(
        self, lm: StreamedLM, model: BatchModel, lock: threading.Condition, has_passed: Callable[[int], None]
    ) -> None:
        self._lm, self._model, self._lock, self._has_passed = lm, model, lock, has_passed
        self._joining: list[tuple[Sequence[Seat], RowCache]] = []
        self._seats: list[Seat] = []
        self._ride: Ride[None] | None = None
        self._is_cancelled = False
        self.is_riding = False

    def join(self, seats: Sequence[Seat], cache: RowCache) -> None:
        """Continue rows from the next pass on; a rider boards if none rides."""
        with self._lock:
            self._joining.append((seats, cache))
        self._board()

    def is_deserted(self) -> bool:
        """Return whether a rider rides for nobody any more; called with the lock held."""
        return self.is_riding and not self._joining and all(seat.is_over() for seat in self._seats)

    def cancel(self) -> None:
        """Let the rider leave at the next stop, if it is still deserted."""
        with self._lock:
            if not self.is_deserted() or self._ride is None:
                return
            self._is_cancelled = True  # it takes nobody else, who would be cancelled with it
            ride = self._ride
        ride.cancel()

    def _board(self) -> None:
        with self._lock:
            if self.is_riding or not self._joining:
                return
            self.is_riding, self._is_cancelled = True, False
        try:
            ride = self._lm.board(self._run)
        except BaseException as error:  # the model was closed
            self._leave(error)
            return
        with self._lock:
            self._ride = ride
        ride.add_done_callback(self._has_ended)

    def _run(self) -> None:
        """Make one token after the other for all rows, until none is left; runs as a rider."""
        cache: RowCache | None = None
        while True:
            with self._lock:
                joining: list[tuple[Sequence[Seat], RowCache]] = []
                if not self._is_cancelled:
                    joining, self._joining = self._joining, []
                for seats, _ in joining:
                    self._seats.extend(seats)
            for _, joined in joining:
                if cache is None:
                    cache = joined
                else:
                    cache.join(joined)
            del joining
            cache = self._keep([not seat.is_over() for seat in self._seats], cache)
            if cache is None:
                return
            logits, cache = self._go_on(cache)
            for seat, of_row in zip(self._seats, logits, strict=True):
                if not seat.is_over():
                    seat.row.advance(of_row)
            num_rows = len(self._seats)
            stays = [not seat.give_if_ended(cache, number) for number, seat in enumerate(self._seats)]
            cache = self._keep(stays, cache)
            self._has_passed(num_rows)

    def _go_on(self, cache: RowCache) -> tuple[Tensor, RowCache]:
        """Pass a token of each row; rows of which NaN comes out leave, and the others pass once more.

        Returns:
            the logits (B, V) of the rows that stay, and their cache.
        """
        while True:
            length = cache.mask.shape[1]
            try:
                return self._model.go_on(cache, [seat.row.last_token for seat in self._seats]), cache
            except NonFiniteError as error:
                if error.row is None or len(self._seats) == 1:
                    raise
                log.info("row %d leaves its batch: %s", error.row, error)
                self._seats[error.row].fail(error)
                cache.shorten(length)
                stays = [number != error.row for number in range(len(self._seats))]
                kept = self._keep(stays, cache)
                assert kept is not None, "one row of several has left"
                cache = kept

    def _keep(self, stays: Sequence[bool], cache: RowCache | None) -> RowCache | None:
        """Let rows leave; return the cache of the others, None where there are none."""
        if not any(stays):
            with self._lock:
                self._seats = []
            return None
        assert cache is not None, "rows have one"
        if not all(stays):
            cache.keep([number for number, stay in enumerate(stays) if stay])
            with self._lock:
                self._seats = [seat for seat, stay in zip(self._seats, stays, strict=True) if stay]
        return cache

    def _has_ended(self, ride: Ride[None]) -> None:
        try:
            ride.result()
        except BaseException as error:  # told to all whose rows ride
            self._leave(error)
        else:
            self._leave(None)

    def _leave(self, error: BaseException | None) -> None:
        with self._lock:
            seats, self._seats, self._ride, self.is_riding = self._seats, [], None, False
        for seat in seats:
            seat.fail(error or RuntimeError("the rider has left its rows"))
        self._board()  # rows may have come meanwhile
        self._has_passed(0)
