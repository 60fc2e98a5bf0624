"""How likely the tokens of prompts are, with the likeliest tokens of each place, for prompts that share a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from slowllm.inference.stopping import special_tokens
from slowllm.modeling.top_log_probs import top_log_probs
from slowllm.runtime.streamed_lm import StreamedLM


@dataclass(frozen=True)
class PromptScores:
    """How likely the tokens of a prompt are, from the second on: before the first there is nothing.

    Attributes:
        log_probs: natural logarithm of each token's probability.
        is_likeliest: whether it is the likeliest of its place.
        top_log_probs: the likeliest tokens of each place with theirs.
    """

    log_probs: tuple[float, ...]
    is_likeliest: tuple[bool, ...]
    top_log_probs: tuple[dict[int, float], ...]


def score_prompts(
    lm: StreamedLM, prompts: Sequence[Sequence[int]], num_top: Sequence[int]
) -> list[PromptScores]:
    """Score prompts in one batch; runs as a rider.

    Args:
        lm: a loaded model.
        prompts: token ids, which may share a batch.
        num_top: likeliest tokens that are asked for, of each prompt.
    """
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), special_tokens(lm).pad, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(
            prompt
        )  # on the left: tokens do not see the padding behind them
    rows = torch.tensor([row for row, prompt in enumerate(prompts) for _ in prompt[1:]], dtype=torch.int64)
    places = torch.tensor(
        [place for prompt in prompts for place in range(len(prompt) - 1)], dtype=torch.int64
    )
    # At least one is kept, also where none is asked for.
    most = max(1, *num_top)
    found = top_log_probs(lm.model, rows, places, ids[rows, places + 1], most, input_ids=ids)
    scored, start = [], 0
    for prompt, wanted in zip(prompts, num_top, strict=True):
        end = start + max(0, len(prompt) - 1)
        tops = [
            dict(zip(tokens[:wanted], values[:wanted], strict=True))
            for tokens, values in zip(
                found.top_ids[start:end].tolist(), found.top_log_probs[start:end].tolist(), strict=True
            )
        ]
        log_probs = tuple(found.log_probs[start:end].tolist())
        assert not any(map(math.isnan, log_probs)), "the head refuses NaN"
        scored.append(PromptScores(log_probs, tuple(found.is_likeliest[start:end].tolist()), tuple(tops)))
        start = end
    return scored
