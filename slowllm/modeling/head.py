"""The output embedding as a row of stops, each an equal part of the vocabulary; log-probabilities without logits.

The head's matrix stays out of memory: its chunks come by on the carousel. Log-probabilities are summed chunk by chunk
with an online softmax, so that tokens x vocabulary is never held.
"""

from __future__ import annotations

import itertools
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
from slowllm.modeling.online_softmax import OnlineSoftmax, tiles_of
from slowllm.modeling.online_top import OnlineTop
from slowllm.storage.spans import Placement
from slowllm.streaming.call_context import call_context, current_call
from slowllm.streaming.carousel import Carousel
from slowllm.streaming.stops import Weights

# From token ids (K,) to their rows (K, H) of the head.
RowReader = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TokenScores:
    """How likely N tokens are.

    Attributes:
        log_probs: (N,) float32, in nats.
        is_likeliest: (N,) bool, whether the token is the argmax: the first of the likeliest.
    """

    log_probs: Tensor
    is_likeliest: Tensor


class StreamedHead(nn.Linear):
    """Mixin for a model's output embedding whose matrix comes by in chunks; made by `stream_head`.

    Attributes:
        carousel: that brings the chunks.
        stops: the stop of each chunk.
        chunk_rows: of each chunk, its first token and the token after its last.
        logit_transform: what the model does to its logits after the head; None where that is not known.
        read_rows: reads single rows of the matrix; None where they cannot be had.
    """

    carousel: Carousel
    stops: tuple[int, ...]
    chunk_rows: tuple[tuple[int, int], ...]
    logit_transform: LogitTransform | None
    read_rows: RowReader | None

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
        for chunk, stop in enumerate(self.stops):

            def work(weights: Weights, chunk: int = chunk) -> Tensor:
                part = F.linear(flat, self.weight_of(weights), self.bias_of(chunk))
                part = part.view(*hidden.shape[:-1], part.shape[-1])
                check_finite("the head", part, infinity_is_legal=True)
                return part

            parts.append(self.carousel.visit(stop, "up", work, comes_back=comes_back))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def weight_of(self, weights: Weights) -> Tensor:
        """Return the matrix of a chunk from the weights of its stop."""
        (weight,) = weights.values()
        return weight

    def bias_of(self, chunk: int) -> Tensor | None:
        """Return the bias of a chunk."""
        start, stop = self.chunk_rows[chunk]
        return None if self.bias is None else self.bias[start:stop]

    def gather(
        self, hidden: Tensor, rows: Tensor, tokens: Tensor, top: OnlineTop | None = None
    ) -> TokenScores:
        """Return the log-probabilities of tokens after some hidden states; see `log_probs_at`.

        Args:
            hidden: (P, H), after the last block.
            rows: (N,) int64, the hidden state that each token follows.
            tokens: (N,) int64.
            top: for P rows, new; it gets the logits of all tiles, and the normalizers.
        """
        rows, tokens = rows.to(hidden.device), tokens.to(hidden.device)
        softmax = OnlineSoftmax(len(hidden), rows, tokens)
        likeliest = torch.zeros_like(softmax.highest, dtype=torch.int64)
        sums: tuple[Tensor, ...] = (softmax.highest, softmax.total, likeliest, softmax.token_logits)
        if top is not None:
            sums += (top.keys,)
        way = current_call().way
        for chunk, stop in enumerate(self.stops if len(tokens) else ()):
            if saved_sums := way.sums_of(chunk):
                for ours, saved in zip(sums, saved_sums, strict=True):
                    ours.copy_(saved)
                continue

            def work(weights: Weights, chunk: int = chunk) -> None:
                first_row = self.chunk_rows[chunk][0]
                for first, weight, bias in tiles_of(self.weight_of(weights), self.bias_of(chunk), first_row):
                    logits = self.tile_logits(hidden, weight, bias)
                    best = logits.max(-1)
                    is_higher = best.values > softmax.highest
                    likeliest.copy_(torch.where(is_higher, best.indices + first, likeliest))
                    if top is not None:
                        top.add(logits, first, best.values)
                    softmax.add(logits, first, best.values)

            self.carousel.visit(stop, "up", work)
            way.pass_chunk(chunk, sums)
        normalizers = softmax.normalizers()
        if top is not None:
            top.normalize(normalizers)
        log_probs = softmax.token_logits - normalizers[rows]
        check_finite("the head", log_probs, infinity_is_legal=True)
        return TokenScores(log_probs, tokens == likeliest[rows])

    def compare(self, hidden: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
        """Return the logits (N,) of tokens, up to a constant for each hidden state; see `log_probs_at`."""
        assert self.read_rows is not None, "log_probs_at() uses gather() for such a model"
        wanted, places = tokens.unique(return_inverse=True)
        weight = self.read_rows(wanted).to(hidden.device, hidden.dtype)
        logits = self.tile_logits(hidden, weight, None if self.bias is None else self.bias[wanted])
        return logits[rows, places]

    def tile_logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the model's logits (P, W) float32 of some rows (W, H) of the head."""
        assert self.logit_transform is not None, "log_probs_at() uses whole logits for such a model"
        logits = self.logit_transform(F.linear(hidden, weight, bias)[None])[0].float()
        check_finite("the head", logits[None], infinity_is_legal=True, has_rows=False)
        return logits


class _HeadFunction(torch.autograd.Function):
    """Logits whose backward pass visits the head's stops again."""

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
        for chunk in reversed(range(len(head.stops))):
            start, stop = head.chunk_rows[chunk]

            def work(weights: Weights, start: int = start, stop: int = stop) -> Tensor:
                weight = head.weight_of(weights)
                part = grad[..., start:stop].flatten(0, -2)  # flat, as in `_logits`
                if ctx.is_autocast:
                    return part @ weight.to(part.dtype)
                return part.to(weight.dtype) @ weight

            parts.append(head.carousel.visit(head.stops[chunk], "down", work))
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return None, total.view(*grad.shape[:-1], -1).to(ctx.dtype)


def stream_head(
    head: nn.Linear,
    carousel: Carousel,
    chunks: Sequence[Placement],
    first_stop: int,
    logit_transform: LogitTransform | None,
    read_rows: RowReader | None = None,
) -> None:
    """Turn a model's output embedding into stops, in place.

    Args:
        head: its bias, if any, is real; of its weight only the shape is used.
        carousel: that brings the chunks.
        chunks: from `cut_head`, in order.
        first_stop: the number of the first chunk's stop.
        logit_transform: from `find_logit_transform`.
        read_rows: from `head_rows`.
    """
    kind = type(head)
    head.__class__ = type(f"Streamed{kind.__name__}", (StreamedHead, kind), {"__module__": __name__})
    streamed = cast(StreamedHead, head)
    streamed.carousel = carousel
    streamed.stops = tuple(range(first_stop, first_stop + len(chunks)))
    ends = itertools.accumulate((chunk.shape[0] for chunk in chunks), initial=0)
    streamed.chunk_rows = tuple(itertools.pairwise(ends))
    streamed.logit_transform, streamed.read_rows = logit_transform, read_rows


def last_hidden(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """Return what a call of a streamed model hands to its head, (B, T, H), without a visit to the head."""
    taken: list[Tensor] = []
    with call_context(take_hidden=taken.append):
        model(**inputs)
    return taken[0]
