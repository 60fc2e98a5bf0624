"""Ctrl-C once ends after what is under way and says how to go on; twice ends at once; and which code each end has."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from slowllm.entrypoints.cli.interrupts import second_interrupt_ends_at_once
from tests.support.processes import Processes

# A process that hears of Ctrl-C while it does what takes its time, and says when it is ready.
WAITS = """
import sys, time
from slowllm.entrypoints.cli.interrupts import second_interrupt_ends_at_once
from slowllm.entrypoints.cli.log_format import Stderr
with Stderr() as stderr, second_interrupt_ends_at_once():
    if {json}:
        stderr.write_json()
    try:
        print("ready", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("ending", flush=True)
        if {long}:
            time.sleep(60)
        raise SystemExit(7)
"""


def ended(num_signals: int, *, json_lines: bool = False) -> tuple[int, str]:
    """Start it, interrupt it so many times, and return its code and what it said."""
    code = WAITS.format(json=json_lines, long=num_signals > 1)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for word in ("ready", "ending")[:num_signals]:
            assert process.stdout.readline().strip() == word
            process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        return process.returncode, said


def test_the_first_interrupt_is_an_exception_and_the_second_ends_at_once() -> None:
    code, said = ended(1)
    assert code == 7
    assert said == (
        "slowllm: interrupted; ending after what is under way, and at once after another Ctrl-C\n"
    )
    code, said = ended(2, json_lines=True)
    assert code == 130
    first, second = map(json.loads, said.splitlines())
    assert first["message"].startswith("interrupted; ending after what is under way")
    assert (second["level"], second["message"]) == ("warning", "ended at once")


def test_a_handler_of_somebody_else_and_other_threads_are_left_alone() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with second_interrupt_ends_at_once():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    errors: list[BaseException] = []

    def enter() -> None:
        try:
            with second_interrupt_ends_at_once():
                pass
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert not errors
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.long
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_job_that_keeps_nothing_says_what_would_keep_its_work(
    number: int, code: int, tmp_path: Path, processes: Processes
) -> None:
    (tmp_path / "in.txt").write_text(
        "\n".join(f"Number {n} of the values is returned." for n in range(20_000))
    )
    reading, writing = os.pipe()
    process = processes.start(
        "-m", "slowllm", "forward", tmp_path / "in.txt", "--dtype", "fp32", "--json", stdout=writing
    )  # fmt: skip
    os.close(writing)
    with os.fdopen(reading) as lines:
        assert json.loads(lines.readline())["line"] == 1
        os.kill(process.pid, number)
        for _ in lines:  # or it would wait for a reader
            pass
    done = process.wait()
    assert done.returncode == code
    assert ("nothing was kept, as it would be with --out FILE or --state DIR" in done.stderr) == (
        number == signal.SIGINT
    )
