"""Which of some choices is the likeliest after a context.

Choices of one token each are compared by their own rows of the head; the rest of it is then not read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from slowllm.errors import InputError
from slowllm.inference.likelihood import Likelihood
from slowllm.inference.scoring import score_keyed
from slowllm.inference.text import Query, TextSide, encode_pair, leading_ids
from slowllm.runtime.state import State
from slowllm.runtime.streamed_lm import StreamedLM

Normalize = Literal["none", "tokens", "characters", "unconditional"]


@dataclass(frozen=True)
class Item:
    """A context, and what may follow it.

    Attributes:
        context: may be empty.
        choices: continuations, blanks at their beginning included; at least one.
    """

    context: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Chosen:
    """What a model makes of an item.

    Attributes:
        probabilities: of the choices against one another; they sum to 1.
        scores: log-likelihoods as normalised, in nats. Up to a constant of the item where only the choices' own rows
            of the head were read.
        best: index of the likeliest choice, the first of equals.
    """

    probabilities: tuple[float, ...]
    scores: tuple[float, ...]
    best: int


@dataclass(frozen=True)
class Encoded:
    """An item as queries.

    Attributes:
        queries: one for each choice; after them one for each choice by itself, where scores are `unconditional`.
        weights: what each choice's log-likelihood is multiplied by.
    """

    queries: tuple[Query, ...]
    weights: tuple[float, ...]

    @property
    def num_choices(self) -> int:
        """How many choices there are."""
        return len(self.weights)

    @property
    def is_relative(self) -> bool:
        """Whether every choice is one token after the same context, and all weigh the same."""
        first, *_ = self.queries
        return (
            all(len(query.continuation) == 1 for query in self.queries)
            and all(query.context == first.context for query in self.queries[: self.num_choices])
            and len(set(self.weights)) == 1
        )


def encode_item(
    side: TextSide, item: Item, normalize: Normalize = "none", *, truncate: bool = False
) -> Encoded:
    """Turn an item into queries.

    Args:
        side: whose tokenizer and vocabulary.
        item: with choices.
        normalize: ``none``: log-likelihoods as they are; ``tokens``, ``characters``: a token's or character's share;
            ``unconditional``: less the log-likelihood of the choice without its context (Brown et al., 2020).
        truncate: whether to cut a context that is too long, from its beginning.
    Raises:
        InputError: there are no choices, one has no tokens, or they are too long.
    """
    if normalize not in get_args(Normalize):
        raise InputError(f"normalize {normalize!r} is unknown; use one of {', '.join(get_args(Normalize))}")
    if isinstance(item.choices, str) or not item.choices:
        raise InputError("there are no choices")
    leading = leading_ids(side.tokenizer)
    queries = [
        encode_pair(side, item.context, choice, leading=leading, truncate=truncate) for choice in item.choices
    ]
    weights = [1.0] * len(queries)
    if normalize == "tokens":
        weights = [1 / len(query.continuation) for query in queries]
    elif normalize == "characters":
        # Without the blank that parts a choice from its context, as in lm-eval's acc_norm.
        weights = [1 / max(1, len(choice.lstrip())) for choice in item.choices]
    elif normalize == "unconditional":
        queries += [encode_pair(side, "", choice) for choice in item.choices]
    return Encoded(tuple(queries), tuple(weights))


def choose(
    lm: StreamedLM, items: Iterable[Encoded], *, relative: bool = False, state: State | None = None
) -> Iterator[Chosen]:
    """Yield what a model makes of any number of items, in order, in as few sweeps as the plan allows.

    Args:
        lm: a loaded model.
        items: from `encode_item`; drawn on the carousel's thread, so it must not call the model.
        relative: whether all of them are `Encoded.is_relative`.
        state: as for `score_keyed`.
    """
    queries = ((item, query) for item in items for query in item.queries)
    scored = score_keyed(lm, queries, relative=relative, state=state)
    for item, first in scored:
        others = [next(scored)[1] for _ in item.queries[1:]]
        yield judge(item, [first, *others])


def judge(item: Encoded, likelihoods: Sequence[Likelihood]) -> Chosen:
    """Compare an item's choices by the likelihoods of its queries."""
    scores = [
        likelihood.log_likelihood * weight
        for likelihood, weight in zip(likelihoods, item.weights, strict=False)
    ]
    for index, alone in enumerate(likelihoods[item.num_choices :]):
        scores[index] -= alone.log_likelihood
    return chosen(scores)


def chosen(scores: Sequence[float]) -> Chosen:
    """Return probabilities by a softmax over scores, and the best."""
    highest = max(scores)
    if highest == -math.inf:  # none of them is possible
        shares = [1.0] * len(scores)
    else:
        shares = [math.exp(score - highest) for score in scores]
    total = math.fsum(shares)
    return Chosen(tuple(share / total for share in shares), tuple(scores), scores.index(highest))
