"""No verb writes over what it was given: its input, the model, a prompt, templates, a state or an earlier run."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import refused, run
from tests.support.likelihoods import TEMPLATES
from tests.support.paths import ROOT, TINY_BLOOM
from tests.support.processes import Processes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(TINY_BLOOM, tmp_path / "model")
    (tmp_path / "lines.txt").write_text("A value is returned.\n")
    (tmp_path / "data.jsonl").write_text(json.dumps({"question": "is it so", "answer": True}) + "\n")
    (tmp_path / "t.yaml").write_text(TEMPLATES)
    return tmp_path


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["forward", "{}/lines.txt", "--model", "{}/model", "--out", "{}/model/config.json"], "is a file of"),
        (["score", "{}/data.jsonl", "--model", "{}/model", "--out", "{}/model/tokenizer.json"], "is a file of"),
        (["yesno", "{}/lines.txt", "--model", "{}/model", "--out", "{}/model/config.json"], "is a file of"),
        (["generate", "a", "--model", "{}/model", "--out", "{}/model/config.json"], "is a file of"),
        (["forward", "{}/lines.txt", "--state", "{}/state", "--out", "{}/state/results.jsonl"], "lies in the folder of --state"),
        (["eval", "task", "--data", "{}/data.jsonl", "--template-file", "{}/t.yaml", "--out", "{}/t.yaml"], "is the input"),
        (["tune", "{}/data.jsonl", "--model", "{}/model", "--out", "{}/model"], "is the model's own folder"),
    ],
)  # fmt: skip
def test_what_a_verb_was_given_is_not_written_over(
    arguments: list[str], says: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (folder / "state").mkdir()
    before = content(folder)
    assert says in refused([word.format(folder) for word in arguments], monkeypatch, capsys)
    assert content(folder) == before


def test_results_beside_a_model_may_be_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["forward", folder / "lines.txt", "--model", folder / "model", "--dtype", "fp32"]
    for _ in range(2):
        assert run([*arguments, "--out", folder / "model" / "scores.jsonl"], monkeypatch) == 0


def test_tuning_replaces_an_earlier_run_only_on_request(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = folder / "prompt"
    arguments = [
        "tune",
        folder / "lines.txt",
        "--out",
        out,
        "--steps",
        "1",
        "--tokens",
        "2",
        "--dtype",
        "fp32",
    ]
    assert run(arguments, monkeypatch) == 0
    before = content(out)
    capsys.readouterr()
    assert "has log.jsonl of an earlier run" in refused(arguments, monkeypatch, capsys)
    assert content(out) == before
    assert run([*arguments, "--overwrite"], monkeypatch) == 0
    capsys.readouterr()
    log = out / "log.jsonl"
    says = refused(["tune", log, "--out", out, "--steps", "1", "--overwrite"], monkeypatch, capsys)
    assert "lies where the log goes" in says


@pytest.mark.parametrize(
    "arguments", ["--version", "--help", "verify --help", "plan weights/tiny-bloom --dtype fp32"]
)
def test_a_full_disk_behind_stdout_is_one_sentence(arguments: str, processes: Processes) -> None:
    with open("/dev/full", "w") as full:
        ended = processes.run("-m", "slowllm", *arguments.split(), stdout=full.fileno())
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == "slowllm: standard output: No space left on device"
    assert "Traceback" not in ended.stderr


def test_a_closed_stdout_is_one_sentence() -> None:
    done = subprocess.run(
        f"exec {shlex.quote(sys.executable)} -m slowllm --version >&-",
        shell=True, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (2, "slowllm: standard output is closed\n")


def test_an_argument_that_is_not_utf_8_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert "cannot be encoded as UTF-8" in refused(["generate", "a\udcff"], monkeypatch, capsys)


def test_a_reader_that_leaves_at_once_is_no_error() -> None:
    done = subprocess.run(
        f"{shlex.quote(sys.executable)} -m slowllm --help | true; exit ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1), "it may have written all before the reader left"
    assert done.stderr == ""
