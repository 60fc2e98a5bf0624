"""How likely tokens are after other tokens: any number of queries, in as few sweeps as the budget allows.

Queries become rows of token ids (`packing`), rows share micro-batches, and each micro-batch is a rider. Where the
plan says that it pays, rows that begin alike go on from one rider's keys and values (`sharing`).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from slowllm.errors import InputError
from slowllm.inference.prefix_sharing import (
    Load,
    Segment,
    batches_of,
    choose_depths,
    common,
    cut,
    loads,
    merge,
    padded_tokens,
)
from slowllm.inference.text import Query, TextSide
from slowllm.modeling.log_probs import log_probs_at
from slowllm.modeling.shared_cache import Beginning, SharedCache, SharedPrefix, can_share
from slowllm.modeling.soft_prompts import PrefixBeginning
from slowllm.planning.host_plan import MAX_RIDER_TOKENS, Plan, padding_worth
from slowllm.planning.job import Job, Rates
from slowllm.runtime.state import State
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.streaming.journal import journal
from slowllm.streaming.riders import Sized

# Rows are packed within a window of this many sweeps' tokens, so that any number can stream through.
WINDOW_SWEEPS = 4


# And of so many queries: what they have in common is not counted, but each has to be held.
WINDOW_QUERIES = 10_000


# Threads of riders, beyond those that the plan's sweep needs anyway: small micro-batches take many.
MAX_RIDERS = 64


K = TypeVar("K")


@dataclass(frozen=True)
class Answer:
    """How likely a continuation is.

    Attributes:
        log_probs: natural logarithms, one for each token of the continuation.
        is_greedy: whether each token was the likeliest of its place; false where that was not asked for.
    """

    log_probs: tuple[float, ...]
    is_greedy: bool

    @property
    def log_likelihood(self) -> float:
        """Sum over the tokens, in nats."""
        return math.fsum(self.log_probs)


def safe_exp(value: float) -> float:
    """Return exp(value), infinity where that is too large for a float."""
    return math.exp(value) if not value > 709.0 else math.inf


def job_of_queries(queries: Sequence[Query], side: TextSide, rates: Rates, *, share: bool = True) -> Job:
    """Return what the plan must know of queries.

    Args:
        queries: all of them.
        side: the model, or its description.
        rates: of the machine.
        share: as for `answer`.
    Raises:
        InputError: there is nothing to score.
    """
    rows = merge(_behind_prompt(side, queries))
    if not rows:
        raise InputError("there is nothing to score")
    padding = padding_worth(rates)
    depths = choose_depths(rows, MAX_RIDER_TOKENS, padding) if share and can_share(side.config) else ()
    segments = cut(rows, depths)
    longest = max(len(row.ids) for row in rows) + _prefix_tokens(side)
    num_tokens = padded_tokens(segments, batches_of(segments, MAX_RIDER_TOKENS, padding))
    return Job(num_tokens=max(longest, num_tokens), longest=longest, forward_only=True, keeps_results=False)


def _prefix_tokens(side: TextSide) -> int:
    """Return how many positions of a soft prompt come before a row's ids, and not among them."""
    prompt = side.soft_prompt
    return 0 if prompt is None else prompt.num_tokens - len(prompt.virtual_ids)


def _behind_prompt(side: TextSide, queries: Sequence[Query]) -> Sequence[Query]:
    """Put the virtual tokens of a soft prompt before each query."""
    leading = () if side.soft_prompt is None else side.soft_prompt.virtual_ids
    return [Query(leading + query.context, query.continuation) for query in queries] if leading else queries


def answer(
    lm: StreamedLM,
    queries: Iterable[Query],
    *,
    relative: bool = False,
    share: bool = True,
    state: State | None = None,
) -> Iterator[Answer]:
    """Yield the answers to any number of queries, in order; see `answer_keyed`."""
    keyed = ((None, query) for query in queries)
    for _, found in answer_keyed(lm, keyed, relative=relative, share=share, state=state):
        yield found


def answer_keyed(
    lm: StreamedLM,
    queries: Iterable[tuple[K, Query]],
    *,
    relative: bool = False,
    share: bool = True,
    state: State | None = None,
) -> Iterator[tuple[K, Answer]]:
    """Yield each query's key and its answer, in order, in as few sweeps as the plan allows.

    Args:
        lm: a loaded model.
        queries: any number of them, each with a key that is handed back with its answer. Drawn on the carousel's
            thread as riders leave, so the iterable must not call the model.
        relative: whether it is enough to know tokens asked for after one context against one another; see
            `head.log_probs_at`. Then `is_greedy` is false.
        share: whether rows may go on from others' keys and values; not together with `state`.
        state: where to keep what is done, and to find what an earlier process has done of the same job.
    Raises:
        InputError: a query is longer than what the model was loaded for.
        StateError: the state cannot be written.
    """
    # Between the leaves of a block every rider would hold what it took of another's keys and values.
    share = share and state is None and lm.plan.granularity == "blocks" and can_share(lm.config)
    seats = max(lm.plan.sweep_tokens // lm.plan.rider_tokens, MAX_RIDERS)

    def jobs() -> Iterator[_MicroBatch[K]]:
        number = 0
        for window in _windows(queries, lm.plan):
            asked = [_Asked(key, len(query.continuation)) for key, query in window]
            plan = lm.plan
            rows = merge(_behind_prompt(lm, [query for _, query in window]))
            for row in rows:
                _refuse_too_long(lm, len(row.ids) + _prefix_tokens(lm))
            if not rows:  # its queries have no tokens to score, but take their turn
                yield _MicroBatch(list, number=None, segments=[], asked=asked, opens_window=True)
            parts = loads(
                rows,
                plan.rider_tokens,
                plan.sweep_tokens,
                plan.padding_tokens,
                share=share,
                max_batches=seats,
            )
            opens_window = True
            for load in parts:
                for batch, (beginning, trunk) in zip(
                    load.batches, _ties(load, _prefix_tokens(lm)), strict=True
                ):
                    segments = [load.segments[member] for member in batch]
                    num_tokens = len(batch) * max(len(segment.ids) for segment in segments)
                    job = functools.partial(_pass, lm, segments, beginning, trunk, relative, state, number)
                    starts_load = load.is_shared and batch is load.batches[0]
                    done = None if state is None else state.result(number)
                    if done is not None:
                        job, num_tokens, starts_load = functools.partial(list, done), 0, False
                    yield _MicroBatch(
                        job, num_tokens, starts_load,
                        number=number, segments=segments, asked=asked, opens_window=opens_window,
                    )  # fmt: skip
                    opens_window = False
                    number += 1

    waiting: deque[_Asked[K]] = deque()
    for batch, results in lm.stream(jobs(), seats, lm.plan.sweep_tokens):
        if batch.opens_window:
            waiting.extend(batch.asked)
        if state is not None and batch.number is not None:
            state.finish(batch.number, results)
        for segment, (values, likeliest) in zip(batch.segments, results, strict=True):
            for wish, value, is_likeliest in zip(segment.wishes, values, likeliest, strict=True):
                batch.asked[wish.query].note(wish.place, value, is_likeliest)
        while waiting and waiting[0].is_complete:
            query = waiting.popleft()
            yield query.key, query.answer()


def _refuse_too_long(lm: StreamedLM, num_tokens: int) -> None:
    planned = lm.sizes.scratch_bytes(max(lm.plan.rider_tokens, lm.plan.longest), lm.plan.longest)
    if lm.sizes.scratch_bytes(num_tokens, num_tokens) > planned:
        raise InputError(
            f"{num_tokens} tokens are more than the memory was planned for, sequences of {lm.plan.longest}; load the "
            f"model with job=slowllm.Job(num_tokens={num_tokens}, longest={num_tokens}, repeated=True)"
        )


class _Asked(Generic[K]):
    """A query that waits for its values, with the key that its answer is handed over with."""

    def __init__(self, key: K, num_tokens: int) -> None:
        self.key = key
        self.values = [math.nan] * num_tokens
        self.num_left, self.is_greedy = num_tokens, True

    def note(self, place: int, value: float, is_likeliest: bool) -> None:
        self.values[place] = value
        self.num_left -= 1
        self.is_greedy &= is_likeliest

    @property
    def is_complete(self) -> bool:
        return not self.num_left

    def answer(self) -> Answer:
        assert self.is_complete, "every wish is in exactly one segment"
        return Answer(tuple(self.values), self.is_greedy)


@dataclass(frozen=True, kw_only=True)
class _MicroBatch(Sized, Generic[K]):
    """The job of passing one micro-batch through the model, and the queries that its results belong to.

    Attributes:
        number: of the micro-batch, for the state; None where there is nothing to pass.
        segments: its rows.
        asked: all queries of the window that it is from.
        opens_window: whether it is the window's first.
    """

    number: int | None
    segments: Sequence[Segment]
    asked: Sequence[_Asked[K]]
    opens_window: bool


def _windows(queries: Iterable[tuple[K, Query]], plan: Plan) -> Iterator[list[tuple[K, Query]]]:
    """Yield queries of a few sweeps at a time; what one has in common with the last is not counted."""
    window: list[tuple[K, Query]] = []
    num_tokens = 0
    last: tuple[int, ...] = ()
    source = iter(queries)
    while True:
        try:
            key, query = next(source)
        except StopIteration:
            break
        except BaseException:  # what came before it can still be answered
            if window:
                yield window
            raise
        ids = query.ids
        own = len(ids) - common(last, ids)
        is_full = num_tokens + own > plan.sweep_tokens * WINDOW_SWEEPS or len(window) == WINDOW_QUERIES
        if window and is_full:
            yield window
            window, num_tokens, own = [], 0, len(ids)
        window.append((key, query))
        num_tokens += own
        last = ids
    if window:
        yield window


def _ties(load: Load, before: int) -> list[tuple[Beginning | None, SharedPrefix | None]]:
    """Return for each micro-batch of a load where its rows begin, and where those that go on from it find them.

    Args:
        load: of segments.
        before: positions before the first token of a row.
    """
    places = {
        member: (number, row) for number, batch in enumerate(load.batches) for row, member in enumerate(batch)
    }
    takers: dict[int, set[int]] = {}
    for number, batch in enumerate(load.batches):
        for member in batch:
            parent = load.segments[member].parent
            if parent is not None:
                takers.setdefault(places[parent][0], set()).add(number)
    trunks = {number: SharedPrefix(len(found)) for number, found in takers.items()}
    ties = []
    for number, batch in enumerate(load.batches):
        segments = [load.segments[member] for member in batch]
        rows = [
            (trunks[places[segment.parent][0]], places[segment.parent][1])
            for segment in segments
            if segment.parent is not None
        ]
        beginning = Beginning(before + segments[0].start, rows) if rows else None
        ties.append((beginning, trunks.get(number)))
    return ties


def _pass(
    lm: StreamedLM,
    segments: Sequence[Segment],
    beginning: Beginning | None,
    trunk: SharedPrefix | None,
    relative: bool,
    state: State | None,
    number: int,
) -> list[tuple[list[float], list[bool]]]:
    """Pass one micro-batch through the model; runs as a rider. Returns what its wishes came to."""
    # In the rider's own context, and not before it runs: a journal may hold the output of a block.
    journal.set(None if state is None else state.journal(number))
    start, before = segments[0].start, _prefix_tokens(lm)
    width = max(len(segment.ids) for segment in segments)
    ids = torch.zeros(len(segments), width, dtype=torch.int64)
    mask = torch.zeros(len(segments), before + start + width, dtype=torch.int64)
    for number, segment in enumerate(segments):
        # Padded on the right: a causal model never looks there, and positions count from the first token.
        ids[number, : len(segment.ids)] = torch.tensor(segment.ids)
        mask[number, : before + start + len(segment.ids)] = 1
    wishes = [(row, wish.position - start, wish.token) for row, s in enumerate(segments) for wish in s.wishes]
    rows, positions, tokens = torch.tensor(wishes, dtype=torch.int64).view(-1, 3).unbind(1)
    prompt = lm.soft_prompt
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if prompt is not None and prompt.virtual_ids:
        inputs = {"inputs_embeds": prompt.embed(lm.model, ids), "attention_mask": mask}
    first: Beginning | PrefixBeginning | None = beginning
    if before and not start and prompt is not None:
        if can_share(lm.config):
            first = PrefixBeginning(prompt, len(segments), lm.model.dtype)
        else:
            cache = prompt.growing_cache(lm.config, len(segments), lm.model.dtype)
            inputs |= {"past_key_values": cache, "use_cache": True}
    if first is not None or trunk is not None:
        num_blocks = len(lm.layout.blocks)
        inputs |= {"past_key_values": SharedCache(num_blocks, first, trunk), "use_cache": True}
    with contextlib.nullcontext() if prompt is None else prompt.adding(start, width):
        found = log_probs_at(lm.model, rows, positions, tokens, relative=relative, **inputs)
    lengths = [len(segment.wishes) for segment in segments]
    return [
        (values.tolist(), likeliest.tolist())
        for values, likeliest in zip(
            found.log_probs.split(lengths), found.is_likeliest.split(lengths), strict=True
        )
    ]
