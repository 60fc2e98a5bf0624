"""Folders of shards are opened whole or refused with their own sentence; rows are taken through a memory map."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from safetensors.torch import save_file

from slowllm.errors import CheckpointError
from slowllm.storage.checkpoint import Checkpoint, read_json
from slowllm.storage.shard import read_header
from slowllm.storage.spans import Placement, Run, Span, take_rows
from tests.support.headers import contents, entry, header_of
from tests.support.properties import num_examples

fuzz = num_examples(
    200,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound folder of two shards."""
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(5)}, tmp_path / "one.safetensors")
    save_file({"c": torch.full((3,), 7.0)}, tmp_path / "two.safetensors")
    write_index(tmp_path, a="one.safetensors", b="one.safetensors", c="two.safetensors")
    return tmp_path


def write_index(folder: Path, **weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def remove(folder: Path, *patterns: str) -> None:
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink()


def test_a_sound_folder_is_opened(folder: Path) -> None:
    with Checkpoint.open(str(folder)) as checkpoint:
        assert checkpoint.spans.keys() == {"a", "b", "c"}
        assert checkpoint.spans["c"].path == folder / "two.safetensors"
        assert checkpoint.num_bytes == (6 + 5 + 3) * 4
        assert checkpoint.folder == folder


def test_shards_that_the_index_does_not_name_are_left_alone(folder: Path) -> None:
    (folder / "consolidated.safetensors").write_bytes(b"not read")
    assert len(Checkpoint.open(folder).spans) == 3


def test_one_file_counts_and_not_an_index_that_an_earlier_save_left(folder: Path) -> None:
    shutil.copy(folder / TWO, folder / "model.safetensors")
    assert {span.path.name for span in Checkpoint.open(folder).spans.values()} == {"model.safetensors"}
    remove(folder, TWO, ONE)
    assert Checkpoint.open(folder).spans.keys() == {"c"}


def test_the_index_decides_between_two_shards_that_hold_a_tensor(folder: Path) -> None:
    save_over(TWO, a=torch.zeros(2, 3), c=torch.zeros(3))(folder)
    spans = Checkpoint.open(folder).spans
    assert (spans["a"].path.name, spans["c"].path.name) == (ONE, TWO)


@pytest.mark.parametrize("name", ["model.safetensors", "adapter.safetensors"])
def test_one_file_needs_no_index(folder: Path, name: str) -> None:
    remove(folder, "*.index.json", "two.safetensors")
    (folder / "one.safetensors").rename(folder / name)
    assert Checkpoint.open(folder).spans.keys() == {"a", "b"}


def test_model_safetensors_comes_before_others(folder: Path) -> None:
    remove(folder, "*.index.json")
    (folder / "two.safetensors").rename(folder / "model.safetensors")
    assert Checkpoint.open(folder).spans.keys() == {"c"}


def break_index(**weight_map: Any) -> Callable[[Path], None]:
    return lambda folder: write_index(folder, **weight_map)


def without_index(*touched: str, remove_all: bool = True) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        remove(folder, "*.index.json", *(["*.safetensors"] if remove_all else []))
        for name in touched:
            (folder / name).touch()

    return change


def text_index(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(text) and None


def save_over(file: str, **tensors: torch.Tensor) -> Callable[[Path], None]:
    return lambda folder: save_file(tensors, folder / file)


def resize(file: str, change: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / file, (folder / file).stat().st_size + change)


def empty_shards(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.write_bytes(contents("{}"))
    write_index(folder)


ONE, TWO = "one.safetensors", "two.safetensors"
FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "gone": (shutil.rmtree, r"no such folder"),
    "no config": (lambda folder: remove(folder, "config.json"), r"has no config\.json, so it is not a Hugging"),
    "no weights": (without_index(), r"has no model\.safetensors and no model\.safetensors\.index\.json"),
    "several files": (without_index(remove_all=False), r"has 2 safetensors files but no model\.saf.*index file too"),
    "pickled": (without_index("pytorch_model-00001-of-00002.bin"), r"only pickled weights .* never loaded"),
    "pickled .pth": (without_index("consolidated.00.pth"), r"only pickled weights"),
    "pickled .pt": (without_index("model.pt"), r"only pickled weights"),
    "GGUF": (without_index("model-q4.gguf"), r"model-q4\.gguf: (has \d+ bytes, too few for a GGUF header|does not begin with GGUF)"),
    "shard missing": (lambda folder: remove(folder, TWO), r"two\.safetensors: named by .* but missing; fetch"),
    "long shard name": (break_index(a="x" * 5000), r"x: named by .* but missing"),
    "tensor missing": (
        break_index(a=ONE, b=ONE, c=TWO, d=TWO), r"two\.safetensors: d is missing, though .*index\.json names it there"
    ),
    "other shard": (
        break_index(a=ONE, b=TWO, c=TWO), r"b: model\.saf.* names two\.safetensors but it lies in one\.safetensors"
    ),
    "traversal": (break_index(a="../one.safetensors"), r"names '\.\./one\.safetensors', which is not a file beside"),
    "absolute": (break_index(a="/etc/passwd"), r"names '/etc/passwd', which is not a file beside"),
    "parent": (break_index(a=".."), r"names '\.\.', which is not a file beside"),
    "no name": (break_index(a=""), r"names '', which is not a file beside"),
    "not a name": (break_index(a=7), r"index\.json: has no weight_map of tensor names to file names"),
    "no map": (text_index("{}"), r"index\.json: has no weight_map of tensor names"),
    "map is a list": (text_index('{"weight_map": []}'), r"index\.json: has no weight_map of tensor names"),
    "index is a list": (text_index("[]"), r"index\.json: is not a JSON object"),
    "index is cut": (text_index('{"weight_map": {'), r"index\.json: is not valid JSON"),
    "index is endless": (text_index("[" * 100_000), r"index\.json: is not valid JSON \(.*recursion"),
    "twice": (
        lambda folder: (
            save_over(TWO, a=torch.zeros(2, 3), c=torch.zeros(3))(folder), break_index(b=ONE, c=TWO)(folder)
        ),
        r"a stands in one\.safetensors and again in two\.safetensors; fetch both shards and the index again",
    ),
    "short": (resize(ONE, -1), r"one\.safetensors: \w ends at byte (\d+) but the file has \d+\. The download is inc"),
    "long": (resize(TWO, 5), r"two\.safetensors: the last tensor ends at byte \d+ but the file has \d+; it is too long"),
    "empty shard": (lambda folder: os.truncate(folder / TWO, 0), r"two\.safetensors: has 0 bytes"),
    "empty": (empty_shards, r"its shards hold no tensors"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "words"), FOLDERS.values(), ids=FOLDERS)
def test_a_folder_is_refused_with(folder: Path, change: Callable[[Path], Any], words: str) -> None:
    change(folder)
    with pytest.raises(CheckpointError, match=words):
        Checkpoint.open(folder)


def test_a_short_file_is_told_with_its_numbers(folder: Path) -> None:
    size = (folder / TWO).stat().st_size
    os.truncate(folder / TWO, size - 5)
    with pytest.raises(
        CheckpointError, match=rf"two\.safetensors: c ends at byte {size:,} but the file has {size - 5:,}\."
    ):
        Checkpoint.open(folder)


def test_json_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: No such file"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(CheckpointError, match=r"config\.json: is not valid JSON"):
        read_json(tmp_path / "config.json")


def test_a_dtype_that_torch_cannot_compute_with_is_refused_by_name(tmp_path: Path) -> None:
    span = Span("a.weight", tmp_path / "one.safetensors", "F8_E4M3", (4,), 8, 4)
    with pytest.raises(
        CheckpointError, match=r"one\.safetensors: a\.weight is stored as F8_E4M3, which cannot"
    ):
        _ = span.torch_dtype


# Bytes


def whole(span: Span) -> Placement:
    runs = (Run(span, 0, 0, span.num_bytes),) if span.num_bytes else ()
    return Placement(span.name, span.shape, span.torch_dtype, runs)


def bytes_of(placement: Placement) -> bytes:
    """Follow the runs by hand."""
    filled = bytearray(placement.num_bytes)
    for run in placement.runs:
        begin = run.span.offset + run.source
        filled[run.target : run.target + run.num_bytes] = run.span.path.read_bytes()[
            begin : begin + run.num_bytes
        ]
    return bytes(filled)


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_mapped_tensors_equal_the_saved_and_share_one_map(tmp_path: Path, dtype: torch.dtype) -> None:
    (tmp_path / "config.json").write_text("{}")
    tensors = {
        "a": torch.arange(35).view(5, 7).to(dtype),
        "b": torch.arange(3).to(dtype),
        "c": torch.tensor(1).to(dtype),
        "d": torch.zeros(0, 4, dtype=dtype),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        mapped = {name: checkpoint.mapped(whole(span)) for name, span in checkpoint.spans.items()}
        for name, tensor in tensors.items():
            found = mapped[name]
            assert found is not None
            assert found.dtype == dtype
            assert torch.equal(found, tensor)
        # No copies: their distance in memory is their distance in the file.
        first, second = mapped["a"], mapped["b"]
        assert first is not None
        assert second is not None
        offsets = checkpoint.spans["b"].offset - checkpoint.spans["a"].offset
        assert second.data_ptr() - first.data_ptr() == offsets
    # A view keeps its map alive.
    assert torch.equal(first, tensors["a"])


def test_a_mapped_tensor_shows_the_file_and_never_writes_to_it(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint:
        mapped = checkpoint.mapped(whole(checkpoint.spans["a"]))
        assert mapped is not None
        before = (folder / ONE).read_bytes()
        mapped.fill_(5.0)
        assert (folder / ONE).read_bytes() == before


def test_rows_of_a_mapped_tensor_are_mapped(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint:
        mapped = checkpoint.mapped(take_rows(whole(checkpoint.spans["a"]), "a", 1, 2))
        assert mapped is not None
        assert mapped.tolist() == [[3.0, 4.0, 5.0]]


def test_what_no_map_can_hold_is_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    header = header_of(
        odd=entry("U8", [1], [0, 1]), a=entry("F32", [2], [1, 9]), b=entry("F32", [2], [9, 17])
    )
    header += " " * (-len(header) % 8)
    (tmp_path / "model.safetensors").write_bytes(contents(header, bytes(17)))
    with Checkpoint.open(tmp_path) as checkpoint:
        a, b = checkpoint.spans["a"], checkpoint.spans["b"]
        assert checkpoint.mapped(whole(a)) is None
        assert checkpoint.mapped(whole(checkpoint.spans["odd"])) is not None
        # Misaligned as a whole, but its bytes alone are not.
        assert checkpoint.mapped(Placement("a", (8,), torch.uint8, (Run(a, 0, 0, 8),))) is not None
        two = Placement("ab", (4,), torch.uint8, (Run(a, 0, 0, 2), Run(b, 0, 2, 2)))
        assert checkpoint.mapped(two) is None


def test_a_shard_that_changed_since_it_was_opened_is_not_mapped(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    os.truncate(folder / TWO, (folder / TWO).stat().st_size - 3)
    with pytest.raises(CheckpointError, match=r"^two\.safetensors: was replaced or changed since its header"):
        checkpoint.mapped(whole(checkpoint.spans["c"]))
    (folder / ONE).unlink()
    with pytest.raises(CheckpointError, match=r"one\.safetensors: cannot be mapped"):
        checkpoint.mapped(whole(checkpoint.spans["a"]))
    (folder / ONE).touch()
    with pytest.raises(CheckpointError, match=r"^one\.safetensors: was replaced or changed since its header"):
        checkpoint.mapped(whole(checkpoint.spans["a"]))


def test_an_empty_file_is_not_mapped(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    (folder / ONE).write_bytes(b"")
    unread = dataclasses.replace(checkpoint.spans["a"], stamp=None)
    with pytest.raises(CheckpointError, match=r"one\.safetensors: cannot be mapped"):
        checkpoint.mapped(whole(unread))


def test_a_shard_cut_short_since_it_was_mapped_is_refused(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint:
        a, b = (whole(checkpoint.spans[name]) for name in "ab")
        first = checkpoint.mapped(a)
        size = (folder / ONE).stat().st_size
        os.truncate(folder / ONE, size - 1)
        words = rf"^one\.safetensors: b ends at byte {size:,} but the file has {size - 1:,} by now; it was cut short"
        for refused in (checkpoint.mapped, checkpoint.check_length):
            with pytest.raises(CheckpointError, match=words):
                refused(b)
        checkpoint.check_length(a)
        # Another file of that name changes nothing for the map.
        (folder / ONE).unlink()
        (folder / ONE).touch()
        checkpoint.check_length(a)
        assert first is not None
        assert first.tolist() == [[0, 1, 2], [3, 4, 5]]


@num_examples(100, suppress_health_check=fuzz.suppress_health_check)
@given(
    cuts=st.lists(st.integers(0, 60), max_size=4),
    rows=st.tuples(st.integers(0, 5), st.integers(0, 5)).map(sorted),
    backwards=st.booleans(),
)
def test_rows_are_the_rows_of_the_whole(
    tmp_path: Path, cuts: list[int], rows: list[int], backwards: bool
) -> None:
    """A (5, 2, 3) parameter in int16 of which each piece lies in its own place on disk."""
    shape, row_bytes = (5, 2, 3), 12
    path = tmp_path / "model.safetensors"
    data = bytes(range(60))
    save_file({"a": torch.frombuffer(bytearray(data), dtype=torch.int16).view(30)}, path)
    span = read_header(path)["a"]
    edges = sorted({0, 60, *cuts})
    pieces = [(low, high) for low, high in itertools.pairwise(edges)]
    # What lies first in the parameter lies last on disk.
    runs = [Run(span, 60 - high if backwards else low, low, high - low) for low, high in pieces]
    placement = Placement("a", shape, torch.int16, tuple(runs))
    start, stop = rows
    taken = take_rows(placement, "rows", start, stop)
    assert (taken.name, taken.shape, taken.dtype) == ("rows", (stop - start, 2, 3), torch.int16)
    assert all(run.num_bytes for run in taken.runs)
    assert [run.target for run in taken.runs] == sorted(run.target for run in taken.runs)
    assert sum(run.num_bytes for run in taken.runs) == taken.num_bytes == (stop - start) * row_bytes
    assert bytes_of(taken) == bytes_of(placement)[start * row_bytes : stop * row_bytes]
