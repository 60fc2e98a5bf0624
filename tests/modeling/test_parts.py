"""A part of a model computes what the whole computes there, and neither reads nor needs the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.utils import ModelOutput

from slowllm.modeling.parts import Part
from slowllm.modeling.recompute import hidden_of
from slowllm.runtime.load import open_model
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.streaming.call_context import call_context
from slowllm.streaming.hints import Reach
from slowllm.streaming.way import StopAfterBlocks, StopForward, Way
from tests.support.families import FAMILIES, VOCAB
from tests.support.parted import OUTSIDE, parted, shard_of

SOME = ["bloom", "falcon-new-decoder", "gemma-3-sliding", "gpt2", "llama-tied", "mixtral", "opt"]
DTYPES = [torch.float32, torch.bfloat16]
LONG = [pytest.param(name, marks=pytest.mark.long) for name in FAMILIES if name not in SOME]
PAGES = 64 * 4096  # what whole pages and their neighbours add to the bytes read of a tiny block


def batch() -> Tensor:
    return torch.randint(5, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))


class Inside(Way):
    """Blocks below `first` return a known output; nothing behind `end - 1` is computed."""

    def __init__(self, first: int, end: int, known: Any) -> None:
        self.first, self.end, self.known, self.output = first, end, known, None

    def output_of(self, block: int) -> Any:
        return self.known if block < self.first else None

    def pass_block(self, block: int, output: Any) -> None:
        if block == self.end - 1:
            self.output = output
            raise StopForward


class Known(Way):
    """All blocks have been computed elsewhere."""

    def __init__(self, output: Any) -> None:
        self.output = output

    def output_of(self, block: int) -> Any:
        return self.output


def run_until(lm: StreamedLM, way: Any, reach: Reach | None = None, **context: Any) -> Any:
    """Call the model until its way ends the pass, and return the output of its last block."""
    with torch.no_grad(), call_context(way=way, reach=reach or Reach(), **context):
        try:
            lm.model(batch(), use_cache=False)
        except StopForward:
            return way.output
    raise AssertionError("the pass did not end")


def opened(folder: Path, part: Part | None, **options: Any) -> StreamedLM:
    return open_model(StreamedLM, folder, part=part, keep_resident=False, poison=True, **options)


@pytest.fixture(scope="module", params=[*SOME, *LONG])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def whole(family: str, request: pytest.FixtureRequest, tiny: Callable[..., Path]) -> Iterator[StreamedLM]:
    folder = tiny(family, request.param)
    with opened(folder, None, dtype=str(request.param)) as lm:
        yield lm


def test_a_span_gives_the_bits_of_the_whole_model_and_reads_its_own_blocks_only(
    whole: StreamedLM, tmp_path: Path
) -> None:
    num_blocks = len(whole.layout.blocks)
    # The last block and the one before it, or the middle one alone.
    for first, end in {(1, num_blocks), (num_blocks // 2, num_blocks // 2 + 1)}:
        part = Part.span(first, end)
        known = run_until(whole, StopAfterBlocks(first))
        expected = hidden_of(run_until(whole, StopAfterBlocks(end)))
        folder = parted(whole.folder, tmp_path / str(first), *map(shard_of, part.blocks))
        with opened(folder, part, dtype=str(whole.model.dtype)) as lm:
            found = run_until(lm, Inside(first, end, known), Reach(first=first, end=end))
            assert torch.equal(hidden_of(found), expected)
            num_bytes = sum(p.num_bytes for stop in whole.layout.stops[first:end] for p in stop)
            assert num_bytes <= lm.report.read_bytes <= num_bytes + PAGES
            assert lm.report.num_passages == end - first
            assert lm.weight_bytes == num_bytes
            assert [bool(stop) for stop in lm.layout.stops] == [n in part.blocks for n in range(num_blocks)]


def test_a_span_from_the_first_block_on_takes_hidden_states_from_elsewhere(
    whole: StreamedLM, tmp_path: Path
) -> None:
    entered: list[Tensor] = []

    def note(block: int, hidden: Tensor) -> Tensor:
        if block == 0:
            entered.append(hidden)
        return hidden

    expected = hidden_of(run_until(whole, StopAfterBlocks(1), edit_input=note))
    folder = parted(whole.folder, tmp_path / "first", shard_of(0))
    with opened(folder, Part.span(0, 1), dtype=str(whole.model.dtype)) as lm:
        fed = {"edit_input": lambda block, hidden: entered[0]}
        assert torch.equal(hidden_of(run_until(lm, Inside(0, 1, None), **fed)), expected)
        assert lm.report.read_bytes <= lm.weight_bytes + PAGES


def test_the_ends_give_the_bits_of_the_whole_model_and_read_no_block(
    whole: StreamedLM, tmp_path: Path
) -> None:
    num_blocks = len(whole.layout.blocks)
    last = run_until(whole, StopAfterBlocks(num_blocks))
    entered: list[Tensor] = []

    def note(block: int, hidden: Tensor) -> Tensor:
        if block == 0:
            entered.append(hidden)
        return hidden

    with torch.no_grad(), call_context(edit_input=note):
        expected: ModelOutput = whole.model(batch(), use_cache=False)
    folder = parted(whole.folder, tmp_path / "ends", OUTSIDE)
    with opened(folder, Part.ends(num_blocks), dtype=str(whole.model.dtype)) as lm:
        assert not any(lm.layout.stops[:num_blocks])
        with torch.no_grad(), call_context(way=Known(last), edit_input=note):
            found = lm.model(batch(), use_cache=False)
        assert torch.equal(entered[1], entered[0])
        assert torch.equal(found.logits, expected.logits)
        assert lm.report.read_bytes <= lm.weight_bytes + PAGES
        assert lm.weight_bytes == sum(chunk.num_bytes for chunk in whole.layout.chunks)
        assert not any(list(block.parameters()) for block in lm.layout.blocks)
