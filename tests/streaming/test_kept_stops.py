"""Units that are asked for most stay in memory, so many of each group."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from slowllm.storage.manifest import open_checkpoint
from slowllm.storage.spans import Placement, Run
from slowllm.streaming.kept_stops import MARGIN, KeptStops
from slowllm.streaming.reader import Reader
from slowllm.streaming.ring import smallest_ring

NUM_UNITS, GROUPS = 8, [range(4), range(4, 8)]


@pytest.fixture
def tensors(tmp_path: Path) -> dict[str, torch.Tensor]:
    made = {f"{part}{unit}": torch.randn(33, 7 + part) + unit for unit in range(NUM_UNITS) for part in (0, 1)}
    save_file(made, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return made


@contextlib.contextmanager
def kept_stops(folder: Path, num_kept: int, *, poison: bool = True) -> Iterator[tuple[KeptStops, Reader]]:
    with open_checkpoint(folder) as checkpoint:
        spans = checkpoint.spans
        units = [
            tuple(
                Placement(
                    f"{part}{unit}", spans[f"{part}{unit}"].shape, torch.float32,
                    (Run(spans[f"{part}{unit}"], 0, 0, spans[f"{part}{unit}"].num_bytes),),
                )
                for part in (0, 1)
            )
            for unit in range(NUM_UNITS)
        ]  # fmt: skip
        with contextlib.closing(Reader(units, ring_bytes=smallest_ring(units), poison=poison)) as reader:
            stops = KeptStops(reader, units, GROUPS, num_kept)
            yield stops, reader
            stops.close()


def visit(stops: KeptStops, unit: int, tensors: dict[str, torch.Tensor]) -> None:
    with stops.visit(unit) as weights:
        assert set(weights) == {f"0{unit}", f"1{unit}"}
        for name, value in weights.items():
            assert torch.equal(value, tensors[name])


def test_the_first_ones_stay_so_many_of_each_group(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with kept_stops(tmp_path, 2) as (stops, reader):
        for unit in range(NUM_UNITS):
            visit(stops, unit, tensors)
        assert [unit for unit in range(NUM_UNITS) if stops.is_kept(unit)] == [0, 1, 4, 5]
        before = reader.stats.read_bytes
        for unit in (0, 1, 4, 5):
            visit(stops, unit, tensors)
        assert reader.stats.read_bytes == before
        assert stops.num_hits == 4
        assert stops.counts.tolist() == [2, 2, 1, 1, 2, 2, 1, 1]


def test_another_takes_the_place_of_one_that_was_asked_for_clearly_less(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    with kept_stops(tmp_path, 1) as (stops, _):
        visit(stops, 0, tensors)
        for count in range(1, 4):
            visit(stops, 2, tensors)
            assert stops.is_kept(2) == (count > MARGIN * 1 + 1)
        assert not stops.is_kept(0)
        visit(stops, 0, tensors)  # read again, and not kept in the place of the other
        assert stops.is_kept(2)
        visit(stops, 2, tensors)
        assert not stops.is_kept(4)  # of the other group, which nobody asked for


def test_without_room_nothing_stays(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with kept_stops(tmp_path, 0) as (stops, _reader):
        for _ in range(2):
            for unit in (0, 5):
                visit(stops, unit, tensors)
        assert not stops.num_hits
        assert not any(map(stops.is_kept, range(NUM_UNITS)))


def test_what_stays_is_not_read_ahead(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with kept_stops(tmp_path, 1, poison=False) as (stops, reader):
        visit(stops, 0, tensors)
        read: list[int] = []
        reader.on_read = lambda stop: read.append(stop.stop)
        with stops.visit(1, upcoming=[0, 2]):
            pass
        visit(stops, 2, tensors)
        assert sorted(set(read)) == [1, 2]


def test_who_raises_while_a_unit_is_held_keeps_nothing(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    with kept_stops(tmp_path, 1) as (stops, _):
        with pytest.raises(ValueError, match="no product"), stops.visit(0):
            raise ValueError("no product")
        assert not stops.is_kept(0)
        visit(stops, 0, tensors)
        assert stops.is_kept(0)
