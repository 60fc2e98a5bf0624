"""Several tokens of a continuation in one sweep: a small model drafts them, the large one says which it would take.

Greedy only, and with the large model's own tokens: what is accepted is what it would have chosen. The draft grows a
tree of likely continuations, best first by their joint probability (SpecExec, Svirschevski et al., 2024; Sequoia,
Chen et al., 2024). The paths from its root to its leaves are the rows of one batch, because not every family takes a
mask that is a tree; the rows go on from one row of keys and values, which is kept once. As many rows as computing
hides under the reading cost nothing, so the tree is the larger, the fewer riders share a sweep.

With ``lookup`` there is no second model: transformers' prompt look-up drafts from what stands in the prompt.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

from slowllm.errors import InputError, PlanError
from slowllm.inference import generation
from slowllm.inference.draft_trees import (
    MAX_TREE_TOKENS,
    Costs,
)
from slowllm.inference.generation import (
    Continuation,
    OnTokens,
    Prompt,
    Settings,
    ride_prompts,
)
from slowllm.inference.speculative_loop import (
    MAX_DEPTH,
    MAX_WIDTH,
    Acceptance,
    DraftStats,
    continue_with_draft,
)
from slowllm.inference.text import TextSide, max_line_tokens
from slowllm.planning.budget import Budget
from slowllm.planning.device_plan import device_rates
from slowllm.planning.job import Job, Rates
from slowllm.runtime.description import ModelInfo
from slowllm.runtime.load import open_model
from slowllm.runtime.streamed_lm import StreamedLM

log = logging.getLogger(__name__)


# Tokens that prompt look-up proposes.
LOOKUP_TOKENS = 10


def costs_of(lm: StreamedLM, rates: Rates) -> Costs:
    """Return what a later sweep of this model costs."""
    rates = rates if lm.device_placement is None else device_rates(rates)
    return Costs(
        read=lm.plan.forecast.read_bytes / rates.disk,
        weights=lm.sizes.all_bytes / rates.memory,
        token=sum(stop.flops for stop in lm.sizes.stops) / rates.compute,
    )


def refuse_uncroppable(lm: TextSide) -> None:
    """Refuse a model whose cache cannot forget what was drafted in vain.

    Raises:
        InputError: it keeps a state or a sliding window instead of every token's keys and values.
    """
    config: PreTrainedConfig = lm.config.get_text_config()
    # Where nothing is said of layers, they are made when first used, and are of the growing kind.
    kinds = {type(layer) for layer in DynamicCache(config=config).layers} - {DynamicLayer}
    if kinds or getattr(getattr(lm, "model", None), "_is_stateful", False):
        names = ", ".join(sorted(kind.__name__ for kind in kinds)) or "a state"
        raise InputError(
            f"{config.model_type}: its cache ({names}) cannot take back tokens, so it works without --draft only"
        )


def check_draft(lm: TextSide, draft: TextSide) -> None:
    """Refuse a draft model that does not speak the same tokens.

    Raises:
        InputError: its tokenizer differs, or one of the two cannot take back tokens.
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
    """Refuse a model with a soft prompt, of which a draft knows nothing.

    Raises:
        InputError: it has one.
    """
    if lm.soft_prompt is not None:
        raise InputError("a draft does not know the soft prompt; leave out --draft, or --prompt")


def check_settings(settings: Settings) -> None:
    """Refuse settings that drafts do not go with.

    Raises:
        InputError: tokens are drawn, or there are beams.
    """
    if settings.do_sample or settings.num_rows > 1:
        raise InputError("a draft only goes with greedy decoding: leave out --draft, or --sample and --beams")


def job_of(lm: TextSide, prompts: Iterable[Prompt], rates: Rates | None = None) -> Job:
    """Return what the plan must know of prompts that are continued with drafts.

    As many passes are counted as without drafts: how many are saved is only seen at work.

    Raises:
        InputError: as for `generation.job_of`.
    """
    rates, prompts = rates or Rates(), list(prompts)
    job = generation.job_of(lm, prompts, rates)
    # What hides under the reading of weights with two bytes for each, in all.
    tree = max(MAX_DEPTH, min(MAX_TREE_TOKENS, int(rates.compute / rates.disk) // len(prompts)))
    return Job(
        num_tokens=sum(prompt.num_tokens + tree for prompt in prompts),
        longest=job.longest + tree,
        forward_only=True,
        keeps_results=True,
        num_passes=job.num_passes,
    )


def load_draft(
    lm: TextSide, draft: ModelInfo, prompts: Sequence[Prompt], budget: Budget, dtype: str
) -> StreamedLM:
    """Open a draft model that stays in memory altogether; before the large one, which takes what is left.

    Args:
        lm: the large model, or its description.
        draft: the small one.
        prompts: of which it keeps keys and values.
        budget: of the process.
        dtype: compute dtype, on the processor, whatever the large model is computed on.
    Raises:
        InputError: it does not speak the same tokens, or does not fit.
    """
    check_draft(lm, draft)
    longest = max(len(prompt.ids) + prompt.settings.max_new_tokens for prompt in prompts) + MAX_DEPTH
    job = Job(
        num_tokens=min(generation.MAX_RIDERS, len(prompts)) * longest + MAX_WIDTH * MAX_DEPTH,
        longest=longest,
        repeated=True,
        forward_only=True,
    )
    try:
        model = open_model(StreamedLM, draft, ram=budget, dtype=dtype, job=job)
    except PlanError as error:
        raise InputError(f"draft model {draft.name}: {error}") from error
    if model.plan.ring_bytes:
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
) -> Iterator[tuple[Continuation, ...]]:
    """Yield the continuations of every prompt, in order, several tokens a sweep; see `generation.generate`.

    Args:
        lm: a loaded model.
        prompts: each a rider of its own.
        draft: a model of the same tokens that is held in memory, or ``lookup``.
        rates: of this machine. Where they were measured, drafting is switched off while it does not pay.
        counts: told what drafting brings.
        on_tokens: called as tokens come; must not call a model.
    Raises:
        InputError: settings or models do not go with drafts.
    """
    prompts, counts, rates = list(prompts), counts or Acceptance(), rates or Rates()
    for prompt in prompts:
        check_settings(prompt.settings)
    if isinstance(draft, str):
        if draft != "lookup":
            raise InputError(f"a draft is a loaded model or 'lookup', not {draft!r}")
        refuse_uncroppable(lm)
        view = generation.own_defaults(lm)

        def look_up(numbers: Sequence[int], chosen: Sequence[Prompt]) -> list[tuple[Continuation, ...]]:
            def count(num_tokens: int) -> None:
                counts.num_passes += 1
                counts.num_tokens += num_tokens

            return generation.continue_prompts(
                lm, view, numbers, chosen, on_tokens=on_tokens, on_pass=count,
                prompt_lookup_num_tokens=LOOKUP_TOKENS,
            )  # fmt: skip

        held = LOOKUP_TOKENS
        return ride_prompts(lm, prompts, look_up, held=lambda c: c[0].num_tokens + held, alone=True)
    check_draft(lm, draft)
    if draft.plan.ring_bytes:
        raise _no_room(draft.name)
    costs, plan = costs_of(lm, rates), lm.plan
    longest = max((prompt.num_tokens for prompt in prompts), default=1)
    if longest > max_line_tokens(draft):
        raise InputError(
            f"{draft.name}: a draft of {max_line_tokens(draft)} positions cannot follow a prompt and its continuation "
            f"of {longest} tokens"
        )
    seats = max(1, min(len(prompts), generation.MAX_RIDERS, plan.sweep_tokens // (longest + MAX_DEPTH)))
    party = DraftStats(
        costs, rates.measured, len(prompts), seats, counts, MAX_DEPTH * draft.weight_bytes / rates.memory
    )
    # What the plan leaves to a rider beside its prompt and continuation.
    share = max(1, min(plan.sweep_tokens // seats - longest, plan.rider_tokens - longest))

    def ride(numbers: Sequence[int], chosen: Sequence[Prompt]) -> list[tuple[Continuation, ...]]:
        try:
            with torch.no_grad():
                tell = None if on_tokens is None else functools.partial(on_tokens, numbers[0], 0)
                return [(continue_with_draft(lm, draft, party, chosen[0], share, tell),)]
        finally:
            party.num_left -= 1

    return ride_prompts(lm, prompts, ride, held=lambda chosen: chosen[0].num_tokens + share, alone=True)
