"""The result of scoring: how likely some tokens are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from slowllm.html import escaped, surprisal_html, table_html


@dataclass(frozen=True)
class Likelihood:
    """How likely a text, a line or a continuation is.

    Attributes:
        log_probs: natural logarithms, one for each scored token.
        tokens: ids of the scored tokens.
        is_greedy: whether every token was the likeliest at its position; false where that was not computed.
        texts: of the tokens, where they are known; they are not compared.
    """

    log_probs: tuple[float, ...]
    tokens: tuple[int, ...]
    is_greedy: bool
    texts: Sequence[str] | None = field(default=None, compare=False, repr=False)

    @property
    def log_likelihood(self) -> float:
        """Sum over the scored tokens, in nats."""
        return math.fsum(self.log_probs)

    @property
    def mean_nll(self) -> float:
        """Mean negative log-likelihood of a token; NaN where no token is scored."""
        return -self.log_likelihood / len(self.log_probs) if self.log_probs else math.nan

    @property
    def perplexity(self) -> float:
        """exp(mean_nll)."""
        return safe_exp(self.mean_nll)

    @property
    def tokens_html(self) -> str:
        """The tokens in colours of their surprisal; their ids, where their texts are not known."""
        texts = [f"{token} " for token in self.tokens] if self.texts is None else self.texts
        return surprisal_html(texts, self.log_probs)

    def figures(self) -> list[tuple[str, str]]:
        """Return what a reader wants to know, by names."""
        return [
            ("tokens", f"{len(self.tokens):,}"), ("log-likelihood", f"{self.log_likelihood:.4f}"),
            ("nats a token", f"{self.mean_nll:.4f}"), ("perplexity", f"{self.perplexity:,.4g}"),
            ("greedy", "yes" if self.is_greedy else "no"),
        ]  # fmt: skip

    def _repr_html_(self) -> str:
        names, values = zip(*self.figures(), strict=True)
        return f"<div>{self.tokens_html}{table_html([[escaped(value) for value in values]], names)}</div>"


def safe_exp(value: float) -> float:
    """Return exp(value), infinity where that is too large for a float."""
    return math.exp(value) if not value > 709.0 else math.inf
