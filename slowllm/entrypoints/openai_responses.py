"""Responses in OpenAI's batch format: output lines of requests that were carried out, refused, or failed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slowllm.entrypoints.openai.responses import ResponseOrigin, error_body, response_body
from slowllm.entrypoints.openai_requests import Refusal, Request
from slowllm.inference.service_types import Answer
from slowllm.inference.text import TextSide


def answered(
    lm: TextSide, request: Request, answers: Sequence[Answer], origin: ResponseOrigin
) -> dict[str, Any]:
    """Return the output line of a request that was carried out.

    Args:
        lm: the model, or its `ModelInfo`.
        request: that was carried out.
        answers: to each of its prompts.
        origin: of this run.
    """
    return _line(request, 200, response_body(lm, request, answers, origin, request.digest[:24]), None)


def refused(refusal: Refusal) -> dict[str, Any]:
    """Return the output line of a refused line; one that is no request has no response."""
    return failed(refusal, 400, refusal.code, refusal.message, refusal.param)


def failed(
    entry: Request | Refusal, status: int, code: str, message: str, param: str | None = None
) -> dict[str, Any]:
    """Return the output line of an error."""
    # The error is written twice, because some readers look for it under "error" and some in the response.
    kind = "invalid_request_error" if status == 400 else "server_error"
    return _line(entry, status, error_body(message, kind, param, code), {"code": code, "message": message})


def _line(entry: Request | Refusal, status: int, body: Any, error: Any) -> dict[str, Any]:
    response = {"status_code": status, "request_id": f"req_{entry.digest[:32]}", "body": body}
    return {
        "id": f"batch_req_{entry.digest[:24]}",
        "custom_id": entry.custom_id,
        "response": None if entry.custom_id is None else response,
        "error": error,
    }
