"""Rates are positive, small checkpoints are not measured, and a plan is printed before anything starts."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import slowllm
from slowllm.entrypoints.progress import duration
from slowllm.errors import PlanError
from slowllm.planning.host_plan import least_bytes
from slowllm.planning.job import Job, Rates
from slowllm.runtime import rates as rates_module
from slowllm.runtime import survey
from slowllm.runtime.description import ModelInfo
from slowllm.runtime.rates import disk_rate, quick_rates
from slowllm.storage.checkpoint import Checkpoint
from slowllm.storage.manifest import open_checkpoint
from tests.support.command_line import refused, run
from tests.support.paths import TINY_BLOOM


def test_the_disk_is_measured_on_the_models_own_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slowllm.runtime.rates.PIECE_BYTES", 1 << 20)
    with Checkpoint.open(TINY_BLOOM) as checkpoint:
        rate = disk_rate(checkpoint, 4 << 20)
    assert 1e6 < rate.bytes_per_second < 1e12
    assert 0 < rate.core_seconds_per_gb < 1e3


def test_no_more_of_the_disk_is_read_than_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slowllm.runtime.rates.PIECE_BYTES", 1 << 16)
    read: list[int] = []
    true = os.preadv

    def count(*arguments: Any) -> int:
        read.append(true(*arguments))
        return read[-1]

    monkeypatch.setattr(os, "preadv", count)
    with Checkpoint.open(TINY_BLOOM) as checkpoint:
        assert max(span.num_bytes for span in checkpoint.spans.values()) > 12 << 16
        disk_rate(checkpoint, 4 << 16)
    # Four pieces more, read before the clock starts, and what lies beside a piece in its pages.
    assert 8 << 16 <= sum(read) <= (8 << 16) + 8 * 2 * 4096


def test_a_small_checkpoint_is_not_measured_and_a_large_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert quick_rates(TINY_BLOOM, "auto") == Rates()
    monkeypatch.setattr("slowllm.runtime.rates.WORTH_MEASURING_BYTES", 1)
    monkeypatch.setattr("slowllm.runtime.rates.WIDTH", 512)
    rates = quick_rates(TINY_BLOOM, "float32")
    assert rates.measured
    assert all(1e6 < rate < 1e15 for rate in (rates.disk, rates.memory, rates.compute))


@pytest.mark.parametrize("granularity", ["blocks", "leaves"])
def test_the_first_block_is_measured_and_no_other_is_passed(
    granularity: Any, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slowllm.modeling.layout.MIN_LEAF_BYTES", 0)
    passed: list[int] = []
    with slowllm.load(tiny("llama-2"), keep_resident=False, granularity=granularity) as lm:
        with lm.watching(lambda passage: passed.append(passage.stop)):
            rates = survey.block_rates(lm, Rates())
        assert rates.measured
        assert all(math.isfinite(rate) and rate > 0 for rate in (rates.memory, rates.compute))
        first = [n for n, name in enumerate(lm.layout.modules) if f"{name}.".startswith("model.layers.0.")]
        assert set(passed) == set(first)
        # And the model is as it was.
        assert lm.model(torch.tensor([[5, 6]])).logits.isfinite().all()


def test_a_plan_is_a_table_or_one_document(monkeypatch: Any, capsys: Any) -> None:
    arguments = ["plan", TINY_BLOOM, "--ram", "3GiB", "--tokens", "5000", "--longest", "100"]
    assert run(arguments, monkeypatch) == 0
    table = capsys.readouterr().out
    for words in (
        "5,000 tokens, sequences of up to 100",
        "everything, mapped",
        "would do",
        "tiny-bloom: 7.5 MB",
    ):
        assert words in table
    assert run([*arguments, "--json"], monkeypatch) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["tokens"] == 5000
    assert plan["ring_bytes"] == 0
    assert plan["num_sweeps"] * plan["sweep_tokens"] >= 5000
    assert 0 < plan["smallest_ram_bytes"] <= plan["peak_ram_bytes"] <= plan["ram_bytes"] == 3 << 30


def test_a_plan_that_cannot_be_kept_is_refused(monkeypatch: Any, capsys: Any) -> None:
    said = refused(["plan", TINY_BLOOM, "--ram", "100MiB"], monkeypatch, capsys)
    assert "is too small for this model: the smallest that would do is" in said
    said = refused(["plan", TINY_BLOOM, "--tokens", "5", "--longest", "6"], monkeypatch, capsys)
    assert "--longest 6 is more than all 5 tokens of the job" in said
    assert "no such folder" in refused(["plan", "/nowhere"], monkeypatch, capsys)


def test_a_plan_for_gradients_never_cuts_blocks(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slowllm.modeling.layout.MIN_LEAF_BYTES", 0)
    # What the process holds would blur the few bytes between the budgets of a tiny model.
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0))
    monkeypatch.setattr("psutil.Process", lambda: process)
    folder = tiny("llama-2")
    forward = Job(num_tokens=100, longest=10, forward_only=True, keeps_results=False)
    needed = {}
    for granularity in ("blocks", "leaves"):
        with slowllm.load(folder, keep_resident=False, granularity=granularity) as lm:
            needed[granularity] = least_bytes(lm.sizes, forward, keep_resident=False)
    assert needed["leaves"] < needed["blocks"]
    options: dict[str, Any] = {"ram": needed["leaves"], "dtype": "fp32", "keep_resident": False}
    found = survey.survey(ModelInfo(folder), job=forward, **options)
    assert (found.plan.granularity, found.dtype) == ("leaves", "float32")
    with_gradients = replace(forward, forward_only=False)
    with slowllm.load(folder, keep_resident=False, granularity="leaves") as lm:
        options["ram"] = least_bytes(lm.sizes, with_gradients, keep_resident=False)
    with pytest.raises(PlanError, match="is too small for this model"):
        survey.survey(ModelInfo(folder), job=with_gradients, **options)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0, "0 s"), (3.21, "3.2 s"), (99, "99 s"), (100, "1.7 min"), (840, "14 min"), (18_360, "5.1 h")],
)
def test_times_are_said_as_people_say_them(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_product_without_a_kernel_is_not_measured_at_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []

    def slow(products: Any, num_rounds: int) -> list[float]:
        shapes.extend(tuple(product.args[0].shape) for product in products)
        return [1.0 if product.args[0].dtype == torch.bfloat16 else 1e-3 for product in products]

    monkeypatch.setattr(rates_module, "_shortest_seconds", slow)
    # Without its cache: another test of this process may have measured already.
    monkeypatch.setattr(rates_module, "_product_times", rates_module._product_times.__wrapped__)
    with open_checkpoint(TINY_BLOOM) as checkpoint:
        assert rates_module.choose_dtype("auto", checkpoint) is torch.float32
    assert shapes == [rates_module.PROBE] * 2
    # 512 rows of the full width are 8,192 times the work of the probe.
    assert rates_module._product_seconds(512, torch.bfloat16) == pytest.approx(8192.0)
    assert shapes == [rates_module.PROBE] * 3
