"""Answers in OpenAI's format: bodies of completions and chats, and errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slowllm.entrypoints.openai.log_probs import log_probs_of
from slowllm.entrypoints.openai.requests import TextRequest
from slowllm.inference.generation_types import Continuation
from slowllm.inference.service_types import Answer
from slowllm.inference.text import TextSide
from slowllm.runtime.run_identity import digest_of


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
