"""Log-probabilities of tokens by one call of a streamed model, without logits of tokens x vocabulary."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slowllm.errors import InputError
from slowllm.modeling.head import StreamedHead, TokenScores, last_hidden
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
        NonFiniteError: a block or the head returned NaN.
    """
    targets = targets.cpu()
    is_scored = targets != -100
    rows, positions = is_scored.nonzero().unbind(1)
    scores = torch.zeros(targets.shape, dtype=torch.float32)
    scores[is_scored] = log_probs_at(model, rows, positions, targets[is_scored], **inputs).log_probs
    return scores


def log_probs_at(
    model: PreTrainedModel,
    rows: Tensor,
    positions: Tensor,
    tokens: Tensor,
    *,
    relative: bool = False,
    **inputs: Any,
) -> TokenScores:
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
        the scores, on the processor.
    Raises:
        InputError: a token is not in the vocabulary.
        NonFiniteError: a block or the head returned NaN.
    """
    head = model.get_output_embeddings()
    assert isinstance(head, StreamedHead), "log_probs_at needs a streamed model"
    check_tokens(tokens, head)
    inputs = {"use_cache": False, **inputs}
    with torch.no_grad():
        if head.logit_transform is None:
            scores = model(**inputs).logits[rows, positions].float().log_softmax(-1)
            tokens = tokens.to(scores.device)
            return _on_host(scores.gather(-1, tokens[:, None])[:, 0], scores.argmax(-1) == tokens)
        places, hidden_rows = torch.stack([rows, positions], -1).unique(dim=0, return_inverse=True)
        skips_head = (relative and head.read_rows is not None) or not len(tokens)
        # Stops that are not visited need not be prefetched.
        reach = replace(current_call().reach, end=head.stops[0])
        with call_context(reach=reach) if skips_head else contextlib.nullcontext():
            hidden = last_hidden(model, inputs)[places[:, 0], places[:, 1]]
        if not len(tokens):
            return TokenScores(torch.zeros(0), torch.zeros(0, dtype=torch.bool))
        if skips_head:
            logits = head.compare(hidden, hidden_rows, tokens)
            return _on_host(logits, torch.zeros(len(tokens), dtype=torch.bool))
        gathered = head.gather(hidden, hidden_rows, tokens)
        return _on_host(gathered.log_probs, gathered.is_likeliest)


def check_tokens(tokens: Tensor, head: StreamedHead) -> None:
    """Refuse tokens that are not in the vocabulary.

    Raises:
        InputError: one is not.
    """
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < head.out_features:
        raise InputError(
            f"targets lie between {int(tokens.min())} and {int(tokens.max())}, but there are {head.out_features} tokens"
        )


def _on_host(log_probs: Tensor, is_likeliest: Tensor) -> TokenScores:
    return TokenScores(log_probs.cpu(), is_likeliest.cpu())
