"""What is remembered of the experts that earlier runs chose."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import slowllm
from slowllm.planning import host_plan
from slowllm.planning.job import Job, Rates
from slowllm.runtime import expert_history
from slowllm.runtime.description import ModelInfo
from slowllm.runtime.expert_history import SWITCH, ExpertHistory, ModuleCounts, counts_folder
from slowllm.runtime.survey import block_rates, survey
from slowllm.streaming.kept_stops import ENOUGH_COUNTS
from tests.support.families import resident
from tests.support.processes import Processes

NAME = "qwen3-moe"
NUM_KEPT = 2
SIZES = {"a.experts": 4, "b.experts": 4}
FINGERPRINT = "0123" * 16


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have a cache folder that is not there yet."""
    monkeypatch.delenv(SWITCH)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "slowllm" / "experts"


@pytest.fixture
def few_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have plans with room for a few experts of each block."""

    def planned(choices: Any, **options: Any) -> Any:
        plan = host_plan.make_plan(choices, **options)
        sizes = host_plan.sizes_for(plan, choices)
        assert sizes.experts is not None
        return replace(plan, kept_units=NUM_KEPT * len(sizes.experts.stops))

    monkeypatch.setattr("slowllm.runtime.load.make_plan", planned)


def opened(checkpoint: Path, **options: Any) -> Any:
    return slowllm.load(checkpoint, dtype="float32", granularity="experts", **options)


def ask(lm: Any, *tokens: int) -> None:
    with torch.no_grad():
        for token in tokens:
            lm.model(torch.tensor([[token]]))


def units_of(lm: Any, token: int) -> set[int]:
    """Return the units that a token needs."""
    before = lm.experts.forecast.chosen.copy()
    ask(lm, token)
    return set((lm.experts.forecast.chosen - before).nonzero()[0].tolist())


def rivals(checkpoint: Path) -> tuple[int, int]:
    """Return two tokens of which none needs an expert of the other's in any block but few."""
    with opened(checkpoint) as lm:
        needs = {token: units_of(lm, token) for token in range(5, 17)}
        lm.experts.leave_out()
    pairs = [(one, other) for one in needs for other in needs if one != other]
    return min(pairs, key=lambda pair: len(needs[pair[0]] & needs[pair[1]]))


def saved(folder: Path) -> dict[str, Any]:
    (file,) = folder.glob("*.json")
    content: dict[str, Any] = json.loads(file.read_text())
    return content


@pytest.mark.usefixtures("few_stay")
def test_what_was_needed_most_has_its_place_at_the_next_start(
    tiny: Callable[..., Path], folder: Path, tmp_path: Path
) -> None:
    cold, hot = rivals(tiny(NAME))
    assert not folder.exists()  # nothing is written of what nobody needed
    with opened(tiny(NAME)) as lm:
        ask(lm, cold, *[hot] * 9)
        fingerprint = lm.fingerprint()
    assert [file.name for file in folder.iterdir()] == [f"{fingerprint}.json"]
    shutil.copytree(tiny(NAME), tmp_path / "copy")  # which has the same fingerprint
    hits = {}
    for switch, checkpoint in (("1", tmp_path / "copy"), ("0", tiny(NAME))):
        with pytest.MonkeyPatch.context() as patch, opened_with(patch, switch, checkpoint) as lm:
            seeds = lm.experts.kept.counts.copy()
            wanted = units_of(lm, cold), units_of(lm, hot)
            before = lm.experts.kept.num_hits
            ask(lm, hot, hot)
            hits[switch] = lm.experts.kept.num_hits - before
            assert torch.equal(
                lm.model(torch.tensor([[hot, cold]])).logits,
                resident(checkpoint)(torch.tensor([[hot, cold]])).logits,
            )
            if switch == "0":
                assert not seeds.any()
                continue
            assert all(seeds[unit] >= 9 for unit in wanted[1])
            assert all(seeds[unit] == 1 for unit in wanted[0] - wanted[1])
            assert {unit for unit in range(len(seeds)) if lm.experts.kept.is_kept(unit)} == wanted[1]
    assert hits["1"] == 2 * len(wanted[1])
    assert hits["0"] < hits["1"]


@contextlib.contextmanager
def opened_with(patch: pytest.MonkeyPatch, switch: str, checkpoint: Path) -> Iterator[Any]:
    patch.setenv(SWITCH, switch)
    with opened(checkpoint) as lm, torch.no_grad():
        yield lm


@pytest.mark.long
def test_two_processes_add_to_one_file(tiny: Callable[..., Path], folder: Path, processes: Processes) -> None:
    code = f"""
import torch, slowllm
with slowllm.load({str(tiny(NAME))!r}, dtype="float32", granularity="experts") as lm, torch.no_grad():
    print(int(lm.experts.kept.counts.sum()), flush=True)
    lm.model(torch.tensor([[7]]))
"""
    env = {SWITCH: "1", "XDG_CACHE_HOME": str(folder.parent.parent)}
    together = [processes.start("-c", code, env=env) for _ in range(2)]
    for process in together:
        assert process.wait().returncode == 0
    modules = saved(folder)["modules"].values()
    assert [one["num_sweeps"] for one in modules] == [2] * len(modules)
    ended = processes.run("-c", code, env=env)
    assert int(ended.stdout) == sum(sum(one["chosen"]) for one in modules) == 4 * len(modules)


def test_two_models_that_are_closed_at_once_lose_nothing(tiny: Callable[..., Path], folder: Path) -> None:
    models = [opened(tiny(NAME)) for _ in range(3)]
    for lm in models:
        ask(lm, 7, 8)
    barrier = threading.Barrier(len(models))

    def close(lm: Any) -> None:
        barrier.wait()
        lm.close()

    threads = [threading.Thread(target=close, args=(lm,)) for lm in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {one["num_sweeps"] for one in saved(folder)["modules"].values()} == {6}


def test_a_run_that_ends_with_an_error_is_remembered(tiny: Callable[..., Path], folder: Path) -> None:
    with contextlib.suppress(ValueError), opened(tiny(NAME)) as lm:
        ask(lm, 7)
        raise ValueError("of the caller")
    assert {one["num_sweeps"] for one in saved(folder)["modules"].values()} == {1}


def test_long_work_saves_as_it_goes_and_counts_nothing_twice(
    tiny: Callable[..., Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tiny(NAME)) as lm:
        ask(lm, 7)
        assert not folder.exists()
        monkeypatch.setattr(expert_history, "SAVE_SECONDS", 0.0)
        ask(lm, 7)
        lm.ride([lambda: None])  # the last stop has been served
        assert {one["num_sweeps"] for one in saved(folder)["modules"].values()} == {2}
        ask(lm, 7)
    assert {one["num_sweeps"] for one in saved(folder)["modules"].values()} == {3}


def test_a_measured_block_is_no_text(tiny: Callable[..., Path], folder: Path) -> None:
    with opened(tiny(NAME)) as lm:
        block_rates(lm, Rates())
        assert lm.experts.forecast.chosen.any()
    assert not folder.exists()


def test_a_plan_says_that_it_reckons_with_earlier_runs(tiny: Callable[..., Path], folder: Path) -> None:
    job = Job(num_tokens=20, longest=20, forward_only=True)
    known = []
    for _ in range(2):
        found = survey(ModelInfo(tiny(NAME)), ram="4GiB", dtype="float32", job=job)
        known.append(found.knows_experts)
        with opened(tiny(NAME)) as lm:
            ask(lm, 7)
    assert known == [False, True]


@pytest.mark.parametrize("value", ["0", "false", "Off", "no "])
def test_where_it_is_switched_off_nothing_is_written(
    value: str, tiny: Callable[..., Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SWITCH, value)
    with opened(tiny(NAME)) as lm:
        ask(lm, 7)
    assert not folder.exists()


def test_the_folder_is_that_of_the_users_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert counts_folder() is None  # as no test may write where a user's files are
    monkeypatch.delenv(SWITCH)
    monkeypatch.setenv("HOME", str(tmp_path))
    for named in ("relative", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", named)
        assert counts_folder() == tmp_path / ".cache" / "slowllm" / "experts"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "named"))
    assert counts_folder() == tmp_path / "named" / "slowllm" / "experts"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "relative")  # nothing is to appear in the working directory
    assert counts_folder() is None


def history(folder: Path, sizes: dict[str, int] = SIZES, *, is_whole: bool = True) -> ExpertHistory:
    return ExpertHistory(folder, lambda: FINGERPRINT, sizes, is_whole=is_whole)


def save(folder: Path, *chosen: int, num_sweeps: int = 2, **options: Any) -> None:
    history(folder, **options).save(np.array(chosen), [num_sweeps] * (len(chosen) // 4))


FILES = [
    (lambda text: text[: len(text) // 2], "is not JSON"),
    (lambda text: "[1]", "is no JSON object"),
    (lambda text: text.replace('"version": 1', '"version": 2'), "is of version 2"),
    (lambda text: text.replace("0123", "3210"), "was made for another model"),
    (lambda text: text.replace("b.experts", "c.experts"), "another model, which has experts in c.experts"),
    (
        lambda text: text.replace("[2, 0, 1, 1]", "[2, 0, 1]"),
        "another model, which has 3 experts in a.experts and not 4",
    ),
    (lambda text: text.replace("[2, 0, 1, 1]", "[2, 0, 1, 3]"), "has no counts of experts for a.experts"),
    (lambda text: text.replace("[2, 0, 1, 1]", "[2, 0, 1, true]"), "has no counts of experts for a.experts"),
    (lambda text: text.replace('"num_sweeps": 2', '"num_sweeps": -2'), "has no counts of experts"),
    (lambda text: "x" * (expert_history.MAX_BYTES + 1), "too large"),
]


@pytest.mark.parametrize(("damage", "reason"), FILES, ids=[reason for _, reason in FILES])
def test_a_file_that_cannot_be_used_is_named_and_replaced(
    damage: Any, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 2, 0, 1, 1, 1, 1, 1, 1)
    file = tmp_path / f"{FINGERPRINT}.json"
    assert damage(file.read_text()) != file.read_text()
    file.write_text(damage(file.read_text()))
    for found in (history(tmp_path), history(tmp_path)):  # as where a verb looks several times
        assert found.counts().tolist() == [0] * 8
    assert found.counts().tolist() == [0] * 8
    assert found.popularity() == ()
    (said,) = caplog.messages
    assert said.startswith(f"{file}: is not used to tell which experts will be needed, and is replaced when")
    assert reason in said
    found.save(np.array([0, 1, 0, 1, 1, 0, 0, 1]), [1, 1])
    assert len(caplog.messages) == 1
    assert history(tmp_path).counts().tolist() == [0, 1, 0, 1, 1, 0, 0, 1]


def test_a_model_is_opened_beside_a_file_of_another(
    tiny: Callable[..., Path], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(tiny("olmoe")) as lm:
        ask(lm, 7)
    (other,) = folder.iterdir()
    with opened(tiny(NAME)) as lm:
        shutil.copy(other, lm.experts.history.path)
    with opened(tiny(NAME)) as lm:
        assert not lm.experts.kept.counts.any()
        ask(lm, 7)
    (said,) = caplog.messages
    assert "was made for another model" in said
    with opened(tiny(NAME)) as lm:
        assert lm.experts.kept.counts.any()


def test_a_folder_that_cannot_be_written_is_said_once(
    tiny: Callable[..., Path], folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_history, "SAVE_SECONDS", 0.0)
    folder.parent.parent.write_text("no folder")
    with opened(tiny(NAME)) as lm:
        ask(lm, 7, 7)
    (said,) = caplog.messages
    assert said.startswith(
        f"{folder}: which experts were needed cannot be written there for the next start ("
    )
    assert said.endswith("); SLOWLLM_EXPERT_COUNTS=0 switches it off")
    assert caplog.records[0].levelno == logging.WARNING


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Keep what is in a folder, and let nobody write there, the superuser included."""
    if os.geteuid():
        folder.chmod(0o500)
        try:
            yield
        finally:
            folder.chmod(0o700)
        return
    mount = ["mount", "--bind", "-o", "ro", str(folder), str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no folder can be made read-only for the superuser here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_folder_that_cannot_even_be_looked_at_ends_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Nobody may look for a name of this length; root may look everywhere else.
    save(tmp_path / ("x" * 300), 2, 0, 1, 1, 1, 1, 1, 1)
    assert history(tmp_path / ("x" * 300)).counts().tolist() == [0] * 8
    (record,) = caplog.records
    assert "cannot be written" in record.getMessage()


def test_a_folder_in_the_place_of_a_file_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / f"{FINGERPRINT}.json"
    file.mkdir()
    found = history(tmp_path)
    assert found.counts().tolist() == [0] * 8
    found.save(np.array([2, 0, 1, 1, 1, 1, 1, 1]), [2, 2])
    (record,) = caplog.records  # and nobody was told that it would be replaced
    assert f"{file.name} is a folder; delete it" in record.getMessage()
    assert list(tmp_path.iterdir()) == [file]


def test_a_read_only_folder_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 2, 0, 1, 1, 1, 1, 1, 1)
    with read_only(tmp_path):
        ours = history(tmp_path)
        for sweeps in (1, 2):
            ours.save(np.full(8, sweeps), [sweeps, sweeps])
        assert ours.counts().tolist() == [2, 0, 1, 1, 1, 1, 1, 1]
        assert [file.name for file in tmp_path.iterdir()] == [f"{FINGERPRINT}.json"]
    assert len(caplog.messages) == 1
    ours.save(np.full(8, 2), [2, 2])
    assert history(tmp_path).counts().tolist() == [4, 2, 3, 3, 3, 3, 3, 3]


def test_whoever_finds_the_folder_locked_saves_later(tmp_path: Path) -> None:
    ours = history(tmp_path)
    with expert_history.locked_folder(tmp_path, 0.0) as is_ours:
        assert is_ours
        ours.save(np.array([1, 0, 0, 0, 0, 0, 0, 1]), [1, 1], wait_seconds=0.0)
        assert not list(tmp_path.iterdir())
    ours.save(np.array([1, 0, 0, 1, 0, 1, 0, 1]), [2, 2])
    assert history(tmp_path).counts().tolist() == [1, 0, 0, 1, 0, 1, 0, 1]


def test_parts_of_a_model_share_a_file(tmp_path: Path) -> None:
    save(tmp_path, 2, 0, 1, 1, sizes={"a.experts": 4}, is_whole=False)
    save(tmp_path, 0, 1, 1, 2, sizes={"b.experts": 4}, is_whole=False)
    assert history(tmp_path).counts().tolist() == [2, 0, 1, 1, 0, 1, 1, 2]


def test_what_was_needed_long_ago_counts_less() -> None:
    counts, before = ModuleCounts(0, (0, 0)), None
    for _ in range(50):
        counts = counts.plus(ModuleCounts(10, (10, 0)))
        assert sum(counts.chosen) <= ENOUGH_COUNTS * 2
    before = counts
    num_runs = 0
    while counts.chosen[1] <= counts.chosen[0]:
        counts, num_runs = counts.plus(ModuleCounts(10, (0, 10))), num_runs + 1
    assert before.chosen[0] > 0
    assert num_runs < 10
    assert max(counts.chosen) <= counts.num_sweeps
