"""Log-probabilities in OpenAI's two forms: that of completions, and that of chats."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from slowllm.entrypoints.openai.requests import TextRequest
from slowllm.entrypoints.openai.token_texts import offsets_in, token_text
from slowllm.inference.continuation import text_of
from slowllm.inference.generation_types import Continuation, Prompt
from slowllm.inference.prompt_scores import PromptScores
from slowllm.inference.service_types import Answer
from slowllm.inference.text import TextSide

# What OpenAI writes for a token that has no probability at all, whose logarithm JSON cannot hold.
_LEAST_LOG_PROB = -9999.0
# One token of a choice: its id, its log-probability, and the likeliest tokens of its place; None where nothing is before it.
Row = tuple[int, float | None, dict[int, float] | None]


def log_probs_of(
    lm: TextSide, request: TextRequest, place: int, answer: Answer, continuation: Continuation, start: int = 0
) -> dict[str, Any] | None:
    """Return a choice's log-probabilities in the form of its endpoint, those behind a stop string left out.

    Args:
        lm: the model, or its `ModelInfo`.
        request: of the choice.
        place: of the prompt in it.
        answer: to the prompt.
        continuation: of the choice.
        start: how many of its tokens are left out because they were told before.
    """
    if (
        not has_log_probs(request, place)
        or continuation.log_probs is None
        or continuation.top_log_probs is None
    ):
        return None
    prompt, ids = request.prompts[place], continuation.ids
    offsets = new_offsets(lm, prompt, ids, start)
    if offsets_end(lm, prompt, ids) > (end := len(continuation.text)):
        offsets = [offset for offset in offsets if offset < end]
    new: list[Row] = [
        (ids[number], continuation.log_probs[number], continuation.top_log_probs[number])
        for number in range(start, start + len(offsets))
    ]
    if start and not new:
        return None
    if answer.prompt_scores is None or request.is_chat:
        return written_rows(lm, request, new, offsets)
    rows = [*_prompt_rows(prompt, answer.prompt_scores), *new, *_end_rows(continuation)]
    echoed = len(request.echo[place])
    offsets = [*offsets_in(lm.tokenizer, prompt.ids), *(echoed + offset for offset in offsets)]
    offsets += [echoed + len(continuation.text)] * (len(rows) - len(offsets))
    return written_rows(lm, request, rows, offsets)


def has_log_probs(request: TextRequest, place: int) -> bool:
    """Return whether the log-probabilities of new tokens were asked for.

    Args:
        request: that asks.
        place: of the prompt in it.
    """
    return request.prompts[place].settings.top_log_probs is not None


def new_offsets(lm: TextSide, prompt: Prompt, ids: Sequence[int], start: int = 0) -> list[int]:
    """Return where each new token begins in the new text, as if no stop string cut it.

    Args:
        lm: the model, or its `ModelInfo`.
        prompt: before the tokens.
        ids: all new tokens.
        start: the first of them whose offset is asked for.
    """
    return [offsets_end(lm, prompt, ids[:place]) for place in range(start, len(ids))]


def offsets_end(lm: TextSide, prompt: Prompt, ids: Sequence[int]) -> int:
    """Return the length of the text of new tokens, as if no stop string cut it."""
    # Without stop strings, so that the text is not cut; a few tokens show how the first new one begins.
    return len(text_of(lm, Prompt(prompt.ids[-8:]), ids))


def written_rows(
    lm: TextSide, request: TextRequest, rows: Sequence[Row], offsets: Sequence[int]
) -> dict[str, Any]:
    """Return tokens and what was likely in their places, in the form of an endpoint.

    Args:
        lm: the model, or its `ModelInfo`.
        request: whose endpoint it is.
        rows: the tokens; of a chat, each with its log-probability.
        offsets: where each of them begins in the choice's text.
    """
    text = functools.partial(token_text, lm.tokenizer)
    if request.is_chat:
        content = [
            {
                **_token(text(token), value),
                "top_logprobs": [_token(text(other), likely) for other, likely in (tops or {}).items()],
            }
            for token, value, tops in rows
            if value is not None
        ]
        return {"content": content, "refusal": None}
    return {
        "tokens": [text(token) for token, _, _ in rows],
        "token_logprobs": [None if value is None else _written(value) for _, value, _ in rows],
        "top_logprobs": [_likeliest(text, *row) for row in rows],
        "text_offset": list(offsets),
    }


def _prompt_rows(prompt: Prompt, scores: PromptScores) -> list[Row]:
    """Return the tokens of a prompt; before the first there is nothing that could make it likely."""
    rest = zip(prompt.ids[1:], scores.log_probs, scores.top_log_probs, strict=True)
    return [(prompt.ids[0], None, None), *rest]


def _end_rows(continuation: Continuation) -> list[Row]:
    """Return the EOS that ended a continuation: readers of an echo count one token behind the prompt."""
    return [] if continuation.eos is None else [continuation.eos]


def _likeliest(
    text: functools.partial[str], token: int, value: float | None, tops: dict[int, float] | None
) -> dict[str, float] | None:
    """Return the likeliest tokens of a place by their texts, the place's own always among them."""
    if tops is None or value is None:
        return None
    likeliest: dict[str, float] = {}
    own = text(token)
    for other, log_prob in tops.items():
        # Several tokens may have one text, such as halves of letters: the likeliest counts, but the place's own is told by
        # its text, and a likelier one then by its number.
        name = text(other)
        is_likelier = name == own and other != token and log_prob > value
        likeliest.setdefault(f"token_id:{other}" if is_likelier else name, _written(log_prob))
    return {**likeliest, own: _written(value)}


def _written(log_prob: float) -> float:
    return max(log_prob, _LEAST_LOG_PROB)


def _token(text: str, log_prob: float) -> dict[str, Any]:
    # A token that ends inside a letter has no text of its own, and its bytes are not known here.
    bytes_ = None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode())
    return {"token": text, "logprob": _written(log_prob), "bytes": bytes_}
