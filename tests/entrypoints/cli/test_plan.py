"""`slowllm plan` without weights and for a file, and `--dry-run` of the other verbs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slowllm.storage.checkpoint import INDEX
from tests.support.command_line import refused, run
from tests.support.paths import ROOT, TINY_BLOOM

SENTENCES = ROOT / "sentences.txt"


def planned(arguments: list[Any], monkeypatch: Any, capsys: Any) -> tuple[dict[str, Any], str]:
    """Run a verb that prints one plan as JSON; return the plan, and what stands on stderr."""
    assert run([*arguments, "--json"], monkeypatch) == 0
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


@pytest.fixture
def configured(tmp_path: Path) -> Path:
    """A folder with all of the embedded model but its weights."""
    folder = tmp_path / "configured"
    folder.mkdir()
    for name in ("config.json", INDEX, "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_BLOOM / name, folder)
    return folder


def test_a_known_model_is_planned_without_its_weights(monkeypatch: Any, capsys: Any) -> None:
    # Measuring would multiply matrices of the width that large models have.
    monkeypatch.setattr("slowllm.runtime.rates.WIDTH", 512)
    assert run(["plan", "meta-llama/llama-3.1-8b", "--ram", "8GiB", "--dtype", "bf16"], monkeypatch) == 0
    table = " ".join(capsys.readouterr().out.split())
    assert "meta-llama/Llama-3.1-8B: 15 GB a sweep in 41 stops" in table
    assert "not on this machine, or not all of them; planned from its published shape" in table
    assert "disk 2 GB/s (assumed), processor" in table
    assert "TFLOP/s (measured)" in table


def test_the_plan_of_a_mixture_says_what_a_token_takes(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr("slowllm.runtime.rates.WIDTH", 512)
    plan, _ = planned(
        ["plan", "openai/gpt-oss-20b", "--ram", "8GiB", "--tokens", "2000"], monkeypatch, capsys
    )
    assert plan["stops"] == "experts"
    assert plan["expert_ring_bytes"] > 0
    first, later, sweep = plan["token_costs"]
    assert (first["num_tokens"], later["num_tokens"], sweep["num_tokens"]) == (1, 1, 2000)
    # 24 blocks of 32 experts, 4 for a token, and what is not experts: 1.2 of 12.6 GB and more.
    assert (
        later["read_bytes"] < 1.35e9 < first["read_bytes"] < sweep["read_bytes"] < plan["weight_bytes"] * 1.01
    )
    assert run(["plan", "openai/gpt-oss-20b", "--ram", "8GiB", "--tokens", "2000"], monkeypatch) == 0
    table = " ".join(capsys.readouterr().out.split())
    assert "read when a router asks for them, through a ring of" in table
    assert "; as is assumed of any model" in table
    assert not plan["expert_use_seen"]
    assert "42 of 42 stops and 0 experts" in table
    assert "mapped" not in table


def test_a_config_alone_is_planned(configured: Path, monkeypatch: Any, capsys: Any) -> None:
    plan, _ = planned(["plan", configured], monkeypatch, capsys)
    by_config, _ = planned(["plan", "--config", configured / "config.json"], monkeypatch, capsys)
    by_weights, _ = planned(["plan", TINY_BLOOM], monkeypatch, capsys)
    assert plan["weight_bytes"] == by_config["weight_bytes"] == by_weights["weight_bytes"]
    assert [p["weights_are_here"] for p in (plan, by_config, by_weights)] == [False, False, True]
    assert not any(p["disk_measured"] or p["rates_measured"] for p in (plan, by_config, by_weights))


def test_the_tokens_of_a_file_are_counted(configured: Path, monkeypatch: Any, capsys: Any) -> None:
    plan, said = planned(["plan", TINY_BLOOM, "--file", SENTENCES], monkeypatch, capsys)
    assert "tokens in 24 lines, by the model's tokenizer" in said
    dry, _ = planned(["forward", SENTENCES, "--dry-run"], monkeypatch, capsys)
    assert (plan["tokens"], plan["longest"]) == (dry["tokens"], dry["longest"])
    again, _ = planned(["plan", configured, "--file", SENTENCES], monkeypatch, capsys)
    assert again["longest"] == plan["longest"]
    (configured / "tokenizer.json").unlink()
    estimated, said = planned(["plan", configured, "--file", SENTENCES], monkeypatch, capsys)
    assert "there is no tokenizer here, so a token is counted for every 3 bytes" in said
    lines = [line for line in SENTENCES.read_text().splitlines() if line]
    assert estimated["tokens"] == sum(-(-len(line.encode()) // 3) + 1 for line in lines)


def test_a_coded_store_is_not_told_to_become_one(
    embedded: Callable[[str], Path], monkeypatch: Any, capsys: Any
) -> None:
    arguments = ["--ram", "3GiB", "--tokens", "1", "--longest", "1"]
    monkeypatch.setattr("slowllm.runtime.survey.block_rates", lambda lm, rates: rates)
    for folder, is_advised in [(TINY_BLOOM, True), (embedded("int8"), False), (embedded("int4"), False)]:
        assert run(["plan", folder, *arguments], monkeypatch) == 0
        assert ("a store of 8 bits" in capsys.readouterr().out) == is_advised


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan"], "give a model or --config, and not both"),
        (["plan", TINY_BLOOM, "--config", TINY_BLOOM], "give a model or --config, and not both"),
        (["plan", TINY_BLOOM, "--file", SENTENCES, "--tokens", 5], "leave --tokens and --longest out"),
        (["plan", "bigscience/bloom", "--device", "cuda"], "is planned for the processor"),
        (["plan", "nobody/nothing"], "slowllm download nobody/nothing`; to plan it without its weights"),
    ],
)
def test_a_plan_that_cannot_be_made_is_refused(
    arguments: list[Any], words: str, monkeypatch: Any, capsys: Any
) -> None:
    assert words in refused(arguments, monkeypatch, capsys)


ITEM = '{"context": "Is the buffer a value?", "choices": [" yes", " no"]}\n'
REQUEST = '{"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": "The value"}}\n'
BOOLQ = '{"question": "is water wet", "passage": "Water wets things.", "answer": true}\n'
TRAIN = '{"prompt": "Is the value returned?", "answer": " yes"}\n'
# Each verb, its file, and the options behind it.
DRY_RUNS: dict[str, tuple[list[str], str, list[str]]] = {
    "forward": (["forward"], "The value is returned.\n", ["--out", "OUT", "--state", "STATE"]),
    "score": (["score"], ITEM, ["--out", "OUT"]),
    "yesno": (["yesno"], "Is the value returned?\n", ["--out", "OUT"]),
    "generate": (["generate", "--prompts"], "The value\n", ["--out", "OUT"]),
    "lookup": (["generate", "--prompts"], "The value\n", ["--draft", "lookup"]),
    "batch": (["batch"], REQUEST, ["--out", "OUT", "--state", "STATE"]),
    "tune": (["tune"], TRAIN, ["--out", "OUT", "--state", "STATE"]),
    "tune top": (["tune"], TRAIN, ["--out", "OUT", "--kind", "deep", "--top", "1"]),
    "boolq": (["eval", "boolq", "--data"], BOOLQ, ["--out", "OUT", "--template-file", "TEMPLATES"]),
}


@pytest.mark.parametrize("weights", [True, False], ids=["weights", "config"])
@pytest.mark.parametrize("verb", DRY_RUNS)
def test_a_dry_run_prints_a_plan_and_does_nothing_else(
    verb: str, weights: bool, configured: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    command, content, options = DRY_RUNS[verb]
    file = tmp_path / "input.jsonl"
    file.write_text(content)
    templates = ROOT / "slowllm" / "inference" / "templates" / "boolq.yaml"
    paths = {"OUT": tmp_path / "out", "STATE": tmp_path / "state", "TEMPLATES": templates}
    before = sorted(tmp_path.rglob("*"))
    model = TINY_BLOOM if weights else configured
    arguments = [*command, file, *(paths.get(option, option) for option in options), "--model", model]
    assert run([*arguments, "--dry-run"], monkeypatch) == 0
    table = capsys.readouterr().out
    assert table.count("would do") == (2 if verb == "tune top" else 1)
    assert ("planned from" in table) == (not weights)
    assert sorted(tmp_path.rglob("*")) == before
