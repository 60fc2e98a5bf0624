"""Score queries: how likely tokens are after other tokens, in as few sweeps as the budget allows.

Queries become rows of token ids (see `prefix_sharing`), rows share micro-batches, and each micro-batch is a rider.
Where the plan says that it pays, rows that begin alike continue from one rider's keys and values (`shared_cache`).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from slowllm.errors import InputError, forward_errors
from slowllm.inference.likelihood import Likelihood
from slowllm.inference.prefix_sharing import (
    Load,
    PackedRow,
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
from slowllm.modeling.batching import BatchRule, batch_rule
from slowllm.modeling.log_probs import log_probs_at
from slowllm.modeling.shared_cache import Beginning, SharedCache, SharedPrefix, can_share
from slowllm.modeling.soft_prompts import PrefixBeginning
from slowllm.planning.host_plan import MAX_RIDER_TOKENS, padding_worth
from slowllm.planning.job import Job, Rates
from slowllm.planning.plan import Plan
from slowllm.runtime.run_identity import batch_identity, digest_of, packed_as_begun, saved_packing
from slowllm.runtime.state import State
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.streaming.call_context import call_context
from slowllm.streaming.riders import Sized
from slowllm.streaming.way import Way

log = logging.getLogger(__name__)

# Rows are packed within a window of this many sweeps' tokens, so that any number of queries can stream through.
WINDOW_SWEEPS = 4
# A window also has at most this many queries: tokens that they share are not counted, but each query is held.
WINDOW_QUERIES = 10_000
# Riders that a sweep may have, even where the plan's micro-batches are fewer: small micro-batches take many.
MAX_RIDERS = 64

K = TypeVar("K")


def job_of_queries(
    queries: Sequence[Query],
    lm: TextSide,
    rates: Rates,
    begun: Mapping[str, Any] | None = None,
    *,
    share: bool = True,
) -> Job:
    """Return the job that the plan is made for.

    Args:
        queries: all of them.
        lm: the model, or its `ModelInfo`.
        rates: of the machine.
        begun: from `state.read_job`: micro-batches are then packed as when the job was begun.
        share: as for `score_keyed`.
    Raises:
        InputError: there is nothing to score.
        StateError: the state is another version's.
    """
    packing = saved_packing(begun or {})
    padding = packing[2] if packing else padding_worth(rates)
    longest, num_tokens, rule = 0, 0, batch_rule(lm.config)
    most_tokens = 1 if rule.rides_alone else MAX_RIDER_TOKENS
    for rows, may_share in _rows_of_classes(lm, queries, rule):
        is_shared = share and may_share and can_share(lm.config)
        segments = cut(rows, choose_depths(rows, most_tokens, padding) if is_shared else ())
        longest = max(longest, *(len(row.ids) + _num_prefix_positions(lm) for row in rows))
        num_tokens += padded_tokens(segments, batches_of(segments, most_tokens, padding))
    if not longest:
        raise InputError("there is nothing to score")
    job = Job(num_tokens=max(longest, num_tokens), longest=longest, forward_only=True, keeps_results=False)
    return packed_as_begun(job, begun)


def describe(
    kind: str,
    lm: StreamedLM,
    queries: Sequence[Query],
    begun: Mapping[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Return what the answers to queries depend on, for `State`; see `run_identity`.

    With `begun`, from `state.read_job`, prefixes are shared only if they were when the job was begun.
    """
    shares = _shares_prefixes(lm) and (begun is None or bool(begun.get("shares_prefixes")))
    tokens = digest_of((query.context, query.continuation) for query in queries)
    return batch_identity(kind, lm, **settings, tokens=tokens, shares_prefixes=shares)


def _shares_prefixes(lm: StreamedLM) -> bool:
    """Return whether rows may continue from other rows' keys and values."""
    # Between the leaves of a block every rider would hold the keys and values that it took from another.
    return lm.plan.granularity != "leaves" and lm.keeps_caches and can_share(lm.config)


def _num_prefix_positions(lm: TextSide) -> int:
    """Return how many positions a soft prompt has that are not among a row's ids: those of a prefix."""
    prompt = lm.soft_prompt
    return 0 if prompt is None else prompt.num_tokens - len(prompt.virtual_ids)


def _with_virtual_tokens(lm: TextSide, queries: Sequence[Query]) -> Sequence[Query]:
    """Put the virtual tokens of a soft prompt before each query."""
    leading = () if lm.soft_prompt is None else lm.soft_prompt.virtual_ids
    return [Query(leading + query.context, query.continuation) for query in queries] if leading else queries


def _rows_of_classes(
    lm: TextSide, queries: Sequence[Query], rule: BatchRule
) -> Iterator[tuple[list[PackedRow], bool]]:
    """Yield the rows that answer queries, and whether they may share prefixes: for each class of lengths.

    A query is answered by a longer row, and a prefix is shared, only where the model computes both alike; see
    `batching`.
    """
    num_before = _num_prefix_positions(lm)
    members: dict[Hashable, list[Query | None]] = {}
    for number, query in enumerate(_with_virtual_tokens(lm, queries)):
        key = rule.length_class(num_before + len(query.ids))
        members.setdefault(key, [None] * len(queries))[number] = query
    for key, of_class in members.items():
        if rows := merge(of_class):
            yield rows, rule.may_share(key)


def score_queries(
    lm: StreamedLM,
    queries: Iterable[Query],
    *,
    relative: bool = False,
    share: bool = True,
    state: State | None = None,
) -> Iterator[Likelihood]:
    """Yield the likelihood of each query's continuation, in order; see `score_keyed`."""
    keyed = ((None, query) for query in queries)
    yield from (found for _, found in score_keyed(lm, keyed, relative=relative, share=share, state=state))


def score_keyed(
    lm: StreamedLM,
    queries: Iterable[tuple[K, Query]],
    *,
    relative: bool = False,
    share: bool = True,
    state: State | None = None,
) -> Iterator[tuple[K, Likelihood]]:
    """Yield each query's key and the likelihood of its continuation, in order, in as few sweeps as the plan allows.

    Args:
        lm: a loaded model.
        queries: any number of them, each with a key that is returned with its likelihood. They are drawn on the
            carousel's thread as riders leave, so the iterable must not call the model.
        relative: whether it is enough to compare the tokens asked for after one context with each other; see
            `log_probs_at`. `is_greedy` is then false.
        share: whether rows may continue from other rows' keys and values; with a state, only if its job says so.
        state: keeps finished micro-batches, and returns those that an earlier process finished; keeps activations
            of those under way, too, unless they share keys and values.
    Raises:
        InputError: a query is longer than the model was loaded for.
        StateError: the state cannot be written.
    """
    share = share and _shares_prefixes(lm) and (state is None or bool(state.job.get("shares_prefixes")))
    max_riders = max(lm.plan.sweep_tokens // lm.plan.rider_tokens, MAX_RIDERS)
    jobs = _jobs(lm, queries, max_riders, relative, share, state)
    pending: deque[_PendingQuery[K]] = deque()
    for batch, results in lm.stream(jobs, max_riders, lm.plan.sweep_tokens):
        if batch.opens_window:
            pending.extend(batch.window)
        if state is not None and batch.number is not None:
            state.finish(batch.number, results)
        for segment, (log_probs, likeliest) in zip(batch.segments, results, strict=True):
            for target, log_prob, is_likeliest in zip(segment.targets, log_probs, likeliest, strict=True):
                batch.window[target.query].add(target.place, log_prob, is_likeliest)
        while pending and not pending[0].num_missing:
            query = pending.popleft()
            yield query.key, query.likelihood()


def _jobs(
    lm: StreamedLM,
    queries: Iterable[tuple[K, Query]],
    max_riders: int,
    relative: bool,
    share: bool,
    state: State | None,
) -> Iterator[_MicroBatch[K]]:
    """Yield the micro-batches of all queries, window by window."""
    plan, num_before, number, rule = lm.plan, _num_prefix_positions(lm), 0, batch_rule(lm.config)
    rider_tokens = 1 if rule.rides_alone else plan.rider_tokens
    for reason in rule.reasons():
        log.info("%s: %s", lm.config.model_type, reason)
    for keyed in _windows(queries, plan):
        window = [_PendingQuery(key, query.continuation) for key, query in keyed]
        rows_of_classes = list(_rows_of_classes(lm, [query for _, query in keyed], rule))
        for rows, _ in rows_of_classes:
            for row in rows:
                _refuse_too_long(lm, len(row.ids) + num_before)
        if not rows_of_classes:  # nothing to compute, but these queries are answered in their turn
            yield _MicroBatch(list, number=None, segments=[], window=window, opens_window=True)
        opens_window = True
        for load in itertools.chain.from_iterable(
            loads(
                rows, rider_tokens, plan.sweep_tokens, plan.padding_tokens,
                share=share and may_share, max_batches=max_riders,
            )
            for rows, may_share in rows_of_classes
        ):  # fmt: skip
            saved = [None if state is None else state.result(number + n) for n in range(len(load.batches))]
            computed = load.computed([finished is not None for finished in saved])
            prefixes, first = _prefixes(load, num_before, computed), min(computed, default=-1)
            for place, members in enumerate(load.batches):
                segments = [load.segments[member] for member in members]
                num_tokens = len(members) * max(len(segment.ids) for segment in segments)
                job = functools.partial(_score_batch, lm, segments, *prefixes[place], relative, state, number)
                starts_load = load.is_shared and place == first
                if place not in computed:
                    job, num_tokens = functools.partial(list, saved[place]), 0
                yield _MicroBatch(
                    job, num_tokens, starts_load,
                    number=number, segments=segments, window=window, opens_window=opens_window,
                )  # fmt: skip
                opens_window = False
                number += 1


def _refuse_too_long(lm: StreamedLM, num_tokens: int) -> None:
    planned = lm.sizes.scratch_bytes(max(lm.plan.rider_tokens, lm.plan.longest), lm.plan.longest)
    if lm.sizes.scratch_bytes(num_tokens, num_tokens) > planned:
        raise InputError(
            f"{num_tokens} tokens are more than the memory was planned for, sequences of {lm.plan.longest}; load the "
            f"model with job=slowllm.Job(num_tokens={num_tokens}, longest={num_tokens}, repeated=True)"
        )


class _PendingQuery(Generic[K]):
    """A query some of whose log-probabilities are still to come."""

    def __init__(self, key: K, tokens: tuple[int, ...]) -> None:
        self.key, self._tokens = key, tokens
        self._log_probs = [math.nan] * len(tokens)
        self.num_missing, self._is_greedy = len(tokens), True

    def add(self, place: int, log_prob: float, is_likeliest: bool) -> None:
        self._log_probs[place] = log_prob
        self.num_missing -= 1
        self._is_greedy &= is_likeliest

    def likelihood(self) -> Likelihood:
        assert not self.num_missing, "every target is in exactly one segment"
        return Likelihood(tuple(self._log_probs), self._tokens, self._is_greedy)


@dataclass(frozen=True, kw_only=True)
class _MicroBatch(Sized, Generic[K]):
    """The job of passing one micro-batch through the model, and the queries that its results belong to.

    Attributes:
        number: of the micro-batch, for the state; None where there is nothing to compute.
        segments: its rows.
        window: all queries of the window that it is from.
        opens_window: whether it is the window's first.
    """

    number: int | None
    segments: Sequence[Segment]
    window: Sequence[_PendingQuery[K]]
    opens_window: bool


def _windows(queries: Iterable[tuple[K, Query]], plan: Plan) -> Iterator[list[tuple[K, Query]]]:
    """Yield queries in windows of a few sweeps' tokens; tokens shared with the query before are not counted."""
    window: list[tuple[K, Query]] = []
    num_tokens = 0
    last: tuple[int, ...] = ()
    source = iter(queries)
    while True:
        try:
            key, query = next(source)
        except StopIteration:
            break
        except BaseException:  # the queries before the error can still be answered
            if window:
                yield window
            raise
        ids = query.ids
        num_new = len(ids) - common(last, ids)
        is_full = num_tokens + num_new > plan.sweep_tokens * WINDOW_SWEEPS or len(window) == WINDOW_QUERIES
        if window and is_full:
            yield window
            window, num_tokens, num_new = [], 0, len(ids)
        window.append((key, query))
        num_tokens += num_new
        last = ids
    if window:
        yield window


def _prefixes(
    load: Load, num_before: int, computed: Set[int]
) -> list[tuple[Beginning | None, SharedPrefix | None]]:
    """Return for each micro-batch the shared rows that it continues, and the prefix that it shares with others.

    Args:
        load: of segments.
        num_before: positions before the first token of a row.
        computed: micro-batches that pass through the model; the others take nothing.
    """
    places = load.places
    takers: dict[int, set[int]] = {}  # micro-batches that continue each
    for member, (number, _) in places.items():
        parent = load.segments[member].parent
        if parent is not None and number in computed:
            takers.setdefault(places[parent][0], set()).add(number)
    shared = {number: SharedPrefix(len(numbers)) for number, numbers in takers.items()}
    prefixes = list[tuple[Beginning | None, SharedPrefix | None]]()
    for number, batch in enumerate(load.batches):
        if number not in computed:
            prefixes.append((None, None))
            continue
        segments = [load.segments[member] for member in batch]
        parents = [places[segment.parent] for segment in segments if segment.parent is not None]
        rows = [(shared[parent], row) for parent, row in parents]
        beginning = Beginning(num_before + segments[0].start, rows) if rows else None
        prefixes.append((beginning, shared.get(number)))
    return prefixes


def _score_batch(
    lm: StreamedLM,
    segments: Sequence[Segment],
    beginning: Beginning | None,
    shared: SharedPrefix | None,
    relative: bool,
    state: State | None,
    number: int,
) -> list[tuple[list[float], list[bool]]]:
    """Pass one micro-batch through the model; runs as a rider.

    Returns:
        for each segment, the log-probability of each of its targets and whether it is the likeliest.
    """
    # Read only now that the rider runs: a way may hold the output of a block. A rider that skips blocks neither
    # takes keys and values there nor has any to share.
    shares = beginning is not None or shared is not None
    way = Way() if state is None or shares else state.way(number)
    start, num_before = segments[0].start, _num_prefix_positions(lm)
    width = max(len(segment.ids) for segment in segments)
    ids = torch.zeros(len(segments), width, dtype=torch.int64)
    mask = torch.zeros(len(segments), num_before + start + width, dtype=torch.int64)
    for row, segment in enumerate(segments):
        # Padded on the right: a causal model never attends to it, and positions count from the first token.
        ids[row, : len(segment.ids)] = torch.tensor(segment.ids)
        mask[row, : num_before + start + len(segment.ids)] = 1
    targets = [(row, t.position - start, t.token) for row, s in enumerate(segments) for t in s.targets]
    rows, positions, tokens = torch.tensor(targets, dtype=torch.int64).view(-1, 3).unbind(1)
    prompt = lm.soft_prompt
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if prompt is not None and prompt.virtual_ids:
        inputs = {"inputs_embeds": prompt.embed(lm.model, ids), "attention_mask": mask}
    first: Beginning | PrefixBeginning | None = beginning
    if num_before and not start and prompt is not None:
        if lm.keeps_caches and can_share(lm.config):
            first = PrefixBeginning(prompt, len(segments), lm.model.dtype)
        else:
            cache = prompt.growing_cache(lm.config, len(segments), lm.model.dtype)
            inputs |= {"past_key_values": cache, "use_cache": True}
    if first is not None or shared is not None:
        shared_cache = SharedCache(len(lm.layout.blocks), first, shared)
        inputs |= {"past_key_values": shared_cache, "use_cache": True}
    adding = contextlib.nullcontext() if prompt is None else prompt.adding()
    with forward_errors(lm.model), call_context(way=way), adding:
        found = log_probs_at(lm.model, rows, positions, tokens, relative=relative, **inputs)
    counts = [len(segment.targets) for segment in segments]
    split = zip(found.log_probs.split(counts), found.is_likeliest.split(counts), strict=True)
    return [(log_probs.tolist(), likeliest.tolist()) for log_probs, likeliest in split]
