"""From the body of a request to the prompts that answer it. For the server and for files of requests alike.

Knows the format and the model's text side; knows no weights, and neither HTTP nor files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from slowllm.entrypoints.openai.refusals import RequestError, read_as
from slowllm.entrypoints.openai.schemas import (
    CHAT,
    COMPLETIONS,
    DEFAULT_MAX_TOKENS,
    ChatBody,
    CompletionBody,
    RequestBody,
    are_ids,
)
from slowllm.errors import InputError
from slowllm.inference.chat_templates import chat_ids
from slowllm.inference.generation_types import Prompt, Settings, check_prompt
from slowllm.inference.service_types import Ask
from slowllm.inference.text import TextSide, encode_text, max_line_tokens, plain_ids

# A tokenizer takes hundreds of bytes for each token, so a long text is looked at in pieces first.
_PIECE_LETTERS = 1 << 15


@dataclass(frozen=True)
class TextRequest:
    """One request that can be done.

    Attributes:
        url: `COMPLETIONS` or `CHAT`.
        model: that it names, if any.
        prompts: to be continued, at least one.
        num_choices: answers to each prompt.
        echo: text of each prompt where it is to stand before the answer, else nothing.
        num_prompt_top: also give the log-probability of each token of the prompts, and the likeliest so many of its place;
            None for none.
        only_prompt: make no new tokens.
        streams: whether the answer is to come as it is made.
        has_usage: whether the end of a stream is to count tokens.
    """

    url: str
    model: str | None
    prompts: tuple[Prompt, ...]
    num_choices: int
    echo: tuple[str, ...] = ()
    num_prompt_top: int | None = None
    only_prompt: bool = False
    streams: bool = False
    has_usage: bool = False

    @property
    def is_chat(self) -> bool:
        """Whether it is a chat; else completions."""
        return self.url == CHAT

    def asks(self) -> list[Ask]:
        """Return what a service is to be asked, one for each prompt; nothing where no token is asked about."""
        if self.only_prompt and self.num_prompt_top is None:
            return []
        return [Ask(prompt, self.num_prompt_top, self.only_prompt) for prompt in self.prompts]


def read_text_request(
    lm: TextSide,
    url: str,
    body: Mapping[str, Any],
    *,
    seed: int,
    rendered: Any = None,
    longest: int | None = None,
) -> TextRequest:
    """Return what a body asks for.

    Args:
        lm: the model, or its `ModelInfo`.
        url: `COMPLETIONS` or `CHAT`.
        body: a JSON object.
        seed: of the first prompt, where the request has none.
        rendered: token ids of a chat, as an earlier process made them.
        longest: tokens of a prompt that may be answered; None for what the model takes.
    Raises:
        RequestError: it cannot be done.
    """
    if url == CHAT:
        return _chat(lm, read_as(ChatBody, body), seed, rendered)
    longest = max_line_tokens(lm) if longest is None else longest
    return _completions(lm, read_as(CompletionBody, body), seed, longest)


def _completions(lm: TextSide, body: CompletionBody, seed: int, longest: int) -> TextRequest:
    settings = _settings(
        body, body.max_tokens or 1 if body.max_tokens is not None else None, body.logprobs, COMPLETIONS
    )
    num_choices, echo = body.n or 1, bool(body.echo)
    if body.best_of not in (None, num_choices):
        raise RequestError(
            f"best_of other than n is not supported, and it is {body.best_of}",
            "best_of",
            "unsupported_parameter",
        )
    if body.max_tokens == 0 and not echo:
        raise RequestError(
            "max_tokens must be a whole number of at least 1, not 0, unless echo is true", "max_tokens"
        )
    rows = [_prompt_ids(lm, prompt, longest) for prompt in body.prompt]
    prompts = _prompts(lm, rows, settings, seed if body.seed is None else body.seed, "prompt")
    return TextRequest(
        COMPLETIONS, body.model, prompts, num_choices,
        echo=tuple(
            prompt if isinstance(prompt, str) else lm.tokenizer.decode(prompt) for prompt in body.prompt if echo
        ),
        num_prompt_top=body.logprobs if echo else None, only_prompt=body.max_tokens == 0, streams=bool(body.stream),
        has_usage=_has_usage(body),
    )  # fmt: skip


def _chat(lm: TextSide, body: ChatBody, seed: int, rendered: Any) -> TextRequest:
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", "top_logprobs")
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    settings = _settings(body, max_tokens, (body.top_logprobs or 0) if body.logprobs else None, CHAT)
    row = tuple(rendered) if are_ids(rendered) else _chat_ids(lm, body.messages)
    prompts = _prompts(lm, [row], settings, seed if body.seed is None else body.seed, "messages")
    return TextRequest(
        CHAT, body.model, prompts, body.n or 1, streams=bool(body.stream), has_usage=_has_usage(body)
    )


def _has_usage(body: RequestBody) -> bool:
    has_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    if has_usage and not body.stream:
        raise RequestError(
            "stream_options are for a stream; set stream to true", "stream_options", "unsupported_parameter"
        )
    return has_usage


def _settings(body: RequestBody, max_tokens: int | None, num_top: int | None, url: str) -> Settings:
    temperature = 1.0 if body.temperature is None else float(body.temperature)
    top_p = 1.0 if body.top_p is None else float(body.top_p)
    if not top_p:
        raise RequestError("top_p must be above 0; for the likeliest tokens set temperature to 0", "top_p")
    try:
        return Settings(
            max_new_tokens=DEFAULT_MAX_TOKENS[url] if max_tokens is None else max_tokens,
            # Without sampling every choice is the same, so one is made.
            num_return_sequences=(body.n or 1) if temperature else 1,
            do_sample=temperature > 0,
            temperature=temperature or 1.0,
            top_k=0,
            top_p=top_p if temperature else 1.0,
            stop=body.stop,
            top_log_probs=num_top,
        )
    except InputError as error:
        raise RequestError(str(error)) from None


def _prompt_ids(lm: TextSide, prompt: str | list[int], longest: int) -> tuple[int, ...]:
    if not isinstance(prompt, str):
        return tuple(prompt)
    num_tokens = 0
    for start in range(0, len(prompt), _PIECE_LETTERS) if len(prompt) > _PIECE_LETTERS else ():
        num_tokens += len(plain_ids(lm.tokenizer, prompt[start : start + _PIECE_LETTERS]))
        # Where pieces are cut, there may be a few tokens more than in the whole.
        if num_tokens > 2 * longest:
            raise RequestError(
                f"the prompt has more than {longest} tokens, and no more are taken",
                "prompt",
                "context_length_exceeded",
            )
    return encode_text(lm.tokenizer, prompt)


def _chat_ids(lm: TextSide, messages: list[Any]) -> tuple[int, ...]:
    if not lm.tokenizer.chat_template:
        raise RequestError(
            f"this model's tokenizer has no chat template; send a prompt to {COMPLETIONS}",
            "messages",
            "unsupported_value",
        )
    try:
        return chat_ids(lm.tokenizer, messages)
    except Exception as error:  # the template is a program, and raises what it likes
        raise RequestError(f"the model's chat template refuses the messages ({error})", "messages") from error


def _prompts(
    lm: TextSide, rows: Sequence[tuple[int, ...]], settings: Settings, seed: int, param: str
) -> tuple[Prompt, ...]:
    """Return rows as prompts, whose seeds count up."""
    prompts = []
    for place, row in enumerate(rows):
        prompt = Prompt(row, replace(settings, seed=seed + place if settings.do_sample else None))
        try:
            check_prompt(lm, prompt, "the prompt")
        except InputError as error:
            is_long = len(row) + settings.max_new_tokens > max_line_tokens(lm)
            raise RequestError(str(error), param, "context_length_exceeded" if is_long else None) from None
        prompts.append(prompt)
    return tuple(prompts)
