"""`score`, `yesno` and `eval` as a user meets them: real files, the resident model's figures, one sentence for errors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import slowllm
from slowllm.entrypoints.cli import evaluate
from slowllm.inference import choices, eval_tasks
from tests.support.command_line import refused, run
from tests.support.families import resident
from tests.support.paths import ROOT, TINY_BLOOM

# In fp32 a product of another shape sums in another order; these log-likelihoods are tens of nats.
TOLERANCE = 1e-4
BOOLQ = [
    {"question": "is the value returned", "passage": "The value is returned.", "answer": True, "title": "t"},
    {"question": "is the heap cold", "passage": "The heap holds memory on the right.", "answer": False, "title": "t"},
    {"question": "does the compiler check", "passage": "The compiler checks every reference.", "answer": True, "title": "t"},
]  # fmt: skip
TEMPLATES = """\
dataset: mine
templates:
  a: !Template
    answer_choices: no ||| yes
    id: a
    jinja: "{{ passage }} {{ question }}? ||| {{ answer_choices[label] }}"
    metadata: !TemplateMetadata {original_task: true, choices_in_prompt: null, metrics: [Accuracy], languages: [en]}
    name: plain
    reference: ''
  b: !Template
    answer_choices: not at all ||| yes
    id: b
    jinja: "{{ question }}? ||| {% if answer %}yes{% else %}not at all{% endif %}"
    metadata: !TemplateMetadata {}
    name: longer
    reference: ''
"""


def save(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def printed(capsys: Any) -> list[Any]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def likelihood(context: str, continuation: str) -> float:
    """What plain transformers says, the first token after BOS."""
    tokenizer, model = _plain()
    before = tokenizer(context)["input_ids"] or [1]
    whole = (before if not context else []) + tokenizer(context + continuation)["input_ids"]
    logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(float(logits[place - 1, whole[place]]) for place in range(len(before), len(whole)))


def _plain(made: list[Any] = []) -> Any:  # noqa: B006 (made once)
    if not made:
        import transformers

        made.extend([transformers.AutoTokenizer.from_pretrained(TINY_BLOOM), resident(TINY_BLOOM)])
    return made


def softmax(scores: list[float]) -> list[float]:
    return torch.tensor(scores, dtype=torch.float64).softmax(0).tolist()


# score


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
        scores = [score / len(word) for score, word in zip(scores, words, strict=True)]
        assert found["scores"] == pytest.approx(scores, abs=TOLERANCE)
    if normalize == "unconditional":
        scores = [score - likelihood("", word) for score, word in zip(scores, words, strict=True)]
        assert found["scores"] == pytest.approx(scores, abs=TOLERANCE)


BAD_LINES = {
    "{bad": "is not JSON",
    '{"text": NaN}': "is not JSON",
    '{"text": "\\ud800"}': "is not JSON",
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
        (["yesno", "{tmp}/a", "--template", "Q: {q}"], "has no {question}"),
        (["yesno", "{tmp}/a", "--yes", " no"], "must be two different words"),
        (["yesno", "{tmp}/long"], "line 2: "),
        (["yesno", "{tmp}/a", "--out", "{tmp}/x/y"], "no such folder to write"),
        (["eval", "boolq", "--data", "{tmp}/none.jsonl"], "no such file or folder"),
        (["eval", "boolq", "--data", "nobody/nothing"], "not in the cache of datasets"),
        (["eval", "boolq", "--data", "{tmp}/boolq.jsonl", "--templates", "x"], "no template is called 'x'; there are"),
        (["eval", "boolq", "--data", "{tmp}/boolq.jsonl", "--template-file", "{tmp}/a"], "is no templates file|has no templates"),
        (["eval", "boolq", "--data", "{tmp}/boolq.jsonl", "--split", "test"], "a file has no splits"),
        (["eval", "boolq", "--data", "{tmp}/other.jsonl"], "has no column 'question', only a"),
        (["eval", "boolq", "--data", "{tmp}/bad.jsonl"], "example 1: label is 2"),
        (["eval", "boolq", "--data", "{tmp}/boolq.jsonl", "--out", "{tmp}/boolq.jsonl"], "is the input"),
        (["eval", "boolq", "--data", "{tmp}/boolq.jsonl", "--normalize", "x"], "--normalize 'x' is unknown"),
        (["eval", "task", "--data", "{tmp}/other.jsonl", "--template-file", "{tmp}/t.yaml"], "does not render ('passage' is undefined)"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    save(tmp_path / "a", ['{"text": "a b"}'])
    save(tmp_path / "empty", ["", " "])
    save(tmp_path / "long", ["a", "word " * 3000])
    save(tmp_path / "boolq.jsonl", BOOLQ)
    save(tmp_path / "other.jsonl", [{"a": 1}])
    save(tmp_path / "bad.jsonl", [{"question": "q", "passage": "p", "label": 2}])
    (tmp_path / "t.yaml").write_text(TEMPLATES)
    before = set(tmp_path.iterdir())
    found = refused([one.replace("{tmp}", str(tmp_path)) for one in arguments], monkeypatch, capsys)
    assert any(part in found for part in sentence.split("|"))
    assert set(tmp_path.iterdir()) == before


# yesno


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


# eval


def test_boolq_is_evaluated_in_one_sweep(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    data, out = save(tmp_path / "dev.jsonl", BOOLQ), tmp_path / "predictions.jsonl"
    file = tmp_path / "templates.yaml"
    file.write_text(TEMPLATES)
    monkeypatch.setattr(evaluate, "REPORT_SECONDS", 0.0)
    options = ["--template-file", file, "--out", out, "--dtype", "fp32"]
    assert run(["eval", "boolq", "--data", data, *options], monkeypatch) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    predictions = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["example"], row["template"]) for row in predictions] == [
        (example, name) for example in (1, 2, 3) for name in ("plain", "longer")
    ]
    right = {"plain": 0, "longer": 0}
    for row in predictions:
        example = BOOLQ[row["example"] - 1]
        question = f"{example['question']}?"
        context = f"{example['passage']} {question}" if row["template"] == "plain" else question
        scores = [likelihood(context, f" {choice}") for choice in row["choices"]]
        assert row["probabilities"] == pytest.approx(softmax(scores), abs=TOLERANCE)
        best = row["choices"][scores.index(max(scores))]
        gold = "yes" if example["answer"] else row["choices"][0]
        assert (row["prediction"], row["gold"], row["correct"]) == (best, gold, best == gold)
        right[row["template"]] += best == gold
    for row in document["templates"]:
        assert row["num_correct"] == right[row["template"]]
        assert row["accuracy"] == pytest.approx(right[row["template"]] / 3)
        assert (row["low"], row["high"]) == pytest.approx(eval_tasks.wilson(row["accuracy"], 3))
    assert document["all"]["num_questions"] == 6
    assert document["all"]["num_correct"] == sum(right.values())
    assert document["templates_from"] == str(file)
    assert "1 sweep in" in captured.err
    assert "6 of 6: accuracy" in captured.err


def test_one_template_and_few_examples_can_be_chosen(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    labels = [
        {"question": row["question"], "passage": row["passage"], "label": int(row["answer"])} for row in BOOLQ
    ]
    data = save(tmp_path / "dev.jsonl", labels)
    options = ["--templates", "true or false", "--limit", 2, "--normalize", "unconditional"]
    assert run(["eval", "boolq", "--data", data, *options], monkeypatch) == 0
    (document,) = printed(capsys)
    assert [row["template"] for row in document["templates"]] == ["true or false"]
    assert document["all"]["num_questions"] == 2
    assert (document["templates_from"], document["normalize"]) == ("slowllm's own", "unconditional")


def test_the_script_prints_a_table_on_a_terminal(tmp_path: Path) -> None:
    if shutil.which("script") is None:
        pytest.skip("needs the program `script` to make a terminal")
    data = save(tmp_path / "dev.jsonl", BOOLQ)
    done = subprocess.run(
        ["script", "-qec", f"{sys.executable} {ROOT}/scripts/eval_boolq.py --data {data}", "/dev/null"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    (row,) = [row for row in done.stdout.splitlines() if "instruction first" in row]
    assert row.split()[0].endswith("/3")
    assert '{"model"' not in done.stdout


def test_any_task_with_choices_is_evaluated(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    colours = [{"thing": "heap", "options": ["red", "blue", "memory"], "right": "memory"}]
    template = """\
templates:
  a: !Template {name: colour, jinja: 'The {{ thing }} holds ||| {{ right }}', answer_choices: '{{ options | join("|||") }}'}
"""
    (tmp_path / "t.yaml").write_text(template)
    data = save(tmp_path / "x.jsonl", colours)
    assert run(["eval", "task", "--data", data, "--template-file", tmp_path / "t.yaml"], monkeypatch) == 0
    (document,) = printed(capsys)
    scores = [likelihood("The heap holds", f" {choice}") for choice in colours[0]["options"]]
    assert document["all"]["num_correct"] == (scores.index(max(scores)) == 2)


def test_long_prompts_are_refused_or_cut_from_the_left(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    long = {**BOOLQ[0], "passage": "word " * 3000 + "The value is returned."}
    data, out = save(tmp_path / "dev.jsonl", [BOOLQ[1], long]), tmp_path / "out.jsonl"
    (tmp_path / "t.yaml").write_text(TEMPLATES)
    arguments = [
        "eval",
        "boolq",
        "--data",
        data,
        "--template-file",
        tmp_path / "t.yaml",
        "--templates",
        "plain",
    ]
    found = refused([*arguments, "--out", out], monkeypatch, capsys)
    assert "example 2, template 'plain': " in found
    assert "use --truncate to cut such prompts from the left" in found
    assert not out.exists()
    assert run([*arguments, "--truncate", "--out", out, "--dtype", "fp32"], monkeypatch) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["num_truncated"] == 1
    assert "1 prompts were cut from the left" in captured.err
    short, cut = [json.loads(line) for line in out.read_text().splitlines()]
    assert "truncated" not in short
    assert cut["truncated"] is True
    # The end of the prompt is what the model saw.
    tokenizer, model = _plain()
    context = long["passage"] + " is the value returned?"
    scores = []
    for word in (" no", " yes"):
        ids = tokenizer(context + word)["input_ids"]
        row, count = torch.tensor([ids[-2049:]]), len(ids) - len(tokenizer(context)["input_ids"])
        logits = model(row[:, :-1]).logits[0, -count:].log_softmax(-1)
        scores.append(float(logits.gather(-1, row[0, -count:, None]).sum()))
    assert cut["probabilities"] == pytest.approx(softmax(scores), abs=TOLERANCE)


def test_predictions_made_before_an_error_are_kept(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    whole = choices.choose

    def failing(*arguments: Any, **options: Any) -> Any:
        for number, found in enumerate(whole(*arguments, **options)):
            if number == 4:
                raise slowllm.SlowLLMError("the disk is gone")
            yield found

    monkeypatch.setattr(choices, "choose", failing)
    data, out = save(tmp_path / "dev.jsonl", BOOLQ), tmp_path / "out.jsonl"
    assert run(["eval", "boolq", "--data", data, "--out", out], monkeypatch) == 2
    assert "slowllm: the disk is gone" in capsys.readouterr().err
    assert not out.exists()
    assert len([json.loads(line) for line in (tmp_path / "out.jsonl.part").read_text().splitlines()]) == 4


def test_lm_evals_options_pass_through(monkeypatch: Any, capsys: Any) -> None:
    from slowllm.entrypoints import lm_eval_model

    passed: list[str] = []
    monkeypatch.setattr(lm_eval_model, "main", passed.extend)
    options = [
        "run",
        "--tasks",
        "a,b",
        "-f",
        "2",
        "--model_args",
        "pretrained=x,ram=4GiB",
        "-s",
        "--limit",
        "3",
        "-h",
    ]
    assert run(["eval", "lm", *options], monkeypatch) == 0
    assert passed == options
