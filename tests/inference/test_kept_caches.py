"""Keys and values that are kept behind conversations: in memory, and on disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.cache_utils import DynamicCache

import slowllm
from slowllm.errors import InputError
from slowllm.inference import generation
from slowllm.inference.cache_folder import CacheFolder
from slowllm.inference.generation_types import Continuation, Prompt, Settings, encode_prompt
from slowllm.inference.kept_caches import FoundCache, KeptCaches
from slowllm.inference.live_cache import RowCache
from slowllm.inference.prefix_sharing import common
from slowllm.inference.service import Service
from slowllm.inference.service_types import Ask
from slowllm.inference.token_tree import TokenTree, length_of

TEXTS = ["Two riders share a sweep when they", "Weights are read", "If a server dies, the client"]


@pytest.fixture(scope="module")
def lm() -> Iterator[Any]:
    with slowllm.load(
        "embedded:tiny-bloom", dtype="float32", job=slowllm.Job(num_tokens=4096, longest=512, repeated=True)
    ) as loaded:
        yield loaded


def alone(lm: Any, prompt: Prompt) -> tuple[Continuation, ...]:
    (found,) = generation.generate(lm, [prompt])
    return found


def cache_of(ids: Sequence[int]) -> RowCache:
    """Return a cache in which each column says which token it is of, and behind which."""
    columns = torch.tensor([[hash((0, *ids[: place + 1])) % 100_003] for place in range(len(ids))]).float()
    held = DynamicCache()
    for _ in range(2):
        held.layers.append(held.layer_class_to_replicate())
        held.update(columns.expand(1, 2, -1, 4).clone(), -columns.expand(1, 2, -1, 4), len(held.layers) - 1)
    return RowCache(held, torch.ones(1, len(ids), dtype=torch.int64))


def assert_holds(cache: RowCache | None, ids: Sequence[int]) -> None:
    """Check that a cache is that of the tokens, also where the blocks take it from disk when they are computed."""
    assert cache is not None
    assert cache.mask.tolist() == [[1] * len(ids)]
    wanted = cache_of([*ids, 7])
    for own, other in zip(cache.layers(), wanted.layers(), strict=True):
        assert own.get_seq_length() == len(ids)
        assert other.keys is not None
        assert other.values is not None
        keys, values = own.update(other.keys[:, :, -1:], other.values[:, :, -1:])
        assert torch.equal(keys, other.keys)
        assert torch.equal(values, other.values)


SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8).map(tuple), max_size=12)


@given(SEQUENCES, st.lists(st.integers(0, 2), max_size=10))
def test_the_tree_finds_the_longest_beginning(sequences: list[tuple[int, ...]], wanted: list[int]) -> None:
    tree: TokenTree[None] = TokenTree()
    for ids in sequences:
        path = tree.find(ids)
        if new := ids[length_of(path) :]:
            tree.add(path, new, None)
    found = tree.find(wanted)
    assert length_of(found) == max((common(ids, tuple(wanted)) for ids in sequences), default=0)
    assert [token for piece, num_own in found for token in piece.ids[:num_own]] == wanted[: length_of(found)]
    # What is there once is counted once.
    assert sum(len(piece.ids) for piece in tree) == len(
        {ids[:n] for ids in sequences for n in range(1, len(ids) + 1)}
    )


@given(SEQUENCES, st.data())
def test_what_is_removed_is_gone_with_all_that_hangs_at_it(
    sequences: list[tuple[int, ...]], data: st.DataObject
) -> None:
    tree: TokenTree[int] = TokenTree()
    for number, ids in enumerate(sequences):
        path = tree.find(ids)
        if new := ids[length_of(path) :]:
            tree.add(path, new, number)
    while len(tree):
        piece = data.draw(st.sampled_from(list(tree)))
        num_before = len(tree)
        gone = tree.remove(piece)
        assert len(gone) == num_before - len(tree) >= 1
        assert not tree.remove(piece)
    assert not tree.find([0, 1, 2])


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(16, 40), st.integers(0, 3)), min_size=1, max_size=12)
)
def test_kept_columns_are_those_of_their_tokens(asked: list[tuple[int, int, int]]) -> None:
    kept = KeptCaches(60)
    for head, length, tail in asked:
        ids = [head] * (length // 2) + [tail] * (length - length // 2)
        found = kept.find([*ids, 9])
        if found is not None:
            assert_holds(found.load(), ids[: found.num_tokens])
        kept.keep(ids, cache_of(ids))
        assert kept.num_tokens == sum(len(piece.ids) for piece in kept._kept) <= 60
        assert all(piece.content.mask.shape[1] == len(piece.ids) and piece.ids for piece in kept._kept)
        again = kept.find([*ids, 9])
        assert again is not None
        assert again.num_tokens == length


def test_no_more_is_kept_than_there_is_room_for() -> None:
    def found(ids: Sequence[int]) -> FoundCache:
        cache = kept.find(ids)
        assert cache is not None
        return cache

    kept = KeptCaches(60)
    kept.keep(range(30), cache_of(range(30)))
    kept.keep(range(100, 130), cache_of(range(100, 130)))
    assert kept.find(range(20)) is not None, "and it was used last"
    kept.keep(range(200, 220), cache_of(range(200, 220)))
    assert kept.num_tokens == 50
    assert kept.find(range(100, 130)) is None
    assert found([*range(25), 7, 7]).num_tokens == 25
    kept.keep(range(10), cache_of(range(10)))  # too short
    kept.keep(range(61), cache_of(range(61)))  # too long
    kept.keep(range(40), cache_of(range(40)))  # goes on from the first one
    assert kept.num_tokens == 60
    kept.keep(range(35), cache_of(range(35)))  # is a part of it
    assert kept.num_tokens == 60
    # A beginning that several share is there once, and its end goes before they do.
    fork = [*range(20), *range(50, 70)]
    early = found([*range(40), 1])
    kept.keep(fork, cache_of(fork))
    assert kept.num_tokens <= 60
    assert_holds(found([*fork, 1]).load(), fork)
    assert_holds(early.load(), list(range(40)))  # who found it before has it


def test_conversations_that_begin_alike_are_written_once(tmp_path: Path) -> None:
    first, second = [*range(40)], [*range(25), *range(70, 100)]
    for _ in range(2):
        with closing(CacheFolder(tmp_path, "m", 1 << 20)) as folder:
            for ids in (first, second, [*first, 1, 2, 3]):
                folder.save(tuple(ids), cache_of(ids))
        files = list(tmp_path.rglob("*.safetensors"))
        assert len(files) == 2  # a few tokens more are not worth a file
    with closing(CacheFolder(tmp_path, "m", 1 << 20)) as folder:
        assert folder.num_tokens == 70
        for ids in (first, second):
            path = folder.find([*ids, 5])
            assert length_of(path) == len(ids)
            assert_holds(folder.load(path, len(ids)), ids)
            assert_holds(folder.load(path, 20), ids[:20])
    # Without the file that another goes on from, the other is of no use.
    max(files, key=lambda file: file.stat().st_size).unlink()
    with closing(CacheFolder(tmp_path, "m", 1 << 20)) as folder:
        assert not folder.num_tokens
    assert not list(tmp_path.rglob("*.safetensors"))


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    with closing(CacheFolder(tmp_path, "m", 1 << 20)) as folder:
        folder.save(tuple(range(20)), cache_of(range(20)))
    (file,) = tmp_path.rglob("*.safetensors")
    stale, fresh = (file.with_name(f"{name}.safetensors.part") for name in ("stale", "fresh"))
    for partial in (stale, fresh):
        partial.write_bytes(b"x")
    os.utime(stale, (0, 0))
    with closing(CacheFolder(tmp_path, "m", 1 << 20)) as folder:
        assert folder.num_tokens == 20
    assert [partial.exists() for partial in (stale, fresh)] == [False, True]


def test_blocks_take_their_keys_from_disk_when_they_are_computed(tmp_path: Path) -> None:
    ids = tuple(range(30))
    with closing(CacheFolder(tmp_path, "m", 1 << 20)) as folder:
        folder.save(ids, cache_of(ids))
    with closing(CacheFolder(tmp_path, "m", 1 << 20)) as folder:
        cache = folder.load(folder.find(ids), 20)
        assert cache is not None
        assert all(layer.keys is None and layer.get_seq_length() == 20 for layer in cache.layers())
        assert cache.cache.get_mask_sizes(3, 0) == (23, 0)
        one = torch.zeros(1, 2, 1, 4)
        cache.layers()[0].update(one, one)
        assert [layer.keys is None for layer in cache.layers()] == [False, True]
        assert [layer.get_seq_length() for layer in cache.layers()] == [21, 20]


def test_a_conversation_is_found_on_disk_by_a_later_process(lm: Any, tmp_path: Path) -> None:
    settings, prompt = (
        Settings(max_new_tokens=20, min_new_tokens=20),
        encode_prompt(lm, TEXTS[0] * 2, Settings()),
    )
    with (
        closing(CacheFolder(tmp_path, "of-this-model", 1 << 20)) as folder,
        Service(lm, folder=folder) as service,
    ):
        (first,) = service.submit(Ask(Prompt(prompt.ids, settings))).result(60).continuations
    longer = Prompt(prompt.ids + first.ids + (5, 6, 7), settings)
    with (
        closing(CacheFolder(tmp_path, "of-this-model", 1 << 20)) as folder,
        Service(lm, folder=folder) as service,
    ):
        assert length_of(folder.find(longer.ids)) == folder.num_tokens == len(prompt.ids + first.ids) - 1
        assert service.submit(Ask(longer)).result(60).continuations == alone(lm, longer)
        assert service.status().num_prompt_tokens == 4
    with closing(CacheFolder(tmp_path, "of-another-model", 1 << 20)) as folder:
        assert not folder.num_tokens


def test_damaged_files_and_full_folders_cost_a_computation_only(
    lm: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(max_new_tokens=8, min_new_tokens=8)
    prompts = [Prompt(encode_prompt(lm, text * 3, settings).ids, settings) for text in TEXTS]
    wanted = [alone(lm, prompt) for prompt in prompts]
    with closing(CacheFolder(tmp_path, "m", 1 << 30)) as folder, Service(lm, folder=folder) as service:
        assert [service.submit(Ask(prompt)).result(60).continuations for prompt in prompts] == wanted
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 3
    size = max(file.stat().st_size for file in files)
    with closing(CacheFolder(tmp_path, "m", 1 << 30)) as folder, Service(lm, folder=folder) as service:
        for file in files:
            file.write_bytes(b"damaged")
        assert [service.submit(Ask(prompt)).result(60).continuations for prompt in prompts] == wanted
    assert "is left aside" in caplog.text
    with closing(CacheFolder(tmp_path, "m", 2 * size)) as folder, Service(lm, folder=folder) as service:
        for prompt in prompts:
            service.submit(Ask(prompt)).result(60)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors")) <= 2 * size
    # Damage that only the checksums show, in the tensors of one file: found while the blocks are computed.
    shutil.rmtree(tmp_path / next(path.name for path in tmp_path.iterdir()))
    with closing(CacheFolder(tmp_path, "m", 1 << 30)) as folder, Service(lm, folder=folder) as service:
        service.submit(Ask(prompts[0])).result(60)
    (file,) = tmp_path.rglob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-2000:] = bytes(2000)
    file.write_bytes(content)
    caplog.clear()
    with closing(CacheFolder(tmp_path, "m", 1 << 30)) as folder, Service(lm, folder=folder) as service:
        longer = Prompt((*prompts[0].ids, 9, 9), settings)
        assert service.submit(Ask(longer)).result(60).continuations == alone(lm, longer)
        assert service.status().num_prompt_tokens == len(longer.ids)
    assert "is left aside, because it is damaged" in caplog.text
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be used as a folder of caches"):
        CacheFolder(tmp_path / "file", "m", 1)
