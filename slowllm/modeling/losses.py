"""Losses of tokens, and their gradients, from one pass over the head and without logits.

The gradient of a cross entropy by a hidden state is the mean of the head's rows, weighted by their probabilities, less
the row of the token. Both sums can be kept relative to the highest logit so far, as in an online softmax (Milakov and
Gimelshein, 2018) and as FlashAttention keeps its output (Dao et al., 2022): so one visit to the head, on the way up,
gives loss and gradient together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from slowllm.modeling.head import StreamedHead, last_hidden
from slowllm.modeling.logit_transform import LogitTransform
from slowllm.modeling.online_softmax import OnlineSoftmax, tiles_of
from slowllm.streaming.call_context import call_context, current_call
from slowllm.streaming.stops import Weights


def token_losses(
    model: PreTrainedModel, rows: Tensor, positions: Tensor, tokens: Tensor, **inputs: Any
) -> Tensor:
    """Return the negative log-likelihood of tokens after positions, by one call of a streamed model.

    Differentiable, once, by whatever the inputs depend on. Losses may be NaN or infinite: the caller has to check.

    Args:
        model: a streamed model.
        rows: (N,) int64, of the batch.
        positions: (N,) int64, after which each token is expected.
        tokens: (N,) int64, of the vocabulary.
        inputs: of the model's forward.
    Returns:
        (N,) float32, in nats, on the device of `tokens`.
    """
    head = model.get_output_embeddings()
    assert isinstance(head, StreamedHead), "token_losses needs a streamed model"
    inputs = {"use_cache": False, **inputs}
    if head.logit_transform is None:  # whole logits, whose backward pass visits the head again
        logits: Tensor = model(**inputs).logits[rows, positions]
        return F.cross_entropy(logits.float(), tokens.to(logits.device), reduction="none").to(tokens.device)
    # The backward pass does not visit the head.
    with call_context(reach=replace(current_call().reach, turn=head.stops[0])):
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
        (N, C) float32, on the device of `choices`.
    """
    head = model.get_output_embeddings()
    assert isinstance(head, StreamedHead), "choice_logits needs a streamed model"
    inputs = {"use_cache": False, **inputs}
    if head.logit_transform is None or head.read_rows is None:
        logits: Tensor = model(**inputs).logits[rows, positions]
        return logits.float()[:, choices].to(choices.device)
    with call_context(reach=replace(current_call().reach, end=head.stops[0], turn=head.stops[0])):
        hidden = last_hidden(model, inputs)[rows, positions]
    weight = head.read_rows(choices).to(hidden.device, hidden.dtype)
    bias = None if head.bias is None else head.bias[choices]
    return head.logit_transform(F.linear(hidden, weight, bias)[None])[0].float().to(choices.device)


class _Losses(torch.autograd.Function):
    """Visit the head's stops once; keep the gradient by the hidden states for the backward pass."""

    @staticmethod
    def forward(ctx: Any, head: StreamedHead, hidden: Tensor, tokens: Tensor) -> Tensor:
        sums = _LossSums(head, hidden, tokens, with_gradient=ctx.needs_input_grad[1])
        for chunk, stop in enumerate(head.stops):

            def work(weights: Weights, chunk: int = chunk) -> None:
                first_row = head.chunk_rows[chunk][0]
                for first, weight, bias in tiles_of(head.weight_of(weights), head.bias_of(chunk), first_row):
                    sums.add_tile(weight, bias, first)

            head.carousel.visit(stop, "up", work, comes_back=ctx.needs_input_grad[1])
        ctx.dtype = hidden.dtype
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(sums.gradient())
        return sums.losses()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return None, (gradient * grad[:, None]).to(ctx.dtype), None


class _LossSums:
    """The sums of each token's loss and gradient while the vocabulary comes by.

    Args:
        head: whose logit transform is known.
        hidden: (N, H), in the compute dtype.
        tokens: (N,) int64.
        with_gradient: whether the gradient is summed as well.
    """

    def __init__(self, head: StreamedHead, hidden: Tensor, tokens: Tensor, *, with_gradient: bool) -> None:
        assert head.logit_transform is not None, "checked by token_losses"
        self._transform, self._hidden, self._with_gradient = head.logit_transform, hidden, with_gradient
        self._is_identity = _is_identity(head.logit_transform)
        self._softmax = OnlineSoftmax(len(tokens), torch.arange(len(tokens), device=tokens.device), tokens)
        size = hidden.shape if with_gradient else (0, 0)
        # The head's rows, weighted by their exponentials; and the row of each token.
        self._weighted_rows = torch.zeros(size, device=hidden.device)
        self._token_rows = torch.zeros_like(self._weighted_rows)

    def add_tile(self, weight: Tensor, bias: Tensor | None, first: int) -> None:
        """Add a tile of the head's rows (W, H), which begins with token `first`."""
        logits, slopes = self._transformed(F.linear(self._hidden, weight, bias))
        scale, here, columns = self._softmax.add(logits, first, logits.amax(-1))
        if not self._with_gradient:
            return
        exponentials = logits
        token_rows = weight[columns].float()
        if slopes is not None:
            exponentials.mul_(slopes)
            token_rows *= slopes[here, columns, None]
        self._token_rows[here] = token_rows
        self._weighted_rows.mul_(scale[:, None]).add_(exponentials.to(self._hidden.dtype) @ weight)

    def _transformed(self, product: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the model's logits of a tile, and the derivative of each by the head's product, None where it is 1."""
        if self._is_identity:
            return product.float(), None
        with torch.enable_grad():
            product = product.float().requires_grad_(True)
            logits = self._transform(product.to(self._hidden.dtype)[None])[0].float()
            # Element by element, as `find_logit_transform` has seen.
            (slopes,) = torch.autograd.grad(logits.sum(), product)
        return logits.detach(), slopes

    def losses(self) -> Tensor:
        """Return (N,) float32."""
        return self._softmax.normalizers() - self._softmax.token_logits

    def gradient(self) -> Tensor:
        """Return the derivative (N, H) float32 of each loss by its hidden state."""
        return self._weighted_rows / self._softmax.total[:, None] - self._token_rows


def _is_identity(transform: LogitTransform) -> bool:
    """Whether a model's logits are its head's product as it is."""
    probe = torch.linspace(-40.0, 40.0, 24).view(1, 3, 8)
    with torch.no_grad():
        return torch.equal(transform(probe), probe)
