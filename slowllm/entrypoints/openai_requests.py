"""Requests in OpenAI's batch format: what a line may say, and what is wrong with one that cannot be done.

Knows the format and the model's text side; knows no weights. Every field is either done as asked, or known to change
nothing, or refused by its name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from slowllm.errors import InputError
from slowllm.files import parse_object, shown
from slowllm.inference.chat_templates import chat_ids
from slowllm.inference.generation_types import Prompt, Settings, check_prompt
from slowllm.inference.text import TextSide, encode_text, max_line_tokens
from slowllm.runtime.run_identity import digest_of

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
# OpenAI's limit for completions is 16 where a request names none. Theirs for chats is what the model takes, which
# here would be thousands of sweeps.
DEFAULT_MAX_TOKENS = {COMPLETIONS: 16, CHAT: 128}
# The most likeliest tokens that may be asked for, by OpenAI's own limits.
MOST_LOG_PROBS = {COMPLETIONS: 5, CHAT: 20}
# Fields of OpenAI's that are understood, but not done unless they ask for nothing: null, or one of these.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "stream": (False,),
    "stream_options": ({}, {"include_usage": False}),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
# Fields that change no answer: who asks, what OpenAI is to keep, and how soon and at what price it answers. Whether
# tools may be called in parallel changes nothing either, because there are none.
IGNORED = (
    "user", "metadata", "store", "safety_identifier", "service_tier", "prompt_cache_key", "prompt_cache_retention",
    "prediction", "parallel_tool_calls",
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """One request that can be done.

    Attributes:
        number: of its line, from 1.
        custom_id: by which its sender knows it again.
        url: `COMPLETIONS` or `CHAT`.
        model: that it names, if any.
        prompts: to be continued, at least one.
        num_choices: answers to each prompt.
        echo: text of each prompt where it is to stand before the answer, else nothing.
        digest: of what it asks for, as hexadecimal digits.
    """

    number: int
    custom_id: str
    url: str
    model: str | None
    prompts: tuple[Prompt, ...]
    num_choices: int
    echo: tuple[str, ...]
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


class _Wrong(Exception):
    """What is wrong with a line."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code or ("invalid_value" if param else "invalid_request")


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
    documents: list[dict[str, Any] | _Wrong] = []
    for _, text in lines:
        try:
            documents.append(parse_object(text, "is JSON but no object"))
        except InputError as error:
            documents.append(_Wrong(str(error), code="invalid_json_line"))
    numbers: dict[str, list[int]] = {}
    for (number, _), found in zip(lines, documents, strict=True):
        if isinstance(found, dict) and isinstance(found.get("custom_id"), str):
            numbers.setdefault(found["custom_id"], []).append(number)
    read: list[Request | Refusal] = []
    for (number, text), found in zip(lines, documents, strict=True):
        custom_id = None
        try:
            if isinstance(found, _Wrong):
                raise found
            custom_id = found["custom_id"] if isinstance(found.get("custom_id"), str) else None
            same = numbers[custom_id] if custom_id is not None else []
            if len(same) > 1:
                raise _Wrong(
                    f"custom_id {custom_id!r} is that of lines {', '.join(map(str, same))}; give each its own",
                    code="duplicate_custom_id",
                )
            read.append(_request(lm, number, found, rendered.get(str(number))))
        except _Wrong as wrong:
            message = f"line {number}: {wrong}"
            read.append(
                Refusal(number, custom_id, wrong.code, message, wrong.param, digest_of([number, text]))
            )
    return read


def _request(lm: TextSide, number: int, line: Mapping[str, Any], rendered: Any) -> Request:
    custom_id, method, url, body = (line.get(name) for name in ("custom_id", "method", "url", "body"))
    if not isinstance(custom_id, str) or not custom_id:
        raise _Wrong("has no custom_id, which must be a string", code="missing_required_parameter")
    if method != "POST":
        raise _Wrong(f"method must be POST, not {shown(method)}", code="invalid_method")
    if url not in (COMPLETIONS, CHAT):
        raise _Wrong(f"url must be {COMPLETIONS} or {CHAT}, not {shown(url)}", code="invalid_url")
    if not isinstance(body, dict):
        raise _Wrong(f"body must be an object, not {shown(body)}")
    if strangers := sorted(line.keys() - {"custom_id", "method", "url", "body"}):
        raise _Wrong(f"{', '.join(strangers)}: no such field", code="unknown_parameter")

    fields = _Fields(body)
    model = fields.text("model")
    given = fields.messages() if url == CHAT else fields.prompts()
    max_tokens = fields.whole("max_tokens", 1)
    if url == CHAT:
        newer = fields.whole("max_completion_tokens", 1)
        max_tokens = newer if newer is not None else max_tokens
    max_tokens = DEFAULT_MAX_TOKENS[url] if max_tokens is None else max_tokens
    temperature, top_p = fields.number("temperature", 1.0, 2.0), fields.number("top_p", 1.0, 1.0)
    if not top_p:
        raise _Wrong("top_p must be above 0; for the likeliest tokens set temperature to 0", "top_p")
    num_choices = fields.whole("n", 1, 128) or 1
    seed = fields.whole("seed", 0, (1 << 63) - 1)
    num_top = fields.log_probs(url)
    echo = url == COMPLETIONS and fields.flag("echo")
    best_of = fields.whole("best_of", 1) if url == COMPLETIONS else None
    if best_of not in (None, num_choices):
        raise _Wrong(
            f"best_of other than n is not supported, and it is {best_of}", "best_of", "unsupported_parameter"
        )
    try:
        settings = Settings(
            max_new_tokens=max_tokens,
            # Without sampling every choice is the same, so one is made.
            num_return_sequences=num_choices if temperature else 1,
            do_sample=temperature > 0,
            temperature=temperature or 1.0,
            top_k=0,
            top_p=top_p if temperature else 1.0,
            stop=fields.stop(),
            top_log_probs=num_top,
        )
    except InputError as error:
        raise _Wrong(str(error)) from None
    if echo and num_top is not None:
        raise _Wrong(
            "echo with logprobs is not supported; `slowllm forward --per-token` gives those of a prompt",
            "echo",
            "unsupported_parameter",
        )
    fields.end()
    if url == CHAT:
        rows = [tuple(rendered) if _are_ids(rendered) else _chat_ids(lm, given)]
    else:
        rows = [_prompt_ids(lm, prompt) for prompt in given]
    param = "messages" if url == CHAT else "prompt"
    if seed is None:
        # Of its own name, so that a request gets the same answer in whatever file it stands.
        seed = int(hashlib.sha256(custom_id.encode()).hexdigest()[:8], 16)
    return Request(
        number=number,
        custom_id=custom_id,
        url=url,
        model=model,
        prompts=tuple(
            _checked(lm, Prompt(row, replace(settings, seed=seed + place if temperature else None)), param)
            for place, row in enumerate(rows)
        ),
        num_choices=num_choices,
        echo=tuple(
            prompt if isinstance(prompt, str) else lm.tokenizer.decode(prompt) for prompt in given if echo
        ),
        digest=digest_of([custom_id, url, body]),
    )


def _prompt_ids(lm: TextSide, prompt: str | list[int]) -> tuple[int, ...]:
    if isinstance(prompt, str):
        return encode_text(lm.tokenizer, prompt)
    return tuple(prompt)


def _chat_ids(lm: TextSide, messages: list[Any]) -> tuple[int, ...]:
    if not lm.tokenizer.chat_template:
        raise _Wrong(
            f"this model's tokenizer has no chat template; send a prompt to {COMPLETIONS}",
            "messages",
            "unsupported_value",
        )
    try:
        return chat_ids(lm.tokenizer, messages)
    except Exception as error:  # the template is a program, and raises what it likes
        raise _Wrong(f"the model's chat template refuses the messages ({error})", "messages") from error


def _checked(lm: TextSide, prompt: Prompt, param: str) -> Prompt:
    try:
        check_prompt(lm, prompt, "the prompt")
    except InputError as error:
        is_long = len(prompt.ids) + prompt.settings.max_new_tokens > max_line_tokens(lm)
        raise _Wrong(str(error), param, "context_length_exceeded" if is_long else None) from None
    return prompt


def _is_same(value: Any, other: Any) -> bool:
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


class _Fields:
    """The body of a request; each field is taken out once, and nothing may be left."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._left = {name: value for name, value in body.items() if value is not None}
        for name in IGNORED:
            self._left.pop(name, None)
        for name, harmless in NEUTRAL.items():
            value = self._left.pop(name, None)
            if value is not None and not any(_is_same(value, other) for other in harmless):
                raise _Wrong(f"{name} {shown(value)} is not supported", name, "unsupported_parameter")

    def end(self) -> None:
        if self._left:
            names = sorted(self._left)
            raise _Wrong(f"{', '.join(names)}: unknown in the body", names[0], "unknown_parameter")

    def text(self, name: str) -> str | None:
        value = self._left.pop(name, None)
        if value is not None and not isinstance(value, str):
            raise _Wrong(f"{name} must be a string, not {shown(value)}", name)
        return value

    def flag(self, name: str) -> bool:
        value = self._left.pop(name, False)
        if not isinstance(value, bool):
            raise _Wrong(f"{name} must be true or false, not {shown(value)}", name)
        return value

    def whole(self, name: str, low: int, high: int | None = None) -> int | None:
        value = self._left.pop(name, None)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < low or value > (high or value):
            between = f"of at least {low}" if high is None else f"from {low} to {high}"
            raise _Wrong(f"{name} must be a whole number {between}, not {shown(value)}", name)
        return value

    def number(self, name: str, default: float, high: float) -> float:
        value = self._left.pop(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= high:
            raise _Wrong(f"{name} must be a number from 0 to {high:g}, not {shown(value)}", name)
        return float(value)

    def stop(self) -> tuple[str, ...]:
        value = self._left.pop("stop", [])
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, list) or len(found) > 4 or not all(isinstance(s, str) and s for s in found):
            raise _Wrong(f"stop must be a string or up to 4 of them, none empty, not {shown(value)}", "stop")
        return tuple(found)

    def log_probs(self, url: str) -> int | None:
        if url == COMPLETIONS:
            return self.whole("logprobs", 0, MOST_LOG_PROBS[url])
        wanted, number = self.flag("logprobs"), self.whole("top_logprobs", 0, MOST_LOG_PROBS[url])
        if number and not wanted:
            raise _Wrong("top_logprobs needs logprobs to be true", "top_logprobs")
        return (number or 0) if wanted else None

    def prompts(self) -> list[Any]:
        value = self._left.pop("prompt", None)
        if isinstance(value, str):
            return [value]
        if isinstance(value, list) and value:
            if all(isinstance(prompt, str) for prompt in value):
                return value
            if _are_ids(value):
                return [value]
            if all(_are_ids(prompt) for prompt in value):
                return value
        raise _Wrong(
            f"prompt must be a string, a list of strings, token ids or a list of those, not {shown(value)}",
            "prompt",
        )

    def messages(self) -> list[Any]:
        value = self._left.pop("messages", None)
        if not isinstance(value, list) or not value:
            raise _Wrong(f"messages must be a list of messages, not {shown(value)}", "messages")
        return [_message(message) for message in value]


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in value)


def _message(message: Any) -> dict[str, str]:
    if isinstance(message, dict):
        # What an answer of OpenAI's has beside its text, where it has only text.
        empty = {"refusal", "annotations", "tool_calls", "function_call", "audio"}
        message = {name: value for name, value in message.items() if value or name not in empty}
    if not isinstance(message, dict) or not message.keys() <= {"role", "content", "name"}:
        raise _Wrong(f"a message has role, content and name, not {shown(message)}", "messages")
    content = message.get("content")
    if isinstance(content, list):
        if not all(isinstance(p, dict) and p.get("type") == "text" for p in content):
            raise _Wrong("content other than text is not supported", "messages", "unsupported_value")
        parts = [part.get("text") for part in content]
        content = "".join(parts) if all(isinstance(text, str) for text in parts) else None
    if not isinstance(content, str) or not isinstance(message.get("role"), str):
        raise _Wrong(f"a message needs a role and a content of text, not {shown(message)}", "messages")
    return {**message, "content": content}
