"""What is to be continued, how, and what came of it: prompts, settings and continuations.

Knows token ids and tokenizers; knows no model's weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from slowllm.errors import InputError, counted
from slowllm.html import escaped, table_html, text_html
from slowllm.inference.text import TextSide, encode_text, max_line_tokens

# Settings that say how tokens are drawn.
SAMPLING = ("temperature", "top_k", "top_p", "seed")


@dataclass(frozen=True)
class Settings:
    """How a prompt is continued; names, meanings and defaults are transformers' own.

    They are complete: what a checkpoint's generation_config.json says of sampling and the like is left aside, its
    EOS and padding tokens are not.

    Attributes:
        max_new_tokens: most tokens of a continuation.
        min_new_tokens: least, before EOS ends it.
        num_beams: beams of a beam search; 1 for none.
        num_return_sequences: continuations of each prompt.
        do_sample: whether tokens are drawn instead of the likeliest taken.
        temperature: of sampling.
        top_k: likeliest tokens drawn from; 0 for all.
        top_p: share of the probability drawn from.
        repetition_penalty: 1.0 for none.
        stop: strings that end a continuation; the text ends before them.
        seed: of sampling: the same tokens as ``torch.manual_seed(seed)`` before transformers' `generate` of this
            prompt alone.
        top_log_probs: also give each token's log-probability, and the likeliest so many of its place; None for none.
    Raises:
        InputError: a value is out of its range, or two do not go together.
    """

    max_new_tokens: int = 2
    min_new_tokens: int = 0
    num_beams: int = 1
    num_return_sequences: int = 1
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    top_log_probs: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            raise InputError(f"stop must be a list of strings, not the one string {self.stop!r}")
        object.__setattr__(self, "stop", tuple(self.stop))  # a list would not do as a key
        for name in ("temperature", "top_p", "repetition_penalty"):
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, int | float):
                raise InputError(f"{name} must be a number, not {value!r}")
        for name, least in (
            ("max_new_tokens", 1), ("min_new_tokens", 0), ("num_beams", 1), ("num_return_sequences", 1), ("top_k", 0),
            ("seed", 0), ("top_log_probs", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise InputError(f"{name} must be a whole number of at least {least}, not {value!r}")
        for name in ("temperature", "repetition_penalty"):
            # Smaller ones make infinities of logits.
            if not 1e-4 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be a number of at least 0.0001, not {getattr(self, name)!r}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must lie above 0 and be at most 1, not {self.top_p!r}")
        for name in () if self.do_sample else ("temperature", "top_p"):
            if getattr(self, name) != 1:
                raise InputError(f"{name} needs do_sample=True")
        if self.min_new_tokens > self.max_new_tokens:
            raise InputError(
                f"min_new_tokens {self.min_new_tokens} is more than {self.max_new_tokens} at most"
            )
        if self.seed is not None and self.seed >= 1 << 64:
            raise InputError(f"seed must be less than 2**64, not {self.seed}")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise InputError("a stop string must have at least one character")
        if self.num_return_sequences > self.num_beams and not self.do_sample:
            raise InputError(
                f"{self.num_return_sequences} continuations of a prompt need as many beams, or sampling; "
                f"there {'is' if self.num_beams == 1 else 'are'} {self.num_beams}"
            )
        if 1 < self.num_beams < self.num_return_sequences:
            raise InputError(f"{self.num_beams} beams cannot give {self.num_return_sequences} continuations")

    @property
    def num_rows(self) -> int:
        """Rows of a batch that one prompt takes."""
        return max(self.num_beams, self.num_return_sequences)


@dataclass(frozen=True)
class Prompt:
    """What is to be continued.

    Attributes:
        ids: token ids, at least one.
        settings: how.
        num_virtual: tokens of a soft prompt before it.
    """

    ids: tuple[int, ...]
    settings: Settings = Settings()
    num_virtual: int = 0

    @property
    def width(self) -> int:
        """Its tokens, those of a soft prompt included."""
        return self.num_virtual + len(self.ids)

    @property
    def num_tokens(self) -> int:
        """Tokens held for it at the end, over all its rows."""
        return (self.width + self.settings.max_new_tokens) * self.settings.num_rows


@dataclass(frozen=True)
class Continuation:
    """One continuation of a prompt.

    Attributes:
        ids: the new tokens, EOS not among them.
        text: of them, cut before a stop string.
        finish_reason: ``stop`` where EOS or a stop string ended it, ``length`` where `max_new_tokens` did.
        log_probs: natural logarithm of each new token's probability, where asked for; by the model's own logits,
            before temperature and the like.
        top_log_probs: the likeliest tokens of each place with theirs, where asked for.
        eos: the EOS token that ended it with its log-probability and the likeliest tokens of its place, where these are
            asked for; None where none did.
    """

    ids: tuple[int, ...]
    text: str
    finish_reason: Literal["stop", "length"]
    log_probs: tuple[float, ...] | None = None
    top_log_probs: tuple[dict[int, float], ...] | None = None
    eos: tuple[int, float, dict[int, float]] | None = None

    def figures(self) -> list[tuple[str, str]]:
        """Return what a reader wants to know, by names."""
        found = [("tokens", f"{len(self.ids):,}"), ("ended by", self.finish_reason)]
        if self.log_probs:
            found.append(("log-likelihood", f"{math.fsum(self.log_probs):.4f}"))
        return found

    def _repr_html_(self) -> str:
        names, values = zip(*self.figures(), strict=True)
        return f"<div>{text_html(self.text)}{table_html([[escaped(value) for value in values]], names)}</div>"


# Called on a rider's thread with the number of a prompt (from 0), of its continuation, and the ids it has so far,
# EOS not among them. A beam search gives its likeliest hypothesis, which may change.
OnTokens = Callable[[int, int, tuple[int, ...]], None]


def encode_prompt(lm: TextSide, text: str, settings: Settings) -> Prompt:
    """Turn a text into a prompt, with the special tokens that its tokenizer adds by default.

    Raises:
        InputError: the tokenizer makes no tokens of it.
    """
    ids = encode_text(lm.tokenizer, text)
    if not ids:
        raise InputError("a prompt is empty: the tokenizer makes no tokens of it")
    return Prompt(ids, settings)


def check_prompt(lm: TextSide, prompt: Prompt, name: str) -> None:
    """Refuse a prompt that this model cannot continue.

    Raises:
        InputError: it is empty, longer with its continuation than the model takes, or no tokens of this model.
    """
    limit, vocabulary = max_line_tokens(lm), lm.config.get_text_config().vocab_size
    if not prompt.ids:
        raise InputError(f"{name} is empty; give at least one token")
    if not 0 <= min(prompt.ids) <= max(prompt.ids) < vocabulary:
        wrong = min(prompt.ids) if min(prompt.ids) < 0 else max(prompt.ids)
        raise InputError(f"{name}: token {wrong} is not one of the model's {vocabulary}")
    if len(prompt.ids) + prompt.settings.max_new_tokens > limit:
        raise InputError(
            f"{name} has {counted(len(prompt.ids), 'token')} and is to get {prompt.settings.max_new_tokens} more, "
            f"but the model takes {limit}"
        )
