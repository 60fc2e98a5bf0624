"""Verbs take a GGUF file, or a folder with one, where they take a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import refused, run
from tests.support.gguf_checkpoints import byte_level_tokenizer, write_gguf


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(
        tmp_path_factory.mktemp("gguf") / "m.gguf", "qwen2", "q4_k", metadata=byte_level_tokenizer()
    )


def printed(arguments: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> str:
    assert run(arguments, monkeypatch) == 0
    return str(capsys.readouterr().out)


def test_a_file_is_planned_scored_and_continued(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    plan = json.loads(printed(["plan", model, "--longest", 100, "--json"], monkeypatch, capsys))
    assert "8 bits" not in json.dumps(plan)
    (tmp_path / "s.txt").write_text("the cat\nthe cats\n")
    arguments = ["forward", "--model", model, tmp_path / "s.txt", "--state", tmp_path / "state"]
    lines = printed(arguments, monkeypatch, capsys).splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["the cat", "the cats"]
    folder = ["generate", "--model", model.parent, "--max-new-tokens", 3, "the"]
    assert json.loads(printed(folder, monkeypatch, capsys))["continuations"][0]["num_tokens"] == 3
    assert "fits" in printed(["doctor", model], monkeypatch, capsys)


def test_a_prompt_is_tuned_and_used(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "t.jsonl").write_text('{"prompt": "the", "answer": " cat"}\n')
    tune = ["tune", tmp_path / "t.jsonl", "--model", model, "--out", tmp_path / "prompt", "--steps", 2]
    printed(tune, monkeypatch, capsys)
    use = ["generate", "--model", model, "--prompt", tmp_path / "prompt", "--max-new-tokens", 2, "the"]
    assert json.loads(printed(use, monkeypatch, capsys))["continuations"][0]["num_tokens"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "MODEL"], "nothing says which hash it should have"),
    ],
)  # fmt: skip
def test_verbs_that_need_another_format_say_so(
    arguments: list[str],
    message: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    named = [{"MODEL": model, "OUT": tmp_path / "out"}.get(word, word) for word in arguments]
    assert message in refused(named, monkeypatch, capsys)


def test_another_file_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (tmp_path / "m.gguf").write_bytes(b"nothing")
    (tmp_path / "s.txt").write_text("a\n")
    sentence = refused(["forward", "--model", tmp_path / "m.gguf", tmp_path / "s.txt"], monkeypatch, capsys)
    assert "m.gguf: has 7 bytes, too few for a GGUF header" in sentence
    (tmp_path / "m.bin").write_bytes(b"nothing")
    sentence = refused(["forward", "--model", tmp_path / "m.bin", tmp_path / "s.txt"], monkeypatch, capsys)
    assert "is a file; give the folder that holds config.json and the safetensors, or a GGUF file" in sentence
