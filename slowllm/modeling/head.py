"""Embedding by rows; the head over vocabulary chunks; log-probabilities without logits.

The two matrices of vocabulary size stay out of memory. The embedding is transformers' own module on a
memory-mapped parameter: a look-up touches only its rows. The head is a row of stops, each an equal part of the
vocabulary. Log-probabilities are gathered chunk by chunk with an online softmax, so that tokens x vocabulary is
never held.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from slowllm.modeling.finite import check_finite
from slowllm.modeling.logit_transform import LogitTransform
from slowllm.storage.spans import Placement
from slowllm.streaming.call_context import call_context, current_call
from slowllm.streaming.carousel import Carousel
from slowllm.streaming.stops import Weights

log = logging.getLogger(__name__)


# Columns of logits that are held in fp32 at a time: 8,192 x 1,024 tokens are 34 MB.
TILE_COLUMNS = 8192


# From token ids (K,) to their rows (K, H) of the head.
Lookup = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Found:
    """What was found of N tokens.

    Attributes:
        log_probs: (N,) float32, in nats.
        is_likeliest: (N,) bool, whether the token is the argmax: the first of the likeliest.
    """

    log_probs: Tensor
    is_likeliest: Tensor


class StreamedHead(nn.Linear):
    """Mixin for a model's output embedding whose matrix comes by in chunks; made by `stream_head`."""

    _carousel: Carousel
    _stops: tuple[int, ...]
    _rows: tuple[tuple[int, int], ...]
    _finish: LogitTransform | None
    _lookup: Lookup | None

    __call__ = nn.Module.__call__

    def forward(self, input: Tensor) -> Tensor:
        """Return the logits (..., V) of hidden states (..., H)."""
        take_hidden = current_call().take_hidden
        if take_hidden is not None:
            take_hidden(input)
            return input.new_zeros(*input.shape[:-1], 0)
        if torch.is_grad_enabled() and input.requires_grad:
            return cast(Tensor, _HeadFunction.apply(self, input))  # type: ignore[no-untyped-call]
        return self._logits(input)

    def _logits(self, hidden: Tensor, *, comes_back: bool = False) -> Tensor:
        # Flat: by the strides of a slice of positions, torch may choose a product in a batch and copy the weight.
        flat = hidden.reshape(-1, hidden.shape[-1])
        parts = []
        for number, stop in enumerate(self._stops):

            def work(weights: Weights, number: int = number) -> Tensor:
                part = F.linear(flat, self._weight(weights), self._bias(number))
                part = part.view(*hidden.shape[:-1], -1)
                check_finite("the head", part, infinity_is_legal=True)
                return part

            parts.append(self._carousel.visit(stop, "up", work, comes_back=comes_back))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def _weight(self, weights: Weights) -> Tensor:
        (weight,) = weights.values()
        return weight

    def _bias(self, number: int) -> Tensor | None:
        start, stop = self._rows[number]
        return None if self.bias is None else self.bias[start:stop]

    def gather(self, hidden: Tensor, which: Tensor, tokens: Tensor) -> Found:
        """Return the log-probabilities of tokens after some hidden states; see `log_probs_at`.

        Args:
            hidden: (P, H), after the last block.
            which: (N,) int64, the hidden state that each token follows.
            tokens: (N,) int64.
        """
        assert self._finish is not None, "log_probs_at() takes the long way for such a model"
        which, tokens = which.to(hidden.device), tokens.to(hidden.device)
        highest = hidden.new_full((len(hidden),), -math.inf, dtype=torch.float32)
        total = torch.zeros_like(highest)
        likeliest = torch.zeros_like(highest, dtype=torch.int64)
        found = highest.new_full((len(tokens),), math.nan)
        sums = (highest, total, likeliest, found)
        journal = current_call().journal
        for number, stop in enumerate(self._stops if len(tokens) else ()):
            if saved := journal.sums_of(number):
                for ours, theirs in zip(sums, saved, strict=True):
                    ours.copy_(theirs)
                continue

            def work(weights: Weights, number: int = number) -> None:
                weight, bias = self._weight(weights), self._bias(number)
                first = self._rows[number][0]
                for column in range(0, len(weight), TILE_COLUMNS):
                    tile = slice(column, min(column + TILE_COLUMNS, len(weight)))
                    logits = self._tile(hidden, weight[tile], None if bias is None else bias[tile])
                    # An online softmax (Milakov and Gimelshein, 2018): the sum is kept relative to the highest.
                    best = logits.max(-1)
                    likeliest.copy_(
                        torch.where(best.values > highest, best.indices + first + column, likeliest)
                    )
                    peak = torch.maximum(highest, best.values)
                    scale = torch.where(peak == highest, 1.0, (highest - peak).exp())
                    place = tokens - (first + column)
                    here = ((place >= 0) & (place < logits.shape[-1])).nonzero().flatten()
                    found[here] = logits[which[here], place[here]]
                    total.mul_(scale).add_(logits.sub_(peak[:, None]).exp_().sum(-1))
                    highest.copy_(peak)

            self._carousel.visit(stop, "up", work)
            journal.pass_chunk(number, sums)
        scores = found - (highest + total.log())[which]
        check_finite("the head", scores, infinity_is_legal=True)
        return Found(scores, tokens == likeliest[which])

    def compare(self, hidden: Tensor, which: Tensor, tokens: Tensor) -> Tensor:
        """Return the logits (N,) of tokens, up to a constant for each hidden state; see `log_probs_at`."""
        assert self._finish is not None, "log_probs_at() takes the long way for such a model"
        assert self._lookup is not None, "log_probs_at() takes the long way for such a model"
        wanted, places = tokens.unique(return_inverse=True)
        weight = self._lookup(wanted).to(hidden.device, hidden.dtype)
        logits = self._tile(hidden, weight, None if self.bias is None else self.bias[wanted])
        return logits[which, places]

    def _tile(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert self._finish is not None, "checked by log_probs"
        logits = self._finish(F.linear(rows, weight, bias)[None])[0].float()
        check_finite("the head", logits[None], infinity_is_legal=True)
        return logits


class _HeadFunction(torch.autograd.Function):
    """Logits whose backward visits the head's stops again."""

    @staticmethod
    def forward(ctx: Any, head: StreamedHead, hidden: Tensor) -> Tensor:
        ctx.head = head
        ctx.dtype = hidden.dtype
        ctx.is_autocast = torch.is_autocast_enabled(hidden.device.type)
        return head._logits(hidden, comes_back=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        head: StreamedHead = ctx.head
        parts = []
        # From the last chunk to the first: the last is still in memory.
        for number in reversed(range(len(head._stops))):
            start, stop = head._rows[number]

            def work(weights: Weights, start: int = start, stop: int = stop) -> Tensor:
                weight = head._weight(weights)
                part = grad[..., start:stop].flatten(0, -2)  # flat, as in `_logits`
                if ctx.is_autocast:
                    return part @ weight.to(part.dtype)
                return part.to(weight.dtype) @ weight

            parts.append(head._carousel.visit(head._stops[number], "down", work))
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return None, total.view(*grad.shape[:-1], -1).to(ctx.dtype)


def stream_head(
    head: nn.Linear,
    carousel: Carousel,
    chunks: Sequence[Placement],
    first_stop: int,
    finish: LogitTransform | None,
    lookup: Lookup | None = None,
) -> None:
    """Turn a model's output embedding into stops.

    Args:
        head: its bias, if any, is real; its weight is only looked at for its shape.
        carousel: that brings the chunks.
        chunks: from `cut_head`, in order.
        first_stop: the number of the first.
        finish: from `find_finish`.
        lookup: reads single rows; None where they cannot be had.
    """
    kind = type(head)
    head.__class__ = type(f"Streamed{kind.__name__}", (StreamedHead, kind), {"__module__": __name__})
    streamed = cast(StreamedHead, head)
    streamed._carousel = carousel
    streamed._stops = tuple(range(first_stop, first_stop + len(chunks)))
    ends = [0]
    for chunk in chunks:
        ends.append(ends[-1] + chunk.shape[0])
    streamed._rows = tuple(itertools.pairwise(ends))
    streamed._finish, streamed._lookup = finish, lookup


def last_hidden(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """Return what a call of a streamed model hands to its head, (B, T, H), without a visit to the head."""
    taken: list[Tensor] = []
    with call_context(take_hidden=taken.append):
        model(**inputs)
    return taken[0]
