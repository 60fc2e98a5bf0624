"""The default budget: what the machine and the container allow, less a reserve; a larger one is lowered."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from slowllm.errors import InputError
from slowllm.runtime import memory
from slowllm.runtime.memory import MemoryLimit, budget_bytes, memory_limit
from tests.support.paths import ROOT

MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("limit", "auto"),
    [
        (MemoryLimit(16 * GIB, False), 14 * GIB),
        (MemoryLimit(2 * GIB, False), 3 * GIB // 2),
        (MemoryLimit(1024 * GIB, False), 1020 * GIB),
        (MemoryLimit(2000 * MIB, True), 1900 * MIB),
    ],
)
def test_auto_leaves_a_reserve(limit: MemoryLimit, auto: int) -> None:
    assert limit.auto_bytes == auto


def test_a_budget_above_the_machine_is_lowered_and_said(caplog: pytest.LogCaptureFixture) -> None:
    limit = memory_limit()
    assert 0 < limit.num_bytes <= psutil.virtual_memory().total
    with caplog.at_level(logging.WARNING, logger="slowllm"):
        assert budget_bytes("1GiB") == GIB
        assert not caplog.text
        assert budget_bytes("auto") == budget_bytes("1000TiB") == limit.auto_bytes
    assert "the budget is" in caplog.text
    with pytest.raises(InputError, match="is not a size"):
        budget_bytes("automatic")


def cgroups(tmp_path: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


@pytest.mark.parametrize(
    "files",
    [
        {
            "memory.max": "max",
            "a/memory.max": str(GIB),
            "a/b/memory.max": "max",
        },  # v2: the parent's limit counts
        {"a/b/memory.max": str(GIB)},
        {"memory.max": str(GIB)},  # the group of a container, mounted at the root
    ],
)
def test_the_lowest_limit_of_version_2_counts(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cgroups(tmp_path / "cgroup", files)
    (tmp_path / "self").write_text("0::/a/b\n")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "_OWN_GROUPS", tmp_path / "self")
    assert memory_limit() == MemoryLimit(GIB, True)


@pytest.fixture
def group() -> Iterator[Path]:
    """A memory cgroup of version 1 with a limit of 1.5 GiB."""
    folder = Path("/sys/fs/cgroup/memory") / f"slowllm-{uuid.uuid4().hex}"
    try:
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text(str(1536 * MIB))
    except OSError:
        pytest.skip("no memory cgroup can be made here")
    yield folder
    folder.rmdir()


def test_a_containers_limit_is_seen_by_a_process_in_it(group: Path) -> None:
    code = (
        f"import os; open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
        "from slowllm.runtime.memory import budget_bytes, memory_limit\n"
        "print(memory_limit(), budget_bytes('3GiB'), budget_bytes('auto'), budget_bytes('1GiB'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    auto = 1536 * MIB - 1536 * MIB // 20
    assert done.stdout.split(") ")[1].split() == [str(auto), str(auto), str(GIB)]
    assert "this container has 1.5GiB" in done.stderr
