"""Continue and score prompts that come at any time, from any thread: all that ride share the sweeps.

What waits boards at the end of a sweep, as many as the plan has tokens for, first come, first served. Prompts of like length
make their first pass together; each row then joins those that are continued already, whatever its settings are, and
leaves when it has ended. Rows that may not share a batch, or are to have the very bits that they have alone, ride alone.

Knows prompts and answers; knows nothing of HTTP.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Self

from slowllm.errors import BusyError, NonFiniteError, RideError
from slowllm.inference.cache_folder import CacheFolder
from slowllm.inference.continuation import continue_prompts, with_own_defaults
from slowllm.inference.generation_types import Continuation
from slowllm.inference.kept_caches import FoundCache, KeptCaches
from slowllm.inference.live_batch import BatchModel, LiveBatch, Seat, may_share_a_batch
from slowllm.inference.live_cache import RowCache
from slowllm.inference.live_rows import LiveRow
from slowllm.inference.prompt_scores import score_prompts
from slowllm.inference.sampling import seeded
from slowllm.inference.service_tasks import ServiceTask, checked_size, class_of
from slowllm.inference.service_types import Answer, Ask, OnPartial, PartialContinuation, ServiceStatus
from slowllm.inference.stored_layers import DamagedCacheError
from slowllm.modeling.batching import batch_rule
from slowllm.planning.packing import pack
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.streaming.ride import Ride
from slowllm.streaming.stops import Passage

log = logging.getLogger(__name__)


class Service:
    """Answers asks. Owns no model; closing it cancels what is left.

    Args:
        lm: a loaded model, opened for `service_job`.
        max_rows: that are continued at once.
        max_waiting: asks that may wait for room.
        kept_tokens: whose keys and values are kept behind answers, for prompts that begin alike.
        folder: where they are kept on disk as well; closed by who made it.
        is_exact: let each prompt ride alone, with the bits that it has alone; the products of several rows together may
            round otherwise, by 2e-4 of a log-probability in float32.
    """

    def __init__(
        self,
        lm: StreamedLM,
        *,
        max_rows: int = 64,
        max_waiting: int = 256,
        kept_tokens: int = 0,
        folder: CacheFolder | None = None,
        is_exact: bool = False,
    ) -> None:
        self._lm, self._max_rows, self._max_waiting = lm, max_rows, max_waiting
        self._rule = batch_rule(lm.config)
        self._shares = may_share_a_batch(lm) and not is_exact
        self._kept = KeptCaches(kept_tokens, folder) if self._shares else KeptCaches(0)
        self._model, self._plain = BatchModel(lm), with_own_defaults(lm)
        self._changed = threading.Condition()
        self._waiting: deque[ServiceTask] = deque()
        self._under_way: set[ServiceTask] = set()
        self._batches: dict[int, LiveBatch] = {}
        # Riders that pass prompts, and whose. New asks wait for the end of their sweep, where they would board anyway.
        self._first_passes: dict[int, tuple[Ride[None] | None, Sequence[ServiceTask]]] = {}
        self._num_boarded = 0
        self._held_tokens = self._held_rows = 0
        self._num_sweeps = self._num_prompt_tokens = self._num_new_tokens = 0
        self._stop: int | None = None
        self._is_closed = False
        self._owned = ExitStack()
        self._owned.enter_context(lm.watching(self._watch))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.drain(0.0)
        self._owned.close()

    # What anybody may call.

    def submit(self, ask: Ask, on_partial: OnPartial | None = None) -> Ride[Answer]:
        """Take an ask, and return at once.

        Args:
            ask: what is asked.
            on_partial: called whenever a continuation has grown.
        Returns:
            a ride to wait for, to cancel, or to be called back by, which ends with the answer.
        Raises:
            InputError: this model cannot do that, or was not opened for so many tokens.
            BusyError: too many asks wait, or the service is closing.
        """
        ask = replace(ask, prompt=seeded(ask.prompt))
        num_tokens, num_rows = checked_size(self._lm, ask, self._max_rows, joins=self._joins(ask))
        ride: Ride[Answer] = Ride(lambda: None)
        task = ServiceTask(ask, on_partial, ride, num_tokens, num_rows)
        ride.on_cancel = functools.partial(self._cancel, task)
        with self._changed:
            if self._is_closed:
                raise BusyError("the service is closing and takes nothing new")
            if len(self._waiting) >= self._max_waiting:
                raise BusyError(f"{len(self._waiting)} requests wait already; ask again later")
            self._waiting.append(task)
            boards_later = bool(self._first_passes) or any(
                batch.is_riding for batch in self._batches.values()
            )
        if not (boards_later and self._shares):
            self._dispatch()
        return ride

    def status(self) -> ServiceStatus:
        """Return how the service is doing now."""
        with self._changed:
            return ServiceStatus(
                len(self._under_way), len(self._waiting), self._held_tokens, self._lm.plan.sweep_tokens, self._stop,
                self._lm.num_stops, self._num_sweeps, self._num_prompt_tokens, self._num_new_tokens,
                self._kept.num_found_tokens,
            )  # fmt: skip

    def drain(self, seconds: float) -> None:
        """Take nothing new, wait for so long until all is answered, and cancel what is left then."""
        deadline = time.monotonic() + seconds
        with self._changed:
            self._is_closed = True
            while (self._waiting or self._under_way) and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(min(1.0, left))
            tasks = [*self._waiting, *self._under_way]
        for task in tasks:
            task.ride.cancel()

    # Who boards.

    def _joins(self, ask: Ask) -> bool:
        """Whether the rows of an ask are continued beside those of others."""
        return self._shares and not ask.only_prompt and ask.prompt.settings.num_beams == 1

    def _has_room(self, task: ServiceTask) -> bool:
        if not self._under_way:
            return True
        return (
            not self._rule.takes_turns
            and self._held_tokens + task.num_tokens <= self._lm.plan.sweep_tokens
            and self._held_rows + task.num_rows <= self._max_rows
        )

    def _dispatch(self) -> None:
        """Let asks board for which there is room, in their order."""
        boarding: list[ServiceTask] = []
        with self._changed:
            while self._waiting and self._has_room(self._waiting[0]):
                task = self._waiting.popleft()
                task.is_riding = True
                self._under_way.add(task)
                self._held_tokens += task.num_tokens
                self._held_rows += task.num_rows
                boarding.append(task)
        try:
            self._board(boarding)
        except RideError as error:  # the model was closed
            for task in boarding:
                self._end(task, None, error)

    def _board(self, tasks: Sequence[ServiceTask]) -> None:
        scored = [task for task in tasks if task.ask.num_prompt_top is not None or task.ask.only_prompt]
        joining = [task for task in tasks if self._joins(task.ask)]
        alone = [task for task in tasks if not (task.ask.only_prompt or self._joins(task.ask))]
        # All parts are counted before any of them can end.
        for task in (*scored, *alone):
            task.num_parts += 1
        for task in joining:
            task.num_parts += task.ask.prompt.settings.num_return_sequences
        for group in self._groups(scored):
            self._pass(self._score, group)
        kept = {
            task: found for task in joining if (found := self._kept.find(task.ask.prompt.ids)) is not None
        }
        for task, found in kept.items():
            self._pass(functools.partial(self._start, found=found), [task])
        for group in self._groups([task for task in joining if task not in kept]):
            self._pass(self._start, group)
        for task in alone:
            self._ride_alone(task)

    def _groups(self, tasks: Sequence[ServiceTask]) -> Iterable[list[ServiceTask]]:
        """Divide tasks into those whose prompts pass the model together."""
        plan, rule = self._lm.plan, self._rule
        lengths = [len(task.ask.prompt.ids) for task in tasks]
        most = plan.rider_tokens if self._shares else 1
        classes = [rule.length_class(length) for length in lengths]
        for batch in pack(lengths, most, plan.padding_tokens, classes=classes):
            yield [tasks[number] for number in batch]

    def _pass(self, work: Callable[[Sequence[ServiceTask]], None], tasks: Sequence[ServiceTask]) -> None:
        """Board a rider that passes the prompts of tasks."""
        with self._changed:
            self._num_boarded += 1
            number = self._num_boarded
            self._first_passes[number] = (None, tasks)

        def job() -> None:
            going = [task for task in tasks if not task.is_over]
            try:
                if going:
                    work(going)
            except NonFiniteError as error:
                if len(going) == 1:
                    raise
                log.info("prompts pass once more, each alone: %s", error)
                for task in going:
                    self._pass(work, [task])

        def ended(ride: Ride[None]) -> None:
            try:
                ride.result()
            except BaseException as error:  # told to those whose prompts they are
                for task in tasks:
                    self._end(task, None, error)
            with self._changed:
                del self._first_passes[number]
            self._dispatch()

        try:
            ride = self._lm.board(job)
        except BaseException:
            with self._changed:
                del self._first_passes[number]
            raise
        with self._changed:
            if number in self._first_passes:
                self._first_passes[number] = (ride, tasks)
        ride.add_done_callback(ended)

    def _ride_alone(self, task: ServiceTask) -> None:
        prompt = replace(task.ask.prompt, num_virtual=self._lm.num_virtual_tokens)

        def ended(ride: Ride[list[tuple[Continuation, ...]]]) -> None:
            try:
                (found,) = ride.result()
            except BaseException as error:  # told to whose prompt it is
                self._end(task, None, error)
            else:
                self._count(len(prompt.ids), sum(len(one.ids) for one in found))
                self._finish(task, dict(enumerate(found)))
            self._dispatch()

        def on_tokens(_: int, number: int, ids: tuple[int, ...]) -> None:
            if task.on_partial is not None:
                task.on_partial(PartialContinuation(number, ids))

        job = functools.partial(continue_prompts, self._lm, self._plain, [0], [prompt], on_tokens=on_tokens)
        ride = self._lm.board(job, prompt.settings.seed)
        task.cancel_rider = ride.cancel
        if task.is_over:  # cancelled while it boarded
            ride.cancel()
        ride.add_done_callback(ended)

    # Jobs, on riders' threads.

    def _score(self, tasks: Sequence[ServiceTask]) -> None:
        prompts = [task.ask.prompt.ids for task in tasks]
        found = score_prompts(self._lm, prompts, [task.ask.num_prompt_top or 0 for task in tasks])
        self._count(sum(map(len, prompts)), 0)
        for task, scores in zip(tasks, found, strict=True):
            task.scores = scores
            self._finish(task, {})

    def _start(self, tasks: Sequence[ServiceTask], found: FoundCache | None = None) -> None:
        """Make the first pass of prompts, and let their rows join those that go on."""
        kept = None if found is None else self._lm.away(found.load)
        num_kept = 0 if kept is None else kept.mask.shape[1]
        prompts = [task.ask.prompt for task in tasks]
        try:
            cache, logits = self._model.start(prompts, kept)
        except DamagedCacheError as error:  # costs a sweep, and no answer
            self._kept.forget(error)
            num_kept, (cache, logits) = 0, self._model.start(prompts)
        self._count(sum(len(task.ask.prompt.ids) for task in tasks) - num_kept, 0)
        seats = [
            self._seat(task, place, index)
            for place, task in enumerate(tasks)
            for index in range(task.ask.prompt.settings.num_return_sequences)
        ]
        going: dict[int, list[tuple[int, Seat]]] = {}
        for place, seat in seats:
            seat.row.advance(logits[place])
            self._count(0, 1)
            if not seat.give_if_ended(cache, place):
                going.setdefault(class_of(seat.row.prompt), []).append((place, seat))
        for length, members in going.items():
            self._join(length, [seat for _, seat in members], cache.rows([place for place, _ in members]))

    def _seat(self, task: ServiceTask, place: int, index: int) -> tuple[int, Seat]:
        told = task.on_partial

        def on_partial(partial: PartialContinuation) -> None:
            if told is not None and not task.is_over:
                told(partial)

        row = LiveRow(self._lm, task.ask.prompt, index, self._model.tokens, on_partial)
        seat = Seat(
            row,
            is_over=lambda: task.is_over,
            give=lambda: self._finish(task, {index: row.continuation()}),
            fail=lambda error: self._end(task, None, error),
            keep=(lambda cache: self._kept.keep(row.seen_ids, cache)) if self._kept.keeps_any else None,
        )
        return place, seat

    def _join(self, length: int, seats: Sequence[Seat], cache: RowCache) -> None:
        with self._changed:
            if length not in self._batches:
                self._batches[length] = LiveBatch(self._lm, self._model, self._changed, self._has_passed)
        self._batches[length].join(seats, cache)

    def _has_passed(self, num_rows: int) -> None:
        """Note that the rows of a batch got a token each, or that its rider has left."""
        self._count(0, num_rows)
        self._dispatch()

    # The ends of tasks.

    def _finish(self, task: ServiceTask, found: dict[int, Continuation]) -> None:
        """Note that one part of a task is done."""
        with self._changed:
            task.continuations |= found
            task.num_parts -= 1
            if task.num_parts:
                return
        ordered = tuple(task.continuations[index] for index in sorted(task.continuations))
        self._end(task, Answer(ordered, task.scores), None)

    def _end(self, task: ServiceTask, answer: Answer | None, error: BaseException | None) -> None:
        with self._changed:
            if task.is_over:
                return
            task.is_over = True
            if task.is_riding:
                self._under_way.discard(task)
                self._held_tokens -= task.num_tokens
                self._held_rows -= task.num_rows
            self._changed.notify_all()
        task.ride.end(answer, error)

    def _cancel(self, task: ServiceTask) -> None:
        with self._changed:
            if task in self._waiting:
                self._waiting.remove(task)
        self._end(task, None, RideError("the request was cancelled"))
        # Riders that work for nobody any more leave at the next stop.
        with self._changed:
            riders = [
                ride.cancel
                for ride, tasks in self._first_passes.values()
                if ride is not None and all(other.is_over for other in tasks)
            ]
            riders += [batch.cancel for batch in self._batches.values() if batch.is_deserted()]
        if task.cancel_rider is not None:
            riders.append(task.cancel_rider)
        for cancel in riders:
            cancel()

    def _count(self, num_prompt: int, num_new: int) -> None:
        with self._changed:
            self._num_prompt_tokens += num_prompt
            self._num_new_tokens += num_new

    def _watch(self, passage: Passage) -> None:
        self._stop = passage.stop
        if passage.stop == self._lm.num_stops - 1 and passage.direction == "up":
            self._num_sweeps += 1
