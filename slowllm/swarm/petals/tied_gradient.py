"""The gradient of a tied head's weight, where a user trains the word embeddings.

A streamed head computes from chunks that carry no gradient to the embedding that it is tied to.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from slowllm.runtime.streamed_lm import StreamedLM


def add_gradient_of_tied_head(lm: StreamedLM) -> None:
    """Let the loss reach the word embeddings by way of the head as well, where both are one weight.

    It does so while `word_embeddings.weight.requires_grad` is set.

    Args:
        lm: whose head is streamed.
    """
    if not getattr(lm.config.get_text_config(), "tie_word_embeddings", False):
        return
    embedding: nn.Embedding = lm.model.get_input_embeddings()
    lm.layout.head.register_forward_hook(functools.partial(_add, embedding))


def _add(embedding: nn.Embedding, head: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Tensor:
    if not (torch.is_grad_enabled() and embedding.weight.requires_grad):
        return logits
    added: Tensor = _HeadWeight.apply(logits, args[0].detach(), embedding.weight)  # type: ignore[no-untyped-call]
    return added


class _HeadWeight(torch.autograd.Function):
    """Logits as they are, whose backward pass also returns the gradient of the weight that made them."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        return logits.view_as(logits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        (hidden,) = ctx.saved_tensors
        return grad, None, grad.flatten(0, -2).T @ hidden.flatten(0, -2)
