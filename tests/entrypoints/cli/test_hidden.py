"""`slowllm hidden`: rows hold what transformers returns, and refusals are one sentence."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.command_line import refused, run
from tests.support.families import resident
from tests.support.paths import TINY_BLOOM

parquet = pytest.importorskip("pyarrow.parquet")
# Rows of a micro-batch are summed in another order than a row alone.
TOLERANCE = 1e-4


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    file = tmp_path / "t.txt"
    file.write_text("The compiler checks every reference.\nA value is returned.\n")
    return file


@functools.cache
def plain() -> Any:
    return resident(TINY_BLOOM)


def states_of(ids: list[int], block: int) -> torch.Tensor:
    with torch.no_grad():
        found = plain()(torch.tensor([ids]), output_hidden_states=True).hidden_states[block + 1][0]
    assert isinstance(found, torch.Tensor)
    return found


def test_rows_hold_what_transformers_returns(texts: Path, tmp_path: Path, monkeypatch: Any) -> None:
    common = ["hidden", texts, "--blocks", "2,0", "--dtype", "fp32"]
    assert run([*common, "--out", tmp_path / "last"], monkeypatch) == 0
    rows = parquet.read_table(tmp_path / "last" / "part-00000.parquet").to_pylist()
    assert [row["line"] for row in rows] == [1, 2]
    for row in rows:
        for block in (0, 2):
            wanted = states_of(row["input_ids"], block)[-1]
            assert (torch.tensor(row[f"hidden_{block}"]) - wanted).abs().max() <= TOLERANCE
    assert run([*common, "--pool", "mean", "--no-prefix", "--out", tmp_path / "mean"], monkeypatch) == 0
    rows = parquet.read_table(tmp_path / "mean" / "part-00000.parquet").to_pylist()
    wanted = states_of(rows[1]["input_ids"], 2).mean(0)
    assert (torch.tensor(rows[1]["hidden_2"]) - wanted).abs().max() <= TOLERANCE
    options = ["--pool", "all", "--format", "safetensors", "--out", tmp_path / "all"]
    assert run([*common, *options], monkeypatch) == 0
    tensors = load_file(tmp_path / "all" / "part-00000.safetensors")
    start, end = tensors["hidden_0.offsets"][1:].tolist()
    ids = tensors["input_ids"][start:end].tolist()
    assert (tensors["hidden_0"][start:end] - states_of(ids, 0)).abs().max() <= TOLERANCE


@pytest.mark.long
def test_a_dry_run_and_a_resumed_run(texts: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    command = ["hidden", texts, "--blocks", "0", "--out", tmp_path / "out"]
    assert run([*command, "--dry-run"], monkeypatch) == 0
    assert not (tmp_path / "out").exists()
    assert run(command, monkeypatch) == 0
    assert run(command, monkeypatch) == 0
    assert "2 texts are in" in capsys.readouterr().err
    message = refused(["hidden", texts, "--blocks", "1", "--out", tmp_path / "out"], monkeypatch, capsys)
    assert "is the state of another job (blocks was 0 and is 1)" in message


BAD = {
    "no blocks": (["--out", "{tmp}/o"], "name the blocks with --blocks, such as 10,20"),
    "beyond": (["--out", "{tmp}/o", "--blocks", "3,99"], "there is no block 99; they are numbered from 0 to"),
    "no numbers": (["--out", "{tmp}/o", "--blocks", "last"], "is no list of numbers, such as 10,20"),
    "pool": (["--out", "{tmp}/o", "--blocks", "0", "--pool", "max"], "--pool 'max' is unknown"),
    "no folder": (["--blocks", "0"], "give the folder to write to with --out DIR"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(
    case: str, texts: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    options, sentence = BAD[case]
    arguments = [option.format(tmp=tmp_path) for option in options]
    assert sentence in refused(["hidden", texts, *arguments], monkeypatch, capsys)
    assert not (tmp_path / "o").exists()
