"""One row of a batch whose rows have settings of their own: what it has got so far, and which token comes next.

Tokens are chosen as transformers' `generate` chooses them for the prompt alone: by its own processors, and of a sampled row
by a generator that is seeded as `torch.manual_seed` seeds the global one.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from slowllm.inference.continuation import text_of
from slowllm.inference.generation_types import Continuation, Prompt
from slowllm.inference.sampling import generator_of, next_tokens, processors_of
from slowllm.inference.service_types import OnPartial, PartialContinuation
from slowllm.inference.stopping import EndDetector, SpecialTokens, without_eos
from slowllm.inference.text import TextSide


class LiveRow:
    """One continuation of a prompt that grows token by token.

    Args:
        lm: with the tokenizer.
        prompt: that is continued; of its settings, `num_beams` is 1.
        index: of the continuation among those of the prompt; its seed counts up with it.
        tokens: with EOS.
        on_partial: called after each token.
    """

    def __init__(
        self,
        lm: TextSide,
        prompt: Prompt,
        index: int,
        tokens: SpecialTokens,
        on_partial: OnPartial | None = None,
    ) -> None:
        self.prompt, self.has_ended = prompt, False
        self._lm, self._tokens, self._on_partial = lm, tokens, on_partial
        self._index = index
        self._settings = prompt.settings
        self._ids = list(prompt.ids)
        self._is_stopped = False
        self._detector = EndDetector(lm, prompt.settings, tokens)
        self._processors = processors_of(prompt, tokens.eos)
        self._generator = generator_of(prompt.settings, index)
        self._log_probs: list[float] = []
        self._tops: list[dict[int, float]] = []

    @property
    def last_token(self) -> int:
        """The token that the model has not seen yet."""
        return self._ids[-1]

    @property
    def seen_ids(self) -> tuple[int, ...]:
        """The tokens that the model has seen: all but the last."""
        return tuple(self._ids[:-1])

    @property
    def num_new(self) -> int:
        """Tokens that were chosen so far, EOS included."""
        return len(self._ids) - len(self.prompt.ids)

    def advance(self, logits: Tensor) -> None:
        """Choose the next token.

        Args:
            logits: (V,) behind the last token, as the model returns them.
        """
        raw = logits.detach().to("cpu", torch.float32)
        ids = torch.tensor([self._ids])
        token = int(next_tokens(ids, raw[None].clone(), self._processors, self._generator))
        self._ids.append(token)
        if (num_top := self._settings.top_log_probs) is not None:
            log_probs = raw.log_softmax(-1)
            best = log_probs.topk(min(num_top, len(log_probs)))
            self._log_probs.append(float(log_probs[token]))
            self._tops.append(dict(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
        width = len(self.prompt.ids)
        self._is_stopped = bool(self._detector.has_ended(torch.tensor([self._ids]), width))
        self.has_ended = self._is_stopped or self.num_new >= self._settings.max_new_tokens
        if self._on_partial is not None:
            self._on_partial(self._partial())

    def _new_ids(self) -> tuple[int, ...]:
        return without_eos(self._ids[len(self.prompt.ids) :], self._tokens)

    def _partial(self) -> PartialContinuation:
        ids = self._new_ids()
        if self._settings.top_log_probs is None:
            return PartialContinuation(self._index, ids)
        return PartialContinuation(
            self._index, ids, tuple(self._log_probs[: len(ids)]), tuple(self._tops[: len(ids)])
        )

    def continuation(self) -> Continuation:
        """Return what has come so far."""
        ids = self._new_ids()
        text = text_of(self._lm, self.prompt, ids)
        reason: Literal["stop", "length"] = "stop" if self._is_stopped else "length"
        if self._settings.top_log_probs is None:
            return Continuation(ids, text, reason)
        eos = None
        if len(ids) < self.num_new:
            eos = (self.last_token, self._log_probs[-1], self._tops[-1])
        return Continuation(
            ids, text, reason, tuple(self._log_probs[: len(ids)]), tuple(self._tops[: len(ids)]), eos
        )
