"""Which blocks are in a folder, and how many of them stay in memory."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slowllm.errors import InputError, PlanError
from slowllm.modeling.parts import Part
from slowllm.options import MIB, Options
from slowllm.planning.budget import Budget
from slowllm.planning.host_plan import START_BYTES
from slowllm.planning.job import Job
from slowllm.runtime.blocks_here import blocks_here, most_resident_blocks, runs_of
from slowllm.runtime.description import ModelInfo
from slowllm.runtime.load import open_model
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.streaming.devices import Device
from tests.support.families import save_tiny
from tests.support.host_device import HostDevice
from tests.support.parted import OUTSIDE, parted, shard_of

NUM_BLOCKS = 6
JOB = Job.serving(cache_tokens=500, batch_tokens=64, max_batch_tokens=256, backward=True, longest=500)
FORWARD = Job.serving(cache_tokens=500, batch_tokens=64, max_batch_tokens=256, backward=False, longest=500)
OPTIONS = Options(dtype="float32")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("llama-2", "deepseek-v3"):
        save_tiny(name, folder / "plain" / name, num_hidden_layers=NUM_BLOCKS)
        parted(folder / "plain" / name, folder / name)
    return folder


def budget(free_bytes: int) -> Budget:
    """A budget of which so much is left, however large this process is."""
    return Budget(4096 * MIB, 4096 * MIB - free_bytes)


def is_resident(info: ModelInfo, first: int, end: int, free_bytes: int) -> bool:
    try:
        lm = open_model(
            StreamedLM, info, ram=budget(free_bytes), dtype="float32", job=JOB, part=Part.span(first, end)
        )
    except PlanError:
        return False
    with lm:
        return not lm.plan.ring_bytes


def peak_bytes(info: ModelInfo, first: int, end: int) -> int:
    with open_model(
        StreamedLM, info, ram=budget(2048 * MIB), dtype="float32", job=JOB, part=Part.span(first, end),
        granularity="blocks",
    ) as lm:  # fmt: skip
        return lm.plan.peak_bytes


@pytest.mark.parametrize("name", ["llama-2", "deepseek-v3"])
def test_as_many_blocks_are_counted_as_stay_and_no_more(name: str, models: Path) -> None:
    info = ModelInfo(models / name)
    here = blocks_here(info)
    assert here == set(range(NUM_BLOCKS))
    for wanted in (1, 3, NUM_BLOCKS):
        heaviest = max(peak_bytes(info, first, first + wanted) for first in range(NUM_BLOCKS - wanted + 1))
        for more in (0, 1):
            free = heaviest + START_BYTES - 1 + more
            count = most_resident_blocks(info, here, OPTIONS, budget(free), [JOB], [])
            assert count == (wanted if more else max(1, wanted - 1))
            if more:
                assert all(is_resident(info, n, n + count, free) for n in range(NUM_BLOCKS - count + 1))


def test_only_blocks_whose_shards_are_all_there_count(models: Path, tmp_path: Path) -> None:
    for name in ("llama-2", "deepseek-v3"):
        folder = parted(models / name, tmp_path / name, *map(shard_of, (0, 2, 3, 4)))
        info = ModelInfo(folder)
        here = blocks_here(info)
        assert here == {0, 2, 3, 4}
        assert most_resident_blocks(info, here, OPTIONS, budget(2048 * MIB), [JOB], []) == 3
    with pytest.raises(InputError, match="has no block whose shards are all there; fetch some with"):
        blocks_here(ModelInfo(parted(models / "llama-2", tmp_path / "ends", OUTSIDE)))


def test_one_block_streams_where_none_stays_and_gradients_give_way(models: Path) -> None:
    info = ModelInfo(models / "llama-2")
    assert most_resident_blocks(info, range(NUM_BLOCKS), OPTIONS, budget(1 * MIB), [JOB, FORWARD], []) == 1
    least = peak_bytes(info, 0, 1) + START_BYTES
    small = budget(least - 1)  # no room for gradients
    assert most_resident_blocks(info, range(NUM_BLOCKS), OPTIONS, small, [JOB, FORWARD], []) > 1


def test_blocks_stay_on_a_device_or_beside_it(models: Path) -> None:
    info = ModelInfo(models / "llama-2")
    options = Options(dtype="float32", device="cuda")

    def count(device_bytes: int) -> int:
        devices: list[Device] = [HostDevice(device_bytes)]
        return most_resident_blocks(info, range(NUM_BLOCKS), options, budget(2048 * MIB), [JOB], devices)

    assert count(1 << 34) == NUM_BLOCKS
    assert count(1 << 20) == 1


@given(st.sets(st.integers(0, 60), min_size=1))
def test_runs_are_what_they_were_made_of(blocks: set[int]) -> None:
    runs = runs_of(blocks)
    assert [block for run in runs for block in run] == sorted(blocks)
    assert all(one.stop < other.start for one, other in itertools.pairwise(runs))
