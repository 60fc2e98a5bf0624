"""Speculative decoding: a small draft model proposes tokens, the large one verifies several in one sweep.

Greedy only, and the result is the large model's own: a drafted token is accepted where it would have chosen the same.
The draft grows a tree of likely continuations, best first by their joint probability (SpecExec, Svirschevski et al.,
2024; Sequoia, Chen et al., 2024). The paths from its root to its leaves are the rows of one batch, which continue one
row of keys and values that is kept once; tree attention is not used, because not every family takes a mask that is a
tree. As many rows as compute hides behind reading cost nothing, so the fewer riders share a sweep, the larger the tree.

With ``lookup`` there is no draft model: transformers' prompt look-up proposes tokens that stand in the prompt.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

from slowllm.errors import InputError, PlanError
from slowllm.inference import generation
from slowllm.inference.continuation import continue_prompts, with_own_defaults
from slowllm.inference.draft_trees import MAX_TREE_TOKENS, Costs
from slowllm.inference.generation import MAX_RIDERS, raise_at_end, ride_prompts
from slowllm.inference.generation_types import Continuation, OnTokens, Prompt, Settings
from slowllm.inference.saved_continuations import saved_in
from slowllm.inference.speculative_loop import (
    MAX_DEPTH,
    MAX_WIDTH,
    Acceptance,
    DraftStats,
    continue_with_draft,
)
from slowllm.inference.text import TextSide, max_line_tokens
from slowllm.modeling.batching import batch_rule
from slowllm.modeling.shared_cache import takes_cache
from slowllm.planning.budget import Budget
from slowllm.planning.device_plan import device_rates
from slowllm.planning.forecast import expert_seconds
from slowllm.planning.job import Job, Rates
from slowllm.runtime.description import ModelInfo
from slowllm.runtime.load import open_model
from slowllm.runtime.state import State
from slowllm.runtime.streamed_lm import StreamedLM

# Tokens that prompt look-up proposes.
LOOKUP_TOKENS = 10


def costs_of(lm: StreamedLM, rates: Rates) -> Costs:
    """Return the costs of a sweep of this model once its resident stops are in memory."""
    rates = rates if lm.device_placement is None else device_rates(rates)
    sizes, plan, experts = lm.sizes, lm.plan, None
    read_bytes, passing_bytes = plan.forecast.read_bytes, sizes.all_bytes
    if sizes.experts is not None:
        read_bytes = sum(
            stop.num_bytes for number, stop in enumerate(sizes.stops) if number not in lm.resident
        )
        passing_bytes = sum(stop.num_bytes + stop.decoded_bytes for stop in sizes.stops)

        def experts(num_tokens: int) -> tuple[float, float]:
            return expert_seconds(sizes, num_tokens, plan.kept_units, rates)

    return Costs(
        read=read_bytes / rates.disk,
        weights=passing_bytes / rates.memory,
        token=sum(stop.flops for stop in sizes.stops) / rates.compute,
        experts=experts,
    )


def refuse_uncroppable(lm: TextSide) -> None:
    """Refuse a model whose cache cannot drop tokens that were not accepted.

    Raises:
        InputError: it keeps a state or a sliding window instead of every token's keys and values, or nothing.
    """
    config: PreTrainedConfig = lm.config.get_text_config()
    if not takes_cache(lm.config):
        raise InputError(f"{config.model_type}: takes no cache, so it works without --draft only")
    # A config without layer types makes layers when they are first used, and these keep every token.
    kinds = {type(layer) for layer in DynamicCache(config=config).layers} - {DynamicLayer}
    if kinds or getattr(getattr(lm, "model", None), "_is_stateful", False):
        names = ", ".join(sorted(kind.__name__ for kind in kinds)) or "a state"
        raise InputError(
            f"{config.model_type}: its cache ({names}) cannot take back tokens, so it works without --draft only"
        )


def refuse_changing_tables(lm: TextSide, prompts: Iterable[Prompt]) -> None:
    """Refuse prompts whose continuation changes a rotary table: tokens verified together would all take the last one.

    Raises:
        InputError: a prompt, its continuation and what may be drafted behind it do not take one table.
    """
    rule = batch_rule(lm.config)
    for number, prompt in enumerate(prompts, 1):
        length, most = prompt.width, prompt.width + prompt.settings.max_new_tokens + MAX_DEPTH
        if rule.length_class(length) != rule.length_class(most):
            limits = ", ".join(str(limit) for _, limit in rule.tables)
            raise InputError(
                f"prompt {number}: {lm.config.model_type} changes its rotary table beyond {limits} tokens, and this "
                f"prompt may reach {most} with a draft, so it works without --draft only"
            )


def check_draft(lm: TextSide, draft: TextSide) -> None:
    """Refuse a draft model that has another vocabulary.

    Raises:
        InputError: its tokenizer differs, or the cache of one of the two cannot drop tokens.
    """
    ours, theirs = lm.tokenizer.get_vocab(), draft.tokenizer.get_vocab()
    if ours != theirs:
        same = sum(theirs.get(token) == number for token, number in ours.items())
        raise InputError(
            f"the draft model has another vocabulary: {len(theirs)} tokens, of which {same} are the same as of the "
            f"model's {len(ours)}; use a draft of the same family"
        )
    refuse_uncroppable(lm)
    refuse_uncroppable(draft)


def refuse_soft_prompt(lm: TextSide) -> None:
    """Refuse a model with a soft prompt, which a draft model does not have.

    Raises:
        InputError: it has one.
    """
    if lm.soft_prompt is not None:
        raise InputError("a draft does not know the soft prompt; leave out --draft, or --prompt")


def check_settings(settings: Settings) -> None:
    """Refuse settings other than those of greedy decoding.

    Raises:
        InputError: tokens are sampled, or there are beams.
    """
    if settings.do_sample or settings.num_rows > 1:
        raise InputError("a draft only goes with greedy decoding: leave out --draft, or --sample and --beams")


def job_of(
    lm: TextSide,
    prompts: Iterable[Prompt],
    rates: Rates | None = None,
    begun: Mapping[str, Any] | None = None,
) -> Job:
    """Return the job that the plan is made for, with room for draft trees; see `generation.job_of`.

    It has as many passes as without drafts: how many are saved is known only afterwards.
    """
    rates, prompts = rates or Rates(), list(prompts)
    refuse_changing_tables(lm, prompts)
    job = generation.job_of(lm, prompts, rates, begun)
    # Tokens whose compute is hidden behind reading weights of two bytes each, divided among the prompts.
    tree = max(MAX_DEPTH, min(MAX_TREE_TOKENS, int(rates.compute / rates.disk) // len(prompts)))
    num_tokens = sum(prompt.num_tokens + tree for prompt in prompts)
    # Logits of every drafted token are looked at.
    return replace(job, num_tokens=num_tokens, longest=job.longest + tree, keeps_results=True, rows=())


def load_draft(
    lm: TextSide, draft: ModelInfo, prompts: Sequence[Prompt], budget: Budget, dtype: str
) -> StreamedLM:
    """Open a draft model that is wholly resident, before the large one, which takes the memory that is left.

    Args:
        lm: the large model, or its `ModelInfo`.
        draft: the small one.
        prompts: whose keys and values it keeps.
        budget: of the process.
        dtype: compute dtype, on the processor, whatever device computes the large model.
    Raises:
        InputError: it has another vocabulary, or does not fit.
    """
    check_draft(lm, draft)
    longest = max(len(prompt.ids) + prompt.settings.max_new_tokens for prompt in prompts) + MAX_DEPTH
    job = Job(
        num_tokens=min(MAX_RIDERS, len(prompts)) * longest + MAX_WIDTH * MAX_DEPTH,
        longest=longest,
        repeated=True,
        forward_only=True,
    )
    try:
        model = open_model(StreamedLM, draft, ram=budget, dtype=dtype, job=job)
    except PlanError as error:
        raise InputError(f"draft model {draft.name}: {error}") from error
    if model.plan.streams:
        model.close()
        raise _no_room(draft.name)
    return model


def _no_room(name: str) -> InputError:
    return InputError(
        f"{name}: a draft model must stay in memory altogether, beside the other; allow more --ram"
    )


def generate(
    lm: StreamedLM,
    prompts: Iterable[Prompt],
    draft: StreamedLM | Literal["lookup"],
    *,
    rates: Rates | None = None,
    counts: Acceptance | None = None,
    on_tokens: OnTokens | None = None,
    state: State | None = None,
) -> Iterator[tuple[Continuation, ...]]:
    """Yield the continuations of every prompt, in order, several tokens a sweep; see `generation.generate`.

    Args:
        lm: a loaded model.
        prompts: each a rider of its own.
        draft: a resident model of the same vocabulary, or ``lookup``.
        rates: of this machine. Where they were measured, drafting is switched off while it does not pay.
        counts: counts drafted and accepted tokens.
        on_tokens: called as tokens come; must not call a model.
        state: as for `generation.generate`.
    Raises:
        InputError: settings or models do not go with drafts.
    """
    prompts, counts, rates = list(prompts), counts or Acceptance(), rates or Rates()
    for prompt in prompts:
        check_settings(prompt.settings)
    refuse_changing_tables(lm, prompts)
    if isinstance(draft, str):
        if draft != "lookup":
            raise InputError(f"a draft is a loaded model or 'lookup', not {draft!r}")
        return _generate_with_lookup(lm, prompts, counts, on_tokens, state)
    check_draft(lm, draft)
    if draft.plan.streams:
        raise _no_room(draft.name)
    costs, plan = costs_of(lm, rates), lm.plan
    longest = max((prompt.num_tokens for prompt in prompts), default=1)
    if longest > max_line_tokens(draft):
        raise InputError(
            f"{draft.name}: a draft of {max_line_tokens(draft)} positions cannot follow a prompt and its continuation "
            f"of {longest} tokens"
        )
    max_riders = max(1, min(len(prompts), MAX_RIDERS, plan.sweep_tokens // (longest + MAX_DEPTH)))
    num_unfinished = len(prompts) - (0 if state is None else state.num_resumed)
    stats = DraftStats(
        costs,
        rates.measured,
        num_unfinished,
        max_riders,
        counts,
        MAX_DEPTH * draft.weight_bytes / rates.memory,
    )
    # Tokens that the plan leaves to a rider beside its prompt and continuation.
    max_tree_tokens = max(1, min(plan.sweep_tokens // max_riders - longest, plan.rider_tokens - longest))

    def continue_one(numbers: Sequence[int], members: Sequence[Prompt]) -> list[tuple[Continuation, ...]]:
        report = None if on_tokens is None else functools.partial(on_tokens, numbers[0], 0)
        try:
            with torch.no_grad():
                return [(continue_with_draft(lm, draft, stats, members[0], max_tree_tokens, report),)]
        finally:
            stats.num_unfinished -= 1

    rider = saved_in(state, continue_one)
    return raise_at_end(ride_prompts(lm, prompts, rider, tree_tokens=max_tree_tokens))


def _generate_with_lookup(
    lm: StreamedLM,
    prompts: Sequence[Prompt],
    counts: Acceptance,
    on_tokens: OnTokens | None,
    state: State | None,
) -> Iterator[tuple[Continuation, ...]]:
    refuse_uncroppable(lm)

    def on_pass(num_tokens: int) -> None:
        counts.num_passes += 1
        counts.num_tokens += num_tokens

    rider = functools.partial(
        continue_prompts, lm, with_own_defaults(lm), on_tokens=on_tokens, on_pass=on_pass,
        prompt_lookup_num_tokens=LOOKUP_TOKENS,
    )  # fmt: skip
    return raise_at_end(ride_prompts(lm, prompts, saved_in(state, rider), tree_tokens=LOOKUP_TOKENS))
