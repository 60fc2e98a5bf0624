"""Compare two models on texts: how far apart their predictions are, exactly and over the whole vocabulary.

Both models are open at once. Loads of texts pass through the blocks of the one, then through those of the other; then
their heads come by together. Knows nothing of how results are shown.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slowllm.errors import InputError, PlanError, forward_errors
from slowllm.inference.text import TextSide
from slowllm.inference.text_batches import batch_of
from slowllm.inference.text_files import Text, Texts
from slowllm.modeling.batching import batch_rule
from slowllm.modeling.compared_heads import Divergence, HiddenPair, Predictions, check_heads, compare_heads
from slowllm.modeling.head import last_hidden
from slowllm.options import format_binary
from slowllm.planning.budget import Budget
from slowllm.planning.host_plan import START_BYTES, least_bytes, padding_worth
from slowllm.planning.job import Job, Rates
from slowllm.planning.packing import pack
from slowllm.runtime.description import ModelInfo
from slowllm.runtime.load import open_model
from slowllm.runtime.streamed_lm import StreamedLM

# Bytes of a token's results and sums, over both models.
_RESULT_BYTES = 256
# Of one number of the hidden states that wait for the heads: none is larger.
_NUMBER_BYTES = 4


@dataclass(frozen=True)
class Compared:
    """How far two models are apart on one text.

    Attributes:
        text: of L tokens, prefix included.
        divergence: of the L - 1 places behind its first token.
    """

    text: Text
    divergence: Divergence


def check_pair(a: TextSide, b: TextSide) -> None:
    """Refuse two models whose tokens are not the same.

    Raises:
        InputError: their tokenizers differ.
    """
    ours, theirs = a.tokenizer.get_vocab(), b.tokenizer.get_vocab()
    if ours != theirs:
        same = sum(theirs.get(token) == number for token, number in ours.items())
        raise InputError(
            f"the two models have different tokenizers, of {len(ours):,} and {len(theirs):,} tokens, of which {same:,} are the "
            "same; compare models with one tokenizer"
        )


def check_texts(a: Texts, b: Texts) -> None:
    """Refuse texts of which the two models' tokenizers make different tokens.

    Raises:
        InputError: they do.
    """
    if a.digest != b.digest:
        raise InputError(
            "the two models' tokenizers have one vocabulary, but make different tokens of these texts; compare models "
            "with one tokenizer"
        )


def job_of(texts: Texts, width: int, rates: Rates) -> Job:
    """Return what the plan of either model must know.

    Args:
        texts: all of them.
        width: of a hidden state of the model.
        rates: of the machine.
    """
    return Job(
        num_tokens=texts.padded_tokens(1, padding_worth(rates)),
        longest=max(1, texts.longest - 1),
        forward_only=True,
        keeps_results=False,
        # What has passed the blocks waits for the heads, and is copied for it.
        held_token_bytes=2 * width * _NUMBER_BYTES + _RESULT_BYTES,
    )


@dataclass(frozen=True)
class Share:
    """A model's part of a budget that it has together with another.

    Attributes:
        least_bytes: the fewest in which its job can run.
        weight_bytes: of one of its sweeps.
    """

    least_bytes: int
    weight_bytes: int


def measure_share(info: ModelInfo, job: Job, dtype: str, keep_resident: bool) -> Share:
    """Return what a model needs for a job, by its headers and small tensors."""
    with open_model(StreamedLM, info, ram=Budget(1 << 60, 0), dtype=dtype, job=job) as lm:
        return Share(min(least_bytes(sizes, job, keep_resident) for sizes in lm.choices), lm.weight_bytes)


def divide(budget: Budget, a: Share, b: Share) -> int:
    """Return A's part of a budget: what it needs, and of what is left a share by its weights.

    Raises:
        PlanError: the budget is too small for both.
    """
    left = budget.free_bytes - a.least_bytes - b.least_bytes
    if left < 0:
        smallest = budget.total_bytes - left + START_BYTES
        raise PlanError(
            f"a budget of {format_binary(budget.total_bytes)} is too small for both models: the smallest that would do is "
            f"{format_binary(smallest)} ({format_binary(a.least_bytes)} for the one, {format_binary(b.least_bytes)} for "
            "the other, and the process as it is)"
        )
    return a.least_bytes + left * a.weight_bytes // max(1, a.weight_bytes + b.weight_bytes)


def compare_texts(a: StreamedLM, b: StreamedLM, texts: Iterable[Text]) -> Iterator[Compared]:
    """Yield texts, in order, with how far two models are apart on them; those of one token have no place.

    Args:
        a: opened for the job, as `b`, with the same tokenizer.
        b: the other model.
        texts: drawn load by load.
    Raises:
        InputError: the heads cannot be compared; see `check_heads`.
        NonFiniteError: a model returned NaN.
    """
    heads = check_heads(a.model, b.model)
    rules = [batch_rule(lm.config) for lm in (a, b)]
    rider_tokens = min(
        1 if rule.rides_alone else lm.plan.rider_tokens for lm, rule in zip((a, b), rules, strict=True)
    )
    padding = min(a.plan.padding_tokens, b.plan.padding_tokens)

    def packed(load: Sequence[Text]) -> list[list[int]]:
        lengths = [max(1, len(text.ids) - 1) for text in load]
        classes: list[Hashable] = [tuple(rule.length_class(length) for rule in rules) for length in lengths]
        return pack(lengths, rider_tokens, padding, classes=classes)

    for load in _loads(texts, packed, min(a.plan.sweep_tokens, b.plan.sweep_tokens)):
        batches = [[load[number] for number in members] for members in packed(load)]
        hidden_a, hidden_b = _hidden(a, batches), _hidden(b, batches)
        pairs = [
            HiddenPair(ours, theirs, _tokens(batch))
            for ours, theirs, batch in zip(hidden_a, hidden_b, batches, strict=True)
        ]
        with forward_errors(a.model):
            found = compare_heads(*heads, pairs)
        of_text = {
            id(text): part
            for batch, divergence in zip(batches, found, strict=True)
            for text, part in zip(batch, _split(divergence, [len(t.ids) - 1 for t in batch]), strict=True)
        }
        for text in load:
            yield Compared(text, of_text[id(text)])


def _loads(
    texts: Iterable[Text], packed: Callable[[Sequence[Text]], list[list[int]]], sweep_tokens: int
) -> Iterator[list[Text]]:
    """Yield texts in loads of as many as one sweep carries, padding included; one at least."""
    load: list[Text] = []
    num_tokens = 0

    def padded() -> int:
        return sum(len(batch) * max(len(load[n].ids) - 1 for n in batch) for batch in packed(load))

    for text in texts:
        load.append(text)
        num_tokens += len(text.ids)
        if num_tokens <= sweep_tokens:
            continue
        rest: list[Text] = []
        while len(load) > 1 and (excess := padded() / sweep_tokens) > 1:
            kept = max(1, min(len(load) - 1, int(len(load) / excess)))
            rest, load = [*load[kept:], *rest], load[:kept]
        yield load
        load, num_tokens = rest, sum(len(one.ids) for one in rest)
    while load:
        rest = []
        while len(load) > 1 and padded() > sweep_tokens:
            rest.insert(0, load.pop())
        yield load
        load = rest


def _hidden(lm: StreamedLM, batches: Sequence[Sequence[Text]]) -> list[Tensor]:
    """Return the hidden states (P, H) of each micro-batch that the head gets, in one sweep over the blocks."""
    return lm.ride([functools.partial(_hidden_of, lm, batch) for batch in batches])


def _hidden_of(lm: StreamedLM, texts: Sequence[Text]) -> Tensor:
    """Pass one micro-batch through the blocks; runs as a rider."""
    batch = batch_of([text.ids for text in texts], 1)
    with forward_errors(lm.model), torch.no_grad():
        hidden = last_hidden(lm.model, {"use_cache": False, **batch.inputs})
    return torch.cat([hidden[row, : len(text.ids) - 1] for row, text in enumerate(texts)])


def _tokens(texts: Sequence[Text]) -> Tensor:
    return torch.tensor([token for text in texts for token in text.ids[1:]], dtype=torch.int64)


def _split(divergence: Divergence, counts: list[int]) -> list[Divergence]:
    """Return the divergence of each text from that of a micro-batch."""

    def of_side(side: Predictions) -> list[Predictions]:
        parts = (side.log_probs, side.likeliest, side.likeliest_log_probs)
        return [Predictions(*own) for own in zip(*(part.split(counts) for part in parts), strict=True)]

    sides = zip(divergence.kl.split(counts), of_side(divergence.a), of_side(divergence.b), strict=True)
    return [Divergence(kl, ours, theirs) for kl, ours, theirs in sides]


def open_pair(
    a: ModelInfo, b: ModelInfo, jobs: tuple[Job, Job], budget: Budget, *, dtype: str, rates: tuple[Rates, Rates],
    keep_resident: bool, exact: bool = True, into: Callable[[StreamedLM], StreamedLM],
) -> tuple[StreamedLM, StreamedLM]:  # fmt: skip
    """Open two models within one budget.

    Args:
        a: the one.
        b: the other.
        jobs: of each.
        budget: of the process.
        dtype: compute dtype.
        rates: of the machine, by the files of each.
        keep_resident: whether stops that fit the budget stay in memory.
        exact: as for `slowllm.load`.
        into: called with each as it is opened, to own it.
    Raises:
        PlanError: the budget is too small for both.
    """
    shares = [measure_share(info, job, dtype, keep_resident) for info, job in zip((a, b), jobs, strict=True)]
    own = divide(budget, *shares)
    others = budget.free_bytes - own
    budget.take(others)
    try:
        first = into(
            open_model(
                StreamedLM,
                a,
                ram=budget,
                dtype=dtype,
                job=jobs[0],
                rates=rates[0],
                keep_resident=keep_resident,
                exact=exact,
            )
        )
    finally:
        budget.give_back(others)
    # What A has left, B may have.
    second = into(
        open_model(
            StreamedLM,
            b,
            ram=budget,
            dtype=dtype,
            job=jobs[1],
            rates=rates[1],
            keep_resident=keep_resident,
            exact=exact,
        )
    )
    return first, second
