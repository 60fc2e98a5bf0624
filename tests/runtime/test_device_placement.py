"""Every tensor is where it belongs, on a device that is only pretended; what that shows, and what not: see `pretended`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.paths import ROOT
from tests.support.pretended_cases import CASES


@pytest.fixture(scope="module")
def failures() -> dict[str, str | None]:
    """What went wrong in each case, all of them run in a process of their own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.support.pretended_device"],
        check=False, cwd=ROOT, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_left_on_the_wrong_device(name: str, failures: dict[str, str | None]) -> None:
    assert failures[name] is None, failures[name]
