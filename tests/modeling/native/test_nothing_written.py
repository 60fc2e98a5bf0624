"""What is quantised is read as it is: no byte of it is written anywhere."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.native_checkpoints import fp8_settings, quantised, store_fp8
from tests.support.paths import TINY_BLOOM
from tests.support.processes import Processes


@pytest.mark.parametrize("arguments", [(), ("--stream-all",)])
def test_a_process_that_may_not_write_files_scores(
    arguments: tuple[str, ...], processes: Processes, tmp_path: Path
) -> None:
    folder = quantised(TINY_BLOOM, tmp_path / "fp8", fp8_settings((16, 16)), store_fp8((16, 16)))
    reading, writing = os.pipe()
    with os.fdopen(reading) as said:
        # Of a file that is larger than nothing, the first byte would end it.
        process = processes.start(
            "-m", "slowllm", "forward", "--model", folder, "--text", "The value is", *arguments, "--json",
            stdout=subprocess.PIPE, stderr=writing, file_bytes=0,
        )  # fmt: skip
        os.close(writing)
        errors = said.read()
    ended = process.wait()
    assert ended.returncode == 0, errors
    assert '"num_tokens": 3' in ended.stdout
