"""A response in pieces, as OpenAI streams it: text as its tokens come, then why it ended, and what it cost.

What a chunk says is final, so text that may still turn out otherwise is held back: half a letter, and what may be the
begin of a stop string. Log-probabilities come in a choice's last chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from slowllm.entrypoints.openai.requests import TextRequest
from slowllm.entrypoints.openai.responses import (
    ResponseOrigin,
    answered_by,
    choices_of,
    log_probs_of,
    response_id,
    usage_of,
)
from slowllm.inference.continuation import text_of
from slowllm.inference.service_types import Answer
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
        # Characters of each choice that were written.
        self._num_written = [0] * (len(request.prompts) * request.num_choices)

    def begin(self) -> Iterator[dict[str, Any]]:
        """Yield what can be said before any token: who speaks, and the texts that are echoed."""
        for index in range(len(self._num_written)):
            if self._request.is_chat:
                yield self._chunk(index, {"role": "assistant", "content": "", "refusal": None})
            elif self._request.echo:
                yield self._chunk(index, self._request.echo[index // self._request.num_choices])

    def go_on(self, place: int, number: int, ids: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Yield what is new in a continuation.

        Args:
            place: of its prompt in the request.
            number: among the continuations of the prompt.
            ids: that it has so far, EOS not among them.
        """
        prompt = self._request.prompts[place]
        text = text_of(self._lm, prompt, ids)
        sure = _sure_length(text, prompt.settings.stop)
        yield from self._texts(place, number, text[:sure])

    def end(self, answers: Sequence[Answer]) -> Iterator[dict[str, Any]]:
        """Yield what was held back, why each choice ended, and what the request cost if it asks."""
        index = 0
        for place, answer in enumerate(answered_by(self._request, answers)):
            for number, continuation in enumerate(answer.continuations):
                yield from self._texts(place, number, continuation.text)
            for continuation in choices_of(self._request, answer):
                log_probs = log_probs_of(self._lm, self._request, place, answer, continuation)
                yield self._chunk(index, None, log_probs, continuation.finish_reason)
                index += 1
        if self._request.has_usage:
            yield {**self._head, "choices": [], "usage": usage_of(self._request, answers)}

    def _texts(self, place: int, number: int, text: str) -> Iterator[dict[str, Any]]:
        num_choices = self._request.num_choices
        # Without sampling one continuation is made for all choices.
        is_only = self._request.prompts[place].settings.num_return_sequences == 1
        for choice in range(num_choices) if is_only else [number]:
            index = place * num_choices + choice
            if new := text[self._num_written[index] :]:
                self._num_written[index] = len(text)
                yield self._chunk(index, {"content": new} if self._request.is_chat else new)

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
