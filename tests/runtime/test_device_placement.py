"""Every tensor is where it belongs, on a device that is only pretended; what that shows, and what not: see `pretended_device`."""

from __future__ import annotations

import json

import pytest

from tests.support.pretended_cases import CASES
from tests.support.processes import Processes

# Each in a process of its own, because registering a device cannot be taken back.
NUM_PARTS = 8


@pytest.mark.parametrize(
    "part", [0, *(pytest.param(part, marks=pytest.mark.long) for part in range(1, NUM_PARTS))]
)
def test_nothing_is_left_on_the_wrong_device(part: int, processes: Processes) -> None:
    names = list(CASES)[part::NUM_PARTS]
    done = processes.run("-m", "tests.support.pretended_device", *names)
    assert done.returncode == 0, done.stderr[-4000:]
    failures = json.loads(done.stdout.splitlines()[-1])
    assert list(failures) == names
    assert not any(failures.values()), "\n".join(
        f"{name}:\n{failed}" for name, failed in failures.items() if failed
    )
