"""A disk that is full, or cannot be read: one sentence each, and what can go on goes on."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import slowllm
from slowllm.entrypoints.cli.log_format import write_line
from slowllm.errors import CheckpointError, InputError, forward_errors
from slowllm.streaming.direct_io import Files
from slowllm.swarm.client import SwarmOptions
from slowllm.swarm.identity import holding_identity
from tests.support.parted import OUTSIDE, parted, shard_of
from tests.support.processes import Processes
from tests.support.served import GREEDY, save_model, texts
from tests.support.serving import serving
from tests.support.swarm_processes import serve_arguments


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte without a free byte."""
    folder = tmp_path / "full"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a file system in memory cannot be mounted here")
    try:
        with (folder / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_an_identity_that_cannot_be_written_is_said_and_leaves_no_part_of_a_key(full: Path) -> None:
    path = full / "peer.key"
    with (
        pytest.raises(InputError, match=r"peer\.key: No space left on device"),
        holding_identity(path),
    ):
        pass
    assert not path.exists()
    (full / "filler").unlink()
    with holding_identity(path) as identity:
        assert len(identity.peer) == 46


def test_a_line_that_cannot_be_written_ends_nothing(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = (full / "log").open("w", encoding="utf-8")
    monkeypatch.setattr(sys, "stderr", stderr)
    write_line("a sentence")
    monkeypatch.undo()
    with pytest.raises(OSError, match="No space left"):  # it is still there, to be written when there is room
        stderr.flush()
    (full / "filler").unlink()
    stderr.close()
    assert (full / "log").read_text() == "a sentence\n"


@pytest.mark.long
def test_a_server_whose_log_is_on_a_full_disk_serves_and_ends_well(full: Path, tmp_path: Path) -> None:
    whole = save_model(tmp_path / "model")
    ids, mask = texts()
    with Processes() as processes, (full / "log").open("w", encoding="utf-8") as stderr:
        server = processes.start(
            *serve_arguments(whole, "0:6", "-v"), stdout=subprocess.PIPE, stderr=stderr.fileno()
        )
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        with (
            slowllm.load(parted(whole, tmp_path / "ends", OUTSIDE), swarm=[address], ram="3GiB") as lm,
            slowllm.load(whole, ram="3GiB", dtype="float32") as local,
            torch.no_grad(),
        ):
            ours, theirs = (m.model.generate(ids, attention_mask=mask, **GREEDY) for m in (lm, local))
            assert torch.equal(ours, theirs)
        assert server.end(signal.SIGTERM).returncode == 0
    assert (full / "log").stat().st_size == 0


@pytest.fixture
def broken_disk(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of shards that cannot be read; none at first."""
    names: list[str] = []
    read = Files._read_once

    def read_once(self: Any, span: Any, offset: int, view: Any) -> int:
        if span.path.name in names:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(self, span, offset, view)

    monkeypatch.setattr(Files, "_read_once", read_once)
    return names


def test_a_disk_that_fails_is_said_with_the_file_and_without_its_folder() -> None:
    with (
        pytest.raises(
            CheckpointError, match=r"^block-4\.safetensors: Input/output error \(there\); look at the disk"
        ),
        forward_errors(None),
    ):
        raise OSError(errno.EIO, "Input/output error (there)", "/srv/models/block-4.safetensors")


@pytest.mark.long
def test_a_client_goes_on_at_another_server_where_a_disk_fails(
    tmp_path: Path, broken_disk: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    whole = save_model(tmp_path)
    ids, mask = texts()
    with (
        serving(whole, "0:6", keep_resident=False, name="broken") as streaming,
        serving(whole, "0:6", *streaming.network.addresses, name="whole") as other,
        slowllm.load(
            parted(whole, tmp_path / "ends", OUTSIDE),
            swarm=SwarmOptions((streaming.network.addresses[0],), timeout=60.0),
        ) as lm,
        slowllm.load(whole, ram="3GiB", dtype="float32") as local,
        torch.no_grad(),
    ):
        lm.swarm.ban(other.network.peer, float("inf"))
        lm.model(ids)
        broken_disk.append(shard_of(4))
        lm.swarm.ban(other.network.peer, 0.0)
        lm.swarm._leaving.clear()
        for _ in range(4):  # calls are spread over both
            assert torch.equal(lm.model(ids).logits, local.model(ids).logits)
        assert torch.equal(*(m.model.generate(ids, attention_mask=mask, **GREEDY) for m in (lm, local)))
    failed = [record.getMessage() for record in caplog.records if "failed (" in record.getMessage()]
    assert failed
    assert all(f"{shard_of(4)}: Input/output error" in one for one in failed)
    assert str(tmp_path) not in " ".join(failed), "a client learns where the server's files lie"
