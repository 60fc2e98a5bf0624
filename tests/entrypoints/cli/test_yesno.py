"""`slowllm yesno` as a user meets it: the resident model's figures, and one sentence for errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import refused, run
from tests.support.likelihoods import TOLERANCE, likelihood, save, softmax


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["yesno", "{tmp}/a", "--template", "Q: {q}"], "has no {question}"),
        (["yesno", "{tmp}/a", "--yes", " no"], "must be two different words"),
        (["yesno", "{tmp}/long"], "line 2: "),
        (["yesno", "{tmp}/a", "--out", "{tmp}/x/y"], "no such folder to write"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    save(tmp_path / "a", ['{"text": "a b"}'])
    save(tmp_path / "long", ["a", "word " * 3000])
    before = set(tmp_path.iterdir())
    found = refused([one.replace("{tmp}", str(tmp_path)) for one in arguments], monkeypatch, capsys)
    assert any(part in found for part in sentence.split("|"))
    assert set(tmp_path.iterdir()) == before


def test_questions_are_answered(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    questions = ["Is the value returned?", "Does the heap hold {memory}?"]
    file = save(tmp_path / "q.txt", [questions[0], "", questions[1]])
    assert run(["yesno", file, "--dtype", "fp32"], monkeypatch) == 0
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in captured.out.splitlines()]
    assert [row["line"] for row in rows] == [1, 3]
    for row, question in zip(rows, questions, strict=True):
        context = f"Question: {question}\nAnswer:"
        expected = softmax([likelihood(context, " yes"), likelihood(context, " no")])[0]
        assert row["p_yes"] == pytest.approx(expected, abs=TOLERANCE)
        assert row["answer"] == ("yes" if expected > 0.5 else "no")
        assert row["question"] == question
    assert "1 sweep in" in captured.err


def test_words_and_prompt_can_be_others(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    file, out = save(tmp_path / "q.txt", ["the heap"]), tmp_path / "out.jsonl"
    options = ["--yes", "returned", "--no", "the memory on", "--template", r"On {question}\n\nis "]
    assert run(["yesno", file, "--dtype", "fp32", "--out", out, *options], monkeypatch) == 0
    row = json.loads(out.read_text())
    scores = [likelihood("On the heap\n\nis", word) for word in (" returned", " the memory on")]
    assert row["p_yes"] == pytest.approx(softmax(scores)[0], abs=TOLERANCE)


def test_a_terminal_gets_a_table(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    file = save(tmp_path / "q.txt", ["Is it\x07?", "long " * 40])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["yesno", file], monkeypatch) == 0
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split() == ["line", "P(yes)", "answer", "question"]
    assert first.endswith("Is it\N{REPLACEMENT CHARACTER}?")
    assert second.endswith("\N{HORIZONTAL ELLIPSIS}")
    assert len(second) == 80
