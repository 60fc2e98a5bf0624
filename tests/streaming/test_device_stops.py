"""Stops on simulated devices, whose copies and computing run as late, or as soon, as they may."""

from __future__ import annotations

import contextlib
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import MagicMock, create_autospec

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slowllm.errors import InputError, PlanError, RideError
from slowllm.options import GIB, MIB, parse_devices
from slowllm.storage.spans import Placement
from slowllm.streaming.device_stops import DeviceStops, device_bytes_of
from slowllm.streaming.devices import CudaDevice, PinnedMemory, allowed_bytes, open_devices
from slowllm.streaming.stops import Weights
from tests.support.host_device import HostDevice
from tests.support.properties import num_examples

SHAPES = (
    ("a.weight", (3, 5), torch.float32),
    ("b.bias", (7,), torch.bfloat16),
    ("c.codes", (301,), torch.uint8),
)


def placements(num_stops: int) -> list[list[Placement]]:
    return [[Placement(name, shape, dtype, ()) for name, shape, dtype in SHAPES] for _ in range(num_stops)]


def value_of(stop: int) -> int:
    return stop + 1


class Host:
    """Stops in one place of the host's memory, which is written over as soon as a stop is given back."""

    def __init__(self, num_stops: int) -> None:
        self.num_stops = num_stops
        self.visited: list[int] = []
        self.upcoming: list[list[int]] = []
        self.threads: set[int] = set()
        self.failing: dict[int, BaseException] = {}
        self.failing_at_exit: dict[int, BaseException] = {}
        self.gate: threading.Event | None = None
        self.entered = threading.Event()
        self.is_closed = False

    @contextlib.contextmanager
    def visit(self, stop: int, upcoming: Sequence[int] = ()) -> Iterator[Weights]:
        self.threads.add(threading.get_ident())
        self.visited.append(stop)
        self.upcoming.append(list(upcoming))
        self.entered.set()
        if self.gate is not None:
            assert self.gate.wait(20)
        if self.is_closed:
            raise RideError("the model was closed")
        if stop in self.failing:
            raise self.failing[stop]
        weights = {name: torch.full(shape, value_of(stop), dtype=dtype) for name, shape, dtype in SHAPES}
        try:
            yield weights
        finally:
            for tensor in weights.values():
                tensor.fill_(255)
            if stop in self.failing_at_exit:
                raise self.failing_at_exit.pop(stop)


class SimulatedDevice(HostDevice):
    """Two queues that run only when somebody waits for them, or at random, each in its own order."""

    def __init__(self, seed: int, eagerness: float) -> None:
        super().__init__()
        self._random, self._eagerness = random.Random(seed), eagerness
        self._queues: dict[str, deque[Any]] = {"copy": deque(), "compute": deque()}
        self._pushed = {"copy": 0, "compute": 0}
        self._done = {"copy": 0, "compute": 0}
        self._lock = threading.RLock()

    def _push(self, queue: str, work: Callable[[], object] | tuple[str, int]) -> None:
        with self._lock:
            self._queues[queue].append(work)
            self._pushed[queue] += 1
            while self._random.random() < self._eagerness and self._step():
                pass

    def _can_run(self, queue: str) -> bool:
        if not self._queues[queue]:
            return False
        work = self._queues[queue][0]
        return callable(work) or self._done[work[0]] >= work[1]

    def _step(self, only: str | None = None) -> bool:
        able = [queue for queue in self._queues if self._can_run(queue)]
        if only in able:
            able = [only]
        if not able:
            return False
        queue = self._random.choice(able)
        work = self._queues[queue].popleft()
        if callable(work):
            work()
        self._done[queue] += 1
        return True

    def compute(self, work: Callable[[], object]) -> None:
        self._push("compute", work)

    def copy(self, target: Tensor, source: Tensor) -> None:
        self._push("copy", lambda: target.copy_(source))

    def copied(self) -> Any:
        with self._lock:
            return "copy", self._pushed["copy"]

    def computed(self) -> Any:
        with self._lock:
            return "compute", self._pushed["compute"]

    def copy_after(self, event: Any) -> None:
        if event is not None:
            self._push("copy", event)

    def compute_after(self, event: Any) -> None:
        if event is not None:
            self._push("compute", event)

    def wait(self, event: Any) -> None:
        if event is None:
            return
        with self._lock:
            while self._done[event[0]] < event[1]:
                assert self._step(event[0]), "the two queues wait for each other"


def check(weights: Weights, stop: int, wrong: list[int]) -> None:
    same = all(bool((weights[name] == value_of(stop)).all()) for name, _, _ in SHAPES)
    same &= all(
        weights[name].shape == shape and weights[name].dtype == dtype for name, shape, dtype in SHAPES
    )
    if not same:
        wrong.append(stop)


def device_stops(host: Host, device: HostDevice | None = None, **options: Any) -> DeviceStops:
    given = {
        "homes": [0] * host.num_stops,
        "devices": [device or HostDevice()],
        "kept": frozenset(),
        "num_slots": [2],
    }
    return DeviceStops(host, placements(host.num_stops), **{**given, **options})


@num_examples(150)
@given(data=st.data())
def test_every_order_of_visits_finds_every_stop_whole(data: Any) -> None:
    num_stops, num_devices = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 2))
    stop = st.integers(0, num_stops - 1)
    kept = data.draw(st.frozensets(stop, max_size=3))
    visits = data.draw(st.lists(st.tuples(stop, st.lists(stop, max_size=8)), max_size=14))
    eagerness = data.draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    devices = [SimulatedDevice(data.draw(st.integers(0, 99)), eagerness) for _ in range(num_devices)]
    num_slots = [data.draw(st.integers(1, 3)) for _ in devices]
    host, wrong = Host(num_stops), list[int]()
    homes = [number % num_devices for number in range(num_stops)]
    stops = device_stops(host, homes=homes, devices=devices, kept=kept, num_slots=num_slots)
    try:
        for number, upcoming in visits:
            with stops.visit(number, upcoming) as weights:
                held = dict(weights)
                devices[homes[number]].compute(lambda held=held, number=number: check(held, number, wrong))
    finally:
        stops.close()
    assert not wrong, "a stop was computed with before it was copied, or after it was written over"
    assert len(host.threads) <= 1, "one visitor of the inner stops"
    assert all(host.visited.count(number) <= 1 for number in kept)


def test_nothing_is_computed_with_before_it_was_copied() -> None:
    asked = threading.Event()

    class Late(SimulatedDevice):
        def wait(self, event: Any) -> None:
            assert asked.wait(20), "whoever visits waits for the device, and not for the host"
            super().wait(event)

    device, wrong = Late(0, 0.0), list[int]()
    stops = device_stops(Host(2), device)
    with stops.visit(0) as weights:
        device.compute(lambda: check(weights, 0, wrong))
        while device._can_run("compute"):
            device._step("compute")
        asked.set()
    stops.close()
    assert not wrong


@pytest.mark.parametrize("poison", [False, True])
def test_a_sweep_up_and_down_reads_each_stop_once_and_one_ahead(poison: bool) -> None:
    host, wrong = Host(6), list[int]()
    stops = device_stops(host, kept=frozenset([2]), poison=poison)
    order = [0, 1, 2, 3, 4, 5, 4, 3, 2, 1, 0]
    with contextlib.closing(stops):
        for place, stop in enumerate(order):
            with stops.visit(stop, order[place + 1 :]) as weights:
                check(weights, stop, wrong)
    assert not wrong
    # Where it turns, the stop before the last is still in its slot.
    assert host.visited == [0, 1, 2, 3, 4, 5, *([4] if poison else []), 3, 1, 0]
    assert host.upcoming[0][:3] == [1, 2, 3], "the reader reads on in the carousel's direction"


def test_a_slot_that_was_given_back_is_poisoned_and_what_stays_is_not() -> None:
    host = Host(3)
    with contextlib.closing(device_stops(host, kept=frozenset([1]), poison=True)) as stops:
        with stops.visit(0) as weights:
            held = weights["a.weight"]
        with stops.visit(1) as weights:
            stays = weights["a.weight"]
        assert bool(held.isnan().all())
        assert bool((stays == value_of(1)).all())


def test_what_keeps_a_stop_from_coming_reaches_its_visitor_and_no_other() -> None:
    host = Host(4)
    host.failing[1] = OSError("the disk failed")
    with contextlib.closing(device_stops(host)) as stops:
        with stops.visit(0, [1, 2]):
            pass
        with pytest.raises(OSError, match="the disk failed"), stops.visit(1, [2]):
            pass
        with stops.visit(2) as weights:
            assert bool((weights["a.weight"] == value_of(2)).all())
        del host.failing[1]
        with stops.visit(1) as weights:
            assert bool((weights["a.weight"] == value_of(1)).all())


def test_what_failed_ahead_of_need_is_tried_again_for_whoever_comes() -> None:
    host = Host(3)
    host.failing[1] = OSError("for a moment")
    with contextlib.closing(device_stops(host)) as stops:
        with stops.visit(0, [1, 2]):
            for _ in range(2000):
                if 2 in host.visited:  # 1 has failed, and the thread has gone on
                    break
                threading.Event().wait(0.005)
        assert host.visited == [0, 1, 2]
        del host.failing[1]
        with stops.visit(1) as weights:
            assert bool((weights["a.weight"] == value_of(1)).all())


def test_an_error_as_the_host_gives_a_stop_back_is_not_lost() -> None:
    host = Host(2)
    host.failing_at_exit[0] = OSError("at the end")
    with contextlib.closing(device_stops(host)) as stops:
        with contextlib.suppress(OSError), stops.visit(0):
            pass
        with stops.visit(0) as weights:
            assert bool((weights["a.weight"] == value_of(0)).all())


def test_an_error_as_the_host_gives_a_stop_back_leaves_alone_who_holds_it() -> None:
    class Counting(HostDevice):
        num_copies = 0

        def copy(self, target: Tensor, source: Tensor) -> None:
            super().copy(target, source)
            self.num_copies += 1

    host, device, wrong = Host(2), Counting(), list[int]()
    host.failing_at_exit[0] = OSError("at the end")
    with contextlib.closing(device_stops(host, device)) as stops, stops.visit(0, [1]) as weights:
        for _ in range(2000):
            if device.num_copies == 2 * len(SHAPES):  # the next one was copied meanwhile
                break
            threading.Event().wait(0.005)
        assert device.num_copies == 2 * len(SHAPES)
        check(weights, 0, wrong)
    assert not wrong


def test_a_device_without_a_free_slot_does_not_keep_another_from_being_copied_to() -> None:
    host = Host(3)
    stops = device_stops(host, homes=[0, 1, 0], devices=[HostDevice(), HostDevice()], num_slots=[1, 1])
    with contextlib.closing(stops), stops.visit(0, [2, 1]):
        for _ in range(2000):
            if 1 in host.visited:
                break
            threading.Event().wait(0.005)
        assert host.visited == [0, 1]


def test_a_copy_that_fails_reaches_the_visitor() -> None:
    class Broken(HostDevice):
        def copy(self, target: Tensor, source: Tensor) -> None:
            raise RuntimeError("CUDA error: an illegal memory access")

    with (
        contextlib.closing(device_stops(Host(2), Broken())) as stops,
        pytest.raises(RuntimeError, match="illegal memory access"),
        stops.visit(0),
    ):
        pass


def test_an_error_of_the_visitor_leaves_the_stops_usable() -> None:
    with contextlib.closing(device_stops(Host(2))) as stops:
        with pytest.raises(ValueError, match="mine"), stops.visit(0):
            raise ValueError("mine")
        with stops.visit(0, [1]):
            pass
        with stops.visit(1):
            pass


def test_closing_while_a_stop_is_on_its_way_ends_the_wait() -> None:
    host = Host(2)
    host.gate = threading.Event()
    stops = device_stops(host)
    errors: list[BaseException] = []

    def visit() -> None:
        try:
            with stops.visit(0):
                pass
        except RideError as error:
            errors.append(error)

    visitor = threading.Thread(target=visit)
    visitor.start()
    assert host.entered.wait(10)
    # As a reader that is closed does, whose visitor then hears of it.
    host.is_closed = True
    host.gate.set()
    stops.close()
    visitor.join(10)
    assert not visitor.is_alive()
    assert [str(error) for error in errors] == ["the model was closed"]
    with pytest.raises(RideError, match="the model was closed"), stops.visit(0):
        pass
    stops.close()


def test_closing_waits_for_what_the_device_computes() -> None:
    device, done = SimulatedDevice(0, 0.0), list[int]()
    stops = device_stops(Host(2), device)
    with stops.visit(0):
        device.compute(lambda: done.append(1))
    assert not done
    stops.close()
    assert done == [1]


def test_slots_are_as_large_as_the_largest_stop_that_passes() -> None:
    class Counting(HostDevice):
        sizes: list[int]

        def allocate(self, num_bytes: int) -> Tensor:
            self.sizes.append(num_bytes)
            return super().allocate(num_bytes)

    device = Counting()
    device.sizes = []
    stops = [[Placement("x", (size,), torch.uint8, ())] for size in (1000, 10, 5000, 300)]
    with contextlib.closing(
        DeviceStops(Host(4), stops, homes=[0] * 4, devices=[device], kept=frozenset([2]), num_slots=[2])
    ):
        assert device.sizes == [5120, 1024, 1024]
    assert device_bytes_of(stops[1][0]) == 256


def test_a_budget_is_what_was_given_or_what_is_free() -> None:
    class Card(HostDevice):
        def free_bytes(self) -> int:
            return 6 * GIB

        def total_bytes(self) -> int:
            return 8 * GIB

    assert allowed_bytes(Card(), None) == 6 * GIB - 256 * MIB
    assert allowed_bytes(Card(), 5 * GIB) == 5 * GIB
    with pytest.raises(InputError, match=r"a vram budget of 9GiB is more than the 8\.59 GB of cpu"):
        allowed_bytes(Card(), 9 * GIB)
    with pytest.raises(InputError, match=r"is more than the 6\.44 GB that are free on cpu; other programs"):
        allowed_bytes(Card(), 7 * GIB)


def test_a_device_is_named_by_its_number() -> None:
    assert parse_devices("cpu") == ("cpu",)
    assert parse_devices("cuda") == ("cuda:0",)
    assert parse_devices("cuda:01, cuda") == ("cuda:1", "cuda:0")
    for wrong in ("", "cuda:", "cuda:-1", "cpu,cuda", "cuda:0,", "CUDA", "cuda:0.5", "xpu"):
        with pytest.raises(InputError, match="is unknown; use cpu, cuda, cuda:1, or several"):
            parse_devices(wrong)


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_devices(("cpu",)) == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    with pytest.raises(
        InputError, match=r"device cuda:0 cannot be used: this torch \(.*\) is built without CUDA; use cpu"
    ):
        open_devices(("cuda:0",))
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    with pytest.raises(InputError, match=r"cannot be used: this torch \(.*\) sees no GPU"):
        open_devices(("cuda:0",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for count, there in ((1, "cuda:0 only"), (4, "cuda:0 to cuda:3")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        with pytest.raises(InputError, match=f"there is no device cuda:4; this machine has {there}"):
            open_devices(("cuda:4",))


GPU = torch.device("cuda:0")


class Driver:
    """Stands for CUDA's runtime; registers what it is told to."""

    def __init__(self, error: int) -> None:
        self.error, self.registered = error, list[tuple[int, int]]()
        self.unregistered: list[int] = []

    def cudaHostRegister(self, start: int, size: int, flags: int) -> int:
        self.registered.append((start, size))
        return self.error

    def cudaHostUnregister(self, start: int) -> int:
        self.unregistered.append(start)
        return 0


def test_memory_is_pinned_until_it_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    buffers = [np.zeros(8192, np.uint8), np.empty(0, np.uint8)]
    with contextlib.closing(PinnedMemory(buffers, GPU)) as pinned:
        assert driver.registered == [(buffers[0].ctypes.data, 8192)]
        pinned.close()
    assert driver.unregistered == [buffers[0].ctypes.data]


def test_memory_that_cannot_be_pinned_is_used_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    driver = Driver(2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr("slowllm.streaming.devices._forget_error", lambda device: None)
    PinnedMemory([np.zeros(8192, np.uint8)], GPU).close()
    assert not driver.unregistered
    assert "could not be pinned (CUDA error 2); copies to the GPU will be slower" in caplog.text


def test_a_card_that_is_full_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(*args: Any, **kwargs: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    device = CudaDevice.__new__(CudaDevice)
    device.torch_device = torch.device("cuda:0")
    monkeypatch.setattr(CudaDevice, "free_bytes", lambda self: 3 * MIB)
    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(PlanError, match=r"cuda:0: 1\.07 GB more cannot be had there \(3\.15 MB are free\)"):
        device.allocate(GIB)


def test_a_stop_that_the_plan_left_out_is_not_copied_ahead() -> None:
    host = Host(3)
    with contextlib.closing(device_stops(host, kept=frozenset([0]), num_slots=[0])) as stops:
        with stops.visit(0, [1, 2]):
            pass
        with (
            pytest.raises(AssertionError, match="the plan was that nobody comes to this stop"),
            stops.visit(1),
        ):
            pass
    assert host.visited == [0]


def test_a_cuda_device_copies_on_its_own_stream_and_records_events_on_the_right_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By stand-ins for torch's objects, which have their methods and arguments: the order of calls, and no more."""
    calls: list[Any] = []
    plain = torch.cuda.Event
    streams = {name: create_autospec(torch.cuda.Stream, instance=True) for name in ("own", "current")}

    def event(*, blocking: bool) -> Any:
        assert blocking, "whoever waits sleeps"
        made = create_autospec(plain, instance=True)
        made.record.side_effect = lambda stream: calls.append(("record", stream))
        return made

    @contextlib.contextmanager
    def using(stream: Any) -> Iterator[None]:
        calls.append(("enter", stream))
        yield
        calls.append(("leave", stream))

    generator = torch.Generator()
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "default_generators", (None, generator))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: streams["own"])
    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams["current"])
    monkeypatch.setattr(torch.cuda, "stream", using)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1)
    device = CudaDevice(torch.device("cuda:1"))
    assert (device.free_bytes(), device.total_bytes(), device.generator) == (7, 9, generator)

    target = MagicMock()
    target.copy_.side_effect = lambda source, non_blocking: calls.append(("copy", non_blocking))
    device.copy(target, torch.zeros(1))
    copied, computed = device.copied(), device.computed()
    assert calls == [
        ("enter", streams["own"]), ("copy", True), ("leave", streams["own"]),
        ("record", streams["own"]), ("record", streams["current"]),
    ]  # fmt: skip
    device.copy_after(computed)
    streams["own"].wait_event.assert_called_once_with(computed)
    device.compute_after(copied)
    streams["current"].wait_event.assert_called_once_with(copied)
    device.wait(copied)
    copied.synchronize.assert_called_once_with()
    for wait in (device.copy_after, device.compute_after, device.wait):
        wait(None)
