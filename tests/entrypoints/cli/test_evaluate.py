"""`slowllm eval` as a user meets it: the resident model's figures, and one sentence for errors."""

from __future__ import annotations

import functools
import json
import logging
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
from tests.support.likelihoods import BOOLQ, TEMPLATES, TOLERANCE, likelihood, plain, printed, save, softmax
from tests.support.paths import ROOT, TINY_BLOOM


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["eval", "boolq", "--data", "{tmp}/none.jsonl"], "no such file or folder"),
        (["eval", "boolq", "--data", "nobody/nothing"], "not in the cache of datasets"),
        (["eval", "boolq", "--data", "{tmp}/boolq.jsonl", "--templates", "x"], "no template is called 'x'; there are"),
        (["eval", "boolq", "--data", "{tmp}/boolq.jsonl", "--template-file", "{tmp}/a"], "is no templates file|has no templates"),
        (["eval", "boolq", "--data", "{tmp}/boolq.jsonl", "--split", "test"], "a file has no splits"),
        (["eval", "boolq", "--data", "{tmp}/other.jsonl"], "line 1 has no 'question', only a"),
        (["eval", "boolq", "--data", "{tmp}/bad.jsonl"], "bad.jsonl: line 1: label is 2, none of true, false, 1, 0, yes and no"),
        (["eval", "boolq", "--data", "{tmp}/words.jsonl"], "words.jsonl: line 3: answer is \"perhaps\", none of"),
        (["eval", "boolq", "--data", "{tmp}/boolq.jsonl", "--out", "{tmp}/boolq.jsonl"], "is the input"),
        (["eval", "boolq", "--data", "{tmp}/boolq.jsonl", "--normalize", "x"], "--normalize 'x' is unknown"),
        (["eval", "task", "--data", "{tmp}/other.jsonl", "--template-file", "{tmp}/t.yaml"], "does not render ('passage' is undefined)"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    save(tmp_path / "a", ['{"text": "a b"}'])
    save(tmp_path / "boolq.jsonl", BOOLQ)
    save(tmp_path / "other.jsonl", [{"a": 1}])
    save(tmp_path / "bad.jsonl", [{"question": "q", "passage": "p", "label": 2}])
    words = [f'{{"question": "q", "passage": "p", "answer": "{word}"}}' for word in ("yes", "perhaps")]
    save(tmp_path / "words.jsonl", [words[0], "", words[1]])
    (tmp_path / "t.yaml").write_text(TEMPLATES)
    before = set(tmp_path.iterdir())
    found = refused([one.replace("{tmp}", str(tmp_path)) for one in arguments], monkeypatch, capsys)
    assert any(part in found for part in sentence.split("|"))
    assert set(tmp_path.iterdir()) == before


def test_boolq_is_evaluated_in_one_sweep(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # as where it is not installed
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


@pytest.mark.long
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


@pytest.mark.long
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
    assert "dev.jsonl: line 2, template 'plain': " in found
    assert "use --truncate to cut such prompts from the left" in found
    assert not out.exists()
    assert run([*arguments, "--truncate", "--out", out, "--dtype", "fp32"], monkeypatch) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["num_truncated"] == 1
    assert "1 prompt was cut from the left" in captured.err
    short, cut = [json.loads(line) for line in out.read_text().splitlines()]
    assert "truncated" not in short
    assert cut["truncated"] is True
    # The end of the prompt is what the model saw.
    tokenizer, model = plain()
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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tasks", "boolq"], "no model is named; give its folder with --model_args pretrained=DIR"),
        (["--tasks", "boolq", "--model_args", "ram=4GiB"], "no model is named"),
        (
            ["--tasks", "boolq", "--model", "hf", "--model_args", "pretrained=x"],
            "--model hf: `slowllm eval lm` runs",
        ),
        (
            ["run", "-t", "boolq", "--model=vllm", "-a", "pretrained=x"],
            "--model vllm: `slowllm eval lm` runs",
        ),
        (["-Mhf", "-t", "boolq"], "--model hf: "),
    ],
)
def test_lm_eval_runs_slowllms_model_or_none(
    options: list[str], words: str, monkeypatch: Any, capsys: Any
) -> None:
    assert words in refused(["eval", "lm", *options], monkeypatch, capsys)


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        (["-t", "a", "-a", "pretrained=x"], ["--model", "slowllm", "--device", "cpu"]),
        (
            ["-t", "a", "--model_args", "ram=4GiB", "pretrained=x", "--device", "cuda:0"],
            ["--model", "slowllm"],
        ),
        (["-t", "a", "--model_args", '{"pretrained": "x"}', "--model", "slowllm"], []),
        (["--config", "file.yaml"], ["--model", "slowllm"]),
        (["ls", "tasks"], []),
        (["run", "--tasks", "a", "--help"], []),
    ],
)
def test_the_model_is_added_to_lm_evals_arguments(given: list[str], passed: list[str]) -> None:
    from slowllm.entrypoints.lm_eval_command import check_arguments

    assert check_arguments(given) == [*given, *passed]


def test_the_hub_is_shut_off_unless_downloads_are_allowed(monkeypatch: Any) -> None:
    from slowllm.entrypoints.lm_eval_command import stay_offline

    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")
    for name in names:
        monkeypatch.setenv(name, "0")
    assert stay_offline(["--tasks", "a", "--allow-downloads"]) == ["--tasks", "a"]
    assert [os.environ[name] for name in names] == ["0"] * 3
    assert stay_offline(["--tasks", "a"]) == ["--tasks", "a"]
    assert [os.environ[name] for name in names] == ["1"] * 3


def test_data_that_are_not_there_are_named_at_once(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))
    # lm-eval's log may still go to the closed stderr of another test of this process.
    monkeypatch.setattr(logging, "raiseExceptions", False)
    task = {
        "task": "far", "dataset_path": "nobody/nothing", "test_split": "test", "output_type": "multiple_choice",
        "doc_to_text": "{{a}}", "doc_to_choice": ["x", "y"], "doc_to_target": "b",
    }  # fmt: skip
    (tmp_path / "far.yaml").write_text(json.dumps(task))
    options = ["--tasks", tmp_path / "far.yaml", "--model_args", f"pretrained={TINY_BLOOM}"]
    said = refused(["eval", "lm", *options], monkeypatch, capsys)
    assert "Couldn't reach 'nobody/nothing' on the Hub" in said
    assert "nothing is downloaded without --allow-downloads" in said


def test_help_of_lm_is_slowllms(monkeypatch: Any, capsys: Any) -> None:
    for options in ([], ["-h"], ["--help"]):
        assert run(["eval", "lm", *options], monkeypatch) == 0
        shown = capsys.readouterr().out
        assert "--allow-downloads" in shown
        assert "slowllm eval lm run --help" in shown


def test_lm_evals_options_pass_through(monkeypatch: Any, capsys: Any) -> None:
    from slowllm.entrypoints import lm_eval_run

    passed: list[str] = []
    monkeypatch.setattr(lm_eval_run, "main", lambda arguments, _: passed.extend(arguments))
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
