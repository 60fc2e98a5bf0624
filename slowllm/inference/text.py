"""Text to token ids: queries, prefixes and limits, by lm-eval's rules."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from slowllm.errors import InputError

if TYPE_CHECKING:
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


# What configs call the longest row; the first that is there counts.
_LIMIT_NAMES = (
    "max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx",
    "max_target_positions",
)  # fmt: skip


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
    limit = next((value for name in _LIMIT_NAMES if (value := getattr(config, name, None))), None)
    # ALiBi has no limit of its own, nor has XLNet, which says -1; BLOOM was trained on 2,048.
    limit = 2048 if limit in (None, 0, -1) else limit
    if not isinstance(limit, int) or limit < 2:
        raise InputError(f"config.json: {limit!r} is no length that the model could take")
    return int(limit * _stretch_of(config)) - lm.num_virtual_tokens


def _stretch_of(config: Any) -> float:
    """Return how many times its training length dynamic NTK stretches a model's rotary table; 1 without it."""
    table = getattr(config, "rope_parameters", None)
    if not isinstance(table, dict) or table.get("rope_type") != "dynamic":
        return 1.0
    factor = table.get("factor")
    return float(factor) if isinstance(factor, int | float) and 1 <= factor <= 1e6 else 1.0


def encode_text(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Return the token ids of a text, with the special tokens that the tokenizer puts around it by itself.

    A text that begins with BOS, or with the first special token that would be put there, gets none, as in lm-eval.

    Raises:
        InputError: the text cannot be encoded as UTF-8.
    """
    _refuse_surrogates(text)
    options = {"add_special_tokens": False} if _begins_with_special(tokenizer, text) else {}
    return tuple(tokenizer(text, verbose=False, **options)["input_ids"])


def plain_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Return the token ids of a text without special tokens around it.

    Raises:
        InputError: the text cannot be encoded as UTF-8.
    """
    _refuse_surrogates(text)
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{_short(text)}: cannot be encoded as UTF-8 ({error.reason})") from error


@functools.lru_cache(maxsize=16)
def leading_ids(tokenizer: Any) -> tuple[int, ...]:
    """Return what the tokenizer by itself puts before a text: BOS, several special tokens, or nothing."""
    probe = "a"
    inner, whole = plain_ids(tokenizer, probe), tuple(tokenizer(probe, verbose=False)["input_ids"])
    for start in range(len(whole) - len(inner) + 1):
        if inner and whole[start : start + len(inner)] == inner:
            return whole[:start]
    return tuple(token for token in whole[:1] if token == tokenizer.bos_token_id)


def _begins_with_special(tokenizer: Any, text: str) -> bool:
    ids = [*leading_ids(tokenizer)[:1], tokenizer.bos_token_id]
    return any(text.startswith(tokenizer.decode([token])) for token in ids if token is not None)


def encode_pair(
    side: TextSide,
    context: str,
    continuation: str,
    *,
    leading: tuple[int, ...] | None = None,
    truncate: bool = False,
) -> Query:
    """Turn a context and its continuation into a query.

    As lm-eval does: blanks at the end of the context go to the continuation, because tokens begin with them, and both
    are tokenized as one string. It is parted before the first token that reaches into the continuation: a token that
    spans the join is scored as a whole, so that no part of the continuation is left out.

    Args:
        side: whose tokenizer and vocabulary.
        context: may be empty; the continuation then follows BOS, or EOS where there is no BOS. One that begins with
            that token follows its own.
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
    tokenizer = side.tokenizer
    before, after = _parted(tokenizer, whole, context)
    if not after:
        raise InputError(f"{_short(continuation)}: the tokenizer makes no tokens of it")
    if context and not _begins_with_special(tokenizer, context):
        before = (leading_ids(tokenizer) if leading is None else leading) + before
    if not before:
        before = (prefix_id(tokenizer, vocabulary),)
        if after[:1] == before and len(after) > 1:  # the continuation begins with it
            after = after[1:]
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


def _parted(tokenizer: Any, whole: str, context: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the tokens of a text that end within the context that it begins with, and the others."""
    if not context:
        return (), plain_ids(tokenizer, whole)
    if not tokenizer.is_fast:  # it does not say where tokens begin and end
        ids, alone = plain_ids(tokenizer, whole), plain_ids(tokenizer, context)
        pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ids, alone, strict=False))
        count = sum(1 for _ in pairs)
        return ids[:count], ids[count:]
    _refuse_surrogates(whole)
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, ends = tuple(encoded["input_ids"]), [end for _, end in encoded["offset_mapping"]]
    count = next((number for number, end in enumerate(ends) if end > len(context)), len(ends))
    return ids[:count], ids[count:]


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
