"""The likeliest tokens of positions beside the log-probabilities of given ones, by one call of a streamed model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slowllm.errors import InputError
from slowllm.modeling.head import StreamedHead, TokenScores, last_hidden
from slowllm.modeling.log_probs import check_tokens, log_probs_at
from slowllm.modeling.online_top import OnlineTop


@dataclass(frozen=True)
class TopScores(TokenScores):
    """How likely N tokens are, and the likeliest K tokens of each of the P places that they stand at.

    Attributes:
        places: (P, 2) int64, row and position of each distinct place, in ascending order.
        place_of_token: (N,) int64, the place of each token.
        top_ids: (P, K) int64, from the likeliest on; of tokens with equal logits the lower id comes first.
        top_log_probs: (P, K) float32, in nats.
    """

    places: Tensor
    place_of_token: Tensor
    top_ids: Tensor
    top_log_probs: Tensor


def top_log_probs(
    model: PreTrainedModel, rows: Tensor, positions: Tensor, tokens: Tensor, num_top: int, **inputs: Any
) -> TopScores:
    """Return the log-probability of any tokens after any positions, and the likeliest tokens there, by one call.

    The log-probabilities have the bits of `log_probs_at`. Memory does not depend on the vocabulary.

    Args:
        model: a streamed model.
        rows: (N,) int64, of the batch.
        positions: (N,) int64, after which each token is expected; several tokens may be asked for after one.
        tokens: (N,) int64.
        num_top: K, how many of the likeliest tokens are wanted for each place.
        inputs: of the model's forward, `input_ids` (B, T) among them.
    Returns:
        the scores, on the processor.
    Raises:
        InputError: a token is not in the vocabulary, or `num_top` is no number of its tokens.
        NonFiniteError: a block or the head returned NaN.
    """
    head = model.get_output_embeddings()
    assert isinstance(head, StreamedHead), "top_log_probs needs a streamed model"
    check_tokens(tokens, head)
    if not 1 <= num_top <= head.out_features:
        raise InputError(
            f"the likeliest {num_top:,} tokens were asked for, but there are {head.out_features:,} tokens; "
            "ask for one at least, and no more than there are"
        )
    if not len(tokens):
        nothing = log_probs_at(model, rows, positions, tokens, **inputs)
        none, ids = torch.zeros(0, dtype=torch.int64), torch.zeros(0, num_top, dtype=torch.int64)
        return TopScores(nothing.log_probs, nothing.is_likeliest, none.view(0, 2), none, ids, ids.float())
    inputs = {"use_cache": False, **inputs}
    places, place_of_token = torch.stack([rows, positions], -1).unique(dim=0, return_inverse=True)
    with torch.no_grad():
        if head.logit_transform is None:
            logits = model(**inputs).logits[places[:, 0], places[:, 1]].float()
            top = OnlineTop(len(places), num_top, logits.device)
            top.add(logits, 0, logits.amax(-1))
            all_log_probs, tokens = logits.log_softmax(-1), tokens.to(logits.device)
            found = all_log_probs[place_of_token.to(logits.device)]
            likeliest = found.argmax(-1) == tokens
            scores = TokenScores(found.gather(-1, tokens[:, None])[:, 0], likeliest)
            top_found = all_log_probs.gather(-1, top.ids)
        else:
            hidden = last_hidden(model, inputs)[places[:, 0], places[:, 1]]
            top = OnlineTop(len(places), num_top, hidden.device)
            scores = head.gather(hidden, place_of_token, tokens, top)
            top_found = top.log_probs
    return TopScores(
        scores.log_probs.cpu(), scores.is_likeliest.cpu(), places.cpu(), place_of_token.cpu(), top.ids.cpu(),
        top_found.cpu(),
    )  # fmt: skip
