"""`slowllm score` as a user meets it: the resident model's figures, and one sentence for errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import slowllm
from tests.support.command_line import refused, run
from tests.support.likelihoods import TOLERANCE, likelihood, printed, save, softmax
from tests.support.paths import TINY_BLOOM


def test_every_kind_of_line_is_scored_as_by_transformers(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    words = [" returned", " the heap", " memory"]
    file = save(tmp_path / "in.jsonl", [
        {"id": "a", "context": "The value is", "choices": words},
        "",
        {"text": "The compiler checks every reference.", "more": [1, {"x": None}]},
        {"context": "The value", "continuation": " is returned.", "line": "mine"},
        {"context": "", "choices": ["The", "A value"]},
    ])  # fmt: skip
    assert run(["score", file, "--dtype", "fp32", "--per-token"], monkeypatch) == 0
    chosen, text, pair, empty = printed(capsys)
    scores = [likelihood("The value is", word) for word in words]
    assert chosen["scores"] == pytest.approx(scores, abs=TOLERANCE)
    assert chosen["probabilities"] == pytest.approx(softmax(scores), abs=TOLERANCE)
    assert chosen["best_choice"] == words[chosen["best"]] == words[scores.index(max(scores))]
    assert (chosen["id"], chosen["line"], chosen["context"]) == ("a", 1, "The value is")
    assert "".join(token["token"] for token in chosen["tokens"][1]) == " the heap"
    assert text["log_likelihood"] == pytest.approx(likelihood("", text["text"]), abs=TOLERANCE)
    assert text["more"] == [1, {"x": None}]
    assert text["perplexity"] == pytest.approx(
        2.718281828459045 ** (-text["log_likelihood"] / text["num_tokens"]), rel=1e-9
    )
    assert sum(token["log_prob"] for token in text["tokens"]) == pytest.approx(text["log_likelihood"])
    assert pair["log_likelihood"] == pytest.approx(likelihood("The value", " is returned."), abs=TOLERANCE)
    assert (pair["line"], pair["is_greedy"], pair["num_tokens"]) == (4, False, 3)
    assert empty["scores"] == pytest.approx([likelihood("", "The"), likelihood("", "A value")], abs=TOLERANCE)


@pytest.mark.parametrize("normalize", ["tokens", "characters", "unconditional"])
def test_choices_are_normalised(normalize: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    words = [" returned", " the memory on the heap"]
    file = save(tmp_path / "in.jsonl", [{"context": "The value is", "choices": words}])
    assert run(["score", file, "--dtype", "fp32", "--normalize", normalize, "--per-token"], monkeypatch) == 0
    (found,) = printed(capsys)
    assert len(found["tokens"]) == 2
    with slowllm.load(TINY_BLOOM, dtype="fp32") as lm:
        assert found["probabilities"] == pytest.approx(lm.choose("The value is", words, normalize), abs=1e-6)
    scores = [likelihood("The value is", word) for word in words]
    if normalize == "characters":
        scores = [score / len(word.strip()) for score, word in zip(scores, words, strict=True)]
        assert found["scores"] == pytest.approx(scores, abs=TOLERANCE)
    if normalize == "unconditional":
        scores = [score - likelihood("", word) for score, word in zip(scores, words, strict=True)]
        assert found["scores"] == pytest.approx(scores, abs=TOLERANCE)


BAD_LINES = {
    "{bad": "is not JSON",
    '{"text": NaN}': "is not JSON",
    '{"text": "\\ud800"}': "half of a surrogate pair",
    '["text"]': "is JSON, but no object",
    "{}": "needs context and choices",
    '{"context": "x", "choices": []}': "one string or more",
    '{"context": "x", "choices": [""]}': "none empty",
    '{"context": "x", "choices": "ab"}': "choices a list of strings",
    '{"context": null, "choices": ["a"]}': "context must be a string",
    '{"text": 3}': "must be strings",
    '{"text": ""}': "the tokenizer makes no tokens of it",
    '{"text": "a", "choices": ["b"]}': "has text beside choices",
    '{"context": "x", "choices": ["a"], "continuation": "b"}': "has continuation beside context and choices",
    '{"text": "a", "context": "b"}': "has context beside text",
    json.dumps({"text": "word " * 3000}): "more than the 2048 that this model takes",
    json.dumps({"context": "word " * 3000, "choices": [" a"]}): "more than the 2048 that this model takes",
}


def test_bad_lines_are_named_and_the_others_done(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    good = {"context": "The value is", "choices": [" returned", " heap"]}
    lines = [good, *BAD_LINES, good]
    file, out = save(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    with open(file, "ab") as more:
        more.write(b'{"text": "\xff"}\n')
    assert run(["score", file, "--out", out], monkeypatch) == 1
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["line"] for row in rows] == list(range(1, len(lines) + 2))
    for row, match in zip(rows[1:-2], BAD_LINES.values(), strict=True):
        assert row.keys() == {"line", "error"}
        assert match in row["error"]
    assert rows[0]["probabilities"] == pytest.approx(rows[-2]["probabilities"])
    assert "UTF-8" in rows[-1]["error"] or "utf-8" in rows[-1]["error"]
    assert f"scored 2 of {len(BAD_LINES) + 3} lines" in captured.err
    assert f"{file}: line 2: is not JSON" in captured.err
    assert captured.out == ""


def test_a_file_of_bad_lines_opens_no_weights(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    file = save(tmp_path / "in.jsonl", ["{"])
    assert run(["score", file], monkeypatch) == 1
    captured = capsys.readouterr()
    assert "is not JSON" in json.loads(captured.out)["error"]
    assert "sweep" not in captured.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["score", "{tmp}/none.jsonl"], "No such file or directory"),
        (["score", "{tmp}/empty"], "has no non-empty line"),
        (["score", "{tmp}/a", "--normalize", "words"], "--normalize 'words' is unknown; use one of none, tokens"),
        (["score", "{tmp}/a", "--out", "{tmp}/a"], "is the input"),
        (["score", "{tmp}/a", "--ram", "much"], "is not a size"),
        (["score", "{tmp}/a", "--model", "./nowhere"], "no such folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    save(tmp_path / "a", ['{"text": "a b"}'])
    save(tmp_path / "empty", ["", " "])
    before = set(tmp_path.iterdir())
    found = refused([one.replace("{tmp}", str(tmp_path)) for one in arguments], monkeypatch, capsys)
    assert any(part in found for part in sentence.split("|"))
    assert set(tmp_path.iterdir()) == before
