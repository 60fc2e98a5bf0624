"""Losses of tokens, and their gradients, from one pass over the head and without logits.

The gradient of a cross entropy by a hidden state is the rows of the head, weighed by their probabilities, less the row
of the token. Both sums can be kept relative to the highest logit so far, as in an online softmax (Milakov and
Gimelshein, 2018) and as FlashAttention keeps its output (Dao et al., 2022): so the head comes by once for loss and
gradient together, on the way up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from slowllm.modeling.head import TILE_COLUMNS, StreamedHead, last_hidden
from slowllm.modeling.logit_transform import LogitTransform
from slowllm.streaming.call_context import call_context, current_call
from slowllm.streaming.stops import Weights


def token_losses(
    model: PreTrainedModel, rows: Tensor, positions: Tensor, tokens: Tensor, **inputs: Any
) -> Tensor:
    """Return the negative log-likelihood of tokens after positions, by one call of a streamed model.

    Differentiable, once, by whatever the inputs came from. Losses may be NaN or infinite; that is the caller's to see.

    Args:
        model: a streamed model.
        rows: (N,) int64, of the batch.
        positions: (N,) int64, after which each token is expected.
        tokens: (N,) int64, of the vocabulary.
        inputs: of the model's forward.
    Returns:
        (N,) float32, in nats, where `tokens` are.
    """
    head = model.get_output_embeddings()
    assert isinstance(head, StreamedHead), "token_losses needs a streamed model"
    inputs = {"use_cache": False, **inputs}
    if head._finish is None:  # whole logits, which visit the head on the way down as well
        logits: Tensor = model(**inputs).logits[rows, positions]
        return F.cross_entropy(logits.float(), tokens.to(logits.device), reduction="none").to(tokens.device)
    # The backward pass does not visit the head.
    with call_context(reach=replace(current_call().reach, turn=head._stops[0])):
        hidden = last_hidden(model, inputs)[rows, positions]
        losses: Tensor = _Losses.apply(head, hidden, tokens.to(hidden.device))  # type: ignore[no-untyped-call]
    return losses.to(tokens.device)


def choice_logits(
    model: PreTrainedModel, rows: Tensor, positions: Tensor, choices: Tensor, inputs: Mapping[str, Any]
) -> Tensor:
    """Return the logits of some tokens after positions, to compare them with each other; differentiable.

    Only their rows of the head are read, where the model allows it.

    Args:
        model: a streamed model.
        rows: (N,) int64, of the batch.
        positions: (N,) int64.
        choices: (C,) int64, tokens.
        inputs: of the model's forward.
    Returns:
        (N, C) float32, where `choices` are.
    """
    head = model.get_output_embeddings()
    assert isinstance(head, StreamedHead), "choice_logits needs a streamed model"
    inputs = {"use_cache": False, **inputs}
    if head._finish is None or head._lookup is None:
        logits: Tensor = model(**inputs).logits[rows, positions]
        return logits.float()[:, choices].to(choices.device)
    with call_context(reach=replace(current_call().reach, end=head._stops[0], turn=head._stops[0])):
        hidden = last_hidden(model, inputs)[rows, positions]
    weight = head._lookup(choices).to(hidden.device, hidden.dtype)
    bias = None if head.bias is None else head.bias[choices]
    return head._finish(F.linear(hidden, weight, bias)[None])[0].float().to(choices.device)


class _Losses(torch.autograd.Function):
    """Visit the head's stops once; keep the gradient by the hidden states for the way down."""

    @staticmethod
    def forward(ctx: Any, head: StreamedHead, hidden: Tensor, tokens: Tensor) -> Tensor:
        sums = _Sums(head, hidden, tokens, with_gradient=ctx.needs_input_grad[1])
        for number, stop in enumerate(head._stops):

            def work(weights: Weights, number: int = number) -> None:
                sums.pass_chunk(head._weight(weights), head._bias(number), head._rows[number][0])

            head._carousel.visit(stop, "up", work, comes_back=ctx.needs_input_grad[1])
        ctx.dtype = hidden.dtype
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(sums.gradient())
        return sums.losses()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return None, (gradient * grad[:, None]).to(ctx.dtype), None


class _Sums:
    """What is kept of each token while the vocabulary comes by.

    Args:
        head: whose finish is known.
        hidden: (N, H), in the compute dtype.
        tokens: (N,) int64.
        with_gradient: whether the gradient is kept as well.
    """

    def __init__(self, head: StreamedHead, hidden: Tensor, tokens: Tensor, *, with_gradient: bool) -> None:
        assert head._finish is not None, "checked by token_losses"
        self._finish, self._hidden, self._tokens = head._finish, hidden, tokens
        self._is_plain = _is_plain(head._finish)
        self._highest = hidden.new_full((len(tokens),), -math.inf, dtype=torch.float32)
        self._total, self._found = torch.zeros_like(self._highest), torch.zeros_like(self._highest)
        size = hidden.shape if with_gradient else (0, 0)
        # The rows' mean by their probabilities, times the total; and the row of the token.
        self._expected = torch.zeros(size, device=hidden.device)
        self._own = torch.zeros_like(self._expected)

    def pass_chunk(self, weight: Tensor, bias: Tensor | None, first: int) -> None:
        """Take in the rows of a chunk (V', H), which begins with token `first`."""
        for column in range(0, len(weight), TILE_COLUMNS):
            tile = slice(column, min(column + TILE_COLUMNS, len(weight)))
            self._pass_tile(weight[tile], None if bias is None else bias[tile], first + column)

    def _pass_tile(self, weight: Tensor, bias: Tensor | None, first: int) -> None:
        logits, slopes = self._finished(F.linear(self._hidden, weight, bias))
        place = self._tokens - first
        here = ((place >= 0) & (place < logits.shape[-1])).nonzero().flatten()
        self._found[here] = logits[here, place[here]]
        peak = torch.maximum(self._highest, logits.amax(-1))
        scale = torch.where(peak == self._highest, 1.0, (self._highest - peak).exp())
        shares = logits.sub_(peak[:, None]).exp_()
        self._total.mul_(scale).add_(shares.sum(-1))
        self._highest = peak
        if not self._own.numel():
            return
        own = weight[place[here]].float()
        if slopes is not None:
            shares.mul_(slopes)
            own *= slopes[here, place[here], None]
        self._own[here] = own
        self._expected.mul_(scale[:, None]).add_(shares.to(self._hidden.dtype) @ weight)

    def _finished(self, raw: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the model's logits of a tile, and the derivative of each by the head's product, None where it is 1."""
        if self._is_plain:
            return raw.float(), None
        with torch.enable_grad():
            raw = raw.float().requires_grad_(True)
            logits = self._finish(raw.to(self._hidden.dtype)[None])[0].float()
            # Element by element, as `find_finish` has seen.
            (slopes,) = torch.autograd.grad(logits.sum(), raw)
        return logits.detach(), slopes

    def losses(self) -> Tensor:
        """Return (N,) float32."""
        return self._highest + self._total.log() - self._found

    def gradient(self) -> Tensor:
        """Return the derivative (N, H) float32 of each loss by its hidden state."""
        return self._expected / self._total[:, None] - self._own


def _is_plain(finish: LogitTransform) -> bool:
    """Whether a model's logits are its head's product as it is."""
    probe = torch.linspace(-40.0, 40.0, 24).view(1, 3, 8)
    with torch.no_grad():
        return torch.equal(finish(probe), probe)
