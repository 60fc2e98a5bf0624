"""Texts pass through a model in order, whatever is saved of them, and few are held at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import slowllm
from slowllm.inference.lines import Line
from slowllm.inference.scoring import WINDOW_SWEEPS
from slowllm.inference.teach import top_tokens
from slowllm.inference.text_batches import SWEEPS_HELD, Result, TextPasses, TokenBatch, batch_of
from slowllm.inference.text_files import Text
from slowllm.runtime.state import State
from slowllm.runtime.streamed_lm import StreamedLM
from tests.support.paths import TINY_BLOOM


@pytest.fixture(scope="module")
def lm() -> Any:
    with slowllm.load(TINY_BLOOM, dtype="fp32") as lm:
        lm.plan = dataclasses.replace(lm.plan, rider_tokens=32, sweep_tokens=64, padding_tokens=8)
        yield lm


def texts_of(lengths: Sequence[int]) -> list[Text]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for number, length in enumerate(lengths, 1):
        ids = tuple(torch.randint(5, 1000, (length,), generator=generator).tolist())
        found.append(Text("a", Line(number, "", ids), ids))
    return found


LENGTHS = [3, 20, 1, 7, 7, 30, 2, 11, 5, 9] * 3


def echo(batch: TokenBatch) -> list[Result]:
    return [{"ids": torch.tensor(ids)} for ids in batch.texts]


def test_results_come_in_the_order_of_the_texts(lm: StreamedLM) -> None:
    texts = texts_of(LENGTHS)
    found = list(TextPasses(lm, texts, echo))
    assert [text for text, _ in found] == texts
    assert all(result["ids"].tolist() == list(text.ids) for text, result in found)


def test_a_batch_leaves_out_the_last_tokens_but_never_the_first() -> None:
    batch = batch_of([(5, 6, 7), (8,)], 1)
    assert batch.ids.tolist() == [[5, 6], [8, 0]]
    assert batch.mask.tolist() == [[1, 1], [1, 0]]


def test_memory_does_not_depend_on_the_number_of_texts(lm: StreamedLM) -> None:
    drawn = most = 0

    def draw() -> Iterator[Text]:
        nonlocal drawn
        for text in texts_of([16] * 600):
            drawn += 1
            yield text

    for num_yielded, _ in enumerate(TextPasses(lm, draw(), echo), 1):
        most = max(most, drawn - num_yielded)
    # The next window is drawn and packed meanwhile.
    assert most * 16 <= (SWEEPS_HELD + WINDOW_SWEEPS) * lm.plan.sweep_tokens


@pytest.mark.parametrize(
    "num_done", [17, pytest.param(0, marks=pytest.mark.long), pytest.param(30, marks=pytest.mark.long)]
)
def test_a_run_that_broke_off_goes_on_with_the_same_bits(
    num_done: int, lm: StreamedLM, tmp_path: Path
) -> None:
    texts = texts_of(LENGTHS)
    wanted = list(top_tokens(lm, texts, 5))
    with State(tmp_path / "s", {"kind": "test"}) as state:
        for number, (text, _) in enumerate(top_tokens(lm, texts, 5, state=state)):
            assert text is texts[number]
            if number == 18:
                break
    saved = list((tmp_path / "s" / "riders").iterdir())
    assert saved
    saved[0].write_bytes(b"damaged")
    computed = 0

    def count(passage: Any) -> None:
        nonlocal computed
        computed += passage.stop == 0

    with State(tmp_path / "s", {"kind": "test"}) as state, lm.watching(count):
        passes = top_tokens(lm, texts, 5, state=state, num_done=num_done)
        found = list(passes)
        passes.forget(len(texts))
    assert [text for text, _ in found] == texts[num_done:]
    for (_, ours), (_, theirs) in zip(found, wanted[num_done:], strict=True):
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not list((tmp_path / "s" / "riders").iterdir())
    if num_done == len(texts):
        assert computed == 0


def test_what_is_kept_elsewhere_is_forgotten(lm: StreamedLM, tmp_path: Path) -> None:
    texts, most = texts_of(LENGTHS * 3), 0
    with State(tmp_path / "s", {"kind": "test"}) as state:
        passes = TextPasses(lm, texts, echo, state=state)
        for number, _ in enumerate(passes, 1):
            passes.forget(number)
            most = max(most, len(list((tmp_path / "s" / "riders").iterdir())))
    num_batches = sum(LENGTHS * 3) // 32
    assert 0 < most < num_batches / 2
