"""Shards: whole or not there, the same bytes however often a run is broken off, and readable by others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from slowllm.errors import InputError
from slowllm.files import STATE_NAME
from slowllm.inference import shard_files
from slowllm.inference.shard_files import FORMATS, Format, ShardRow, ShardWriter, check_folder

pytest.importorskip("pyarrow")
ROWS = [
    ShardRow(
        "a.txt" if number < 6 else "b.txt", number, f"text {number}",
        {
            "ids": torch.arange(number % 4, dtype=torch.int32), "top": torch.full((number % 4, 3), float(number)).half(),
            "pooled": torch.full((5,), number / 8).bfloat16(),
        },
    )
    for number in range(1, 12)
]  # fmt: skip
GROWS = ("ids", "top")


def write(folder: Path, kind: Format, rows: list[ShardRow]) -> ShardWriter:
    writer = ShardWriter(folder, kind, GROWS, {"k": 1}, shard_bytes=130)
    for row in rows[writer.num_done :]:
        writer.add(row)
    return writer


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_run_that_broke_off_leaves_the_same_bytes(kind: Format, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    num_shards = write(whole, kind, ROWS).finish()
    assert num_shards > 2
    writer = write(broken, kind, ROWS[:7])
    assert 0 < writer.num_done <= 7
    (broken / f"part-00002.{kind}.part").write_bytes(b"half")
    assert write(broken, kind, ROWS).finish() == num_shards
    assert contents(broken) == contents(whole)
    again = ShardWriter(broken, kind, GROWS, {"k": 1})
    assert again.num_done == len(ROWS)
    assert again.finish() == num_shards


@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_shard_and_those_after_it_are_made_again(kind: Format, tmp_path: Path, caplog: Any) -> None:
    write(tmp_path, kind, ROWS).finish()
    wanted = contents(tmp_path)
    path = tmp_path / f"part-00001.{kind}"
    path.write_bytes(path.read_bytes()[:40])
    write(tmp_path, kind, ROWS).finish()
    assert "part-00001" in caplog.text
    assert contents(tmp_path) == wanted


def test_parquet_is_what_datasets_loads(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "out" / STATE_NAME).mkdir(parents=True)
    (tmp_path / "out" / STATE_NAME / "job.json").write_text("{}")
    write(tmp_path / "out", "parquet", ROWS).finish()
    found = datasets.load_dataset(
        "parquet", data_dir=str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert found.column_names == ["file", "line", "text", "ids", "top", "pooled"]
    for row, wanted in zip(found, ROWS, strict=True):
        assert (row["file"], row["line"], row["text"]) == (wanted.file, wanted.line, wanted.text)
        for name, tensor in wanted.tensors.items():
            assert row[name] == tensor.float().tolist()
    assert str(found.features["top"].feature.feature.dtype) == "float16"


def test_safetensors_say_where_rows_begin(tmp_path: Path) -> None:
    write(tmp_path, "safetensors", ROWS).finish()
    number = 0
    for path in sorted(tmp_path.iterdir()):
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["slowllm"])
            files, job = about["files"], about["job"]
            assert job == {"k": 1}
            for row in range(len(file.get_tensor("line"))):
                wanted = ROWS[number]
                assert files[int(file.get_tensor("file")[row])] == wanted.file
                assert int(file.get_tensor("line")[row]) == wanted.line
                for name, tensor in wanted.tensors.items():
                    values = file.get_tensor(name)
                    if name in GROWS:
                        start, end = file.get_tensor(f"{name}.offsets")[row : row + 2].tolist()
                        assert torch.equal(values[start:end], tensor)
                    else:
                        assert torch.equal(values[row], tensor)
                number += 1
    assert number == len(ROWS)


def test_a_shard_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    for kind in FORMATS:
        writer = ShardWriter(tmp_path / "gone", kind, GROWS, {}, shard_bytes=1)
        with pytest.raises(InputError, match=rf"part-00000\.{kind}: "):
            writer.add(ROWS[0])


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    check_folder(tmp_path / "new")
    check_folder(tmp_path)
    (tmp_path / "part-00000.parquet").touch()
    with pytest.raises(InputError, match="holds shards of a run that is not known"):
        check_folder(tmp_path)
    (tmp_path / STATE_NAME).mkdir()
    check_folder(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(
        InputError, match=r"holds notes\.txt, which no such run wrote; name a new or an empty"
    ):
        check_folder(tmp_path)
    with pytest.raises(InputError, match="is a file; --out takes a folder"):
        check_folder(tmp_path / "notes.txt")
    with pytest.raises(InputError, match="no: no such folder to make where in"):
        check_folder(tmp_path / "no" / "where")
    with pytest.raises(InputError, match=r"notes\.txt: no such folder to make a in"):
        check_folder(tmp_path / "notes.txt" / "a")


def test_a_folder_that_may_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # whoever runs as root may write anywhere
    with pytest.raises(InputError, match="new: may not be written; name another folder"):
        check_folder(tmp_path / "new")


def test_the_size_of_a_shard_is_bounded() -> None:
    assert shard_files.SHARD_BYTES * shard_files.COPIES < 256 << 20
