"""A response in pieces, as OpenAI streams it: text as its tokens come, then why it ended, and what it cost.

What a chunk says is final, so text that may still turn out otherwise is held back: half a letter, and what may be the
begin of a stop string. Log-probabilities come with the text of their tokens; those of an echo, and where they are known at
the end only, in a choice's last chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from slowllm.entrypoints.openai.log_probs import has_log_probs, log_probs_of, new_offsets, written_rows
from slowllm.entrypoints.openai.requests import TextRequest
from slowllm.entrypoints.openai.responses import (
    ResponseOrigin,
    answered_by,
    choices_of,
    response_id,
    usage_of,
)
from slowllm.inference.continuation import text_of
from slowllm.inference.service_types import Answer, PartialContinuation
from slowllm.inference.text import TextSide


class ChunkWriter:
    """Writes the chunks of one response. Used by one thread at a time.

    Args:
        lm: the model, or its `ModelInfo`.
        request: that is answered.
        origin: of the run.
        word: of the response's id.
    """

    def __init__(self, lm: TextSide, request: TextRequest, origin: ResponseOrigin, word: str) -> None:
        self._lm, self._request = lm, request
        self._head: dict[str, Any] = {
            "id": response_id(request, word),
            "object": "chat.completion.chunk" if request.is_chat else "text_completion",
            "created": origin.created,
            "model": origin.model,
            "system_fingerprint": origin.fingerprint,
        }
        num_choices = len(request.prompts) * request.num_choices
        # Characters of each choice that were written, tokens whose log-probabilities were, and where the tokens so far begin.
        self._num_written, self._num_told = [0] * num_choices, [0] * num_choices
        self._offsets: list[list[int]] = [[] for _ in range(num_choices)]

    def begin(self) -> Iterator[dict[str, Any]]:
        """Yield what can be said before any token: who speaks, and the texts that are echoed."""
        for index in range(len(self._num_written)):
            if self._request.is_chat:
                yield self._chunk(index, {"role": "assistant", "content": "", "refusal": None})
            elif self._request.echo:
                yield self._chunk(index, self._request.echo[index // self._request.num_choices])

    def go_on(self, place: int, partial: PartialContinuation) -> Iterator[dict[str, Any]]:
        """Yield what is new in a continuation.

        Args:
            place: of its prompt in the request.
            partial: what it has so far.
        """
        prompt = self._request.prompts[place]
        text = text_of(self._lm, prompt, partial.ids)
        sure = _sure_length(text, prompt.settings.stop)
        for index in self._choices(place, partial.number):
            if sure > self._num_written[index]:
                yield self._text(index, text[:sure], self._told(index, place, partial, sure))

    def end(self, answers: Sequence[Answer]) -> Iterator[dict[str, Any]]:
        """Yield what was held back, why each choice ended, and what the request cost if it asks."""
        index = 0
        for place, answer in enumerate(answered_by(self._request, answers)):
            for number, continuation in enumerate(answer.continuations):
                for choice in self._choices(place, number):
                    if len(continuation.text) > self._num_written[choice]:
                        yield self._text(choice, continuation.text, None)
            for continuation in choices_of(self._request, answer):
                told = self._num_told[index]
                log_probs = log_probs_of(self._lm, self._request, place, answer, continuation, told)
                yield self._chunk(index, None, log_probs, continuation.finish_reason)
                index += 1
        if self._request.has_usage:
            yield {**self._head, "choices": [], "usage": usage_of(self._request, answers)}

    def _choices(self, place: int, number: int) -> Iterable[int]:
        """Return the choices that a continuation of a prompt is made for."""
        first, num_choices = place * self._request.num_choices, self._request.num_choices
        # Without sampling one continuation is made for all choices.
        if self._request.prompts[place].settings.num_return_sequences == 1:
            return range(first, first + num_choices)
        return [first + number]

    def _text(self, index: int, text: str, log_probs: dict[str, Any] | None) -> dict[str, Any]:
        new = text[self._num_written[index] :]
        self._num_written[index] = len(text)
        return self._chunk(index, {"content": new} if self._request.is_chat else new, log_probs)

    def _told(self, index: int, place: int, partial: PartialContinuation, end: int) -> dict[str, Any] | None:
        """Return the log-probabilities of the tokens that begin before a place of the text and were not told yet."""
        log_probs, tops = partial.log_probs, partial.top_log_probs
        if log_probs is None or tops is None or self._request.echo or not has_log_probs(self._request, place):
            return None
        offsets = self._offsets[index]
        offsets += new_offsets(self._lm, self._request.prompts[place], partial.ids, len(offsets))
        told = range(self._num_told[index], sum(offset < end for offset in offsets))
        self._num_told[index] = max(told.stop, told.start)
        rows = [(partial.ids[number], log_probs[number], tops[number]) for number in told]
        return written_rows(self._lm, self._request, rows, [offsets[number] for number in told])

    def _chunk(
        self, index: int, said: Any, log_probs: Any = None, reason: str | None = None
    ) -> dict[str, Any]:
        if self._request.is_chat:
            choice = {"index": index, "delta": said or {}, "logprobs": log_probs, "finish_reason": reason}
        else:
            choice = {"index": index, "text": said or "", "logprobs": log_probs, "finish_reason": reason}
        chunk = {**self._head, "choices": [choice]}
        return {**chunk, "usage": None} if self._request.has_usage else chunk


def _sure_length(text: str, stop: Sequence[str]) -> int:
    """Return how many letters of a text cannot turn out otherwise when more tokens come."""
    text = text.rstrip("\N{REPLACEMENT CHARACTER}")
    begun = [length for string in stop for length in range(1, len(string)) if text.endswith(string[:length])]
    return len(text) - max(begun, default=0)
