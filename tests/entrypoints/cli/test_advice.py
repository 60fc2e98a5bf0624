"""A message that advises something is followed by its advice, which then works."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import refused, run
from tests.support.likelihoods import save
from tests.support.paths import TINY_BLOOM

LONG = "The value is returned. " * 600
Case = tuple[list[str], str, list[str]]
# A command, what its refusal advises, and the words that follow the advice.
CASES: dict[str, Case] = {
    "truncate a line": (["forward", "{tmp}/long.txt"], "use --truncate to cut such lines", ["--truncate"]),
    "raise the limit": (
        ["forward", "{tmp}/short.txt", "--max-tokens", "2"], "or --max-tokens to raise the limit", ["--max-tokens", "9"],
    ),
    "no prefix": (
        ["forward", "{tmp}/short.txt", "--model", "{tmp}/nobos"], "use --no-prefix", ["--no-prefix"],
    ),
    "sample": (["generate", "The value", "--temperature", "0.5"], "--temperature needs --sample", ["--sample"]),
    "overwrite a prompt": (
        ["tune", "{tmp}/data.jsonl", "--out", "{tmp}/old", "--steps", "1", "--tokens", "2"], "--overwrite", ["--overwrite"],
    ),
    "overwrite another job's lines": (
        ["forward", "{tmp}/short.txt", "--out", "{tmp}/of-another.jsonl"], "begin anew with --overwrite", ["--overwrite"],
    ),
}  # fmt: skip


def prepare(folder: Path) -> None:
    (folder / "long.txt").write_text(LONG)
    (folder / "short.txt").write_text("The value is returned.")
    save(folder / "data.jsonl", [{"prompt": "The value is", "answer": " returned."}])
    shutil.copytree(TINY_BLOOM, folder / "nobos")
    config = json.loads((folder / "nobos" / "tokenizer_config.json").read_text())
    config.update(bos_token=None, eos_token=None)
    (folder / "nobos" / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "old").mkdir()
    (folder / "old" / "adapter_config.json").write_text("{}")
    (folder / "of-another.jsonl.part").write_text('{"line": 1}\n')


@pytest.mark.parametrize("name", CASES)
def test_following_the_advice_works(name: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    prepare(tmp_path)
    words, advice, more = CASES[name]
    command = [word.replace("{tmp}", str(tmp_path)) for word in words]
    assert advice in refused(command, monkeypatch, capsys)
    assert run([*command, *more], monkeypatch) == 0


@pytest.mark.parametrize("verb", ["forward", "generate"])
def test_the_budget_that_a_refusal_names_works(
    verb: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    prepare(tmp_path)
    command = [verb, *([str(tmp_path / "short.txt")] if verb == "forward" else ["The value"])]
    said = refused([*command, "--ram", "1MiB"], monkeypatch, capsys)
    found = re.search(r"the smallest that would do is (\S+)", said)
    assert found is not None
    assert run([*command, "--ram", found[1]], monkeypatch) == 0
