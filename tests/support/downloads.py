"""`slowllm download` in processes of its own, against the small hub of `fake_hub`: there the hub is not offline."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.fake_hub import COMMIT, FakeHub, etag
from tests.support.paths import ROOT
from tests.support.processes import Processes

# Runs many cases in one process. The one from which it is forked has read another environment.
CHILD = """
import contextlib, importlib, io, json, shutil, sys
from collections import namedtuple
from huggingface_hub import constants
importlib.reload(constants)
from slowllm import cli
disk_usage, constants_before = shutil.disk_usage, dict(vars(constants))
for name, (arguments, free, patches) in json.loads(sys.argv[1]).items():
    shutil.disk_usage = disk_usage if free is None else lambda path: namedtuple("U", "free")(free)
    vars(constants).update({**constants_before, **patches})
    sys.argv, code, out, err = ["slowllm", "download", *arguments], 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.run()
        except SystemExit as leaving:
            code = leaving.code or 0
    print(json.dumps([name, code, out.getvalue(), err.getvalue()]))
"""


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


def environment(server: FakeHub, home: Path, **more: str) -> dict[str, str]:
    return {
        **os.environ,
        **{"PYTHONPATH": str(ROOT), "HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"},
        **{"HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_secret", "NO_PROXY": "*", "OMP_NUM_THREADS": "1"},
        **more,
    }


def snapshot(home: Path, repo: str) -> Path:
    return home / "hub" / f"models--{repo.replace('/', '--')}" / "snapshots" / COMMIT


def blob(home: Path, repo: str, name: str, content: bytes) -> Path:
    return snapshot(home, repo).parent.parent / "blobs" / etag(name, content)


def run_all(processes: Processes, todo: dict[str, Any], env: dict[str, str]) -> dict[str, Result]:
    """Run `slowllm download` for each case, given as its arguments, bytes free, and constants to change."""
    done = processes.run("-c", CHILD, json.dumps(todo), env=env)
    assert done.returncode == 0, done.stderr
    return {name: Result(*rest) for name, *rest in map(json.loads, done.stdout.splitlines())}
