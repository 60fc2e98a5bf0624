"""The result of scoring: how likely some tokens are."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Likelihood:
    """How likely a text, a line or a continuation is.

    Attributes:
        log_probs: natural logarithms, one for each scored token.
        tokens: ids of the scored tokens.
        is_greedy: whether every token was the likeliest at its position; false where that was not computed.
    """

    log_probs: tuple[float, ...]
    tokens: tuple[int, ...]
    is_greedy: bool

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


def safe_exp(value: float) -> float:
    """Return exp(value), infinity where that is too large for a float."""
    return math.exp(value) if not value > 709.0 else math.inf
