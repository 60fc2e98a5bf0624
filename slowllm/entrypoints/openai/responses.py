"""Answers in OpenAI's format: bodies of completions and chats, their log-probabilities, and errors."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slowllm.entrypoints.openai.requests import TextRequest
from slowllm.entrypoints.openai.token_texts import offsets_in, token_text
from slowllm.inference.continuation import text_of
from slowllm.inference.generation_types import Continuation, Prompt
from slowllm.inference.prompt_scores import PromptScores
from slowllm.inference.service_types import Answer
from slowllm.inference.text import TextSide
from slowllm.runtime.run_identity import digest_of

# What OpenAI writes for a token that has no probability at all, whose logarithm JSON cannot hold.
_LEAST_LOG_PROB = -9999.0
# One token of a choice: its id, its log-probability, and the likeliest tokens of its place; None where nothing is before it.
_Row = tuple[int, float | None, dict[int, float] | None]


@dataclass(frozen=True)
class ResponseOrigin:
    """What a response says about its origin.

    Attributes:
        model: its name.
        created: seconds since 1970.
        fingerprint: of the model, its dtype and the versions it ran with.
    """

    model: str
    created: int
    fingerprint: str


def system_fingerprint(identity: Mapping[str, Any]) -> str:
    """Return a short word for the model, its dtype and the versions of a `run_identity`."""
    return f"fp_{digest_of([identity[name] for name in ('versions', 'model', 'dtype')])[:10]}"


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return an error as OpenAI writes it.

    Args:
        message: for people.
        kind: ``invalid_request_error``, ``server_error`` and the like.
        param: field of the body that is wrong, if it is one.
        code: for programs.
    """
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def response_id(request: TextRequest, word: str) -> str:
    """Return the id of the response to a request; `word` is its own."""
    return f"{'chatcmpl' if request.is_chat else 'cmpl'}-{word}"


def answered_by(request: TextRequest, answers: Sequence[Answer]) -> Sequence[Answer]:
    """Return an answer for each prompt, also where there was nothing to ask."""
    return answers or [Answer(()) for _ in request.prompts]


def response_body(
    lm: TextSide, request: TextRequest, answers: Sequence[Answer], origin: ResponseOrigin, word: str
) -> dict[str, Any]:
    """Return the response to a request that was carried out.

    Args:
        lm: the model, or its `ModelInfo`.
        request: that was carried out.
        answers: to its `asks`.
        origin: of the run.
        word: of the response's id.
    """
    choices = list[dict[str, Any]]()
    for place, answer in enumerate(answered_by(request, answers)):
        for continuation in choices_of(request, answer):
            choice: dict[str, Any] = {"index": len(choices)}
            if request.is_chat:
                choice["message"] = {"role": "assistant", "content": continuation.text, "refusal": None}
            else:
                choice["text"] = (request.echo[place] if request.echo else "") + continuation.text
            choice["logprobs"] = log_probs_of(lm, request, place, answer, continuation)
            choice["finish_reason"] = continuation.finish_reason
            choices.append(choice)
    return {
        "id": response_id(request, word),
        "object": "chat.completion" if request.is_chat else "text_completion",
        "created": origin.created,
        "model": origin.model,
        "choices": choices,
        "usage": usage_of(request, answers),
        "system_fingerprint": origin.fingerprint,
    }


def choices_of(request: TextRequest, answer: Answer) -> list[Continuation]:
    """Return a continuation for each choice of a prompt; an empty one where no tokens were asked for."""
    made = answer.continuations or (Continuation((), "", "length", (), ()),)
    # Without sampling all choices are equal, and one continuation was made for all of them.
    return list(made) * (request.num_choices // len(made))


def usage_of(request: TextRequest, answers: Sequence[Answer]) -> dict[str, int]:
    """Return how many tokens the prompts and all choices have."""
    num_prompt = sum(len(prompt.ids) for prompt in request.prompts)
    num_new = sum(
        len(continuation.ids)
        for answer in answered_by(request, answers)
        for continuation in choices_of(request, answer)
    )
    return {"prompt_tokens": num_prompt, "completion_tokens": num_new, "total_tokens": num_prompt + num_new}


def log_probs_of(
    lm: TextSide, request: TextRequest, place: int, answer: Answer, continuation: Continuation
) -> dict[str, Any] | None:
    """Return a choice's log-probabilities in the form of its endpoint, those behind a stop string left out.

    Args:
        lm: the model, or its `ModelInfo`.
        request: of the choice.
        place: of the prompt in it.
        answer: to the prompt.
        continuation: of the choice.
    """
    if continuation.log_probs is None or continuation.top_log_probs is None:
        return None
    if request.prompts[place].settings.top_log_probs is None:
        return None
    prompt = request.prompts[place]
    offsets = _new_offsets(lm, prompt, continuation)
    new = [
        (token, value, tops)
        for token, value, tops, _ in zip(
            continuation.ids, continuation.log_probs, continuation.top_log_probs, offsets, strict=False
        )
    ]
    text = functools.partial(token_text, lm.tokenizer)
    if request.is_chat:
        content = [
            {
                **_token(text(token), value),
                "top_logprobs": [_token(text(other), likely) for other, likely in tops.items()],
            }
            for token, value, tops in new
        ]
        return {"content": content, "refusal": None}
    rows: list[_Row] = [*new]
    if answer.prompt_scores is not None:
        rows = [*_prompt_rows(prompt, answer.prompt_scores), *new, *_end_rows(continuation)]
        echoed = len(request.echo[place])
        offsets = [*offsets_in(lm.tokenizer, prompt.ids), *(echoed + offset for offset in offsets)]
        offsets += [echoed + len(continuation.text)] * (len(rows) - len(offsets))
    return {
        "tokens": [text(token) for token, _, _ in rows],
        "token_logprobs": [None if value is None else _written(value) for _, value, _ in rows],
        "top_logprobs": [_likeliest(text, *row) for row in rows],
        "text_offset": offsets,
    }


def _new_offsets(lm: TextSide, prompt: Prompt, continuation: Continuation) -> list[int]:
    """Return where each new token begins in the new text; fewer than there are tokens where a stop string cut it."""
    # Without stop strings, so that the text is not cut; a few tokens show how the first new one begins.
    end_of_prompt = Prompt(prompt.ids[-8:])
    ids, end = continuation.ids, len(continuation.text)
    offsets = [len(text_of(lm, end_of_prompt, ids[:place])) for place in range(len(ids))]
    if len(text_of(lm, end_of_prompt, ids)) > end:
        offsets = [offset for offset in offsets if offset < end]
    return offsets


def _prompt_rows(prompt: Prompt, scores: PromptScores) -> list[_Row]:
    """Return the tokens of a prompt; before the first there is nothing that could make it likely."""
    rest = zip(prompt.ids[1:], scores.log_probs, scores.top_log_probs, strict=True)
    return [(prompt.ids[0], None, None), *rest]


def _end_rows(continuation: Continuation) -> list[_Row]:
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
