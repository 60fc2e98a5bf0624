"""Pieces of text in OpenAI's formats: where tokens begin, what of a stream is sure, and names of likeliest tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slowllm.entrypoints.openai.chunks import _sure_length
from slowllm.entrypoints.openai.log_probs import _likeliest
from slowllm.entrypoints.openai.refusals import RequestError, read_as
from slowllm.entrypoints.openai.requests import read_text_request
from slowllm.entrypoints.openai.schemas import COMPLETIONS, CompletionBody
from slowllm.entrypoints.openai.token_texts import offsets_in
from slowllm.runtime.description import ModelInfo
from tests.support.paths import TINY_BLOOM


@pytest.fixture(scope="module")
def info() -> ModelInfo:
    return ModelInfo(TINY_BLOOM)


@given(text=st.text(max_size=60) | st.sampled_from(["", "a" * 500, "\U0001f600\u00e9 x \u4f60\u597d" * 9]))
def test_tokens_begin_where_the_text_before_them_ends(info: ModelInfo, text: str) -> None:
    tokenizer = info.tokenizer
    ids = tokenizer(text)["input_ids"]
    offsets = offsets_in(tokenizer, ids)
    assert len(offsets) == len(ids)
    assert offsets == sorted(offsets)
    for place, offset in enumerate(offsets):
        before = tokenizer.decode(ids[:place], clean_up_tokenization_spaces=False)
        # Inside a letter, it is where the letter begins.
        assert before[:offset] == text[:offset]
        assert len(before.rstrip("\N{REPLACEMENT CHARACTER}")) <= offset <= len(before)


def test_special_tokens_have_no_length(info: ModelInfo) -> None:
    ids = [1, *info.tokenizer("The value")["input_ids"], 2]
    assert offsets_in(info.tokenizer, ids) == [0, 0, 3, 9]


@given(
    text=st.text("abc\N{REPLACEMENT CHARACTER}", max_size=12),
    more=st.text("abc", max_size=6),
    stop=st.lists(st.text("abc", min_size=1, max_size=3), max_size=3),
)
def test_what_is_sure_stays_whatever_comes(text: str, more: str, stop: list[str]) -> None:
    sure = text[: _sure_length(text, stop)]
    # Half a letter at the end is another one when its rest has come.
    whole = text.rstrip("\N{REPLACEMENT CHARACTER}") + more
    if not any(string in text for string in stop):  # else it had ended before
        assert whole[: min((whole.find(s) for s in stop if s in whole), default=len(whole))].startswith(sure)
    assert stop or sure == text.rstrip("\N{REPLACEMENT CHARACTER}")


def test_a_likelier_token_with_the_same_text_is_named_by_its_number() -> None:
    def text(token: int) -> str:
        return "?" if token < 3 else str(token)

    found = _likeliest(text, 1, -2.0, {0: -1.0, 2: -1.5, 5: -3.0})  # type: ignore[arg-type]
    assert found == {"token_id:0": -1.0, "token_id:2": -1.5, "5": -3.0, "?": -2.0}
    assert _likeliest(text, 0, -1.0, {0: -1.0, 2: -1.5}) == {"?": -1.0}  # type: ignore[arg-type]
    assert _likeliest(text, 7, float("-inf"), {5: -1.0}) == {"5": -1.0, "7": -9999.0}  # type: ignore[arg-type]


def test_of_unknown_fields_all_are_named() -> None:
    with pytest.raises(RequestError, match="a, b: unknown in the body") as caught:
        read_as(CompletionBody, {"prompt": "x", "b": 1, "a": 2})
    assert caught.value.code == "unknown_parameter"


def test_a_long_text_of_few_tokens_is_taken(info: ModelInfo) -> None:
    text = "x" + " " * 70_000
    whole = len(info.tokenizer(text)["input_ids"])
    found = (
        read_text_request(info, COMPLETIONS, {"prompt": text, "max_tokens": 1}, seed=1)
        if whole < 2047
        else None
    )
    assert found is None or len(found.prompts[0].ids) == whole
