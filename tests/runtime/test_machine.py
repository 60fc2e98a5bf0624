"""What is found out about this machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from slowllm.errors import InputError
from slowllm.runtime import machine, rates
from slowllm.runtime.blueprint import known_blueprint
from slowllm.runtime.pressure import system_times


def test_this_machine_has_cores_memory_and_versions() -> None:
    found = machine.this_machine()
    assert 1 <= found.num_cores <= (os.cpu_count() or 1)
    assert 0 < found.limit.num_bytes <= found.ram_bytes
    assert {"torch", "transformers"} <= set(found.versions)
    assert set(found.units) == {"bf16", "int8"}


def test_units_are_known_by_their_flags() -> None:
    found = machine.units_of(frozenset({"avx2", "avx512_vnni", "amx_bf16", "amx_int8", "amx_tile"}))
    assert found == {"bf16": ("amx_bf16",), "int8": ("amx_int8", "avx512_vnni")}


@pytest.mark.parametrize(
    ("text", "cores"), [("max 100000\n", None), ("150000 100000\n", 1.5), ("nonsense", None), ("", None)]
)
def test_the_quota_of_a_container_is_in_cores(text: str, cores: float | None, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert machine._quota_cores(tmp_path / "cpu.max") == cores
    assert machine._quota_cores(tmp_path / "nothing") is None


def test_a_folder_is_measured_by_a_file_that_is_gone_afterwards(tmp_path: Path) -> None:
    rate, how = machine.folder_rate(tmp_path, probe_bytes=1 << 20)
    assert rate > 0
    assert how == "a file written there"
    assert not list(tmp_path.iterdir())


def test_a_large_checkpoint_is_read_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.support.paths import TINY_BLOOM

    monkeypatch.setattr(machine, "WORTH_MEASURING_BYTES", 1 << 20)
    rate, how = machine.folder_rate(TINY_BLOOM)
    assert rate > 0
    assert how == "the checkpoint there"
    assert rates.PIECE_BYTES  # the largest tensors are smaller than one piece


def test_a_folder_that_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder to measure"):
        machine.folder_rate(tmp_path / "nothing")
    with pytest.raises(InputError, match="has no room for a file of"):
        machine.folder_rate(tmp_path, probe_bytes=1 << 60)


def test_a_model_that_is_not_in_the_table_is_refused() -> None:
    with pytest.raises(
        InputError, match="nobody/nothing: is no known model; there are bigscience/bloom-560m"
    ):
        known_blueprint("nobody/nothing")


def test_pressure_is_read_where_the_system_has_it(tmp_path: Path) -> None:
    (tmp_path / "memory").write_text(
        "some avg10=0.00 avg60=0.00 avg300=0.00 total=2500000\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=7\n"
    )
    assert system_times(tmp_path / "memory").memory_stall == 2.5
    assert system_times(tmp_path / "nothing").memory_stall is None
    first, second = system_times(), system_times()
    assert second.at >= first.at
    assert first.others is not None
