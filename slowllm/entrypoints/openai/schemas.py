"""What OpenAI's requests and answers look like.

Every field of a request is either done as asked, or known to change nothing, or refused by its name. A field's
description ends the sentence "it must be ...", for readers of the OpenAPI description and of errors alike.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainValidator,
    WithJsonSchema,
)
from pydantic_core import core_schema

from slowllm.entrypoints.openai.refusals import wrong
from slowllm.files import shown

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
# OpenAI's limit for completions is 16 where a request names none. Theirs for chats is what the model takes, which
# here would be thousands of sweeps.
DEFAULT_MAX_TOKENS = {COMPLETIONS: 16, CHAT: 128}
# The most likeliest tokens that may be asked for, by OpenAI's own limits.
MOST_LOG_PROBS = {COMPLETIONS: 5, CHAT: 20}
MOST_CHOICES = 128
# OpenAI's limit is 4; tasks of lm-eval have more.
MOST_STOPS = 16


def _is_same(value: Any, other: Any) -> bool:
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


class _NothingBut:
    """The type of a field that is understood, but not done unless it is null or one of these values."""

    def __init__(self, *harmless: Any) -> None:
        self._harmless = harmless

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.with_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"enum": [None, *self._harmless]}

    def _check(self, value: Any, info: core_schema.ValidationInfo[Any]) -> None:
        if value is not None and not any(_is_same(value, other) for other in self._harmless):
            raise wrong(f"{info.field_name} {shown(value)} is not supported", "unsupported_parameter")


def are_ids(value: Any) -> bool:
    """Return whether this is a list of whole numbers."""
    return isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in value)


_PROMPT = "a string, a list of strings, token ids or a list of those"


def _prompts(value: Any) -> list[Any]:
    # Not a union of types, of which each would tell of every item of a long list what it is not.
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if are_ids(value):
            return [value]
        if all(isinstance(prompt, str) for prompt in value) or all(are_ids(prompt) for prompt in value):
            return value
    raise wrong(f"prompt must be {_PROMPT}, not {shown(value)}")


_STOP = f"a string or up to {MOST_STOPS} of them, none empty"


def _stops(value: Any) -> tuple[str, ...]:
    found = [value] if isinstance(value, str) else [] if value is None else value
    if (
        not isinstance(found, list)
        or len(found) > MOST_STOPS
        or not all(isinstance(s, str) and s for s in found)
    ):
        raise wrong(f"stop must be {_STOP}, not {shown(value)}")
    return tuple(found)


# What an answer of OpenAI's has beside its text, where it has only text.
_EMPTY_IN_MESSAGE = ("refusal", "annotations", "tool_calls", "function_call", "audio")


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise wrong(f"messages must be a list of messages, not {shown(value)}")
    return [_message(message) for message in value]


def _message(message: Any) -> dict[str, str]:
    if isinstance(message, dict):
        message = {name: value for name, value in message.items() if value or name not in _EMPTY_IN_MESSAGE}
    if not isinstance(message, dict) or not message.keys() <= {"role", "content", "name"}:
        raise wrong(f"a message has role, content and name, not {shown(message)}")
    content = message.get("content")
    if isinstance(content, list):
        if not all(isinstance(p, dict) and p.get("type") == "text" for p in content):
            raise wrong("content other than text is not supported", "unsupported_value")
        parts = [part.get("text") for part in content]
        content = "".join(parts) if all(isinstance(text, str) for text in parts) else None
    if not isinstance(content, str) or not isinstance(message.get("role"), str):
        raise wrong(f"a message needs a role and a content of text, not {shown(message)}")
    if "name" in message and not isinstance(message["name"], str):
        raise wrong(f"the name in a message must be a string, not {shown(message['name'])}")
    return {**message, "content": content}


_TEXT_PART = {
    "type": "object", "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
}  # fmt: skip
_MESSAGE = {
    "type": "object", "required": ["role", "content"], "additionalProperties": False,
    "properties": {
        "role": {"type": "string"}, "name": {"type": "string"},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART}]},
    },
}  # fmt: skip
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}}

Prompts = Annotated[
    Any,
    PlainValidator(_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "minItems": 1, "items": {"type": "string"}},
                {**_IDS, "minItems": 1},
                {"type": "array", "minItems": 1, "items": _IDS},
            ]
        }
    ),
]
Stops = Annotated[
    Any,
    PlainValidator(_stops),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "maxItems": MOST_STOPS, "items": {"type": "string", "minLength": 1}},
                {"type": "null"},
            ]
        }
    ),
]
Messages = Annotated[
    Any, PlainValidator(_messages), WithJsonSchema({"type": "array", "minItems": 1, "items": _MESSAGE})
]


class StreamOptions(BaseModel):
    """What a stream is to have beside the text.

    Attributes:
        include_usage: whether a last chunk counts tokens.
        include_obfuscation: changes nothing: no chunk is padded.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class RequestBody(BaseModel):
    """What requests for completions and for chats have in common. A field that is null is as one that is not there."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = Field(None, description="a string")
    temperature: float | None = Field(
        None, ge=0, le=2, allow_inf_nan=False, description="a number from 0 to 2"
    )
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False, description="a number from 0 to 1")
    n: int | None = Field(None, ge=1, le=MOST_CHOICES, description=f"a whole number from 1 to {MOST_CHOICES}")
    seed: int | None = Field(
        None, ge=0, le=(1 << 63) - 1, description=f"a whole number from 0 to {(1 << 63) - 1}"
    )
    stop: Stops = Field((), description=_STOP)
    stream: bool | None = Field(None, description="true or false")
    stream_options: StreamOptions | None = Field(
        None, description="an object with include_usage and include_obfuscation, true or false"
    )
    # What is not done.
    frequency_penalty: Annotated[Any, _NothingBut(0)] = None
    presence_penalty: Annotated[Any, _NothingBut(0)] = None
    logit_bias: Annotated[Any, _NothingBut({})] = None
    suffix: Annotated[Any, _NothingBut("")] = None
    tools: Annotated[Any, _NothingBut([])] = None
    tool_choice: Annotated[Any, _NothingBut("none", "auto")] = None
    functions: Annotated[Any, _NothingBut([])] = None
    function_call: Annotated[Any, _NothingBut("none", "auto")] = None
    response_format: Annotated[Any, _NothingBut({"type": "text"})] = None
    modalities: Annotated[Any, _NothingBut(["text"])] = None
    audio: Annotated[Any, _NothingBut()] = None
    reasoning_effort: Annotated[Any, _NothingBut()] = None
    verbosity: Annotated[Any, _NothingBut()] = None
    web_search_options: Annotated[Any, _NothingBut()] = None
    # What changes no answer: who asks, what OpenAI is to keep, and how soon and at what price it answers;
    # and there are no tools to be called in parallel.
    user: Any = None
    metadata: Any = None
    store: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prediction: Any = None
    parallel_tool_calls: Any = None


class CompletionBody(RequestBody):
    """The body of a request to /v1/completions."""

    prompt: Prompts = Field(description=_PROMPT)
    max_tokens: int | None = Field(None, ge=0, description="a whole number of at least 1")
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MOST_LOG_PROBS[COMPLETIONS],
        description=f"a whole number from 0 to {MOST_LOG_PROBS[COMPLETIONS]}",
    )
    echo: bool | None = Field(None, description="true or false")
    best_of: int | None = Field(None, ge=1, description="a whole number of at least 1")


class ChatBody(RequestBody):
    """The body of a request to /v1/chat/completions."""

    messages: Messages = Field(description="a list of messages")
    max_tokens: int | None = Field(None, ge=1, description="a whole number of at least 1")
    max_completion_tokens: int | None = Field(None, ge=1, description="a whole number of at least 1")
    logprobs: bool | None = Field(None, description="true or false")
    top_logprobs: int | None = Field(
        None, ge=0, le=MOST_LOG_PROBS[CHAT], description=f"a whole number from 0 to {MOST_LOG_PROBS[CHAT]}"
    )
