"""Hidden states behind blocks are those that transformers returns, and nothing behind them is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import slowllm
from slowllm.errors import InputError
from slowllm.inference.hidden import hidden_states, parse_block_numbers, part_of_blocks, pass_hidden
from slowllm.inference.lines import Line
from slowllm.inference.text_files import Text
from slowllm.modeling import layout
from slowllm.modeling.parts import Part
from slowllm.runtime.load import open_model
from slowllm.runtime.streamed_lm import StreamedLM
from tests.support.families import VOCAB, family_cases, resident

Tiny = Callable[..., Path]


@pytest.fixture(autouse=True)
def _every_leaf_is_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "MIN_LEAF_BYTES", 0)


IDS = torch.randint(5, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))


def wanted(folder: Path, ids: torch.Tensor) -> Any:
    with torch.no_grad():
        return resident(folder)(ids, output_hidden_states=True, use_cache=False).hidden_states


def compare(name: str, tiny: Tiny, **options: Any) -> None:
    expected = wanted(tiny(name), IDS)
    with slowllm.load(tiny(name), dtype="fp32", keep_resident=False, poison=True, **options) as lm:
        last = len(lm.layout.blocks) - 1
        found = hidden_states(lm, range(last + 1), input_ids=IDS)
    assert len(found) == len(expected) - 1
    for block, hidden in enumerate(found):
        # Mamba's list has no embeddings, but the last block's hidden states before and behind the norm.
        place = block if name == "mamba" and block < last else block + 1
        assert torch.equal(hidden, expected[place]), block


@pytest.mark.long
@pytest.mark.parametrize("name", family_cases())
def test_hidden_states_of_a_family_equal_the_resident_models(name: str, tiny: Tiny) -> None:
    compare(name, tiny)


@pytest.mark.parametrize("granularity", ["blocks", "leaves"])
def test_hidden_states_equal_the_resident_models(granularity: str, tiny: Tiny) -> None:
    compare("bloom", tiny, granularity=granularity)


@pytest.mark.parametrize("granularity", ["blocks", "leaves"])
def test_what_is_behind_the_last_chosen_block_is_not_read(granularity: Any, tiny: Tiny) -> None:
    expected, stops = wanted(tiny("bloom"), IDS), []
    with (
        open_model(
            StreamedLM, tiny("bloom"), dtype="fp32", keep_resident=False, poison=True, granularity=granularity,
            part=part_of_blocks((0, 1), 3),
        ) as lm,
        lm.watching(lambda passage: stops.append(passage.stop)),
    ):  # fmt: skip
        first, second = hidden_states(lm, (0, 1), input_ids=IDS)
        read_bytes = lm.report.read_bytes
        lm.close()
        # Of the block behind them there is an empty stop.
        assert max(stops) == len(lm.layout.modules) - 2
        assert read_bytes <= sum(stop.num_bytes for stop in lm.sizes.stops[: max(stops) + 1])
    assert torch.equal(first, expected[1])
    assert torch.equal(second, expected[2])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_texts_are_pooled_over_their_own_tokens(dtype: str, tiny: Tiny) -> None:
    rows = [(1, 9, 8, 7), (1, 6), (1, 5, 4, 3, 2, 30)]
    texts = [Text("a", Line(number, "", ids), ids) for number, ids in enumerate(rows, 1)]
    with slowllm.load(tiny("bloom"), dtype=dtype) as lm:
        each = [dict(hidden) for _, hidden in pass_hidden(lm, texts, (1,), "all")]
        last = [hidden["hidden_1"] for _, hidden in pass_hidden(lm, texts, (1,), "last")]
        mean = [hidden["hidden_1"] for _, hidden in pass_hidden(lm, texts, (1,), "mean")]
        alone = [hidden_states(lm, (1,), input_ids=torch.tensor([ids]))[0][0] for ids in rows]
    for number, ids in enumerate(rows):
        whole = each[number]["hidden_1"]
        assert each[number]["input_ids"].tolist() == list(ids)
        assert whole.dtype == alone[number].dtype
        assert torch.allclose(whole, alone[number], atol=1e-5 if dtype == "fp32" else 0.05)
        assert torch.equal(last[number], whole[-1])
        assert torch.equal(mean[number], whole.float().mean(0))


def test_blocks_are_numbers_of_the_model() -> None:
    assert parse_block_numbers("20,10", 70) == (10, 20)
    assert part_of_blocks((3, 9), 10) is None
    assert part_of_blocks((3, 8), 10) == Part(0, 9, has_ends=True)
    for text, sentence in {
        "a": "'a' is no list of numbers, such as 10,20", "": "'' is no list of numbers", "1,": "is no list of numbers",
        "1.5": "is no list of numbers", "3,70": "there is no block 70; they are numbered from 0 to 69",
        "-1,3": "there is no block -1", "3,3": "names a block twice",
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=sentence):
            parse_block_numbers(text, 70)
