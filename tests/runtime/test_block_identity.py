"""A block is known again in any checkpoint of its model, and is told from any other block."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slowllm.errors import CheckpointError, InputError
from slowllm.modeling.blocks import find_blocks
from slowllm.modeling.parts import Part
from slowllm.modeling.skeleton import build_skeleton, read_config
from slowllm.runtime.block_identity import block_hash, block_hashes, ends_hash
from slowllm.runtime.load import open_model
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.storage.manifest import open_checkpoint
from slowllm.storage.samples import MAX_SAMPLES, SAMPLE_ELEMENTS, hash_tensors, sampled_places
from slowllm.storage.spans import Placement, Run
from tests.support.families import FAMILIES, resident, save_tiny
from tests.support.parted import OUTSIDE, parted, shard_of, tensors_of, write
from tests.support.stores import make_store

Tiny = Callable[..., Path]
SOME = ["bloom", "llama-tied", "mixtral", "deepseek-v3", "gemma-3-with-a-tower"]
LONG = [pytest.param(name, marks=pytest.mark.long) for name in FAMILIES if name not in SOME]
UP = "model.layers.1.mlp.up_proj.weight"


def hashes_of(folder: Path) -> tuple[list[str], str]:
    """The hashes of all blocks of a checkpoint, and that of its ends."""
    config: Any = read_config(folder)
    _, blocks = find_blocks(build_skeleton(config, folder, torch.float32))
    with open_checkpoint(folder) as checkpoint:
        return list(block_hashes(checkpoint, range(len(blocks))).values()), ends_hash(checkpoint)


def changed(folder: Path, out: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors = tensors_of(folder)
    change(tensors)
    return write(folder, out, tensors)


@pytest.mark.parametrize("name", [*SOME, *LONG])
def test_shards_and_the_handle_make_no_difference(name: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny(name)
    blocks, ends = hashes_of(folder)
    assert len({*blocks, ends}) == len(blocks) + 1
    assert hashes_of(parted(folder, tmp_path / "parted")) == (blocks, ends)
    save_tiny(name, tmp_path / "single", shard="1GB")
    assert hashes_of(tmp_path / "single") == (blocks, ends)
    # Read and written by transformers, in the names of today and of yesterday.
    resident(folder).save_pretrained(tmp_path / "again", max_shard_size="100KB")
    assert hashes_of(tmp_path / "again") == (blocks, ends)
    for dtype in ("fp32", "bf16"):
        with open_model(StreamedLM, folder, dtype=dtype) as lm:
            assert list(block_hashes(lm, range(len(blocks))).values()) == blocks
            assert ends_hash(lm) == ends


@pytest.mark.parametrize("name", ["bloom", "llama-2"])
def test_the_prefix_of_the_base_model_makes_no_difference(name: str, tiny: Tiny, tmp_path: Path) -> None:
    prefix = {"bloom": "transformer.", "llama-2": "model."}[name]
    bare = {key.removeprefix(prefix): tensor for key, tensor in tensors_of(tiny(name)).items()}
    assert hashes_of(write(tiny(name), tmp_path, bare)) == hashes_of(tiny(name))


def test_a_tied_matrix_counts_once_under_whatever_name(tiny: Tiny, tmp_path: Path) -> None:
    folder, old, new = tiny("llama-tied"), "model.embed_tokens.weight", "lm_head.weight"
    both = changed(folder, tmp_path / "both", lambda t: t.update({new: t[old].clone()}))
    other = changed(folder, tmp_path / "other", lambda t: t.update({new: t.pop(old)}))
    assert hashes_of(both) == hashes_of(other) == hashes_of(folder)


def test_parts_have_the_hashes_of_the_whole(tiny: Tiny, tmp_path: Path) -> None:
    blocks, ends = hashes_of(tiny("mixtral"))
    folder = parted(tiny("mixtral"), tmp_path / "span", shard_of(1), shard_of(2))
    with open_model(StreamedLM, folder, part=Part.span(1, 3)) as lm:
        assert block_hashes(lm, [2, 1]) == {1: blocks[1], 2: blocks[2]}
        with pytest.raises(InputError, match="block 0 is not in this part of the model"):
            block_hash(lm, 0)
        with pytest.raises(InputError, match="block 3: the model has 3 blocks"):
            block_hash(lm, 3)
        with pytest.raises(InputError, match="-1 is no number of a block"):
            block_hash(lm, -1)
        with pytest.raises(InputError, match="has blocks 1 to 2, but not what is outside"):
            ends_hash(lm)
        assert block_hashes(lm, []) == {}
    with open_checkpoint(folder, may_lack_shards=True) as checkpoint:
        assert block_hash(checkpoint, 1) == blocks[1]
        assert block_hashes(checkpoint, [1, 2]) == {1: blocks[1], 2: blocks[2]}
        with pytest.raises(CheckpointError, match=r"layers\.0\..* missing; .* block-0\.safetensors"):
            block_hash(checkpoint, 0)
    apart = parted(tiny("mixtral"), tmp_path / "apart", shard_of(0), shard_of(2))
    with open_checkpoint(apart, may_lack_shards=True) as checkpoint:
        assert block_hashes(checkpoint, [2, 0]) == {0: blocks[0], 2: blocks[2]}
    only = parted(tiny("mixtral"), tmp_path / "ends", OUTSIDE)
    with open_model(StreamedLM, only, part=Part.ends(3)) as lm:
        assert ends_hash(lm) == ends
    with open_checkpoint(only, may_lack_shards=True) as checkpoint:
        assert ends_hash(checkpoint) == ends


def test_the_stored_dtype_counts(tiny: Tiny) -> None:
    single, half = hashes_of(tiny("llama-2")), hashes_of(tiny("llama-2", torch.bfloat16))
    assert not {*single[0], single[1]} & {*half[0], half[1]}


@pytest.mark.parametrize("name", ["llama-2", "mixtral"])
def test_exact_stores_have_the_hashes_of_their_source_and_others_their_own(
    name: str, tiny: Tiny, tmp_path: Path
) -> None:
    source = tiny(name, torch.bfloat16)
    wanted, found = hashes_of(source), {}
    for store in ("bf16", "lossless", "int8", "int4"):
        made = make_store(source, tmp_path / store, store)
        codecs = {t.codec for file in made.manifest.files.values() for t in file.tensors.values()}  # type: ignore[union-attr]
        assert codecs == ({None} if store == "bf16" else {None, store})
        found[store] = hashes_of(tmp_path / store)
    assert found["bf16"] == found["lossless"] == wanted
    for store in ("int8", "int4"):
        assert found[store][1] == wanted[1], "what is outside the blocks is not coded"
        assert not set(found[store][0]) & {*wanted[0], *found["int4" if store == "int8" else "int8"][0]}
    # A store made again is the same.
    make_store(source, tmp_path / "again", "int8")
    assert hashes_of(tmp_path / "again") == found["int8"]


def test_samples_of_a_large_lossless_matrix_are_those_of_its_source(tmp_path: Path) -> None:
    # Matrices of more weights than share an exponent, the last of them few.
    save_tiny("llama-2", tmp_path / "source", torch.bfloat16, hidden_size=256, intermediate_size=700)
    make_store(tmp_path / "source", tmp_path / "store", "lossless")
    assert hashes_of(tmp_path / "store") == hashes_of(tmp_path / "source")


@pytest.mark.parametrize("store", [None, "lossless", "int8", "int4"])
def test_a_flipped_bit_in_a_sampled_place_is_noticed(store: str | None, tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    if store is None:
        write(tiny("llama-2", torch.bfloat16), folder, tensors_of(tiny("llama-2", torch.bfloat16)))
    else:
        make_store(tiny("llama-2", torch.bfloat16), folder, store)
    before, ends = hashes_of(folder)
    with open_checkpoint(folder) as checkpoint:
        span = checkpoint.spans[UP]
    first = sampled_places(UP, span.shape)[3][0] * 2 if store is None else 0
    if store == "lossless":
        # Of the first quarter of a chunk, every second byte is a weight's sign and mantissa.
        first = 2 * sampled_places(UP, span.shape)[0][0]
    elif store is not None:
        assert span.coding is not None
        part = span.coding.parts[0]
        first = part.offset + sampled_places(f"{UP} {part.name}", part.shape)[0][0]
    with open(span.path, "r+b") as file:
        file.seek(span.offset + first)
        byte = file.read(1)[0]
        file.seek(span.offset + first)
        file.write(bytes([byte ^ 1]))
    after, ends_after = hashes_of(folder)
    assert [a == b for a, b in zip(after, before, strict=True)] == [True, False, True]
    assert ends_after == ends


def test_every_expert_is_sampled(tiny: Tiny, tmp_path: Path) -> None:
    before, _ = hashes_of(tiny("mixtral"))
    for expert in range(4):
        names = [
            key
            for key in tensors_of(tiny("mixtral"))
            if f"layers.1.block_sparse_moe.experts.{expert}." in key
        ]
        assert names, "transformers writes the names of the original"
        made = changed(
            tiny("mixtral"),
            tmp_path / str(expert),
            lambda t, names=names: t.update({n: t[n] + 1 for n in names}),
        )
        assert [a == b for a, b in zip(hashes_of(made)[0], before, strict=True)] == [True, False, True]


def test_swapped_blocks_are_noticed(tiny: Tiny, tmp_path: Path) -> None:
    def swap(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".layers.0." in name]:
            other = name.replace(".0.", ".2.")
            tensors[name], tensors[other] = tensors[other], tensors[name]

    before, ends = hashes_of(tiny("llama-2"))
    after, ends_after = hashes_of(changed(tiny("llama-2"), tmp_path, swap))
    assert ends_after == ends
    assert len({*before, *after}) == 5, "and the names differ, so that nothing is only moved"


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_parameters"])
def test_another_config_has_other_ends(key: str, tiny: Tiny, tmp_path: Path) -> None:
    made = parted(tiny("llama-2"), tmp_path)
    table = json.loads((made / "config.json").read_text())
    same = {**table, "dtype": "float16", "_name_or_path": "elsewhere", "transformers_version": "9"}
    (made / "config.json").write_text(json.dumps(same))
    assert hashes_of(made) == hashes_of(tiny("llama-2"))
    other = {"rms_norm_eps": 1e-3, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}
    (made / "config.json").write_text(json.dumps({**table, key: other[key]}))
    assert hashes_of(made)[0] == hashes_of(tiny("llama-2"))[0]
    assert hashes_of(made)[1] != hashes_of(tiny("llama-2"))[1]


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_shard_that_is_no_longer_whole_is_refused(damage: str, tiny: Tiny, tmp_path: Path) -> None:
    made = parted(tiny("llama-2"), tmp_path)
    with open_checkpoint(made) as checkpoint:
        path = made / shard_of(1)
        if damage == "gone":
            path.unlink()
            with pytest.raises(FileNotFoundError):
                block_hash(checkpoint, 1)
        else:
            os.truncate(path, path.stat().st_size // 2)
            with pytest.raises(CheckpointError, match="was replaced or changed since its header was read"):
                block_hash(checkpoint, 1)
        assert block_hash(checkpoint, 0)


def test_a_shard_that_ends_before_a_sample_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    made = parted(tiny("llama-2"), tmp_path)
    with open_checkpoint(made) as checkpoint:
        # As where the header was read just before the shard was cut short.
        span = replace(checkpoint.spans[UP], stamp=None)
        placement = Placement(UP, span.shape, span.torch_dtype, (Run(span, 0, 0, span.num_bytes),))
        os.truncate(span.path, span.offset + span.num_bytes // 2)
        with pytest.raises(
            CheckpointError, match=r"mlp\.up_proj\.weight ends at byte .* it was cut short while it was open"
        ):
            hash_tensors(checkpoint, {UP: placement})


@pytest.mark.parametrize("shape", [(), (0, 4), (7,), (64, 32), (300, 9, 1000), (4, 64, 96), (50_000, 8192)])
def test_samples_lie_in_the_tensor_one_in_each_share(shape: tuple[int, ...]) -> None:
    places = sampled_places("some.weight", shape)
    count = torch.Size(shape).numel()
    assert all(first >= 0 and first + number <= count for first, number in places)
    assert all(a[0] + a[1] <= b[0] for a, b in itertools.pairwise(places))
    if len(places) > 1:
        assert {number for _, number in places} == {SAMPLE_ELEMENTS}
        assert len(places) == (min(shape[0], MAX_SAMPLES) if len(shape) == 3 and shape[0] > 8 else 8)
        assert places != sampled_places("another.weight", shape)
    else:
        assert sum(number for _, number in places) == count
