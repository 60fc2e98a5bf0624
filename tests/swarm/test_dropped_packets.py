"""The way to a server is cut without a word: no signal, no end of a connection, only silence in both directions."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def why_not() -> str:
    """Return why packets cannot be dropped on this machine, nothing where they can."""
    if os.geteuid():
        return "network namespaces need root"
    if missing := [tool for tool in ("ip", "nsenter", "unshare") if shutil.which(tool) is None]:
        return f"{' and '.join(missing)} are not installed"
    made = subprocess.run(
        ["unshare", "--net", "ip", "link", "add", "one", "type", "veth", "peer", "name", "two"],
        capture_output=True, check=False,
    )  # fmt: skip
    return "" if not made.returncode else f"no network namespace can be made ({made.stderr.decode().strip()})"


@pytest.mark.long
def test_a_generation_outlives_a_server_whose_packets_are_dropped(tmp_path: Path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-m", "tests.support.dropped", str(tmp_path)],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(said))
    assert said["same"]
    assert said["harmed"] == 1
