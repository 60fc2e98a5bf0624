"""One function turns text into tokens for every verb, as lm-eval's and transformers' own do."""

from __future__ import annotations

import types
from typing import Any

import pytest

from slowllm.errors import InputError
from slowllm.inference.generation_types import Settings, encode_prompt
from slowllm.inference.lines import encode as encode_lines
from slowllm.inference.text import encode_pair, encode_text, leading_ids, prefix_id
from tests.support.tokenizers import LEADING, MANNERS

PAIRS = [
    ("the cat", " and the dog"),
    ("the cat ", "and"),
    ("is it so?", " yes"),
    ("the cat sat on the mat,", " is it so? no"),
    ("dog", " cats"),
    ("the dog and the other", " cat"),
]
# A token spans the end of the context.
ACROSS = [("th", "e"), ("the c", "ats and the dog"), ("the d", "og and the cat"), ("the ca", "t")]


class Side:
    """What `encode_pair` asks of a model."""

    soft_prompt, num_virtual_tokens = None, 0

    def __init__(self, manner: str) -> None:
        self.tokenizer: Any = MANNERS[manner]()
        self.config = types.SimpleNamespace(
            vocab_size=1000, max_position_embeddings=64, get_text_config=lambda: self.config
        )


@pytest.fixture(params=MANNERS)
def manner(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def pair_of_lm_eval(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Encode by the code of lm-eval's `hf` model, which is lent a tokenizer and nothing else."""
    from lm_eval.models.huggingface import HFLM

    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    lent: Any = types.SimpleNamespace(
        backend="causal", tokenizer=tokenizer, add_bos_token=None, prefix_token_id=prefix
    )
    lent.tok_encode = types.MethodType(HFLM.tok_encode, lent)
    return HFLM._encode_pair(lent, context, continuation)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("context", "continuation"), PAIRS)
def test_a_pair_is_encoded_as_by_lm_eval(manner: str, context: str, continuation: str) -> None:
    side = Side(manner)
    for start in ("", *(LEADING.get(manner, ())[:1])):  # a text that begins with BOS gets no second one
        query = encode_pair(side, start + context, continuation)
        wanted = pair_of_lm_eval(side.tokenizer, start + context, continuation)
        if manner == "BPE with two leading tokens" and start:
            continue  # lm-eval knows a text that begins with BOS only, and doubles other tokens
        assert (list(query.context), list(query.continuation)) == wanted


@pytest.mark.parametrize(("context", "continuation"), ACROSS)
def test_no_part_of_a_continuation_is_left_out(manner: str, context: str, continuation: str) -> None:
    side = Side(manner)
    query = encode_pair(side, context, continuation)
    scored = side.tokenizer.decode(query.continuation).replace(" ", "")
    assert scored.endswith(continuation.replace(" ", ""))
    whole = side.tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
    assert list(query.context + query.continuation)[-len(whole) :] == whole
    assert len(query.context) >= 1


def test_leading_tokens_are_found(manner: str) -> None:
    tokenizer = MANNERS[manner]()
    assert tuple(tokenizer.convert_ids_to_tokens(leading_ids(tokenizer))) == LEADING.get(manner, ())


def test_a_prompt_is_what_the_tokenizer_makes_of_it(manner: str) -> None:
    side = Side(manner)
    for context, continuation in PAIRS:
        text = context + continuation
        ids = tuple(side.tokenizer(text)["input_ids"])
        assert encode_text(side.tokenizer, text) == encode_prompt(side, text, Settings()).ids == ids
        for token in LEADING.get(manner, ())[:1]:
            assert side.tokenizer.decode(encode_text(side.tokenizer, token + text)).count(token) == 1


def test_a_lone_surrogate_is_one_sentence(manner: str) -> None:
    side = Side(manner)
    for encode in (
        lambda: encode_pair(side, "a\udcff", " b"),
        lambda: encode_pair(side, "", "b\udcff"),
        lambda: encode_prompt(side, "a\udcff", Settings()),
    ):
        with pytest.raises(InputError, match="cannot be encoded as UTF-8"):
            encode()


def test_a_text_that_begins_with_the_prefix_gets_no_second_one(manner: str) -> None:
    side = Side(manner)
    prefix = prefix_id(side.tokenizer)
    query = encode_pair(side, "", side.tokenizer.decode([prefix]) + "the cat")
    assert query.context == (prefix,)
    assert prefix not in query.continuation
    texts = [(1, side.tokenizer.decode([prefix]) + "the cat")]
    (line,) = encode_lines(side, texts, max_tokens=9, truncate=True, prefix=prefix)
    assert line.ids == query.continuation
    (without,) = encode_lines(side, texts, max_tokens=9, truncate=True)
    assert without.ids == (prefix, *query.continuation)
