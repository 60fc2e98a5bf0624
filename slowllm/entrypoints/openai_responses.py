"""Responses in OpenAI's batch format: output lines of requests that were carried out, refused, or failed."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from slowllm.entrypoints.openai_requests import CHAT, Refusal, Request
from slowllm.inference.continuation import text_of
from slowllm.inference.generation_types import Continuation, Prompt
from slowllm.inference.text import TextSide


@dataclass(frozen=True)
class ResponseMeta:
    """What every response of a run says about its origin.

    Attributes:
        model: its name.
        created: seconds since 1970.
        fingerprint: of the model, its dtype and the versions it ran with.
    """

    model: str
    created: int
    fingerprint: str


def answered(
    lm: TextSide, request: Request, results: Sequence[Sequence[Continuation]], meta: ResponseMeta
) -> dict[str, Any]:
    """Return the output line of a request that was carried out.

    Args:
        lm: the model, or its `ModelInfo`.
        request: that was carried out.
        results: continuations of each of its prompts.
        meta: of this run.
    """
    is_chat = request.url == CHAT
    choices, num_new = list[dict[str, Any]](), 0
    for place, (prompt, continuations) in enumerate(zip(request.prompts, results, strict=True)):
        # Without sampling all choices are equal, and one continuation was made for all of them.
        for continuation in list(continuations) * (request.num_choices // len(continuations)):
            choice: dict[str, Any] = {"index": len(choices)}
            if is_chat:
                choice["message"] = {"role": "assistant", "content": continuation.text, "refusal": None}
            else:
                choice["text"] = (request.echo[place] if request.echo else "") + continuation.text
            choice["logprobs"] = _log_probs(lm, prompt, continuation, is_chat)
            choice["finish_reason"] = continuation.finish_reason
            choices.append(choice)
            num_new += len(continuation.ids)
    num_prompt = sum(len(prompt.ids) for prompt in request.prompts)
    body = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{request.digest[:24]}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": meta.created,
        "model": meta.model,
        "choices": choices,
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_new,
            "total_tokens": num_prompt + num_new,
        },
        "system_fingerprint": meta.fingerprint,
    }
    return _line(request, 200, body, None)


def refused(refusal: Refusal) -> dict[str, Any]:
    """Return the output line of a refused line; one that is no request has no response."""
    return failed(refusal, 400, refusal.code, refusal.message, refusal.param)


def failed(
    entry: Request | Refusal, status: int, code: str, message: str, param: str | None = None
) -> dict[str, Any]:
    """Return the output line of an error."""
    # The error is written twice, because some readers look for it under "error" and some in the response.
    kind = "invalid_request_error" if status == 400 else "server_error"
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return _line(entry, status, body, {"code": code, "message": message})


def _line(entry: Request | Refusal, status: int, body: Any, error: Any) -> dict[str, Any]:
    response = {"status_code": status, "request_id": f"req_{entry.digest[:32]}", "body": body}
    return {
        "id": f"batch_req_{entry.digest[:24]}",
        "custom_id": entry.custom_id,
        "response": None if entry.custom_id is None else response,
        "error": error,
    }


def _log_probs(lm: TextSide, prompt: Prompt, continuation: Continuation, is_chat: bool) -> Any:
    """Return a choice's log-probabilities in the form of its endpoint, those behind a stop string left out."""
    if continuation.log_probs is None or continuation.top_log_probs is None:
        return None
    # Without stop strings, so that the text is not cut; a few tokens show how the first new one begins.
    end_of_prompt = Prompt(prompt.ids[-8:])
    ids, end = continuation.ids, len(continuation.text)
    offsets = [len(text_of(lm, end_of_prompt, ids[:place])) for place in range(len(ids))]
    if len(text_of(lm, end_of_prompt, ids)) > end:
        offsets = [offset for offset in offsets if offset < end]
    text = functools.partial(_token_text, lm.tokenizer)
    rows = [
        (text(token), value, [(text(other), likely) for other, likely in tops.items()])
        for token, value, tops, _ in zip(
            ids, continuation.log_probs, continuation.top_log_probs, offsets, strict=False
        )
    ]
    if is_chat:
        content = [
            {**_token(token, value), "top_logprobs": [_token(*pair) for pair in tops]}
            for token, value, tops in rows
        ]
        return {"content": content, "refusal": None}
    return {
        "tokens": [token for token, _, _ in rows],
        "token_logprobs": [value for _, value, _ in rows],
        # The token itself is always among them.
        "top_logprobs": [{**_likeliest(tops), token: value} for token, value, tops in rows],
        "text_offset": offsets,
    }


def _likeliest(tops: Iterable[tuple[str, float]]) -> dict[str, float]:
    likeliest: dict[str, float] = {}
    for text, log_prob in tops:
        likeliest.setdefault(
            text, log_prob
        )  # the likelier of two with equal text, such as halves of a letter
    return likeliest


def _token(text: str, log_prob: float) -> dict[str, Any]:
    # A token that ends inside a letter has no text of its own, and its bytes are not known here.
    bytes_ = None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode())
    return {"token": text, "logprob": log_prob, "bytes": bytes_}


def _token_text(tokenizer: Any, token: int) -> str:
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    # A SentencePiece tokenizer drops the blank before its first token.
    is_behind_blank = str(tokenizer.convert_ids_to_tokens(token)).startswith("\N{LOWER ONE EIGHTH BLOCK}")
    return " " + text if is_behind_blank and not text.startswith(" ") else text
