"""A part of a model computes what the whole computes there, and neither reads nor needs the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.utils import ModelOutput

from slowllm.errors import CheckpointError, InputError, StoreError, UnsupportedError
from slowllm.modeling import layout
from slowllm.modeling.cache_sizes import measure_cache
from slowllm.modeling.parts import Part, parse_blocks
from slowllm.modeling.recompute import hidden_of
from slowllm.modeling.sizes import ASSUMED_HOPS
from slowllm.modeling.skeleton import build_skeleton
from slowllm.modeling.soft_prompts import SoftPrompt
from slowllm.planning.job import Job
from slowllm.runtime.load import open_model
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.streaming.call_context import call_context
from slowllm.streaming.hints import Reach
from slowllm.streaming.way import StopAfterBlocks, StopForward
from tests.support.families import FAMILIES, VOCAB, save_tiny
from tests.support.parted import OUTSIDE, Inside, Known, parted, shard_of, tensors_of, write
from tests.support.stores import make_store

# A projection on either side of the blocks, which are wider than the embedding.
NARROW = "opt-narrow-embedding"
QUICK = {
    ("bloom", torch.bfloat16), ("falcon-new-decoder", torch.float32), ("gemma-3-sliding", torch.bfloat16),
    ("gpt2", torch.float32), ("llama-tied", torch.float32), ("mixtral", torch.bfloat16), (NARROW, torch.float32),
}  # fmt: skip
ALL = [(name, dtype) for name in (*FAMILIES, NARROW) for dtype in (torch.float32, torch.bfloat16)]
CASES = [
    pytest.param(case, marks=() if case in QUICK else pytest.mark.long, id=f"{case[0]}-{case[1]}")
    for case in ALL
]
PAGES = 64 * 4096  # what whole pages and their neighbours add to the bytes read of a tiny block


def batch() -> Tensor:
    return torch.randint(5, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))


def run_until(lm: StreamedLM, way: Any, reach: Reach | None = None, **context: Any) -> Any:
    """Call the model until its way ends the pass, and return the output of its last block."""
    with torch.no_grad(), call_context(way=way, reach=reach or Reach(), **context):
        try:
            lm.model(batch(), use_cache=False)
        except StopForward:
            return way.output
    raise AssertionError("the pass did not end")


def opened(folder: Path, part: Part | None, **options: Any) -> StreamedLM:
    return open_model(StreamedLM, folder, part=part, **{"keep_resident": False, "poison": True, **options})


@pytest.fixture(scope="module", params=CASES)
def whole(
    request: pytest.FixtureRequest, tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[StreamedLM]:
    name, dtype = request.param
    if name == NARROW:
        folder = tmp_path_factory.mktemp(name)
        save_tiny("opt", folder, dtype, word_embed_proj_dim=32, do_layer_norm_before=False)
    else:
        folder = tiny(name, dtype)
    with opened(folder, None, dtype=str(dtype)) as lm:
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
            num_bytes = sum(p.num_bytes for stop in lm.layout.stops for p in stop) + sum(
                p.num_bytes for unit in lm.layout.units for p in unit
            )
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


# What a part does not have


@pytest.fixture
def folder(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    return parted(tiny("llama-2"), tmp_path / "parted")


def without(folder: Path, *shards: str) -> Path:
    for shard in shards:
        (folder / shard).unlink()
    return folder


def test_a_shard_that_the_part_needs_is_named_with_the_parameter(folder: Path) -> None:
    without(folder, shard_of(1))
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.1\.\S+ and 8 more: missing; the index says that it is in "
    ):
        opened(folder, Part.span(1, 3))
    with pytest.raises(
        CheckpointError, match=r"is in block-1\.safetensors, which is not there; fetch this shard"
    ):
        opened(folder, Part.whole(3))
    opened(folder, Part.span(2, 3)).close()
    with pytest.raises(CheckpointError, match=r"block-1\.safetensors: named by .* but missing"):
        opened(folder, None)
    without(folder, OUTSIDE)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight and 2 more: .* outside\.safetensors"):
        opened(folder, Part.ends(3))
    without(folder, shard_of(0), shard_of(2))
    with pytest.raises(
        CheckpointError, match=r"has none of the shards that .* names; fetch those of the part"
    ):
        opened(folder, Part.span(2, 3))


def test_experts_whose_shard_is_absent_are_named(tiny: Callable[..., Path], tmp_path: Path) -> None:
    made = parted(tiny("mixtral"), tmp_path / "mixtral")
    without(made, shard_of(0))
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.mlp\.experts\.gate_up_proj and .* block-0\.safetensors"
    ):
        opened(made, Part.span(0, 1))


def test_a_missing_parameter_that_no_index_knows_is_refused_as_ever(folder: Path, tmp_path: Path) -> None:
    kept = {name: tensor for name, tensor in tensors_of(folder).items() if "layers.1.mlp.up" not in name}
    made = write(folder, tmp_path / "less", kept)
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight: missing from the checkpoint"
    ):
        opened(made, Part.span(1, 2))
    opened(made, Part.span(2, 3)).close()


def test_blocks_that_the_model_does_not_have_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="blocks 1 to 3: the model has 3 blocks, numbered from 0 to 2"):
        opened(folder, Part.span(1, 4))
    with pytest.raises(InputError, match="the model has 3 blocks"):
        opened(folder, Part.ends(4))
    with pytest.raises(InputError, match="2:1 names no blocks; give the first and the one after the last"):
        Part.span(2, 1)
    with pytest.raises(InputError, match="1:1 names no blocks; a part has at least one, or the ends"):
        Part.span(1, 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0:3", Part.span(0, 3)), ("1:2", Part.span(1, 2)), (" 3 ", 3), ("1", 1), ("auto", "auto")],
)
def test_an_option_names_a_span_or_a_number_of_blocks(text: str, expected: object) -> None:
    assert parse_blocks(text, 3) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1:4", "the model has 3 blocks"), ("2:2", "names no blocks"), ("0", "0 blocks: the model has 3, of which"),
        ("4", "4 blocks: the model has 3"), ("a:b", "'a:b' names no blocks; write 8:16"), ("", "'' names no blocks"),
        ("-1:2", "'-1:2' names no blocks"), ("1:", "'1:' names no blocks"),
    ],
)  # fmt: skip
def test_an_option_that_names_no_blocks_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_blocks(text, 3)


def test_parts_say_what_they_are() -> None:
    assert str(Part.span(3, 5)) == "blocks 3 to 4"
    assert str(Part.span(3, 4)) == "block 3"
    assert str(Part.ends(5)) == "what is outside the blocks"
    assert str(Part.whole(5)) == "blocks 0 to 4 and what is outside the blocks"
    assert Part.whole(5).is_whole(5)
    assert not Part.span(0, 5).is_whole(5)


def test_what_is_absent_says_so(folder: Path) -> None:
    with opened(folder, Part.span(1, 2)) as lm:
        assert f"LlamaForCausalLM, block 1, float32, {lm.weight_bytes / 1e3:.3g} kB a sweep" in repr(lm)
        assert isinstance(lm.layout.blocks[0], LlamaDecoderLayer)
        with pytest.raises(
            UnsupportedError, match=r"model\.layers\.0: is not in this part of the model, which has block 1"
        ):
            lm.model(batch())
        with pytest.raises(
            UnsupportedError, match=r"lm_head: the head is not in this part .* block 1; it gives hidden"
        ):
            lm.model.lm_head(torch.zeros(1, 64))
        for name in ("model.layers.0.mlp.up_proj.weight", "lm_head.weight", "model.embed_tokens.weight"):
            with pytest.raises(InputError, match=r"is not in this part of parted, which has block 1"):
                lm.weights(name)
        wanted = tensors_of(folder)["model.layers.1.mlp.up_proj.weight"]
        assert torch.equal(lm.weights("model.layers.1.mlp.up_proj.weight"), wanted)
    with opened(folder, Part.ends(3)) as lm:
        with pytest.raises(
            UnsupportedError, match=r"layers\.0: is not in this part of the model, which has what is outside"
        ):
            lm.model(batch())
        assert torch.equal(lm.weights("lm_head.weight"), tensors_of(folder)["lm_head.weight"])
        # Two labels for each of three blocks, and what the hops of a client are given, from which a session is rebuilt.
        assert lm.sizes.cache_token_bytes == 3 * 2 * 8 + ASSUMED_HOPS * 64 * 4


def test_what_stands_for_absent_ends_takes_no_memory_and_stays_tied(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    made = parted(tiny("llama-tied"), tmp_path / "tied", shard_of(0))
    with opened(made, Part.span(0, 1)) as lm:
        table = lm.model.get_input_embeddings().weight
        assert table is lm.model.get_output_embeddings().weight
        assert table.shape == (VOCAB, 64)
        assert table.untyped_storage().nbytes() == table.itemsize
        assert lm.sizes.kept_bytes == 0


def test_a_span_counts_its_own_blocks_only(folder: Path, tiny: Callable[..., Path]) -> None:
    job = Job.serving(cache_tokens=100, batch_tokens=16, max_batch_tokens=32, backward=True)
    with opened(tiny("llama-2"), None) as whole, opened(folder, Part.span(1, 2), job=job) as lm:
        assert lm.sizes.cache_token_bytes * 3 == whole.sizes.cache_token_bytes
        assert lm.sizes.checkpoint_token_bytes * 3 == whole.sizes.checkpoint_token_bytes
        assert lm.sizes.stops[1] == whole.sizes.stops[1]
        assert lm.sizes.all_bytes == lm.sizes.stops[1].num_bytes
        assert lm.plan.sweep_tokens == 32
        assert lm.can_run_backward
        assert lm.plan.forecast.read_bytes <= lm.sizes.all_bytes
    # Of the windows of Gemma and the states of hybrid models each block has its own.
    with opened(tiny("qwen3-next-hybrid"), None) as whole:
        found = [
            measure_cache(build_skeleton(whole.config, whole.folder, torch.float32), Part.span(n, n + 1))
            for n in range(3)
        ]
        assert found[0] == found[2] != found[1]
        assert found[1].row_bytes == 0 < found[0].row_bytes


def test_leaves_of_a_span_serve_forward_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tiny: Callable[..., Path]
) -> None:
    monkeypatch.setattr(layout, "MIN_LEAF_BYTES", 0)
    with opened(tiny("llama-2"), None) as whole:
        known = run_until(whole, StopAfterBlocks(1))
        expected = hidden_of(run_until(whole, StopAfterBlocks(2)))
    serve = {"cache_tokens": 10, "batch_tokens": 18, "max_batch_tokens": 18}
    job = Job.serving(**serve, backward=False)
    with opened(without(folder, shard_of(0), OUTSIDE), Part.span(1, 2), granularity="leaves", job=job) as lm:
        assert not lm.can_run_backward
        assert torch.equal(hidden_of(run_until(lm, Inside(1, 2, known))), expected)
        assert lm.report.read_bytes <= lm.weight_bytes + PAGES
    with opened(folder, Part.span(1, 2), job=Job.serving(**serve, backward=True)) as lm:
        assert [sizes.granularity for sizes in lm.choices] == ["blocks"]
    with pytest.raises(
        InputError, match="stops smaller than a block serve forward only; serve without backward"
    ):
        opened(folder, Part.span(1, 2), granularity="leaves", job=Job.serving(**serve, backward=True))


def test_a_single_file_serves_any_part(tiny: Callable[..., Path], tmp_path: Path) -> None:
    save_tiny("llama-2", tmp_path, shard="1GB")
    with opened(tiny("llama-2"), None) as whole:
        known = run_until(whole, StopAfterBlocks(2))
        expected = hidden_of(run_until(whole, StopAfterBlocks(3)))
    for options in ({}, {"keep_resident": True}):
        with opened(tmp_path, Part.span(2, 3), **options) as lm:
            assert torch.equal(hidden_of(run_until(lm, Inside(2, 3, known))), expected)


@pytest.mark.parametrize("store", ["lossless", "int4"])
def test_a_part_of_a_store_needs_its_own_files_only(
    store: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    made = tmp_path / store
    make_store(tiny("llama-2", torch.bfloat16), made, store)
    with opened(made, None) as whole:
        known = run_until(whole, StopAfterBlocks(1))
        expected = hidden_of(run_until(whole, StopAfterBlocks(2)))
    without(made, "block-00000.safetensors", "outside.safetensors", "head.safetensors")
    with opened(made, Part.span(1, 2)) as lm:
        assert torch.equal(hidden_of(run_until(lm, Inside(1, 2, known))), expected)
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.\S+ and 8 more: missing; .* block-00000\.safetensors"
    ):
        opened(made, Part.span(0, 2))
    without(made, "block-00001.safetensors", "block-00002.safetensors")
    with pytest.raises(StoreError, match="has none of the store's files; fetch those of the part"):
        opened(made, Part.span(1, 2))


def test_a_prompt_is_not_checked_against_weights_that_are_not_here(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = SoftPrompt("shallow", torch.ones(2, 64))
    with opened(folder, Part.ends(3), prompt=prompt):
        assert "is not checked" not in caplog.text
    without(folder, shard_of(1))
    with caplog.at_level("WARNING", logger="slowllm"), opened(folder, Part.ends(3), prompt=prompt):
        assert (
            "whether the soft prompt was made for these weights is not checked, because 9 tensors"
            in caplog.text
        )


def test_the_part_that_is_everything_is_the_whole_model(tiny: Callable[..., Path]) -> None:
    with (
        opened(tiny("llama-2"), Part.whole(3)) as lm,
        opened(tiny("llama-2"), None) as whole,
        torch.no_grad(),
    ):
        assert torch.equal(lm.model(batch()).logits, whole.model(batch()).logits)
        assert lm.choices == whole.choices
        assert repr(lm) == repr(whole)
