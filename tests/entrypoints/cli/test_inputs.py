"""What verbs read: files, texts, standard input, tables; and a word about what was probably not meant."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slowllm.entrypoints.cli.inputs import check_installed
from slowllm.errors import InputError
from tests.support.command_line import refused, run
from tests.support.likelihoods import printed, save
from tests.support.paths import ROOT, TINY_BLOOM

VALUE = "The value is returned."


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that verbs run in, with two files of lines; standard input is a terminal."""
    save(tmp_path / "a.txt", [VALUE, "", "A reference is valid."])
    save(tmp_path / "b.txt", ["The heap holds it."])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    return tmp_path


def test_several_files_are_scored_in_one_command(folder: Path, monkeypatch: Any, capsys: Any) -> None:
    assert run(["forward", "a.txt", "b.txt", "--dtype", "fp32"], monkeypatch) == 0
    rows = printed(capsys)
    assert [(row["file"], row["line"]) for row in rows] == [("a.txt", 1), ("a.txt", 3), ("b.txt", 1)]
    assert run(["forward", "--text", VALUE, "--text", "The heap", "--dtype", "fp32"], monkeypatch) == 0
    one, two = printed(capsys)
    assert (one["line"], one["log_likelihood"]) == (1, rows[0]["log_likelihood"])
    assert (two["line"], two["text"]) == (2, "The heap")
    assert "file" not in one
    assert run(["yesno", "a.txt", "b.txt"], monkeypatch) == 0
    assert [(row["file"], row["line"]) for row in printed(capsys)] == [
        ("a.txt", 1),
        ("a.txt", 3),
        ("b.txt", 1),
    ]


@pytest.mark.parametrize("verb", ["forward", "yesno", "generate", "score", "batch"])
def test_standard_input_is_read_where_nothing_is_named(
    verb: str, folder: Path, monkeypatch: Any, capsys: Any
) -> None:
    lines = {
        "score": json.dumps({"text": VALUE}),
        "batch": '{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": "A"}}',
    }
    piped = io.BytesIO(lines.get(verb, VALUE).encode())
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False, buffer=piped))
    assert run([verb], monkeypatch) == 0
    assert len(printed(capsys)) == 1
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    assert refused([verb], monkeypatch, capsys).startswith("slowllm: give ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["forward", "a.txt", "./a.txt"], "./a.txt: is given twice"),
        (["score", "-", "-"], "standard input: is given twice"),
        (["forward", "a.txt", "--text", "b"], "give files or --text, not both"),
        (["yesno", "--text", " "], "--text 1 is empty"),
        (["generate", "--prompts", "a.txt", "--prompts", "a.txt"], "a.txt: is given twice"),
        (["forward", "b.txt", "long.txt"], "long.txt: line 2 has 2100 tokens"),
        (["forward", "binary.txt"], "binary.txt: is a binary file"),
        (["yesno", "boolq.csv"], "boolq.csv: has no column question; there are text, id"),
        (["score", "bad.csv"], "bad.csv: has none of the columns context, choices, continuation, text; there are id"),
        (["score", "empty.csv"], "empty.csv: has no rows"),
        (["yesno", "half.jsonl"], "half.jsonl: line 2 has no question"),
        (["convert", "a", "-", "--store", "int8"], "- is standard output and no folder; name a folder"),
        (["download", "a/b", "--to", "-"], "- is standard output and no folder; name a folder"),
    ],
)  # fmt: skip
def test_inputs_that_cannot_be_taken_are_one_sentence(
    arguments: list[str], message: str, folder: Path, monkeypatch: Any, capsys: Any
) -> None:
    save(folder / "long.txt", ["short", "the " * 2100])
    (folder / "binary.txt").write_bytes(b"\x7fELF\x02\x00")
    save(folder / "boolq.csv", ["text,id", "a,1"])
    save(folder / "bad.csv", ["id", "1"])
    save(folder / "empty.csv", ["text"])
    save(folder / "half.jsonl", [{"question": "Is it?"}, {"text": "Is it?"}])
    assert message in refused(arguments, monkeypatch, capsys)


def test_tables_are_scored_and_asked(folder: Path, monkeypatch: Any, capsys: Any) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows: list[dict[str, Any]] = [
        {"id": "x", "context": "The value is", "choices": [" returned", " heap"]},
        {"id": "y", "context": "The value", "continuation": " is returned."},
        {"id": "z", "text": VALUE},
    ]
    save(folder / "q.jsonl", rows)
    save(folder / "q.csv", [
        "id,context,choices,continuation,text",
        'x,The value is,"["" returned"", "" heap""]",,',
        "y,The value,, is returned.,",
        f"z,,,,{VALUE}",
    ])  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist(rows, pyarrow.schema([
        ("id", pyarrow.string()), ("context", pyarrow.string()), ("choices", pyarrow.list_(pyarrow.string())),
        ("continuation", pyarrow.string()), ("text", pyarrow.string()),
    ])), folder / "q.parquet")  # fmt: skip
    assert run(["score", "q.jsonl", "q.csv", "q.parquet", "--dtype", "fp32"], monkeypatch) == 0
    found = printed(capsys)
    assert [(row.pop("file"), row.pop("line")) for row in found][2:5] == [
        ("q.jsonl", 3),
        ("q.csv", 2),
        ("q.csv", 3),
    ]
    assert found[:3] == found[3:6] == found[6:]
    save(folder / "y.csv", ["id,question", "1,Is it returned?"])
    parquet.write_table(pyarrow.table({"question": ["Is it returned?"]}), folder / "y.parquet")
    save(folder / "y.jsonl", [{"question": "Is it returned?", "answer": True}])
    assert run(["yesno", "y.csv", "y.parquet", "y.jsonl", "--dtype", "fp32"], monkeypatch) == 0
    rows = printed(capsys)
    assert {(row["question"], round(row["p_yes"], 6)) for row in rows} == {
        ("Is it returned?", round(rows[0]["p_yes"], 6))
    }


@pytest.mark.parametrize(
    ("arguments", "warning"),
    [
        (["forward", "q.jsonl"], "q.jsonl looks like JSON Lines, but each line is scored as it stands; `slowllm score` reads"),
        (["forward", "q.csv"], "q.csv looks like CSV, but each line is scored as it stands; `slowllm score` reads"),
        (["yesno", "q.jsonl"], "q.jsonl looks like JSON Lines, but each line is asked as it stands; questions are read"),
        (["generate", "a.txt"], "a.txt is a file, but its name is continued; --prompts a.txt continues its lines"),
        (["generate", "--prompts", "q.jsonl"], "q.jsonl looks like JSON Lines, but each line is continued as it stands;"),
    ],
)  # fmt: skip
def test_what_was_probably_not_meant_is_done_with_a_warning(
    arguments: list[str], warning: str, folder: Path, monkeypatch: Any, capsys: Any
) -> None:
    save(folder / "q.jsonl", [{"text": VALUE}])
    save(folder / "q.csv", ["text"])
    assert run(arguments, monkeypatch) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 1
    (line,) = [line for line in captured.err.splitlines() if line.startswith("warning: ")]
    assert line.startswith(f"warning: {warning}")


def test_keys_that_results_have_are_left_out_and_named(folder: Path, monkeypatch: Any, capsys: Any) -> None:
    save(folder / "q.jsonl", [{"text": VALUE, "best": 7, "line": "mine", "id": 3}])
    assert run(["score", "q.jsonl"], monkeypatch) == 0
    captured = capsys.readouterr()
    row = json.loads(captured.out)
    assert (row["line"], row["id"]) == (1, 3)
    assert "best" not in row
    assert (
        "warning: the input's keys best, line are left out, because results have keys of these"
        in captured.err
    )
    assert "scored 1 of 1 line\n" in captured.err


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "a", "id": 1e999}', "is not JSON (1e999 is too large a number)"),
        ('{"text": "a", "text": "b"}', 'has the key "text" twice'),
        ('{"text": "\\ud83d"}', "has \\ud83d, half of a surrogate pair, which alone is no character"),
    ],
)
def test_lines_that_json_cannot_hold_are_named(
    line: str, reason: str, folder: Path, monkeypatch: Any, capsys: Any
) -> None:
    save(folder / "q.jsonl", [line])
    assert run(["score", "q.jsonl"], monkeypatch) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"line": 1, "error": reason}
    assert f"slowllm: q.jsonl: line 1: {reason}\n" in captured.err


@pytest.mark.parametrize("verb", ["forward", "yesno", "generate", "score"])
def test_a_dash_behind_out_is_standard_output(verb: str, folder: Path, monkeypatch: Any, capsys: Any) -> None:
    given = {"generate": ["a"], "score": ["--text", "a"]}.get(verb, ["b.txt"])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run([verb, *given, "--out", "-"], monkeypatch) == 0
    assert len(printed(capsys)) == 1
    assert not (folder / "-").exists()


def test_settings_of_the_checkpoint_that_are_not_used_are_named(
    folder: Path, monkeypatch: Any, capsys: Any
) -> None:
    shutil.copytree(TINY_BLOOM, folder / "bloom")
    own = {"do_sample": True, "temperature": 0.6, "top_k": None, "repetition_penalty": 1.0, "eos_token_id": 2}
    (folder / "bloom" / "generation_config.json").write_text(json.dumps(own))
    assert run(["generate", "The value", "--model", "bloom"], monkeypatch) == 0
    says = "generation_config.json of bloom is left aside but for EOS and padding: do_sample=true, temperature=0.6\n"
    assert says in capsys.readouterr().err
    assert run(["generate", "The value", "--model", "embedded:tiny-bloom"], monkeypatch) == 0
    assert "left aside" not in capsys.readouterr().err


def test_a_package_that_is_missing_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # as where it is not installed
    with pytest.raises(InputError, match=r"^peft is not installed; pip install peft, or .* '\.\[tune\]'$"):
        check_installed("yaml", "peft")


def test_what_needs_no_torch_is_refused_before_it_is_loaded(folder: Path) -> None:
    commands = [
        ["forward", "a.txt", "--model", "./nowhere"],
        ["forward", "none.txt"],
        ["verify", "./nowhere"],
        ["plan", "no/such-model"],
        ["generate", "a", "--num-sequences", "2"],
        ["tune", "a.txt", "--out", "o", "--steps", "2", "--epochs", "2"],
        ["tune", "a.txt", "--out", "o", "--top", "2"],
        ["tune", "none.txt", "--out", "o"],
        ["eval", "boolq", "--data", "none.jsonl"],
        ["forward", "--text", "x", "--swarm", "garbage"],
    ]
    code = f"""if True:
        import sys
        from slowllm.cli import run
        for arguments in {commands}:
            sys.argv = ["slowllm", *arguments]
            try:
                run()
            except SystemExit as leaving:
                assert leaving.code == 2, arguments
            assert "torch" not in sys.modules, arguments
    """
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [line.startswith("slowllm: ") for line in done.stderr.splitlines()] == [True] * len(commands)
