"""Text to token ids: queries, prefixes and limits, by lm-eval's rules."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Protocol

from slowllm.errors import InputError
from slowllm.modeling.soft_prompts import SoftPrompt


@dataclass(frozen=True)
class Query:
    """What is asked: how likely a continuation is after a context, as token ids.

    Attributes:
        context: at least one token.
        continuation: whose tokens' log-probabilities are wanted.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        """What the model has to see: all but the last token, of which nothing follows."""
        return (self.context + self.continuation)[:-1] if self.continuation else self.context


class TextSide(Protocol):
    """What is asked of a model before its weights: a `StreamedLM`, or a `Description`."""

    @property
    def config(self) -> Any:
        """Transformers' config."""

    @property
    def tokenizer(self) -> Any:
        """Transformers' tokenizer."""

    @property
    def soft_prompt(self) -> SoftPrompt | None:
        """What stands before every text, if anything does."""

    @property
    def num_virtual_tokens(self) -> int:
        """Its tokens."""


def prefix_id(tokenizer: Any, vocab_size: int | None = None) -> int:
    """Return the token that stands before a line: BOS, or EOS where there is no BOS.

    Raises:
        InputError: the tokenizer has neither, or one that is beyond the model's vocabulary.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            if vocab_size is not None and token >= vocab_size:
                raise InputError(
                    f"the tokenizer's BOS or EOS is {token}, beyond the model's {vocab_size} tokens"
                )
            return int(token)
    raise InputError("this tokenizer has neither BOS nor EOS to score the first token after; use --no-prefix")


def max_line_tokens(lm: TextSide) -> int:
    """Return how many tokens a line may have, prefix included, by the model's own limit and beside a soft prompt.

    Raises:
        InputError: the config's limit is no length.
    """
    config = lm.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    # ALiBi has no limit of its own; BLOOM was trained on 2,048.
    limit = limit or 2048
    if not isinstance(limit, int) or limit < 2:
        raise InputError(f"config.json: {limit!r} is no length that the model could take")
    return limit - lm.num_virtual_tokens


def leading_ids(tokenizer: Any) -> tuple[int, ...]:
    """Return what the tokenizer by itself puts before a text: BOS, or nothing."""
    ids = tokenizer("", verbose=False)["input_ids"]
    return tuple(token for token in ids[:1] if token == tokenizer.bos_token_id)


def encode_pair(
    side: TextSide,
    context: str,
    continuation: str,
    *,
    leading: tuple[int, ...] | None = None,
    truncate: bool = False,
) -> Query:
    """Turn a context and its continuation into a query.

    As lm-eval does: blanks at the end of the context go to the continuation, because tokens begin with them; both
    are tokenized as one string, and parted after as many tokens as the context alone has.

    Args:
        side: whose tokenizer and vocabulary.
        context: may be empty; the continuation then follows BOS, or EOS where there is no BOS.
        continuation: whose tokens are scored.
        leading: token ids before the context; what the tokenizer puts there by itself, by default.
        truncate: whether to cut a context that is too long, from its beginning.
    Raises:
        InputError: the continuation has no tokens, one is beyond the vocabulary, or they are too many.
    """
    vocabulary = side.config.get_text_config().vocab_size
    blanks = len(context) - len(context.rstrip())
    whole = context + continuation
    context = context[: len(context) - blanks]
    tokenize = functools.partial(side.tokenizer, add_special_tokens=False, verbose=False)
    before = tuple(tokenize(context)["input_ids"]) if context else ()
    after = tuple(tokenize(whole)["input_ids"])[len(before) :]
    if not after:
        raise InputError(f"{_short(continuation)}: the tokenizer makes no tokens of it")
    if context:
        before = (leading_ids(side.tokenizer) if leading is None else leading) + before
    else:
        before = (prefix_id(side.tokenizer, vocabulary),)
    if max(*before, *after) >= vocabulary:
        raise InputError(f"token {max(*before, *after)} is beyond the model's vocabulary of {vocabulary}")
    too_many = len(before) + len(after) - 1 - max_line_tokens(side)
    if too_many > 0:
        if not truncate or too_many >= len(before):
            raise InputError(
                f"{len(before) + len(after) - 1} tokens are more than the {max_line_tokens(side)} that this model takes"
            )
        before = before[too_many:]
    return Query(before, after)


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
