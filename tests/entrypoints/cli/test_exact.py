"""`--exact` in the verbs that open a model for several texts: the same words, and what it was is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from slowllm.entrypoints.cli.app import app
from slowllm.entrypoints.cli.defaults import options_of, verbs_of
from slowllm.errors import InputError
from slowllm.runtime import load
from tests.entrypoints.cli.test_runner import VERBS
from tests.support.command_line import refused, run
from tests.support.families import save_tiny, speaking
from tests.support.reports import read_report

# Those that compute nothing of texts, one text, or gradients, and servers whose riders are other machines' calls.
WITHOUT = {"plan", "doctor", "tune", "serve"}
# Those whose prompts share micro-batches as well.
SERVING = {"api", "web"}
TOGETHER = "rows of several micro-batches together"
ALONE = "rows of each micro-batch by themselves"


def test_all_verbs_that_open_a_model_for_texts_have_it_in_the_same_words() -> None:
    found = {" ".join(words): options_of(verb) for words, verb in verbs_of(typer.main.get_command(app))}
    with_ram = {verb for verb, options in found.items() if "ram" in options}
    assert with_ram - WITHOUT == {verb for verb, options in found.items() if "exact" in options}
    for verb in with_ram - WITHOUT:
        option = found[verb]["exact"]
        assert (option.opts, option.secondary_opts) == (["--exact"], ["--no-exact"])
        assert option.default is (verb not in SERVING)
    assert len({found[verb]["exact"].help for verb in with_ram - WITHOUT - SERVING}) == 1
    assert len({found[verb]["exact"].help for verb in SERVING}) == 1


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in WITHOUT])
def test_it_reaches_load(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {name: tmp_path / name for name in ("lines", "scores", "boolq.jsonl", "batch")}
    files["lines"].write_text("A cat sat.\n")
    files["scores"].write_text('{"context": "A cat", "choices": [" sat", " ran"]}\n')
    files["boolq.jsonl"].write_text('{"question": "is it so", "passage": "It is so.", "answer": true}\n')
    files["batch"].write_text(
        '{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": "A"}}\n'
    )
    seen: list[Any] = []

    def open_model(*args: Any, **options: Any) -> None:
        seen.append(options["exact"])
        raise InputError("seen")

    monkeypatch.setattr(load, "open_model", open_model)
    named = {name.removesuffix(".jsonl"): str(file) for name, file in files.items()}
    arguments = [*verb.split(), *(one.format(**named) for one in VERBS[verb])]
    for more in ([], ["--exact"], ["--no-exact"]):
        result = CliRunner().invoke(app, [*arguments, *more])
        assert str(result.exception) == "seen", (result.output, result.exception)
    assert seen == [True, True, False]


@pytest.fixture
def mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny mixture with a tokenizer, whose experts are read on demand however small it is."""
    save_tiny("olmoe", tmp_path / "plain", torch.float32, shard="5MB", vocab_size=8192)
    monkeypatch.setattr(load, "_allowed", lambda *_, **__: ["experts"])
    return speaking(tmp_path / "plain", tmp_path / "mixture")


def test_verbose_says_which_it_was(
    mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "lines.txt").write_text("A cat sat.\n")
    for switch, words in (("--exact", ALONE), ("--no-exact", TOGETHER)):
        caplog.clear()
        assert run(["forward", tmp_path / "lines.txt", "--model", mixture, "-v", switch], monkeypatch) == 0
        (said,) = [one for one in caplog.messages if one.startswith("experts are read when routers ask")]
        assert words in said


@pytest.mark.long
def test_a_report_says_which_it_was(mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="reports are made with matplotlib")
    (tmp_path / "lines.txt").write_text("A cat sat.\n")
    for switch, words in (("--exact", ALONE), ("--no-exact", TOGETHER)):
        arguments = ["forward", tmp_path / "lines.txt", "--model", mixture, switch]
        assert run([*arguments, "--report", tmp_path / "r.html"], monkeypatch) == 0
        assert words in read_report(tmp_path / "r.html").text


def test_a_model_whose_blocks_are_read_whole_says_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "lines.txt").write_text("A cat sat.\n")
    for switch in ("--exact", "--no-exact"):
        assert run(["forward", tmp_path / "lines.txt", "-v", switch], monkeypatch) == 0
    assert any(one.startswith("compute dtype") for one in caplog.messages)
    assert "exact" not in caplog.text
    assert "experts" not in caplog.text


def test_a_job_that_was_begun_otherwise_is_another_job(
    mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "lines.txt").write_text("A cat sat.\n")
    arguments = ["forward", tmp_path / "lines.txt", "--model", mixture, "--state", tmp_path / "state"]
    assert run([*arguments, "--no-exact"], monkeypatch) == 0
    capsys.readouterr()
    assert "exact" in refused(arguments, monkeypatch, capsys)
    assert run([*arguments, "--no-exact"], monkeypatch) == 0
