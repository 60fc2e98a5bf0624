"""Every verb writes one page with what it has: figures, plots, and the first results."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="reports are made with matplotlib")

from slowllm.entrypoints.report import recorder
from slowllm.entrypoints.report.recorder import reporting
from slowllm.entrypoints.report.results import LineScored
from slowllm.errors import InputError, RideError
from slowllm.inference import lines as lines_module
from slowllm.inference.likelihood import Likelihood
from tests.support.command_line import run
from tests.support.reports import read_report

NASTY = "The value </svg><script>alert(1)</script> is $x$."
TIMES = ["Timeline of stops", "Seconds of each stop"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    texts = [f"The value {number} is returned." for number in range(6)]
    (tmp_path / "lines.txt").write_text("\n".join([NASTY, *texts]) + "\n")
    questions = [
        {"question": f"is value {number} returned", "passage": NASTY, "answer": number % 2 == 0}
        for number in range(4)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, questions)) + "\n")
    return tmp_path


def test_forward_shows_surprisal_lines_and_times(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    arguments = [
        "forward",
        folder / "lines.txt",
        "--stream-all",
        "--dtype",
        "fp32",
        "--out",
        folder / "o.jsonl",
    ]
    assert run([*arguments, "--report", folder / "r.html"], monkeypatch) == 0
    page = read_report(folder / "r.html")
    assert page.headings == [
        "slowllm forward", "Figures", "Surprisal of tokens", "Lines", "Where the time went", "Program",
    ]  # fmt: skip
    assert page.labels == ["Surprisal of tokens", "Mean NLL of lines", *TIMES]
    assert NASTY in page.text
    assert f"--report {folder / 'r.html'}" in page.text
    assert re.search(r"read from disk\s*7\.\d+ MB", page.text)
    assert re.search(r"resident\s*0 of 11 stops", page.text)
    rows = [json.loads(row) for row in (folder / "o.jsonl").read_text().splitlines()]
    assert f"{rows[0]['mean_nll']:,.4f}" in page.text
    assert f"{sum(row['num_tokens'] for row in rows):,}" in page.text
    assert {file.name for file in folder.iterdir()} == {"lines.txt", "data.jsonl", "o.jsonl", "r.html"}


def test_eval_shows_accuracy_and_calibration(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (folder / "t.yaml").write_text(TEMPLATE)
    arguments = ["eval", "task", "--data", folder / "data.jsonl", "--template-file", folder / "t.yaml"]
    assert run([*arguments, "--dtype", "fp32", "--report", folder / "r.html"], monkeypatch) == 0
    found = json.loads(capsys.readouterr().out)["all"]
    page = read_report(folder / "r.html")
    assert page.labels == ["Accuracy of templates", "Reliability of answers", *TIMES]
    assert f"{found['accuracy']:.4f}" in page.text
    assert "expected calibration error" in page.text
    assert "</svg><script>" in page.text  # the template's name, in the plot and in tables
    assert "The model lies in memory maps" in page.text


TEMPLATE = """
templates:
  one: !Template
    name: "</svg><script>$\\\\frac{"
    jinja: "{{passage}} {{question}}? |||{% if answer %}yes{% else %}no{% endif %}"
    answer_choices: "no ||| yes"
"""


def test_generate_shows_continuations_and_tokens_of_sweeps(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    arguments = [
        "generate",
        NASTY,
        "The value",
        "--max-new-tokens",
        3,
        "--json",
        "--report",
        folder / "r.html",
    ]
    assert run(arguments, monkeypatch) == 0
    rows = [json.loads(row) for row in capsys.readouterr().out.splitlines()]
    page = read_report(folder / "r.html")
    assert page.labels == [*TIMES, "Seconds of each sweep", "New tokens of each sweep"]
    for row in rows:
        assert row["continuations"][0]["text"] in page.text
    num_tokens = sum(row["continuations"][0]["num_tokens"] for row in rows)
    assert re.search(rf"new tokens\s*{num_tokens}\s", page.text)


def test_tune_shows_losses_and_learning_rates(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pytest.importorskip("peft", reason="a prompt is written in PEFT's format")
    arguments = [
        "tune", folder / "lines.txt", "--validation", folder / "lines.txt", "--out", folder / "prompt", "--steps", 2,
        "--tokens", 2, "--kind", "deep", "--top", 2, "--dtype", "fp32", "--json", "--report", folder / "r.html",
    ]  # fmt: skip
    assert run(arguments, monkeypatch) == 0
    records = [json.loads(row) for row in capsys.readouterr().out.splitlines()]
    page = read_report(folder / "r.html")
    assert page.labels[:2] == ["Losses", "Learning rate"]
    assert len([name for name in page.headings if name.startswith("Figures: ")]) == 2
    for record in records:
        shown = record.get("loss", record.get("validation_loss"))
        assert f"{shown:,.4f}" in page.text


def test_results_of_an_earlier_process_are_in_the_tables(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    arguments = ["forward", folder / "lines.txt", "--state", folder / "state", "--dtype", "fp32", "--json"]
    assert run(arguments, monkeypatch) == 0
    assert run([*arguments, "--report", folder / "r.html"], monkeypatch) == 0
    page = read_report(folder / "r.html")
    assert "their results are in the tables, not in the times" in page.text
    assert "No stop was visited in this process." in page.text
    assert "The value 5 is returned." in page.text
    assert page.labels == ["Surprisal of tokens", "Mean NLL of lines"]


def test_an_interrupted_run_is_reported_with_what_there_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    scored = lines_module.score_lines

    def interrupted(*arguments: Any, **options: Any) -> Iterator[Any]:
        results = scored(*arguments, **options)
        yield next(results)
        raise KeyboardInterrupt

    monkeypatch.setattr(lines_module, "score_lines", interrupted)
    arguments = ["forward", folder / "lines.txt", "--json", "--report", folder / "r.html"]
    assert run(arguments, monkeypatch) == 130
    page = read_report(folder / "r.html")
    assert "This run was interrupted. The report has what was there by then." in page.text
    assert NASTY in page.text
    assert "The value 0" not in page.text
    assert "Timeline of stops" in page.labels


def line(number: int) -> LineScored:
    return LineScored(str(number), "text", (), Likelihood((), (), is_greedy=False))


def one_line_and(file: Path, error: BaseException | None) -> None:
    with reporting(file, "t") as told:
        told.add(line(1))
        if error is not None:
            raise error


def test_an_error_is_reported_and_raised(tmp_path: Path) -> None:
    with pytest.raises(RideError, match="the disk is gone"):
        one_line_and(tmp_path / "r.html", RideError("the disk is gone\nsince noon"))
    assert "ended with an error: the disk is gone." in read_report(tmp_path / "r.html").text


def test_a_report_that_cannot_be_written_hides_no_error(tmp_path: Path, capsys: Any) -> None:
    gone = tmp_path / "none" / "r.html"
    with pytest.raises(InputError, match="No such file or directory"):
        one_line_and(gone, None)
    with pytest.raises(KeyboardInterrupt):
        one_line_and(gone, KeyboardInterrupt())
    assert "slowllm: there is no report: " in capsys.readouterr().err


def test_nothing_is_written_where_nothing_was_computed(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(InputError, match="wrong"), reporting(tmp_path / "r.html", "t"):
        raise InputError("wrong")
    with reporting(tmp_path / "r.html", "t"):
        pass
    assert "nothing was computed, so there is no report" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_a_file_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "chapter_for", None)
    with reporting(None, "t") as told:
        told.add(line(1))
    assert not told
    assert not told.has_begun


@pytest.mark.long
def test_a_client_of_a_swarm_reports_its_requests(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pytest.importorskip("hivemind", reason="a swarm needs hivemind")
    from tests.support.served import save_model
    from tests.support.serving import serving

    model = save_model(tmp_path_factory.mktemp("model"))
    with serving(model, "0:6") as server:
        arguments = [
            "forward", "--model", model, "--ram", "3GiB", "--text", "The value", "--text", "a value", "--json",
            "--swarm", server.network.addresses[0], "--report", folder / "r.html",
        ]  # fmt: skip
        assert run(arguments, monkeypatch) == 0, capsys.readouterr().err
    page = read_report(folder / "r.html")
    assert re.search(r"requests\s*\d+ requests? to 1 server", page.text)
    assert "The blocks were computed by servers of the swarm" in page.text
    assert "planned time" not in page.text
    assert page.labels == ["Surprisal of tokens", "Mean NLL of lines", *TIMES]
