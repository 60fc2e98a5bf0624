"""`slowllm forward` as a user meets it: real files, real processes, one sentence and exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.support.command_line import refused, run
from tests.support.paths import ROOT, TINY_BLOOM
from tests.support.processes import Processes
from tests.support.terminal import run_on_terminal

FORWARD = ["-m", "slowllm", "forward"]


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    file = tmp_path / "s.txt"
    file.write_text("The compiler checks every reference.\n\n  A value is returned.  \n")
    return file


def test_json_lines_have_every_figure(sentences: Path, monkeypatch: Any, capsys: Any) -> None:
    assert run(["forward", sentences, "--json", "--per-token", "--dtype", "fp32"], monkeypatch) == 0
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in captured.out.splitlines()]
    assert [row["line"] for row in rows] == [1, 3]
    assert rows[1]["text"] == "A value is returned."
    for row in rows:
        assert row["num_tokens"] == len(row["tokens"])
        assert row["log_likelihood"] == pytest.approx(sum(token["log_prob"] for token in row["tokens"]))
        assert row["mean_nll"] == pytest.approx(-row["log_likelihood"] / row["num_tokens"])
        assert "".join(token["token"] for token in row["tokens"]) == row["text"]
    assert "corpus perplexity" in captured.err
    assert "peak RSS" in captured.err


def test_streaming_every_block_gives_the_same_lines(sentences: Path, monkeypatch: Any, capsys: Any) -> None:
    outputs = []
    for option in ("--resident", "--stream-all"):
        assert run(["forward", sentences, "--json", option], monkeypatch) == 0
        captured = capsys.readouterr()
        outputs.append(captured.out)
    assert outputs[0] == outputs[1]
    assert "1 sweep in" in captured.err
    assert "read 7." in captured.err


def test_no_prefix_leaves_the_first_token_unscored(sentences: Path, monkeypatch: Any, capsys: Any) -> None:
    assert run(["forward", sentences, "--json", "--per-token", "--no-prefix"], monkeypatch) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(row["tokens"][0]["log_prob"] is None for row in rows)
    assert all(token["log_prob"] < 0 for row in rows for token in row["tokens"][1:])


def test_a_file_is_written_whole(sentences: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    out = tmp_path / "out.jsonl"
    assert run(["forward", sentences, "--out", out], monkeypatch) == 0
    assert len([json.loads(line) for line in out.read_text().splitlines()]) == 2
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == [sentences, out] or set(tmp_path.iterdir()) == {sentences, out}


def test_a_terminal_gets_a_table(sentences: Path, processes: Processes) -> None:
    ended, written = run_on_terminal(processes, "forward", sentences)
    assert ended.returncode == 0
    assert "perplexity" in written
    assert "The compiler checks every reference." in written
    assert '{"line"' not in written


def test_standard_input_is_read(sentences: Path, processes: Processes) -> None:
    with open(sentences) as file:
        done = processes.run(*FORWARD, "-", "--json", stdin=file.fileno())
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 2


def test_other_models_are_scored(sentences: Path, monkeypatch: Any, capsys: Any) -> None:
    draft = ROOT / "weights" / "tiny-bloom-draft"
    assert run(["forward", sentences, "--model", draft, "--json", "--ram", "4GiB"], monkeypatch) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_longer_lines_are_cut_only_on_request(sentences: Path, monkeypatch: Any, capsys: Any) -> None:
    assert "line 1 has 6 tokens but the limit is 5" in refused(
        ["forward", sentences, "--max-tokens", 5], monkeypatch, capsys
    )
    assert run(["forward", sentences, "--max-tokens", 5, "--truncate", "--json"], monkeypatch) == 0
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in captured.out.splitlines()]
    assert rows[0]["truncated"] is True
    assert rows[0]["num_tokens"] == 5
    assert "cut" in captured.err


BAD_INPUT: dict[str, tuple[bytes | None, list[str], str]] = {
    "no such file": (None, [], "No such file or directory"),
    "empty file": (b"", [], "has no non-empty line"),
    "blank lines": (b"\n  \n\t\n", [], "has no non-empty line"),
    "undecodable bytes": (b"good\nbad \xff here\n", [], "line 2 is not UTF-8 (byte 5 is 0xff)"),
    "ram unreadable": (b"a b\n", ["--ram", "much"], "'much' is not a size"),
    "ram negative": (b"a b\n", ["--ram", "-5"], "'-5' is not a size"),
    "ram too small": (b"a b\n", ["--ram", "50MiB"], "the smallest that would do is"),
    "dtype unknown": (b"a b\n", ["--dtype", "fp8"], "dtype 'fp8' is unknown"),
    "no such model": (b"a b\n", ["--model", "./nowhere"], "no such folder"),
    "folder without config": (b"a b\n", ["--model", "{tmp}"], "has no config.json"),
    "limit beyond the model": (b"a b\n", ["--max-tokens", "99999"], "is more than the"),
    "output folder missing": (
        b"a b\n",
        ["--out", "{tmp}/no/where.jsonl"],
        "no such folder to write where.jsonl to",
    ),
    "output is the input": (b"a b\n", ["--out", "{tmp}/in.txt"], "is the input; name another file"),
    "output is a folder": (b"a b\n", ["--out", "{tmp}"], "is a folder; name a file"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_sentence(case: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    content, options, sentence = BAD_INPUT[case]
    file = tmp_path / "in.txt"
    if content is not None:
        file.write_bytes(content)
    arguments = ["forward", file, *(option.replace("{tmp}", str(tmp_path)) for option in options)]
    assert sentence in refused(arguments, monkeypatch, capsys)
    assert set(tmp_path.iterdir()) <= {file}  # nothing half-written


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("pipe", "is no ordinary file"),
        ("in.txt", "is the input"),
        ("link", "is the input"),
        ("in", "is the input"),
    ],
)
def test_an_output_that_would_destroy_something_is_refused(
    name: str, sentence: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    file = tmp_path / "in.txt"
    file.write_text("a b\n")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(file)
    if name == "in":  # whose partial results would go to the input
        file = file.rename(tmp_path / "in.part")
    before = set(tmp_path.iterdir())
    assert sentence in refused(["forward", file, "--out", tmp_path / name], monkeypatch, capsys)
    assert set(tmp_path.iterdir()) == before
    assert file.read_text() == "a b\n"


def test_two_runs_do_not_write_one_file(
    sentences: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    import fcntl

    with open(tmp_path / "out.jsonl.part", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        sentence = refused(["forward", sentences, "--out", tmp_path / "out.jsonl"], monkeypatch, capsys)
    assert "another run is writing it" in sentence


def test_an_empty_model_name_is_refused(sentences: Path, monkeypatch: Any, capsys: Any) -> None:
    assert "the name of the model is empty" in refused(
        ["forward", sentences, "--model", ""], monkeypatch, capsys
    )


@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_shows_numbers_on_a_narrow_terminal(columns: int, processes: Processes) -> None:
    ended, written = run_on_terminal(processes, "forward", "sentences.txt", "--per-token", columns=columns)
    assert ended.returncode == 0
    rows = [row for row in written.splitlines() if "On the right is" in row]
    assert len(rows) == 1
    assert rows[0].split()[:2] == ["2", "14"]
    assert len(rows[0].split()) > 6
    tokens = written.partition("line 2: log-probability of each token")[2].splitlines()[1:15]
    assert tokens[0].split()[1:] == ["'On'"]
    assert sum(float(row.split()[0]) for row in tokens) == pytest.approx(float(rows[0].split()[2]), abs=0.01)


def test_a_nan_in_the_weights_is_named(
    sentences: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(TINY_BLOOM, folder)
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        if "h.6.self_attention.dense.bias" in tensors:
            tensors["h.6.self_attention.dense.bias"][0] = float("nan")
            save_file(tensors, shard, {"format": "pt"})
    out = tmp_path / "out.jsonl"
    sentence = refused(["forward", sentences, "--model", folder, "--out", out], monkeypatch, capsys)
    assert "transformer.h.6: NaN in the output" in sentence
    assert not out.exists()


def test_a_short_shard_is_named(sentences: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    folder = tmp_path / "model"
    shutil.copytree(TINY_BLOOM, folder)
    shard = sorted(folder.glob("*.safetensors"))[2]
    os.truncate(shard, shard.stat().st_size - 1000)
    sentence = refused(["forward", sentences, "--model", folder], monkeypatch, capsys)
    assert sentence.startswith(f"slowllm: {shard.name}: ")
    assert "The download is incomplete; fetch this shard again." in sentence


def test_a_full_disk_leaves_whole_lines_and_no_result(tmp_path: Path, processes: Processes) -> None:
    # A limit on the size of files stands for a disk that gets full: the write fails in the same place.
    file, out = tmp_path / "in.txt", tmp_path / "out.jsonl"
    file.write_text("A value is returned.\n" * 200)
    command = (*FORWARD, file, "--per-token", "--out", out)
    done = processes.run(*command, file_bytes=60_000)
    assert done.returncode == 2
    assert f"slowllm: {out}: File too large; the lines written so far are in out.jsonl.part" in done.stderr
    assert not out.exists()
    lines = (tmp_path / "out.jsonl.part").read_text().splitlines()
    assert len(lines) > 5
    assert all(json.loads(line)["num_tokens"] for line in lines)
    again = processes.run(*command)
    assert "1 micro-batch was done before" in again.stderr
    assert out.read_text().splitlines()[: len(lines)] == lines
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "out.jsonl"]


def test_a_full_standard_output_is_one_sentence(sentences: Path, processes: Processes) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with open("/dev/full", "w") as full:
        done = processes.run(*FORWARD, sentences, "--json", stdout=full.fileno())
    assert done.returncode == 2
    assert done.stderr.endswith("slowllm: standard output: No space left on device\n")
    assert "Traceback" not in done.stderr


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path, processes: Processes) -> None:
    file = tmp_path / "in.txt"
    file.write_text("A value is returned.\n" * 3000)
    started = processes.start(*FORWARD, file, "--json", stdout=subprocess.PIPE)
    assert started.stdout is not None
    first = started.stdout.readline()
    started.stdout.close()
    done = started.wait()
    assert done.returncode == 1  # as click has it
    assert json.loads(first)["line"] == 1
    assert "Traceback" not in done.stderr


def test_an_interrupt_ends_cleanly_with_whole_lines(tmp_path: Path, processes: Processes) -> None:
    file, out = tmp_path / "in.txt", tmp_path / "out.jsonl"
    file.write_text("\n".join(f"Number {n} of the values is returned to the caller." for n in range(6_000)))
    started = processes.start(*FORWARD, file, "--out", out, "--dtype", "fp32")
    partial = tmp_path / "out.jsonl.part"
    # Wait for the first results: without them there is nothing to interrupt.
    while started.is_running() and not (partial.exists() and partial.stat().st_size):
        time.sleep(0.001)
    done = started.end(signal.SIGINT)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert f"the lines done so far are in {partial}, and the same command goes on from there" in done.stderr
    assert not out.exists()
    rows = [json.loads(line) for line in partial.read_text().splitlines()]
    assert [row["line"] for row in rows] == list(range(1, len(rows) + 1))
