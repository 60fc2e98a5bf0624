"""What a whole model, and a whole process, do when the disk, the files or the memory are not what was promised."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import slowllm
from benchmarks import machine
from slowllm.errors import CheckpointError, PlanError
from slowllm.options import parse_bytes
from slowllm.planning.host_plan import START_BYTES
from tests.support.families import save_tiny
from tests.support.paths import ROOT, TINY_BLOOM
from tests.support.processes import Processes

LAST = "model-00005-of-00005.safetensors"  # of the embedded model: blocks 7 to 9, and parts of block 6
IDS = torch.tensor([[5, 6, 7, 8]])


def run(processes: Processes, script: str, *arguments: object) -> list[str]:
    """Run a script in a process of its own, which must end well; return the lines that it printed."""
    done = processes.run("-c", textwrap.dedent(script), *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the embedded model, to be spoiled."""
    return Path(shutil.copytree(TINY_BLOOM, tmp_path / "model"))


def logits(lm: slowllm.StreamedLM) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(lm.model(IDS).logits)


# Reads that never return


@pytest.mark.parametrize("end", ["lm.close(); thread.join(); print('closed')", "print('left open')"])
def test_a_process_ends_well_though_a_read_never_returns(end: str, processes: Processes) -> None:
    script = f"""
        import os, sys, threading
        import torch
        import slowllm
        from slowllm.streaming import reader
        from slowllm.errors import RideError

        reader.CLOSE_PATIENCE_SECONDS = 0.1
        arrived, never = threading.Event(), threading.Event()
        lm = slowllm.load(sys.argv[1], keep_resident=False)

        def hang(*_):
            arrived.set()
            never.wait()

        def call():
            try:
                lm.ride([lambda: lm.model(torch.tensor([[5, 6, 7]]))] * 2)
            except RideError as error:
                print(error, error.__notes__, flush=True)

        os.preadv = hang
        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        arrived.wait()
        {end}
    """
    lines = run(processes, script, TINY_BLOOM)
    if "closed" in end:
        assert lines == ["the model was closed ['raised by rider 0 of 2; 1 more failed']", "closed"]
    else:  # whether the caller is still heard depends on who is faster
        assert lines[0] == "left open"


# Disks and files that fail


def test_a_disk_that_fails_ends_the_call_and_the_next_one_is_served(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true, broken = os.preadv, True

    def fail(number: int, *rest: Any) -> int:
        if broken and os.readlink(f"/proc/self/fd/{number}").endswith(LAST):
            raise OSError(errno.EIO, "Input/output error")
        return true(number, *rest)

    with slowllm.load(folder, dtype="fp32", keep_resident=False) as lm:
        before = logits(lm)
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(
            OSError, match=rf"Input/output error \(reading h\.6\..* at byte [\d,]+\): '.*{LAST}'"
        ):
            logits(lm)
        broken = False
        assert torch.equal(logits(lm), before)


@pytest.mark.parametrize("keep_resident", [False, True])
def test_a_shard_cut_short_is_told_by_the_model_and_its_other_stops_still_serve(
    folder: Path, keep_resident: bool
) -> None:
    with slowllm.load(folder, dtype="fp32", keep_resident=keep_resident) as lm:
        before = logits(lm)
        sound = (folder / LAST).read_bytes()
        os.truncate(folder / LAST, 4096)
        with pytest.raises(
            CheckpointError, match=rf"^{LAST}: h\.6\..* by now; it was cut short while it was open$"
        ):
            logits(lm)
        for stop in (*range(6), lm.num_stops - 1):
            assert lm._carousel.visit(stop, "up", len)
        (folder / LAST).write_bytes(sound)
        assert torch.equal(logits(lm), before)


def replace(folder: Path, change: Callable[[bytes], bytes]) -> None:
    other = folder / "new"
    other.write_bytes(change((folder / LAST).read_bytes()))
    os.replace(other, folder / LAST)


REPLACEMENTS = {
    "the same size": lambda shard: shard[:-60_000] + bytes(60_000),
    "another size": lambda shard: shard[:100],
}


@pytest.mark.parametrize("change", REPLACEMENTS.values(), ids=REPLACEMENTS)
@pytest.mark.parametrize("keep_resident", [False, True])
def test_a_shard_replaced_while_it_is_open_changes_no_result(
    folder: Path, keep_resident: bool, change: Callable[[bytes], bytes]
) -> None:
    with slowllm.load(folder, dtype="fp32", keep_resident=keep_resident) as lm:
        before = logits(lm)
        replace(folder, change)
        assert torch.equal(logits(lm), before)


def test_a_shard_replaced_before_it_was_opened_is_refused(folder: Path) -> None:
    with slowllm.load(folder, dtype="fp32", keep_resident=False) as lm:
        replace(folder, REPLACEMENTS["the same size"])
        with pytest.raises(
            CheckpointError, match=rf"^{LAST}: was replaced or changed since its header was read"
        ):
            logits(lm)


def test_a_git_lfs_pointer_is_told_with_what_to_do(folder: Path) -> None:
    (folder / LAST).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00ff\nsize 2066712\n")
    with pytest.raises(
        CheckpointError, match=rf"^{LAST}: is a git-LFS pointer, .* `git lfs pull`, or .* download`$"
    ):
        slowllm.load(folder)


# Forks


def test_a_forked_child_is_refused_and_ends_by_itself(processes: Processes) -> None:
    # Every lock is held by another thread at the fork, which is not there in the child to give it back.
    script = """
        import os, signal, sys, threading
        import torch
        import slowllm
        from slowllm.errors import RideError

        def call():
            return lm.model(torch.tensor([[5, 6, 7]])).logits

        def hold():
            with lm._carousel._boarding.changed, lm._source._changed:
                held.set()
                forked.wait()

        lm = slowllm.load(sys.argv[1], keep_resident=False)
        before = call()
        stream = lm.stream([call] * 3, 1)
        next(stream)
        held, forked = threading.Event(), threading.Event()
        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()
        child = os.fork()
        if not child:
            signal.alarm(60)  # or a child that hangs would outlive the test
            for refused in (call, lambda: lm.ride([call]), lambda: list(lm.stream([call], 1))):
                try:
                    refused()
                except RideError as error:
                    print(error, flush=True)
            del stream  # whose riders are the parent's
            sys.exit(7)  # the model is closed on the way out
        forked.set()
        thread.join()
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), len(list(stream)), bool((call() == before).all()))
    """
    refusal = "this process was forked after the model was loaded, and a fork has none of the model's threads; load it here"
    assert run(processes, script, TINY_BLOOM) == [refusal] * 3 + ["7 2 True"]


# Memory


@pytest.mark.parametrize("keep_resident", [False, True])
def test_the_budget_that_a_refusal_names_loads_and_runs_and_a_smaller_one_does_not(
    keep_resident: bool,
) -> None:
    used = 300 << 20  # by the process; what it really has grows with every attempt
    with pytest.raises(PlanError, match="the smallest that would do is") as caught:
        slowllm.load(TINY_BLOOM, ram=slowllm.Budget(100 << 20, used), keep_resident=keep_resident)
    smallest = parse_bytes(str(caught.value).split("the smallest that would do is ")[1].split()[0])
    with slowllm.load(TINY_BLOOM, ram=slowllm.Budget(smallest, used), keep_resident=keep_resident) as lm:
        assert logits(lm).isfinite().all()
    with pytest.raises(PlanError, match="the smallest that would do is"):
        slowllm.load(
            TINY_BLOOM,
            ram=slowllm.Budget(smallest - START_BYTES - (1 << 20), used),
            keep_resident=keep_resident,
        )


@pytest.mark.long
def test_forty_riders_stay_within_the_plan(processes: Processes) -> None:
    script = """
        import json, sys
        import psutil, torch
        import slowllm

        def peak_bytes():
            # Not getrusage, which begins with the peak of the process that started this one.
            with open("/proc/self/status") as file:
                return 1024 * int(next(line.split()[1] for line in file if line.startswith("VmHWM")))

        def ride(lm):
            ids = torch.full((1, 16), 7)  # all forty wait at every stop
            with torch.no_grad():
                return lm.ride([lambda: lm.model(ids, use_cache=False).logits] * 40)

        with slowllm.load(sys.argv[1]) as lm:  # imports what is imported late
            ride(lm)
        before = psutil.Process().memory_info().rss
        job = slowllm.Job(num_tokens=40 * 16, longest=16, forward_only=True, keeps_results=False)
        with slowllm.load(sys.argv[2], ram=before + (512 << 20), keep_resident=False, job=job) as lm:
            assert lm.plan.sweep_tokens >= 40 * 16
            results = ride(lm)
            assert len(results) == 40 and all(result.isfinite().all() for result in results)
            used = peak_bytes() - before
            print(json.dumps([used, lm.plan.peak_bytes, lm.weight_bytes, lm.report.peak_rss_bytes - before]))
    """
    with tempfile.TemporaryDirectory() as folder:  # 400 MB, not to be kept with what pytest keeps
        save_tiny("bloom", Path(folder), shard="100MB", hidden_size=1024, n_layer=8, n_head=8)
        (line,) = run(processes, script, TINY_BLOOM, folder)
    used, planned, weights, reported = json.loads(line)
    assert used <= planned <= 512 << 20
    assert used + weights > planned, "weights that stay would not be noticed"
    assert reported >= used


@pytest.mark.parametrize("num_lines", [40, pytest.param(300, marks=pytest.mark.long)])
def test_a_cgroup_of_the_budget_is_enough(num_lines: int, tmp_path: Path) -> None:
    cgroup = machine.memory_cgroup(f"slowllm-test-{os.getpid()}", 700 << 20)
    if cgroup is None:
        pytest.skip("no memory cgroup can be made here")
    texts = tmp_path / "in.txt"
    texts.write_text("\n".join(f"Line number {n} of the file is scored." for n in range(num_lines)))
    command = [
        sys.executable,
        "-m",
        "slowllm",
        "forward",
        str(texts),
        "--ram",
        "700MiB",
        "--stream-all",
        "--json",
    ]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False,
            preexec_fn=lambda: machine.enter_cgroup(cgroup),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) == num_lines
        # And the cap is one: a process that takes more is killed.
        greedy = [sys.executable, "-c", "bytearray(800 << 20)"]
        killed = subprocess.run(greedy, check=False, preexec_fn=lambda: machine.enter_cgroup(cgroup))
        assert killed.returncode == -signal.SIGKILL
    finally:
        machine.remove_cgroup(cgroup)
