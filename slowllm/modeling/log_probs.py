"""Log-probabilities of tokens by one call of a streamed model, without logits of tokens x vocabulary."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slowllm.errors import InputError
from slowllm.modeling.head import Found, StreamedHead, last_hidden
from slowllm.streaming.call_context import call_context, current_call


def log_probs(model: PreTrainedModel, targets: Tensor, **inputs: Any) -> Tensor:
    """Return the log-probability of each target token under a streamed model, by one call of it.

    Args:
        model: a streamed model.
        targets: (B, T) int64, the token expected after each position; -100 marks positions that are not scored.
        inputs: of the model's forward, `input_ids` (B, T) among them.
    Returns:
        (B, T) float32 on the processor, zero where not scored.
    Raises:
        InputError: a target is no token of the vocabulary.
        NonFiniteError: NaN came out of a block or the head.
    """
    targets = targets.cpu()
    wanted = targets != -100
    places = wanted.nonzero()
    found = log_probs_at(model, places[:, 0], places[:, 1], targets[wanted], **inputs).log_probs
    scores = torch.zeros(targets.shape, dtype=torch.float32)
    scores[wanted] = found
    return scores


def log_probs_at(
    model: PreTrainedModel,
    rows: Tensor,
    positions: Tensor,
    tokens: Tensor,
    *,
    relative: bool = False,
    **inputs: Any,
) -> Found:
    """Return the log-probability of any tokens after any positions, by one call of a streamed model.

    Args:
        model: a streamed model.
        rows: (N,) int64, of the batch.
        positions: (N,) int64, after which each token is expected; several tokens may be asked for after one.
        tokens: (N,) int64.
        relative: whether it is enough to know the tokens asked for after one position against one another: their
            log-probabilities may all be off by the same number. Then only their rows of the head are read, where
            the model allows it, and `is_likeliest` is all false.
        inputs: of the model's forward, `input_ids` (B, T) among them.
    Returns:
        what was found, on the processor.
    Raises:
        InputError: a token is not in the vocabulary.
        NonFiniteError: NaN came out of a block or the head.
    """
    head = model.get_output_embeddings()
    assert isinstance(head, StreamedHead), "log_probs_at needs a streamed model"
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < head.out_features:
        raise InputError(
            f"targets lie between {int(tokens.min())} and {int(tokens.max())}, but there are {head.out_features} tokens"
        )
    inputs = {"use_cache": False, **inputs}
    with torch.no_grad():
        if head._finish is None:
            scores = model(**inputs).logits[rows, positions].float().log_softmax(-1)
            wanted = tokens.to(scores.device)
            return _on_host(scores.gather(-1, wanted[:, None])[:, 0], scores.argmax(-1) == wanted)
        wanted, which = torch.stack([rows, positions], -1).unique(dim=0, return_inverse=True)
        few = (relative and head._lookup is not None) or not len(tokens)
        # The head's stops are not visited, so they need not be prefetched.
        reach = replace(current_call().reach, end=head._stops[0])
        with call_context(reach=reach) if few else contextlib.nullcontext():
            hidden = last_hidden(model, inputs)[wanted[:, 0], wanted[:, 1]]
        if not len(tokens):
            return Found(torch.zeros(0), torch.zeros(0, dtype=torch.bool))
        if few:
            return _on_host(head.compare(hidden, which, tokens), torch.zeros(len(tokens), dtype=torch.bool))
        found = head.gather(hidden, which, tokens)
        return _on_host(found.log_probs, found.is_likeliest)


def _on_host(log_probs: Tensor, is_likeliest: Tensor) -> Found:
    return Found(log_probs.cpu(), is_likeliest.cpu())
