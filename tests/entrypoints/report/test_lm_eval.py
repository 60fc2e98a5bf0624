"""What is read of the files of lm-eval's results."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-eval computes the figures")
pytest.importorskip("matplotlib", reason="reports are made with matplotlib")

import yaml
from lm_eval.tasks import TaskManager

from slowllm.entrypoints.lm_eval_run import figures_of, may_write_results
from slowllm.entrypoints.report.results import TaskMeasured
from tests.support.command_line import run
from tests.support.paths import TINY_BLOOM
from tests.support.reports import read_report


def test_figures_come_with_their_errors_and_filters() -> None:
    metrics = {
        "alias": "boolq", "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,strict": 1, "f1_stderr,strict": "N/A",
        "sample_len": 20, "flag,none": True,
    }  # fmt: skip
    assert list(figures_of({"results": {"boolq": metrics}})) == [
        TaskMeasured("boolq", "acc", 0.5, 0.1), TaskMeasured("boolq", "f1 (strict)", 1.0, None),
    ]  # fmt: skip
    assert list(figures_of([1])) == list(figures_of({"a": 1})) == []


def test_lm_eval_is_not_kept_from_refusing_or_from_its_own_folder() -> None:
    assert may_write_results(["run", "--tasks", "boolq", "--model", "slowllm"])
    assert not may_write_results(["ls", "tasks"])
    assert not may_write_results(["run", "--model", "slowllm", "--config", "mine.yaml"])
    assert not may_write_results(["run", "--model", "slowllm", "--log_samples"])


@pytest.mark.parametrize("names_output", [True, False])
def test_tasks_are_reported(
    names_output: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": "The value", "label": number % 2}) + "\n" for number in range(3))
    )
    task = {
        "task": "mine", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "doc_to_text": "{{text}}", "doc_to_target": "label", "doc_to_choice": ["is", "was"],
        "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(task))
    output = ["--output_path", tmp_path / "out"] if names_output else []
    arguments = [
        "eval", "lm", "--report", tmp_path / "r.html", "--tasks", tmp_path / "mine.yaml", "--model_args",
        f"pretrained={TINY_BLOOM},dtype=fp32", *output,
    ]  # fmt: skip
    assert run(arguments, monkeypatch) == 0, capsys.readouterr().err
    page = read_report(tmp_path / "r.html")
    assert "Figures: log-likelihoods" in page.headings
    assert "Tasks of lm-eval" in page.labels
    assert "mine: acc" in page.text
    assert (tmp_path / "out").exists() == names_output
