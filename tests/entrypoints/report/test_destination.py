"""What is wrong with the file of a report is one sentence and exit code 2, before a model is opened."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest

from slowllm.entrypoints.report.destination import check_report
from slowllm.errors import InputError
from slowllm.runtime import load
from tests.support.command_line import refused
from tests.support.likelihoods import TEMPLATES


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of inputs; whoever opens a model fails."""
    (tmp_path / "lines.html").write_text("A value is returned.\n")
    (tmp_path / "data.jsonl").write_text(json.dumps({"question": "is it so", "answer": True}) + "\n")
    (tmp_path / "t.yaml").write_text(TEMPLATES)
    (tmp_path / "folder.html").mkdir()
    monkeypatch.setattr(load, "open_model", None)
    return tmp_path


@pytest.mark.parametrize(
    ("report", "says"),
    [
        ("none/r.html", "no such folder to write r.html to"),
        ("folder.html", "is a folder; name a file with --report"),
        ("lines.html", "is the input; name another file with --report"),
        ("out.html", "is the file of --out; name another file with --report"),
        ("report.txt", "give its file a name that ends in .html"),
        ("-", "give its file a name that ends in .html"),
        ("/proc/r.html", "name another folder with --report"),
        ("/dev/null/r.html", "no such folder to write r.html to"),
        ("x" * 300 + ".html", "File name too long"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused(
    folder: Path, report: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    arguments = ["forward", folder / "lines.html", "--out", folder / "out.html", "--report", folder / report]
    assert says in refused(arguments, monkeypatch, capsys)


VERBS: dict[str, list[str]] = {
    "forward": ["forward", "{}/lines.html"],
    "generate": ["generate", "a"],
    "eval boolq": ["eval", "boolq", "--data", "{}/data.jsonl"],
    "eval task": ["eval", "task", "--data", "{}/data.jsonl", "--template-file", "{}/t.yaml"],
    "eval lm": ["eval", "lm", "--tasks", "boolq", "--model_args", "pretrained=x"],
    "tune": ["tune", "{}/lines.html", "--out", "{}/prompt"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_refuses_at_once(
    verb: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    arguments = [word.format(folder) for word in VERBS[verb]]
    no_folder = [*arguments, "--report", folder / "none" / "r.html"]
    assert "no such folder" in refused(no_folder, monkeypatch, capsys)
    find = importlib.util.find_spec
    with monkeypatch.context() as without:
        without.setattr(
            importlib.util,
            "find_spec",
            lambda name, *more: None if name == "matplotlib" else find(name, *more),
        )
        said = refused([*arguments, "--report", folder / "r.html"], monkeypatch, capsys)
    assert "--report needs matplotlib, which is not installed: pip install 'slowllm[report]'" in said
    if verb != "eval lm":
        said = refused([*arguments, "--report", folder / "r.html", "--dry-run"], monkeypatch, capsys)
        assert "--dry-run does nothing that --report could show" in said
    assert not (folder / "r.html").exists()


def test_the_files_of_inputs_and_results_are_found_behind_links(tmp_path: Path) -> None:
    (tmp_path / "in.html").write_text("a")
    (tmp_path / "link.html").symlink_to(tmp_path / "in.html")
    (tmp_path / "hard.html").hardlink_to(tmp_path / "in.html")
    (tmp_path / "circle.html").symlink_to(tmp_path / "circle.html")
    for name in ("link.html", "hard.html"):
        with pytest.raises(InputError, match="is the input"):
            check_report(tmp_path / name, None, tmp_path / "in.html")
    with pytest.raises(InputError, match=r"circle\.html: .*(loop|circle|symbolic)"):
        check_report(tmp_path / "circle.html", None)
    (tmp_path / "r.html.part").mkdir()
    with pytest.raises(InputError, match="is a folder; name a file"):
        check_report(tmp_path / "r.html", None)


def test_what_is_no_file_is_left_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.html")
    with pytest.raises(InputError, match="is no ordinary file; name another one with --report"):
        check_report(tmp_path / "pipe.html", None)


def test_an_earlier_report_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "r.html").write_text("an earlier one")
    assert check_report(tmp_path / "r.html", "-", "-", None) == tmp_path.resolve() / "r.html"
    assert check_report(None, None) is None
    assert sorted(tmp_path.iterdir()) == [tmp_path / "r.html"]
