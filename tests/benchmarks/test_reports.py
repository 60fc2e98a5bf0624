"""What a benchmark reports of what its sides measured: figures made up here, and limits and ratios worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import forward_pass, generation, machine, scoring, sides, tuning_step
from benchmarks import report as report_page
from slowllm.runtime.rates import DiskRate
from tests.support.reports import read_report

Runs = dict[str, list[dict[str, Any]]]
Report = Callable[..., dict[str, Any]]
SHARED = {
    "weight_bytes": 6_000_000_000,
    "resident_bytes": 0,
    "num_resident": 0,
    "mapped": False,
    "peak_rss_bytes": 7,
}
GB = 1_000_000_000


@pytest.fixture
def report_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Report:
    """Return the report of a benchmark of four blocks of Llama-70B, each of whose sides reports what it is given.

    The disk has 1, 2 and 9 GB/s in turn, the processor 1, 2 and 3 TFLOP/s. A block has 10 million weights to multiply
    with, the head 5 million.
    """

    def report(module: Any, runs: Runs, *arguments: str) -> dict[str, Any]:
        left = {name: list(figures) for name, figures in runs.items()}
        disk, flops = iter([1 * GB, 2 * GB, 9 * GB]), iter([1e12, 2e12, 3e12])
        monkeypatch.setattr(sides, "checkpoint", lambda *_: tmp_path)
        monkeypatch.setattr(sides, "capped", sides.contextlib.nullcontext)
        monkeypatch.setattr(sides, "run", lambda _, name, *rest, **options: left[name].pop(0))
        monkeypatch.setattr(machine, "measure_disk", lambda folder: DiskRate(next(disk), 0.5))
        monkeypatch.setattr(machine, "gemm_flops_per_second", lambda *_: next(flops))
        if hasattr(module, "matrix_sizes"):
            monkeypatch.setattr(module, "matrix_sizes", lambda folder: (10e6, 5_000_000, 64))
        module.main(["--geometry", "llama-70b", "--blocks", "4", *arguments])
        assert not any(left.values()), "each side runs as often as was asked for"
        return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))

    return report


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the sides agree."""
    packed = {"rider_tokens": 64, "padding_tokens": 0}
    monkeypatch.setattr(forward_pass, "verify", lambda *_: (packed, 0.0))
    monkeypatch.setattr(tuning_step, "verify", lambda *_: 0.001)


def sweep(wall_s: float, read_bytes: int, **more: Any) -> dict[str, Any]:
    figures = {"wall_s": wall_s, "read_bytes": read_bytes, "wait_s": 1.0, "compute_s": 2.0, **SHARED}
    return {**figures, "block_s": 1.25, "rest_s": 0.5, "predicted_s": 4.0, **more}


def ours(wall_s: float, read_bytes: int, **more: Any) -> dict[str, Any]:
    sweeps = [sweep(wall_s, read_bytes), sweep(4.0, 3 * GB), sweep(2.0, 1 * GB)]
    return sweep(wall_s, read_bytes, micro_batches=[2], top=[1, 2], sweeps=sweeps, block_bytes=5 * GB, **more)


RESIDENT = [{"wall_s": 0.0, "block_s": block_s, "head_s": 0.1} for block_s in (0.5, 0.6, 0.9)]


@pytest.mark.usefixtures("verified")
def test_a_pass_is_compared_with_the_slower_of_disk_and_processor(report_of: Report) -> None:
    runs: Runs = {
        "ours": [ours(5.0, 8 * GB), ours(4.0, 8 * GB), ours(9.0, 8 * GB)],
        "resident": RESIDENT,
        "accelerate": [
            {"wall_s": wall_s, "top": [1, 2], "peak_rss_bytes": 9} for wall_s in (10.0, 20.0, 90.0)
        ],
    }
    report = report_of(
        forward_pass, runs, "--tokens", "10", "--sequences", "2", "--sweeps", "3", "--peer", "accelerate"
    )
    assert (report["disk_gb_per_s"], report["gemm_tflop_per_s"], report["wall_s"]) == (2.0, 2.0, 5.0)
    assert report["gemm_limit_s"] == pytest.approx(2 * (10e6 * 4 * 10 + 5e6 * 2) / 2e12)
    # A first sweep must read 6 GB once, though 8 GB were read: 3 s; four blocks and the head in memory take 2.5 s.
    assert (report["disk_limit_s"], report["resident_compute_s"]) == (3.0, pytest.approx(2.5))
    assert (report["limit_s"], report["efficiency"]) == (3.0, 0.6)
    assert report["gb_per_s"] == 1.2
    assert report["full_model_s"] == 1.25 * 80 + 0.5
    # The later sweeps read 3 and 1 GB: 1.5 s and 0.5 s, so computing is their limit.
    assert [later["limit_s"] for later in report["later_sweeps"]] == [pytest.approx(2.5)] * 2
    assert (report["peer_wall_s"], report["speedup"], report["peer_same_tokens"]) == (20.0, 4.0, 1)
    assert report["peer_gb_per_s"] == 0.3
    assert report["speedup_later"] == 20 / 3


@pytest.mark.usefixtures("verified")
@pytest.mark.parametrize(("warm", "disk_limit_s"), [("--warm", 0.0), ("--stream-all", 6.0)])
def test_a_mapped_model_reads_everything_unless_the_page_cache_is_warm(
    report_of: Report, warm: str, disk_limit_s: float
) -> None:
    runs = {"ours": [ours(8.0, 0) | {"mapped": True}], "resident": RESIDENT[:1]}
    report = report_of(forward_pass, runs, "--repeat", "1", warm)
    assert report["disk_limit_s"] == disk_limit_s
    assert report["limit_s"] == max(disk_limit_s, 2.1)


@pytest.mark.usefixtures("verified")
def test_of_the_peers_two_ways_the_faster_one_counts(report_of: Report) -> None:
    peer = {"top": [1, 2], "peak_rss_bytes": 9}
    runs: Runs = {
        "ours": [ours(5.0, 6 * GB)],
        "resident": RESIDENT[:1],
        "accelerate": [{"wall_s": 30.0, **peer}],
        "accelerate_one_by_one": [{"wall_s": 15.0, "measured": 2, **peer}],
    }
    report = report_of(forward_pass, runs, "--case", "mixed", "--repeat", "1", "--peer", "accelerate")
    assert (report["peer_padded_s"], report["speedup_padded"]) == (30.0, 6.0)
    assert (report["peer_one_by_one_s"], report["speedup_one_by_one"]) == (15.0, 3.0)
    assert (report["peer_wall_s"], report["speedup"]) == (15.0, 3.0)
    runs["accelerate"] = [{"wall_s": 30.0, "top": [3, 4], "peak_rss_bytes": 9}]
    with pytest.raises(SystemExit, match="the same likeliest token for only 0%"):
        report_of(forward_pass, runs, "--case", "mixed", "--repeat", "1", "--peer", "accelerate")


@pytest.mark.usefixtures("verified")
def test_many_sentences_may_read_the_weights_more_than_once(report_of: Report) -> None:
    figures = {"num_sweeps": 3, "num_scored": 38, "mean_log_prob": -8.0, "written_bytes": 1}
    report = report_of(
        forward_pass, {"many": [sweep(20.0, 18 * GB) | figures]},
        "--case", "many", "--sentences", "2", "--repeat", "1",
    )  # fmt: skip
    assert report["disk_limit_s"] == report["limit_s"] == 18.0
    assert report["gemm_limit_s"] == pytest.approx(2 * (10e6 * 4 * 40 + 5e6 * 38) / 1e12)
    assert report["gemm_efficiency"] == pytest.approx(report["gemm_limit_s"] / 20)
    assert report["efficiency"] == 0.9


@pytest.mark.usefixtures("verified")
def test_the_blocks_of_a_store_are_compared_and_not_its_head(
    report_of: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sides, "store_of", lambda folder, store: folder / store)
    stored = ours(9.0, 4 * GB, granularity="blocks") | {"block_s": 0.5, "block_bytes": 2 * GB, "top": [1, 9]}
    runs = {"ours": [ours(5.0, 8 * GB), stored], "resident": RESIDENT[:1]}
    found = report_of(forward_pass, runs, "--store", "int8", "--repeat", "1")["stored"]
    assert (found["blocks_s"], found["plain_blocks_s"], found["blocks_of_plain"]) == (2.0, 5.0, 0.4)
    assert (found["block_bytes_of_plain"], found["blocks_disk_s"]) == (0.4, 2.0)
    assert found["same_tokens"] == 0.5


def test_scoring_compares_with_rows_that_share_nothing_and_with_the_peer(report_of: Report) -> None:
    common = {
        "probabilities": [0.5, 0.6],
        "num_sweeps": 2.0,
        "wait_s": 1.0,
        "compute_s": 1.0,
        "read_bytes": 1,
    }
    figures = {**common, **SHARED, "plan_peak_bytes": 1, "planned_tokens": 10, "predicted_s": 1.0}
    runs: Runs = {
        "ours": [figures | {"wall_s": wall_s} for wall_s in (5.0, 4.0, 9.0)],
        "whole": [figures | {"wall_s": wall_s} for wall_s in (10.0, 20.0, 90.0)],
        "accelerate": [{"wall_s": 30.0, "measured": 2, "num_sweeps": 8, "probabilities": [0.52]}] * 3,
    }
    report = report_of(scoring, runs, "--questions", "20", "--peer", "accelerate")
    assert (report["wall_s"], report["whole_s"], report["speedup_by_sharing"]) == (5.0, 20.0, 4.0)
    assert (report["questions_per_sweep"], report["questions_per_second"]) == (10.0, 4.0)
    assert (report["disk_limit_s"], report["speedup"]) == (3.0, 6.0)
    runs["accelerate"] = [runs["accelerate"][0] | {"probabilities": [0.56]}] * 3
    with pytest.raises(SystemExit, match=r"accelerate gives a choice another probability, by 0\.06"):
        report_of(scoring, runs, "--questions", "20", "--peer", "accelerate")


def test_generation_is_limited_by_all_its_sweeps(report_of: Report) -> None:
    figures = {
        "tokens": [[1, 2]] * 4, "num_sweeps": 2.0, "wait_s": 1.0, "compute_s": 1.0, **SHARED, "plan_peak_bytes": 1,
        "predicted_s": 1.0, "predicted_sweeps": 2, "first_token_s": 1.0, "later_token_s": 0.5, "later_token_bytes": 1,
        "expert_hits": None,
    }  # fmt: skip
    runs: Runs = {
        "ours": [figures | {"wall_s": wall_s, "read_bytes": 12 * GB} for wall_s in (8.0, 4.0, 9.0)],
        "accelerate": [{"wall_s": 24.0, "tokens": [[1, 9]] * 4, "peak_rss_bytes": 9}] * 3,
        "accelerate_one_by_one": [{"wall_s": 80.0, "measured_tokens": 2, "peak_rss_bytes": 9}] * 3,
    }
    arguments = ("--prompts", "4", "--new-tokens", "2", "--prompt-tokens", "1", "--peer", "accelerate")
    report = report_of(generation, runs, *arguments)
    assert report["tokens_per_sweep"] == 4.0
    # Prompts of one token, and a second token of each: eight tokens through the blocks, eight through the head.
    assert report["gemm_limit_s"] == pytest.approx(2 * (10e6 * 4 * 8 + 5e6 * 8) / 2e12)
    assert (report["disk_limit_s"], report["limit_s"], report["efficiency"]) == (6.0, 6.0, 0.75)
    assert (report["speedup_batch"], report["speedup_one_by_one"]) == (3.0, 10.0)
    runs["accelerate"] = [runs["accelerate"][0] | {"tokens": [[1, 2], [8, 2], [8, 2], [8, 2]]}] * 3
    with pytest.raises(SystemExit, match="first tokens are ours for only 25%"):
        report_of(generation, runs, *arguments)


def step(seconds: float, read_bytes: int, loss: float = 5.0) -> dict[str, Any]:
    figures = {"seconds": seconds, "read_bytes": read_bytes, "wait_s": 1.0, "compute_s": 2.0}
    return {**figures, "loss": loss, "grad_norm": 0.5}


def tuned(*steps: dict[str, Any], first_epoch_s: float = 9.0) -> dict[str, Any]:
    plan = {"rider_tokens": 64, "padding_tokens": 0, "plan_peak_bytes": 1}
    forecast = {"predicted_s": 1.0, "predicted_later_s": 1.0}
    return {"wall_s": 0.0, "steps": list(steps), "first_epoch_s": first_epoch_s, **SHARED, **plan, **forecast}


@pytest.mark.usefixtures("verified")
def test_a_tuning_steps_first_and_later_steps_have_limits_of_their_own(report_of: Report) -> None:
    runs: Runs = {
        "ours": [tuned(step(10.0, 12 * GB), step(6.0, 8 * GB), step(3.0, 4 * GB))],
        "resident": [{"wall_s": 0.0, "block_s": 1.75, "head_s": 0.5, "micro_batches": 2}],
        "accelerate": [step(0.0, 24 * GB) | {"wall_s": 36.0, "peak_rss_bytes": 9}],
    }
    arguments = ("--sentences", "4", "--sentence-tokens", "6", "--virtual-tokens", "5", "--repeat", "1")
    report = report_of(tuning_step, runs, *arguments, "--peer", "accelerate")
    assert report["tokens"] == 4 * (5 + 5)
    # Forward, recomputed, and backward through four blocks; forward and backward through the head.
    assert report["gemm_limit_s"] == pytest.approx((6 * 10e6 * 4 * 40 + 4 * 5e6 * 20) / 1e12)
    assert report["resident_compute_s"] == 7.5
    first, later = report["first"], report["later"]
    assert (first["read_of_forward"], first["disk_limit_s"], first["limit_s"]) == (2.0, 12.0, 12.0)
    assert first["efficiency"] == 1.2
    # The median of the later two steps.
    assert (later["seconds"], later["disk_limit_s"], later["limit_s"]) == (4.5, 6.0, 7.5)
    assert (report["speedup"], report["speedup_later"]) == (3.6, 8.0)
    runs["accelerate"][0]["loss"] = 5.1
    with pytest.raises(SystemExit, match=r"our first step has a loss of 5, not 5\.1"):
        report_of(tuning_step, runs, *arguments, "--peer", "accelerate")


@pytest.mark.usefixtures("verified")
def test_a_tuning_step_on_a_store_is_compared_by_loss_and_gradient(
    report_of: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sides, "store_of", lambda folder, store: folder / store)
    stored = tuned(step(3.0, 6 * GB, loss=5.5), step(2.0, 3 * GB))
    runs = {
        "ours": [tuned(step(10.0, 12 * GB), step(6.0, 8 * GB)), stored],
        "resident": [{"wall_s": 0.0, "block_s": 1.75, "head_s": 0.5, "micro_batches": 2}],
    }
    found = report_of(tuning_step, runs, "--store", "int8", "--repeat", "1")["stored"]
    assert (found["first"]["seconds"], found["later"]["seconds"]) == (3.0, 2.0)
    assert (found["loss_change"], found["grad_norm_change"]) == (pytest.approx(0.1), 0)
    runs["ours"][1]["steps"][0]["loss"] = 5.5
    with pytest.raises(SystemExit, match=r"a step on the store has a loss of 5\.5, not 5"):
        report_of(tuning_step, runs, "--store", "lossless", "--repeat", "1")


@pytest.mark.usefixtures("verified")
def test_an_epoch_above_frozen_blocks_is_compared_with_the_first(report_of: Report) -> None:
    whole = tuned(step(10.0, 12 * GB), first_epoch_s=12.0)
    runs = {"ours": [whole, tuned(step(4.0, 6 * GB), step(2.0, 3 * GB), first_epoch_s=8.0)]}
    report = report_of(tuning_step, runs, "--top", "1", "--steps", "2", "--repeat", "1")
    assert (report["first_epoch_s"], report["later_epoch_s"], report["first_of_later"]) == (8.0, 2.0, 4.0)
    assert report["without_frozen_s"] == 12.0
    runs["ours"][0]["steps"][0]["loss"] = 4.0
    with pytest.raises(SystemExit, match="above the frozen blocks has a loss of 5, not 4"):
        report_of(tuning_step, runs, "--top", "1", "--steps", "2", "--repeat", "1")


@pytest.mark.usefixtures("verified")
def test_a_page_shows_ours_the_limit_and_the_peer(report_of: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="reports are made with matplotlib")
    peer = {"wall_s": 15.0, "top": [1, 2], "peak_rss_bytes": 9}
    runs: Runs = {"ours": [ours(5.0, 6 * GB)], "resident": RESIDENT[:1], "accelerate": [peer]}
    file = tmp_path / "page.html"
    document = report_of(
        forward_pass, runs, "--tokens", "10", "--sequences", "2", "--repeat", "1", "--peer", "accelerate", "--report",
        str(file),
    )  # fmt: skip
    page = read_report(file)
    assert page.labels == ["Seconds"]
    assert page.headings[0] == "Benchmark forward_pass"
    for name in ("ours", "limit", "limit of the disk", "peer"):
        assert name in page.text
    assert json.dumps(document, indent=2) in page.text
    bars = report_page.bars_of(document, report_page.SECONDS)
    assert dict(bars)["ours"] == 5.0
    assert dict(bars)["peer"] == 15.0


def test_a_page_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        forward_pass.main(["--report", str(tmp_path / "none" / "page.html")])
    assert "no such folder to write page.html to" in capsys.readouterr().err
