"""`slowllm compare`: a checkpoint and its store in one process, as JSON and as tables; refusals are one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slowllm.entrypoints.cli import compare
from tests.support.command_line import refused, run
from tests.support.paths import ROOT, TINY_BLOOM

SENTENCES = ROOT / "sentences.txt"


@pytest.mark.long
def test_a_store_is_compared_with_its_checkpoint(
    embedded: Callable[[str], Path], monkeypatch: Any, capsys: Any
) -> None:
    command = ["compare", TINY_BLOOM, embedded("int8"), SENTENCES, "--dtype", "fp32"]
    assert run([*command, "--json", "--worst", 2], monkeypatch) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_texts"] == len(found["texts"]) == 24
    assert found["num_tokens"] == sum(text["num_tokens"] for text in found["texts"])
    assert 0 < found["kl"]["low"] < found["kl"]["value"] < found["kl"]["high"] < 0.1
    assert found["top_1_agreement"]["value"] > 0.8
    assert found["kl_quantiles"]["1"] == found["worst"][0]["kl"] >= found["worst"][1]["kl"]
    assert len(found["worst"]) == 2
    place = found["worst"][0]
    line = SENTENCES.read_text().splitlines()[place["line"] - 1]
    assert (place["context"].removeprefix("<s>") + place["token"]) in line
    monkeypatch.setattr(compare, "prints_text", lambda out, as_json: True)
    assert run(command, monkeypatch) == 0
    shown = capsys.readouterr().out
    assert f"{found['kl']['value']:.6f}" in shown
    assert "perplexity of B over that of A" in shown
    assert "text (the 20" in shown
    assert shown.count("log-probability") == 5


def test_a_model_has_no_distance_from_itself(monkeypatch: Any, capsys: Any) -> None:
    texts = ["--text", "The value is returned.", "--text", "Yes, and no."]
    command = ["compare", TINY_BLOOM, TINY_BLOOM, *texts, "--dtype", "fp32", "--worst", "1"]
    assert run([*command, "--json"], monkeypatch) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kl"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert found["top_1_agreement"]["value"] == found["perplexity_ratio"]["value"] == 1.0
    assert [text["line"] for text in found["texts"]] == [1, 2]
    monkeypatch.setattr(compare, "prints_text", lambda out, as_json: True)
    assert run(command, monkeypatch) == 0
    assert "perplexity of B over that of A" in capsys.readouterr().out


@pytest.mark.long
def test_a_dry_run_plans_both(monkeypatch: Any, capsys: Any) -> None:
    command = ["compare", TINY_BLOOM, TINY_BLOOM, SENTENCES, "--dry-run", "--json", "--ram", "4GiB"]
    assert run(command, monkeypatch) == 0
    plans = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [plan["model"] for plan in plans] == ["tiny-bloom", "tiny-bloom"]


def test_bad_input_is_one_sentence(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    other = tmp_path / "other"
    shutil.copytree(TINY_BLOOM, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "no.parquet").write_bytes(b"PAR1 no")
    for arguments, sentence in (
        ([TINY_BLOOM, other, SENTENCES], "the two models have different tokenizers"),
        ([TINY_BLOOM, tmp_path / "nowhere", SENTENCES], "no such folder"),
        ([TINY_BLOOM, TINY_BLOOM, tmp_path / "no.parquet"], "is no Parquet file that can be read"),
        ([TINY_BLOOM, TINY_BLOOM, SENTENCES, "--ram", "50MiB"], "is too small for both models"),
        ([TINY_BLOOM, TINY_BLOOM, SENTENCES, "--max-tokens", "99999"], "is more than the"),
    ):
        assert sentence in refused(["compare", *arguments], monkeypatch, capsys)


@pytest.mark.long
def test_both_models_stay_within_one_budget(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    command = ["compare", TINY_BLOOM, TINY_BLOOM, SENTENCES, "--json", "--stream-all", "--ram", "4GiB"]
    assert run(command, monkeypatch) == 0
    assert json.loads(capsys.readouterr().out)["kl"]["value"] == 0.0
