"""`slowllm teach`: what students get is what the resident model says, whole after kills, and refusals are one sentence."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.command_line import refused, run
from tests.support.families import resident
from tests.support.paths import ROOT, TINY_BLOOM
from tests.support.processes import Processes

TOP = 7
# Rows of a micro-batch are summed in another order than a row alone.
TOLERANCE = 2e-4

parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    file = tmp_path / "t.txt"
    file.write_text("The compiler checks every reference.\n\n  A value is returned.  \nYes\n")
    return file


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("part-*"))}


def test_rows_say_what_the_resident_model_says(
    texts: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    out = tmp_path / "out"
    assert run(["teach", texts, "--out", out, "--top", TOP, "--dtype", "fp32"], monkeypatch) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "3 texts in 1 shard" in captured.err
    rows = parquet.read_table(out / "part-00000.parquet").to_pylist()
    assert [(row["file"], row["line"], row["text"]) for row in rows] == [
        (str(texts), 1, "The compiler checks every reference."), (str(texts), 3, "A value is returned."),
        (str(texts), 4, "Yes"),
    ]  # fmt: skip
    plain = resident(TINY_BLOOM)
    for row in rows:
        ids = torch.tensor(row["input_ids"])
        assert ids[0] == 1
        with torch.no_grad():
            wanted = plain(ids[None]).logits[0, :-1].log_softmax(-1)
        own = torch.tensor(row["log_probs"])
        assert (own - wanted.gather(-1, ids[1:, None])[:, 0]).abs().max() <= TOLERANCE
        top, found = torch.tensor(row["top_log_probs"]), torch.tensor(row["top_ids"])
        assert found.shape == top.shape == (len(ids) - 1, TOP)
        assert (top - wanted.topk(TOP).values).abs().max() <= 0.01  # float16
        assert (wanted.gather(-1, found) - wanted.topk(TOP).values).abs().max() <= TOLERANCE


def test_log_probs_are_those_of_forward(texts: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    assert run(["forward", texts, "--json", "--dtype", "fp32"], monkeypatch) == 0
    wanted = [json.loads(line)["log_likelihood"] for line in capsys.readouterr().out.splitlines()]
    out = tmp_path / "out"
    options = ["--out", out, "--top", 1, "--dtype", "fp32", "--format", "safetensors"]
    assert run(["teach", texts, *options], monkeypatch) == 0
    tensors = load_file(out / "part-00000.safetensors")
    offsets = tensors["log_probs.offsets"].tolist()
    found = [float(tensors["log_probs"][a:b].double().sum()) for a, b in itertools.pairwise(offsets)]
    assert found == pytest.approx(wanted, abs=TOLERANCE)
    assert tensors["top_ids"].dtype == tensors["input_ids"].dtype == torch.int32
    assert tensors["top_log_probs"].dtype == torch.float16


def test_a_finished_folder_is_left_as_it_is(
    texts: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    command = ["teach", texts, "--out", tmp_path / "out", "--top", 3]
    assert run(command, monkeypatch) == 0
    before = contents(tmp_path / "out")
    assert run(command, monkeypatch) == 0
    assert "3 texts are in" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before
    assert "is the state of another job (top was 3 and is 4)" in refused(
        [*command[:-1], 4], monkeypatch, capsys
    )
    texts.write_text("other\n")
    assert "is the state of another job (other texts)" in refused(command, monkeypatch, capsys)


def test_a_dry_run_writes_nothing(texts: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    assert run(["teach", texts, "--out", tmp_path / "out", "--dry-run", "--json"], monkeypatch) == 0
    assert json.loads(capsys.readouterr().out)["num_sweeps"]
    assert not (tmp_path / "out").exists()


BAD: dict[str, tuple[list[Any], str]] = {
    "no folder": (["{texts}"], "give the folder to write to with --out DIR"),
    "none of the likeliest": (["{texts}", "--out", "{tmp}/o", "--top", "0"], "--top 0 is no number of likeliest tokens"),
    "fewer": (["{texts}", "--out", "{tmp}/o", "--top", "-3"], "--top -3 is no number of likeliest tokens"),
    "beyond": (["{texts}", "--out", "{tmp}/o", "--top", "999999"], "--top 999999 is no number of likeliest tokens"),
    "format": (["{texts}", "--out", "{tmp}/o", "--format", "csv"], "--format 'csv' is unknown"),
    "a file": (["{texts}", "--out", "{texts}"], "is a file; --out takes a folder"),
    "nowhere": (["{texts}", "--out", "{tmp}/a/b"], "no such folder to make b in"),
    "not empty": (["{texts}", "--out", "{tmp}"], "which no such run wrote; name a new or an empty folder"),
    "no Parquet": (["{tmp}/no.parquet", "--out", "{tmp}/o"], "is no Parquet file that can be read"),
    "too long": (["{texts}", "--out", "{tmp}/o", "--max-tokens", "2"], "t.txt: line 1 has 6 tokens but the limit is 2"),
    "limit": (["{texts}", "--out", "{tmp}/o", "--max-tokens", "99999"], "is more than the"),
    "budget": (["{texts}", "--out", "{tmp}/o", "--ram", "50MiB"], "the smallest that would do is"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(
    case: str, texts: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    (tmp_path / "no.parquet").write_bytes(b"PAR1 no")
    options, sentence = BAD[case]
    arguments = [option.format(texts=texts, tmp=tmp_path) for option in options]
    assert sentence in refused(["teach", *arguments], monkeypatch, capsys)
    assert not (tmp_path / "o").exists()


def test_a_folder_of_another_verb_is_refused(
    texts: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    state = tmp_path / "out" / ".state"
    state.mkdir(parents=True)
    (state / "job.json").write_text('{"kind": "hidden"}')
    message = refused(["teach", texts, "--out", tmp_path / "out"], monkeypatch, capsys)
    assert "is the state of another job (slowllm hidden, not teach)" in message


def test_a_folder_that_cannot_be_made_is_refused(texts: Path, monkeypatch: Any, capsys: Any) -> None:
    assert "/proc/taught: No such file or directory" in refused(
        ["teach", texts, "--out", "/proc/taught"], monkeypatch, capsys
    )


def test_nan_is_one_sentence(texts: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    model = tmp_path / "model"
    shutil.copytree(TINY_BLOOM, model)
    for shard in model.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in tensors:
            if name.endswith("h.2.mlp.dense_h_to_4h.weight"):
                tensors[name][0, 0] = float("nan")
        save_file(tensors, shard, {"format": "pt"})
    message = refused(["teach", texts, "--model", model, "--out", tmp_path / "out"], monkeypatch, capsys)
    assert "NaN in the output" in message


@pytest.mark.long
@pytest.mark.parametrize("moment", ["stops", "writes"])
@pytest.mark.parametrize("kind", ["parquet", "safetensors"])
def test_kills_leave_the_same_bytes(moment: str, kind: str, tmp_path: Path, processes: Processes) -> None:
    command = ["teach", str(ROOT / "sentences.txt"), "--dtype", "fp32", "--top", "5", "--format", kind]
    for name, num_kills in (("whole", 0), ("killed", 12)):
        done = processes.run(
            "-m", "tests.support.killed", moment, str(num_kills), "3", *command, "--out", str(tmp_path / name)
        )
        assert done.returncode == 0, done.stderr
        codes = json.loads(done.stdout.splitlines()[-1])["codes"]
        assert codes[-1] == 0
        assert len(codes) > num_kills / 3
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
