"""Every verb on every kind of model stays within `--ram`, in a cgroup of exactly that size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.memory_jobs import JOBS, MODELS, make_model, run_in_budget, smallest_budget, write_inputs

Folder = Callable[[str], Path]

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Return the folder of a model, made on first use."""
    out = tmp_path_factory.mktemp("models")

    def get(name: str) -> Path:
        if not (out / name).exists():
            make_model(name, out / name)
        return out / name

    return get


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("name", MODELS)
def test_no_job_takes_more_than_its_budget(name: str, job: str, model: Folder, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    smallest = smallest_budget(model(name), JOBS[job], tmp_path)
    for budget in (smallest, 2 * smallest):
        measured = run_in_budget(model(name), JOBS[job], tmp_path, budget)
        if measured is None:
            pytest.skip("no memory cgroup can be made here")
        assert measured.returncode == 0, measured.stderr
        assert measured.peak_bytes <= budget
        if budget == smallest:
            assert budget <= 2 * measured.peak_bytes, "less would have done"
