"""Units that are asked for most stay in memory, so many of each group."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from slowllm.storage.manifest import open_checkpoint
from slowllm.storage.spans import Placement, Run
from slowllm.streaming.demand_stops import DemandStops
from slowllm.streaming.device_stops import DeviceStops
from slowllm.streaming.kept_stops import ENOUGH_COUNTS, MARGIN, KeptStops
from slowllm.streaming.reader import Reader
from slowllm.streaming.ring import smallest_ring
from tests.streaming.test_device_stops import SimulatedDevice
from tests.support.properties import num_examples

NUM_UNITS, GROUPS = 8, [range(4), range(4, 8)]


def make_tensors(folder: Path) -> dict[str, torch.Tensor]:
    made = {f"{part}{unit}": torch.randn(33, 7 + part) + unit for unit in range(NUM_UNITS) for part in (0, 1)}
    save_file(made, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return made


@pytest.fixture
def tensors(tmp_path: Path) -> dict[str, torch.Tensor]:
    return make_tensors(tmp_path)


@contextlib.contextmanager
def kept_stops(
    folder: Path, num_kept: int, *, poison: bool = True, counts: list[int] | None = None
) -> Iterator[tuple[KeptStops, Reader]]:
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
            known = None if counts is None else np.array(counts)
            stops = KeptStops(reader, units, GROUPS, num_kept, known)
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


def test_those_that_earlier_runs_asked_for_most_take_their_places_when_they_come(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    # The third was asked for hardly more often than the first, and has its place all the same.
    with kept_stops(tmp_path, 2, counts=[8, 1, 10, 30, 0, 0, 0, 0]) as (stops, reader):
        for unit, kept in ((0, [0]), (1, [0, 1]), (3, [0, 3]), (2, [2, 3]), (0, [2, 3]), (1, [2, 3])):
            visit(stops, unit, tensors)
            assert [unit for unit in range(4) if stops.is_kept(unit)] == kept
        before = reader.stats.read_bytes
        for unit in (2, 3):
            visit(stops, unit, tensors)
        assert reader.stats.read_bytes == before
        # Of a group of which nothing is known, the first ones stay as ever.
        for unit in (4, 5, 6):
            visit(stops, unit, tensors)
        assert [unit for unit in range(4, 8) if stops.is_kept(unit)] == [4, 5]


def test_what_earlier_runs_asked_for_gives_way_to_what_is_asked_for_now(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    with kept_stops(tmp_path, 1, counts=[0, 3, 0, 0, 0, 0, 0, 0]) as (stops, _):
        visit(stops, 1, tensors)
        for _time in range(8):
            visit(stops, 0, tensors)
        assert stops.is_kept(0)
        visit(stops, 1, tensors)  # which is no longer expected to stay
        assert stops.is_kept(0)
    with kept_stops(tmp_path, 1, counts=[0, 3, 0, 0, 0, 0, 0, 0]) as (stops, _):
        for _time in range(8):
            visit(stops, 0, tensors)
        visit(stops, 1, tensors)  # comes too late
        assert stops.is_kept(0)


def test_counts_of_a_group_are_halved_where_they_are_many(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    most = ENOUGH_COUNTS * len(GROUPS[0])
    with kept_stops(tmp_path, 1, counts=[most - 8, 8, 0, 0, 0, 0, 3, 0]) as (stops, _):
        visit(stops, 1, tensors)
        assert stops.counts.tolist() == [(most - 8) // 2, 4, 0, 0, 0, 0, 3, 0]


def test_what_is_in_memory_comes_first_and_what_was_read_ahead_next(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    with kept_stops(tmp_path, 1) as (stops, _):
        for unit in (3, 5):
            visit(stops, unit, tensors)
        demand = DemandStops(stops, stops.is_kept)
        assert demand.soonest_first(range(NUM_UNITS)) == [3, 5, 0, 1, 2, 4, 6, 7]
        assert demand.soonest_first([1, 2, 3, 6, 7], ahead=[7, 3, 2, 4]) == [3, 7, 2, 1, 6]


@num_examples(25)
@given(data=st.data())
def test_behind_devices_every_unit_comes_whole_whoever_asks_what_is_kept(
    data: Any, tmp_path_factory: Any
) -> None:
    folder = tmp_path_factory.mktemp("units")
    made = make_tensors(folder)
    unit = st.integers(0, NUM_UNITS - 1)
    visits = data.draw(st.lists(st.tuples(unit, st.lists(unit, max_size=4)), min_size=1, max_size=20))
    eagerness = data.draw(st.sampled_from([0.0, 0.3, 1.0]))
    devices = [SimulatedDevice(data.draw(st.integers(0, 99)), eagerness) for _ in range(2)]
    wrong = list[int]()

    def check(held: dict[str, torch.Tensor], number: int) -> None:
        if not all(torch.equal(value, made[name]) for name, value in held.items()):
            wrong.append(number)

    with kept_stops(folder, data.draw(st.integers(0, 3))) as (kept, reader):
        homes = [int(number in GROUPS[1]) for number in range(NUM_UNITS)]
        stops = DeviceStops(
            kept, kept._units, homes=homes, devices=devices, kept=frozenset(), num_slots=[2, 2], poison=False
        )
        demand = DemandStops(stops, kept.is_kept)
        try:
            for first, others in visits:
                units = demand.soonest_first(list(dict.fromkeys([first, *others])))
                for number, weights in demand.bring(units):
                    assert set(weights) == {f"0{number}", f"1{number}"}
                    held = dict(weights)
                    devices[homes[number]].compute(lambda held=held, number=number: check(held, number))
        finally:
            reader.close()
            stops.close()
    assert not wrong
    assert demand.wait_seconds > 0
