"""`slowllm doctor` says what this machine is, and plans the same two jobs for each model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slowllm.planning.job import Job
from slowllm.runtime import fit as fits
from slowllm.runtime.blueprint import known_blueprint
from slowllm.runtime.known_models import KNOWN_MODELS
from slowllm.runtime.survey import survey_blueprint
from tests.support.command_line import refused, run
from tests.support.paths import TINY_BLOOM


@pytest.fixture(autouse=True)
def small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring would multiply matrices of the width that large models have."""
    monkeypatch.setattr("slowllm.runtime.rates.WIDTH", 512)


def diagnosed(arguments: list[Any], monkeypatch: Any, capsys: Any) -> dict[str, Any]:
    assert run(["doctor", *arguments, "--json"], monkeypatch) == 0
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


def test_a_model_is_planned_on_a_disk_that_was_measured(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr("slowllm.runtime.machine.folder_rate", lambda path: (1.5e9, "a file written there"))
    found = diagnosed(["meta-llama/Llama-3.1-8B", "--folder", tmp_path, "--ram", "4GiB"], monkeypatch, capsys)
    assert found["disks"] == [
        {"folder": str(tmp_path), "bytes_per_second": 1.5e9, "read": "a file written there"}
    ]
    (row,) = found["models"]
    assert row["fits"]
    assert row["disk_measured"]
    assert row["processor_measured"]
    assert 0 < row["smallest_ram_bytes"] <= 4 << 30
    # A token reads all weights but those that stay.
    assert row["token_seconds"] >= 0.5 * row["weight_bytes"] / 1.5e9
    assert [change["boolq_hours"] for change in row["faster"]] == sorted(
        change["boolq_hours"] for change in row["faster"]
    )


def test_the_figures_are_those_of_plan(monkeypatch: Any, capsys: Any) -> None:
    blueprint = known_blueprint("bigscience/bloom-560m")
    from slowllm.planning.job import Rates

    job = Job(3270 * 150, 512, forward_only=True, keeps_results=False)
    planned = survey_blueprint(blueprint, ram=4 << 30, dtype="fp32", job=job, rates=Rates())
    fit = fits.fit_of(
        blueprint, [job], ram_bytes=4 << 30, process_bytes=planned.process_bytes, dtype="fp32", rates_of=lambda _: Rates()
    )  # fmt: skip
    assert fit.surveys[0].plan.forecast == planned.plan.forecast
    assert fit.smallest_bytes == planned.smallest_bytes


def test_a_model_that_does_not_fit_says_what_would_do(monkeypatch: Any, capsys: Any) -> None:
    (row,) = diagnosed(["bigscience/bloom-560m", "--ram", "64MiB"], monkeypatch, capsys)["models"]
    assert not row["fits"]
    assert row["smallest_ram_bytes"] > 64 << 20
    assert row["boolq_hours"] is None
    assert run(["doctor", "bigscience/bloom-560m", "--ram", "64MiB"], monkeypatch) == 0
    assert "bigscience/bloom-560m would run with --ram " in capsys.readouterr().out


@pytest.mark.long
def test_weights_that_are_here_and_a_store_are_planned(
    embedded: Callable[[str], Path], monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr("slowllm.runtime.survey.block_rates", lambda lm, rates: rates)
    (row,) = diagnosed([TINY_BLOOM], monkeypatch, capsys)["models"]
    assert row["model"] == "tiny-bloom"
    assert row["fits"]
    (coded,) = diagnosed([embedded("int8")], monkeypatch, capsys)["models"]
    assert coded["weight_bytes"] < row["weight_bytes"]


@pytest.mark.long
def test_twelve_known_models_are_planned_where_none_is_named(monkeypatch: Any, capsys: Any) -> None:
    assert len(set(fits.TWELVE)) == 12
    assert set(fits.TWELVE) <= set(KNOWN_MODELS)
    assert run(["doctor", "--ram", "16GiB"], monkeypatch) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in fits.TWELVE)
    assert "change first, for BoolQ with " in table


def test_a_folder_that_is_not_there_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    said = refused(["doctor", "--folder", tmp_path / "nothing"], monkeypatch, capsys)
    assert "no such folder to measure" in said
