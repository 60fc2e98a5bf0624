"""A cache of what the large model predicted after a few tokens, for the draft to use when they come again."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

# Weights of the cached predictions after the same two or three tokens, beside the draft model's own, and how many of
# the likeliest tokens are cached (4.2 tokens a sweep instead of 3.6).
NGRAM_WEIGHTS, NUM_CACHED = {2: 0.4, 3: 0.6}, 4
MAX_NGRAM = max(NGRAM_WEIGHTS)
# Entries that a rider keeps: about 20 MB.
MAX_ENTRIES = 20_000


class NgramCache:
    """The large model's likeliest tokens after each n-gram.

    Every node of a verified tree adds an entry, accepted or not (Token Recycling, Luo et al., 2024).
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[int, ...], tuple[list[int], list[float]]] = {}

    def update(self, contexts: Sequence[Sequence[int]], logits: Tensor) -> None:
        """Cache the likeliest tokens by logits (N, V) after each of N contexts."""
        best = logits.log_softmax(-1).topk(min(NUM_CACHED, logits.shape[-1]))
        for context, *entry in zip(contexts, best.indices.tolist(), best.values.exp().tolist(), strict=True):
            for length in NGRAM_WEIGHTS:
                self._entries[tuple(context[-length:])] = entry[0], entry[1]
        while len(self._entries) > MAX_ENTRIES:  # evict the oldest first
            del self._entries[next(iter(self._entries))]

    def blend(self, contexts: Sequence[Sequence[int]], log_probs: Tensor) -> Tensor:
        """Return the draft's log-probabilities (N, V), blended with the cached ones after each of N contexts."""
        probs: Tensor | None = None
        for row, context in enumerate(contexts):
            for length, weight in sorted(NGRAM_WEIGHTS.items(), reverse=True):
                entry = self._entries.get(tuple(context[-length:]))
                if entry is not None:
                    probs = log_probs.exp() if probs is None else probs
                    probs[row] *= 1 - weight
                    for token, prob in zip(*entry, strict=True):
                        if token < probs.shape[-1]:
                            probs[row, token] += weight * prob
                    break
        return log_probs if probs is None else probs.log()
