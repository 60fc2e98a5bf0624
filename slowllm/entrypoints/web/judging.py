"""Score a text, and compare choices, for a visitor: asks that make no new token, of the same service as all others."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from slowllm.entrypoints.web.completing import likeliest
from slowllm.entrypoints.web.desk import Desk, Errand
from slowllm.entrypoints.web.texts import refuse_long
from slowllm.entrypoints.web.waiting import Bell, until_done, where
from slowllm.entrypoints.web.words import ShownToken
from slowllm.errors import InputError
from slowllm.inference.choices import Chosen, Encoded, Item, Normalize, encode_item, judge
from slowllm.inference.generation_types import Prompt, Settings
from slowllm.inference.likelihood import Likelihood
from slowllm.inference.pieces import pieces_of
from slowllm.inference.prompt_scores import PromptScores
from slowllm.inference.service_types import Ask
from slowllm.inference.text import Query, encode_pair

SCORE, CHOOSE, YES_NO = "score", "choose", "yes or no"
# How many likelier tokens are shown beside each.
NUM_LIKELIEST = 3


@dataclass(frozen=True)
class Scored:
    """How likely a text is.

    Attributes:
        tokens: of it.
        likelihood: of all.
    """

    tokens: tuple[ShownToken, ...]
    likelihood: Likelihood


def ask_for(query: Query, num_top: int = 1) -> Ask:
    """Return the ask that scores a query's continuation."""
    # One likeliest token at least is asked for, because the head counts from one.
    prompt = Prompt(query.context + query.continuation, Settings(max_new_tokens=1))
    return Ask(prompt, num_prompt_top=num_top, only_prompt=True)


def likelihood_of(query: Query, scores: PromptScores) -> Likelihood:
    """Return the likelihood of a query's continuation by the scores of its ask."""
    number = len(query.continuation)
    return Likelihood(scores.log_probs[-number:], query.continuation, all(scores.is_likeliest[-number:]))


async def likelihoods(
    desk: Desk, errand: Errand, queries: Sequence[Query], num_top: int = 1
) -> AsyncIterator[str | list[PromptScores]]:
    """Yield a status again and again, and at last the scores of each query's ask.

    Raises:
        SlowLLMError: what `Errand.submit` raises and a ride ends with.
    """
    bell, started = Bell(), time.monotonic()
    rides = [errand.submit(ask_for(query, num_top)) for query in queries]
    async for _ in until_done(rides, bell):
        yield f"{time.monotonic() - started:.0f} s: {where(desk)}"
    found = [ride.result().prompt_scores for ride in rides]
    yield [scores for scores in found if scores is not None]


async def score(desk: Desk, errand: Errand, text: str) -> AsyncIterator[str | Scored]:
    """Yield a status again and again, and at last how likely a text is.

    Raises:
        InputError: the text has no tokens, or too many.
        SlowLLMError: what `likelihoods` raises.
    """

    def encoded() -> Query:
        refuse_long(text)
        with desk.tokenizing():
            return encode_pair(desk.lm, "", text)

    query = await asyncio.to_thread(encoded)
    async for found in likelihoods(desk, errand, [query], NUM_LIKELIEST):
        if isinstance(found, str):
            yield found
        else:
            yield await asyncio.to_thread(_scored, desk, query, found[0])


def _scored(desk: Desk, query: Query, scores: PromptScores) -> Scored:
    tokenizer, likelihood = desk.lm.tokenizer, likelihood_of(query, scores)
    tops = scores.top_log_probs[-len(query.continuation) :]
    # What stands before the text by itself, BOS for one, is left out, so that it does not count as text.
    texts = pieces_of(tokenizer, (), query.continuation)
    tokens = tuple(
        ShownToken(piece, log_prob, likeliest(tokenizer, top))
        for piece, log_prob, top in zip(texts, likelihood.log_probs, tops, strict=True)
    )
    return Scored(tokens, likelihood)


async def choose(
    desk: Desk, errand: Errand, item: Item, normalize: Normalize = "none"
) -> AsyncIterator[str | Chosen]:
    """Yield a status again and again, and at last the probabilities of choices after a context.

    Raises:
        InputError: there are no choices, one has no tokens, or they are too long.
        SlowLLMError: what `likelihoods` raises.
    """

    def encoded() -> Encoded:
        for text in (item.context, *item.choices):
            refuse_long(text)
        with desk.tokenizing():
            return encode_item(desk.lm, item, normalize)

    found_item = await asyncio.to_thread(encoded)
    async for found in likelihoods(desk, errand, found_item.queries):
        if isinstance(found, str):
            yield found
        else:
            pairs = zip(found_item.queries, found, strict=True)
            yield judge(found_item, [likelihood_of(query, scores) for query, scores in pairs])


def choices_of(text: str, *, adds_blank: bool) -> tuple[str, ...]:
    """Return the choices of a form, one a line.

    Args:
        text: whose lines are the choices; empty ones are left out.
        adds_blank: whether each gets the blank before it that parts it from the context.
    Raises:
        InputError: there are fewer than two.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) < 2:
        raise InputError("give at least two choices, one a line")
    return tuple(f" {line.strip()}" if adds_blank else line for line in lines)


def yes_no_item(question: str, template: str, yes: str, no: str) -> Item:
    r"""Return a question as a context with two choices.

    Args:
        question: any text.
        template: in which ``{question}`` stands for the question, and ``\n`` for a line break.
        yes: the one word.
        no: the other.
    Raises:
        InputError: the template has no ``{question}``, the question is empty, or the words are no two words.
    """
    if not question.strip():
        raise InputError("give a question")
    if "{question}" not in template:
        raise InputError(f"the template {template!r} has no {{question}}")
    if not yes.strip() or not no.strip() or yes.strip() == no.strip():
        raise InputError(f"{yes!r} and {no!r} must be two different words, neither of them empty")
    context = template.replace("\\n", "\n").replace("{question}", question.strip())
    blank = "" if context[-1:].isspace() else " "
    return Item(context, (blank + yes.strip(), blank + no.strip()))


def perplexity_in_words(likelihood: Likelihood) -> str:
    """Return a perplexity, or that it is too large for a number."""
    value = likelihood.perplexity
    return f"{value:,.4g}" if math.isfinite(value) else "beyond the largest number"
