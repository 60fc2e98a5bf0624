"""Requests in OpenAI's batch format: what a line may say, and what is wrong with one that cannot be done.

Knows the lines; what is in a body is read as the server reads it (`openai.requests`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from slowllm.entrypoints.openai.refusals import RequestError
from slowllm.entrypoints.openai.requests import TextRequest, read_text_request
from slowllm.entrypoints.openai.schemas import CHAT, COMPLETIONS
from slowllm.errors import InputError
from slowllm.files import parse_object, shown
from slowllm.inference.text import TextSide
from slowllm.runtime.run_identity import digest_of


@dataclass(frozen=True, kw_only=True)
class Request(TextRequest):
    """One request that can be done.

    Attributes:
        number: of its line, from 1.
        custom_id: by which its sender knows it again.
        digest: of what it asks for, as hexadecimal digits.
    """

    number: int
    custom_id: str
    digest: str


@dataclass(frozen=True)
class Refusal:
    """A line that cannot be done.

    Attributes:
        number: of the line, from 1.
        custom_id: of the request; None where the line is no request.
        code: of the error, for programs.
        message: of the error, for people.
        param: field of the body that is wrong, if it is one.
        digest: of the line, as hexadecimal digits.
    """

    number: int
    custom_id: str | None
    code: str
    message: str
    param: str | None
    digest: str


def read_requests(
    lm: TextSide, lines: Iterable[tuple[int, str]], rendered: Mapping[str, Any] | None = None
) -> list[Request | Refusal]:
    """Turn numbered lines into requests, and those that cannot be done into refusals, in their order.

    Lines that share a custom_id are all refused: nobody could tell their answers apart.

    Args:
        lm: the model, or its `ModelInfo`.
        lines: of the file.
        rendered: token ids of chats, by the number of the line, as an earlier process made them.
    """
    rendered = rendered or {}
    lines = list(lines)
    documents: list[dict[str, Any] | RequestError] = []
    for _, text in lines:
        try:
            documents.append(parse_object(text, "is JSON but no object"))
        except InputError as error:
            documents.append(RequestError(str(error), code="invalid_json_line"))
    numbers: dict[str, list[int]] = {}
    for (number, _), found in zip(lines, documents, strict=True):
        if isinstance(found, dict) and isinstance(found.get("custom_id"), str):
            numbers.setdefault(found["custom_id"], []).append(number)
    read: list[Request | Refusal] = []
    for (number, text), found in zip(lines, documents, strict=True):
        custom_id = None
        try:
            if isinstance(found, RequestError):
                raise found
            custom_id = found["custom_id"] if isinstance(found.get("custom_id"), str) else None
            same = numbers[custom_id] if custom_id is not None else []
            if len(same) > 1:
                raise RequestError(
                    f"custom_id {custom_id!r} is that of lines {', '.join(map(str, same))}; give each its own",
                    code="duplicate_custom_id",
                )
            read.append(_request(lm, number, found, rendered.get(str(number))))
        except RequestError as wrong:
            message = f"line {number}: {wrong}"
            read.append(
                Refusal(number, custom_id, wrong.code, message, wrong.param, digest_of([number, text]))
            )
    return read


def _request(lm: TextSide, number: int, line: Mapping[str, Any], rendered: Any) -> Request:
    custom_id, method, url, body = (line.get(name) for name in ("custom_id", "method", "url", "body"))
    if not isinstance(custom_id, str) or not custom_id:
        raise RequestError("has no custom_id, which must be a string", code="missing_required_parameter")
    if method != "POST":
        raise RequestError(f"method must be POST, not {shown(method)}", code="invalid_method")
    if url not in (COMPLETIONS, CHAT):
        raise RequestError(f"url must be {COMPLETIONS} or {CHAT}, not {shown(url)}", code="invalid_url")
    if not isinstance(body, dict):
        raise RequestError(f"body must be an object, not {shown(body)}")
    if strangers := sorted(line.keys() - {"custom_id", "method", "url", "body"}):
        raise RequestError(f"{', '.join(strangers)}: no such field", code="unknown_parameter")
    # Of its own name, so that a request gets the same answer in whatever file it stands.
    seed = int(hashlib.sha256(custom_id.encode()).hexdigest()[:8], 16)
    asked = read_text_request(lm, url, body, seed=seed, rendered=rendered)
    if asked.streams:
        raise RequestError("stream true is not supported", "stream", "unsupported_parameter")
    return Request(
        **{field.name: getattr(asked, field.name) for field in fields(asked)},
        number=number, custom_id=custom_id, digest=digest_of([custom_id, url, body]),
    )  # fmt: skip
