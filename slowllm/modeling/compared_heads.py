"""How far two models' predictions are apart, over the whole vocabulary, while the chunks of both heads come by.

The divergence of B from A is the mean under A of the difference of their logits, less that of their normalizers. The
mean is an online softmax's sum, so one tile of logits of each model is enough. The chunks of the two may differ: at
each chunk of A those of B are visited that overlap it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slowllm.errors import InputError
from slowllm.modeling.head import StreamedHead
from slowllm.modeling.online_softmax import TILE_COLUMNS, OnlineSoftmax
from slowllm.streaming.stops import Weights


@dataclass(frozen=True)
class Predictions:
    """What one model says of P places.

    Attributes:
        log_probs: (P,) float32, of the token that stands there, in nats.
        likeliest: (P,) int64, the likeliest token, the first of equal ones.
        likeliest_log_probs: (P,) float32, of that.
    """

    log_probs: Tensor
    likeliest: Tensor
    likeliest_log_probs: Tensor


@dataclass(frozen=True)
class Divergence:
    """How far two models are apart at P places.

    Attributes:
        kl: (P,) float32, the Kullback-Leibler divergence KL(A || B), in nats.
        a: what A says.
        b: what B says.
    """

    kl: Tensor
    a: Predictions
    b: Predictions


@dataclass(frozen=True)
class HiddenPair:
    """What two models hand to their heads for the same P places.

    Attributes:
        a: (P, H) of A.
        b: (P, H') of B.
        tokens: (P,) int64, the tokens that stand there.
    """

    a: Tensor
    b: Tensor
    tokens: Tensor


def check_heads(a: PreTrainedModel, b: PreTrainedModel) -> tuple[StreamedHead, StreamedHead]:
    """Return the heads of two streamed models that can be compared.

    Raises:
        InputError: their vocabularies have different sizes, or one's logits cannot be computed in parts.
    """
    heads = a.get_output_embeddings(), b.get_output_embeddings()
    for model, head in zip((a, b), heads, strict=True):
        assert isinstance(head, StreamedHead), "only streamed models are compared"
        if head.logit_transform is None:
            raise InputError(
                f"{type(model).__name__}: its logits can only be computed all at once, so they are not compared"
            )
    first, second = heads
    assert isinstance(first, StreamedHead)
    assert isinstance(second, StreamedHead)
    if first.out_features != second.out_features:
        raise InputError(
            f"the one model has logits of {first.out_features:,} tokens and the other of {second.out_features:,}, "
            "so their predictions cannot be compared"
        )
    return first, second


def compare_heads(a: StreamedHead, b: StreamedHead, pairs: Sequence[HiddenPair]) -> list[Divergence]:
    """Return how far two models are apart, for each micro-batch, by one visit to each chunk of A's head.

    Args:
        a: from `check_heads`, as `b`.
        b: the other's head; a chunk that reaches over an end of A's is visited on both sides of it.
        pairs: of each micro-batch.
    Raises:
        NonFiniteError: a head returned NaN.
    """
    sums = [_Sums(a, b, pair) for pair in pairs]
    with torch.no_grad():
        for chunk, stop in enumerate(a.stops):

            def at_a(weights: Weights, chunk: int = chunk) -> None:
                _visit_overlapping(a, b, chunk, a.weight_of(weights), sums)

            a.carousel.visit(stop, "up", at_a)
    return [one.divergence() for one in sums]


def _visit_overlapping(
    a: StreamedHead, b: StreamedHead, chunk: int, weight_a: Tensor, sums: Sequence[_Sums]
) -> None:
    """Visit the chunks of B that overlap one of A, whose weights stay valid meanwhile."""
    start_a, end_a = a.chunk_rows[chunk]
    for number, stop in enumerate(b.stops):
        start_b, end_b = b.chunk_rows[number]
        start, end = max(start_a, start_b), min(end_a, end_b)
        if start >= end:
            continue

        def at_b(weights: Weights, start_b: int = start_b, start: int = start, end: int = end) -> None:
            weight_b = b.weight_of(weights)
            for one in sums:
                for first in range(start, end, TILE_COLUMNS):
                    last = min(first + TILE_COLUMNS, end)
                    one.add(
                        weight_a[first - start_a : last - start_a],
                        weight_b[first - start_b : last - start_b],
                        first,
                    )

        # Another carousel, which never waits for this one.
        b.carousel.visit(stop, "up", at_b)


class _Side:
    """The sums of one model."""

    def __init__(self, head: StreamedHead, hidden: Tensor, tokens: Tensor) -> None:
        rows = torch.arange(len(tokens), device=hidden.device)
        self._head, self._hidden = head, hidden
        self.softmax = OnlineSoftmax(len(tokens), rows, tokens.to(hidden.device))
        self.likeliest = torch.zeros_like(rows)

    def logits(self, weight: Tensor, first: int) -> Tensor:
        """Return the logits (P, W) float32 of a tile, and keep the likeliest token."""
        bias = self._head.bias
        logits = self._head.tile_logits(
            self._hidden, weight, None if bias is None else bias[first : first + len(weight)]
        )
        best = logits.max(-1)
        is_higher = best.values > self.softmax.highest
        self.likeliest.copy_(torch.where(is_higher, best.indices + first, self.likeliest))
        self.tile_highest = best.values
        return logits

    def add(self, logits: Tensor, first: int) -> Tensor:
        """Add a tile, which becomes exp(logit - highest); return the factor for sums up to now."""
        scale, _, _ = self.softmax.add(logits, first, self.tile_highest)
        return scale

    def predictions(self) -> Predictions:
        """Return what the model says."""
        normalizers = self.softmax.normalizers()
        return Predictions(
            (self.softmax.token_logits - normalizers).cpu(), self.likeliest.cpu(),
            (self.softmax.highest - normalizers).cpu(),
        )  # fmt: skip


class _Sums:
    """The sums of two models over one micro-batch."""

    def __init__(self, a: StreamedHead, b: StreamedHead, pair: HiddenPair) -> None:
        self._a, self._b = _Side(a, pair.a, pair.tokens), _Side(b, pair.b, pair.tokens)
        self._difference = torch.zeros(len(pair.tokens), dtype=torch.float64)

    def add(self, weight_a: Tensor, weight_b: Tensor, first: int) -> None:
        """Add a tile of both heads, which begins with token `first`."""
        ours, theirs = self._a.logits(weight_a, first), self._b.logits(weight_b, first)
        difference = ours - theirs.to(ours.device)
        scale = self._a.add(ours, first)
        self._b.add(theirs, first)
        # What A rules out does not count, whatever B says of it: there the difference may be infinite, or none.
        difference.masked_fill_(ours == 0, 0.0)
        part = difference.mul_(ours).sum(-1, dtype=torch.float64)
        self._difference.mul_(scale.double().cpu()).add_(part.cpu())

    def divergence(self) -> Divergence:
        """Return how far they are apart, once every tile was added."""
        softmax_a, softmax_b = self._a.softmax, self._b.softmax
        mean = self._difference / softmax_a.total.double().cpu()
        kl = mean - softmax_a.normalizers().double().cpu() + softmax_b.normalizers().double().cpu()
        # It is none, but for rounding.
        return Divergence(kl.clamp_(min=0.0).float(), self._a.predictions(), self._b.predictions())
