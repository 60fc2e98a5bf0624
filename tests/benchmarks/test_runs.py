"""Each benchmark runs on a tiny model, so that it does not rot; what it measures there means nothing.

What is made of the measurements is tested with made-up ones in `test_reports`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import slowllm
from benchmarks import (
    forward_pass,
    generation,
    machine,
    make_checkpoint,
    make_gguf,
    passes,
    scoring,
    sentences,
    serving,
    sides,
    teaching,
    tuning_sides,
    tuning_step,
    visit_cost,
)
from tests.support.processes import Processes


def run(processes: Processes, module: str, *arguments: str) -> dict[str, Any]:
    """Run a benchmark and return the JSON document in its last line."""
    done = processes.run("-m", f"benchmarks.{module}", *arguments)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("benchmarks") / "tiny"
    make_checkpoint.make_checkpoint("tiny", 3, out)
    return out


def options(checkpoint: Path) -> list[str]:
    return ["--geometry", "tiny", "--blocks", "3", "--checkpoint", str(checkpoint), "--ram", "4GiB"]


@pytest.fixture
def measured(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, Any]]:
    """Run a benchmark with all its sides in this process, whose imports are paid for."""

    modules = {
        "passes": (passes.RUNNERS, sentences.Task),
        "scoring": (scoring.RUNNERS, scoring.Task),
        "generation": (generation.RUNNERS, generation.Task),
        "serving": (serving.RUNNERS, serving.Task),
        "tuning_sides": (tuning_sides.RUNNERS, tuning_sides.Task),
    }

    def run_side(module: str, name: str, task: dict[str, Any], **_: object) -> dict[str, Any]:
        runners, kind = modules[module]
        found = {**runners[name](kind(**task)), "peak_rss_bytes": sides.peak_rss_bytes()}
        return dict(json.loads(json.dumps(found)))

    monkeypatch.setattr(sides, "run", run_side)

    def measure(*arguments: str, module: Any = forward_pass) -> dict[str, Any]:
        module.main([*options(tiny_llama), "--repeat", "1", *arguments])
        return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))

    return measure


@pytest.mark.long
def test_forward_pass_runs_its_sides_as_processes(
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    processes: Processes,
) -> None:
    # Each is forked from a process that has paid for the imports, and enters no cgroup.
    monkeypatch.setattr(sides.subprocess, "run", lambda command, **_: processes.run(*command[1:]))
    forward_pass.main([*options(tiny_llama), "--repeat", "1", "--stream-all"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["verified"] is True
    for key in (
        "disk_gb_per_s",
        "read_core_s_per_gb",
        "gemm_tflop_per_s",
        "gemm_limit_s",
        "wait_s",
        "compute_s",
        "full_model_s",
    ):
        assert report[key] > 0, key
    assert report["wait_s"] + report["compute_s"] <= report["wall_s"]
    assert report["resident_bytes"] == 0
    assert report["read_bytes"] >= report["weight_bytes"], "every stop comes from the disk once"


def test_teaching_compares_equal_likelihoods(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pyarrow")
    options = ["--texts", "3", "--tokens", "5", "--top", "4", "--repeat", "1", "--dtype", "fp32"]
    page = tmp_path / "page.html"
    teaching.main(["--checkpoint", str(tiny_llama), *options, "--report", str(page)])
    assert "<svg" in page.read_text()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["verified"] is True
    assert report["tokens"] == 18
    assert report["ratio"] == pytest.approx(report["teach_s"] / report["forward_s"])


def test_visit_cost_compares_equal_bits(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = [
        "--blocks",
        "2",
        "--width",
        "64",
        "--heads",
        "4",
        "--vocab",
        "64",
        "--tokens",
        "3",
        "--rounds",
        "1",
    ]
    visit_cost.main(tiny)
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["verified"] is True
    assert report["stops"] >= 3
    for side in ("guest", "rider", "together"):
        assert report[f"{side}_token_ms"] > 0
        assert report[f"{side}_speed"] == pytest.approx(report["plain_token_ms"] / report[f"{side}_token_ms"])


@pytest.mark.parametrize(
    "module",
    [
        "forward_pass",
        "generation",
        "scoring",
        "serving",
        "swarm",
        "teaching",
        "tuning_step",
        "visit_cost",
        "expert_counts",
        "lossless_size",
    ],
)
def test_benchmarks_are_programs(module: str, processes: Processes) -> None:
    done = processes.run("-m", f"benchmarks.{module}", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"python -m benchmarks.{module} --" in done.stdout


def test_later_sweeps_read_only_what_is_not_resident(measured: Callable[..., dict[str, Any]]) -> None:
    report = measured("--tokens", "24", "--sequences", "3", "--sweeps", "3", "--peer", "accelerate")
    assert report["mapped"]
    assert report["resident_bytes"] >= report["weight_bytes"]
    assert [sweep["read_bytes"] for sweep in report["later_sweeps"]] == [0, 0]
    assert report["peer_same_tokens"] == 1
    assert sum(report["micro_batches"]) == 3


def test_a_warm_pass_is_a_rate_of_memory(measured: Callable[..., dict[str, Any]]) -> None:
    report = measured("--warm", "--peer", "accelerate")
    assert report["page_cache"] == "warm"
    assert not report["capped_by_cgroup"]
    assert report["disk_limit_s"] == 0, "a mapped model in the page cache needs no disk"


@pytest.mark.parametrize("store", ["lossless", "int8"])
def test_the_blocks_of_a_store_are_compared_with_the_plain_ones(
    store: str, measured: Callable[..., dict[str, Any]]
) -> None:
    report = measured("--store", store, "--stream-all")
    stored = report["stored"]
    assert stored["block_bytes_of_plain"] < (
        0.9 if store == "lossless" else 0.7
    )  # so small, parts are padded
    assert (stored["logits_distance"] == 0) == (store == "lossless")
    assert stored["logits_distance"] < 0.05
    assert stored["read_bytes"] < report["read_bytes"]


def test_a_tuning_step_on_a_store_is_compared_with_the_plain_one(
    measured: Callable[..., dict[str, Any]],
) -> None:
    report = measured("--store", "int8", "--sentences", "3", "--steps", "2", module=tuning_step)
    assert report["stored"]["loss_change"] == pytest.approx(0, abs=0.01)
    assert report["stored"]["grad_norm_change"] == pytest.approx(0, abs=0.1)


def test_mixed_sentences_are_compared_with_both_ways_of_the_peer(
    measured: Callable[..., dict[str, Any]],
) -> None:
    report = measured("--case", "mixed", "--peer", "accelerate")
    assert (report["tokens"], report["sequences"]) == (1024, 64)
    assert sum(report["micro_batches"]) == 64
    assert report["verified"]
    assert report["peer_one_by_one_measured"] == 2
    # Padded on the left on both sides, in other batches: a position off by one would agree nowhere.
    assert report["peer_same_tokens"] > 0.9


def test_many_sentences_are_scored_in_few_sweeps_and_nothing_is_written(
    measured: Callable[..., dict[str, Any]],
) -> None:
    arguments = ("--case", "many", "--sentences", "300", "--sentence-tokens", "20", "--stream-all")
    report = measured(*arguments)
    assert report["tokens"] == 6000
    assert report["num_scored"] == 300 * 19
    assert 1 <= report["num_sweeps"] <= 6
    assert report["written_bytes"] < 1 << 20
    # Of 4,096 tokens with random weights.
    assert -10 < report["mean_log_prob"] < -math.log(4096)


def test_mixed_sentences_have_4_to_60_tokens() -> None:
    task = sentences.Task("", "", "mixed", 0, 1, 0, 0, 1, keep_resident=True)
    lengths = sentences.lengths_of(task)
    assert (len(lengths), sum(lengths), min(lengths), max(lengths)) == (64, 1024, 4, 60)
    assert [len(row) for row in sentences.sentences(task, 100)] == lengths


def test_logits_that_differ_end_the_benchmark() -> None:
    same = [torch.ones(2, 3), torch.zeros(1, 3)]
    forward_pass.compare(same, [part.clone() for part in same])
    with pytest.raises(SystemExit, match=r"not verified: .* by up to 0\.25"):
        forward_pass.compare(same, [same[0], same[1] + 0.25])
    with pytest.raises(SystemExit, match=r"not verified: .* by up to inf"):
        forward_pass.compare(same, [same[0] * math.nan, same[1]])


def test_the_resident_side_has_the_first_block_alone(tiny_llama: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(
        tiny_llama, dtype=torch.bfloat16, experts_implementation="eager"
    )
    model = passes.one_block(tiny_llama)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name
    assert len(model.model.layers) == 1
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["lm_head.weight"]


def test_a_token_is_multiplied_with_two_of_eight_experts(tmp_path: Path) -> None:
    model = make_checkpoint._on_meta("mixtral-8x22b", 1)
    model.config.save_pretrained(tmp_path)
    block, head, width = forward_pass.matrix_sizes(tmp_path)
    experts, attention, router = 3 * 6144 * 16384, 2 * 6144 * 6144 + 2 * 6144 * 1024, 6144 * 8
    assert (block, head, width) == (2 * experts + attention + router, 32768 * 6144, 6144)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "13", "--sequences", "2"], "13 are not 2 sequences"),
        (["--case", "many", "--peer", "accelerate"], "many has no peer"),
        (["--case", "many", "--sentence-tokens", "1"], "must be at least 2"),
        (["--store", "int3"], "invalid choice"),
        (["--case", "many", "--store", "int8"], "many has no peer and no store"),
    ],
)
def test_what_does_not_go_together_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        forward_pass.parse(arguments)
    assert message in capsys.readouterr().err


def test_another_checkpoint_than_was_asked_for_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(SystemExit, match="is not 4 blocks of tiny"):
        forward_pass.main(["--geometry", "tiny", "--blocks", "4", "--checkpoint", str(tiny_llama)])


def test_the_disk_is_measured_on_the_checkpoint_itself(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slowllm.runtime.rates.PIECE_BYTES", 1 << 16)
    monkeypatch.setattr(machine, "PROBE_BYTES", 1 << 19)
    rate = machine.measure_disk(tiny_llama)
    assert rate.bytes_per_second > 0
    assert rate.core_seconds_per_gb > 0


@pytest.mark.parametrize("choice_tokens", [1, 3])
def test_scoring_reports_questions_per_sweep(
    measured: Callable[..., dict[str, Any]], choice_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "TOLERANCE", 0.2)  # so narrow a model in bf16
    report = measured(
        "--questions", "40", "--header-tokens", "50", "--choice-tokens", str(choice_tokens), "--peer", "accelerate",
        module=scoring,
    )  # fmt: skip
    assert report["verified"] is True
    assert report["questions_per_sweep"] == 40
    assert report["planned_tokens"] < 40 * 50, "the header is counted once"
    assert report["peer_passes"] == (3 if choice_tokens == 1 else 5)
    assert report["peer_passes_measured"] == 2


def test_generation_reports_tokens_per_sweep(measured: Callable[..., dict[str, Any]]) -> None:
    report = measured("--prompts", "6", "--new-tokens", "3", "--peer", "accelerate", module=generation)
    assert report["verified"] is True
    assert report["tokens_per_sweep"] == 6
    assert report["num_sweeps"] == report["predicted_sweeps"] == 3
    assert report["peer_one_by_one_measured_tokens"] == 2


def test_generation_can_sample(measured: Callable[..., dict[str, Any]]) -> None:
    report = measured("--prompts", "2", "--new-tokens", "6", "--sample", module=generation)
    assert report["num_sweeps"] == 6
    assert 0 < report["first_token_s"] < report["wall_s"]
    assert 0 < report["later_token_s"] < report["wall_s"]


def test_a_tuning_step_has_a_limit_and_a_peer(measured: Callable[..., dict[str, Any]]) -> None:
    report = measured(
        "--sentences", "12", "--peer-batch", "8", "--stream-all", "--peer", "accelerate", module=tuning_step
    )
    assert report["verified"] is True
    assert 0 < report["gradient_difference"] <= tuning_step.TOLERANCE
    assert report["tokens"] == 12 * 31
    assert report["micro_batches"] >= 1
    assert not report["mapped"]
    assert report["first"]["read_of_forward"] >= 1
    for name in ("first", "later"):
        assert 0 < report[name]["compute_s"] < report[name]["seconds"]


def test_an_epoch_above_frozen_blocks_is_compared_with_the_first(
    measured: Callable[..., dict[str, Any]],
) -> None:
    report = measured("--sentences", "12", "--top", "1", "--steps", "2", module=tuning_step)
    assert report["verified"] is True
    assert report["first_epoch_s"] > report["first"]["seconds"], (
        "the frozen blocks are passed before the first step"
    )
    assert report["first_of_later"] == report["first_epoch_s"] / report["later_epoch_s"]
    assert report["later_epoch_s"] == report["later"]["seconds"]
    assert report["without_frozen_s"] > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("TOLERANCE", "our gradient of one block differs"),
        ("LOSS_TOLERANCE", "a step on one block has a loss"),
    ],
)
def test_a_gradient_or_a_loss_that_differs_is_not_reported(
    measured: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setattr(tuning_step, name, -1.0)
    with pytest.raises(SystemExit, match=f"not verified: {message}"):
        measured("--sentences", "2", module=tuning_step)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top", "4"], "leaves no frozen blocks of 4"),
        (["--top", "1", "--peer", "accelerate"], "--top has no peer"),
        (["--steps", "1"], "must be at least 2"),
        (["--sentence-tokens", "1"], "must be at least 2"),
    ],
)
def test_tuning_options_that_do_not_go_together_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        tuning_step.parse(arguments)
    assert message in capsys.readouterr().err


def test_answers_that_differ_are_not_reported(
    measured: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "TOLERANCE", -1.0)
    with pytest.raises(SystemExit, match="not verified: ours gives a choice another probability"):
        measured("--questions", "4", "--header-tokens", "5", module=scoring)


def test_a_checkpoint_is_written_as_the_hub_has_it(tmp_path: Path, processes: Processes) -> None:
    report = run(processes, "make_checkpoint", "--geometry", "tiny", "--blocks", "3", str(tmp_path / "tiny"))
    assert report["bytes"] == sum(
        tensor.numel() * 2
        for tensor in AutoModelForCausalLM.from_pretrained(tmp_path / "tiny", experts_implementation="eager")
        .state_dict()
        .values()
    )
    with slowllm.load(tmp_path / "tiny", dtype="fp32") as lm, torch.no_grad():
        ids = lm.tokenizer("The value is returned.", return_tensors="pt")["input_ids"]
        hidden = lm.model(ids, output_hidden_states=True).hidden_states
        assert all(0.01 < float(state.std()) < 100 for state in hidden)


BILLIONS = {
    "bloom-176b": 176.2,
    "llama-70b": 70.6,
    "llama-405b": 405.9,
    "mixtral-8x22b": 140.6,
    "falcon-180b": 179.5,
    "glm-5.2": 743.9,
    "deepseek-v4-flash": 284.3,
}


@pytest.mark.parametrize("geometry", BILLIONS)
def test_geometries_have_the_sizes_of_the_published_models(geometry: str) -> None:
    model = make_checkpoint._on_meta(geometry, make_checkpoint.num_model_blocks(geometry))
    assert math.isclose(model.num_parameters() / 1e9, BILLIONS[geometry], rel_tol=0.005)
    names = make_checkpoint._names_on_disk(make_checkpoint._on_meta(geometry, 1))
    if geometry == "bloom-176b":
        assert "h.0.self_attention.query_key_value.weight" in names
    if geometry == "mixtral-8x22b":
        assert "model.layers.0.block_sparse_moe.experts.7.w2.weight" in names
    if geometry == "deepseek-v4-flash":
        assert "layers.0.ffn.experts.255.w2.weight" in names


def test_a_disk_too_small_is_refused_with_the_numbers(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"needs 811\.\d GB but .* GB are free"):
        make_checkpoint.make_checkpoint("llama-405b", 126, tmp_path / "big")
    assert list(tmp_path.iterdir()) == []


def test_serving_asks_from_many_threads(measured: Callable[..., dict[str, Any]]) -> None:
    report = measured("--clients", "8", "--new-tokens", "3", module=serving)
    assert report["verified"] is True
    assert report["all_tokens"] == 8 * 3
    assert report["one_tokens"] == 3
    assert report["all_sweeps"] < 8 * report["one_sweeps"], "they share sweeps, whenever their threads begin"
    assert report["aggregate_of_one"] == pytest.approx(
        report["all_tokens_per_s"] / report["one_tokens_per_s"]
    )


def test_a_gguf_file_of_a_geometry_is_a_model(tmp_path: Path) -> None:
    out = tmp_path / "gguf"
    num_bytes = make_gguf.make_gguf("tiny", 2, out)
    assert (out / "tiny.gguf").stat().st_size == num_bytes
    with slowllm.load(out, dtype="float32") as lm, torch.no_grad():
        logits = lm.model(torch.arange(5, 15)[None]).logits
    assert 0.1 < float(logits.std()) < 10
