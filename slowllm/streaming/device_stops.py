"""Stops on devices: a layer that copies the next stop to where it is computed, while the last one still computes.

Between the reader, whose stops lie in RAM, and whoever visits. Knows stops, their tensors and devices; knows nothing of
models, and of CUDA no more than a device says. A thread of its own, the one visitor of the inner stops, copies what
comes next into a slot of its device. Some stops stay on their device for good. Three things must never happen, and
are kept apart by marks in the devices' queues: a stop that is computed with before it was copied; a slot that is
written over while it is still computed with; and memory of the host that is given back before it was copied.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from slowllm.errors import RideError
from slowllm.rounding import round_up
from slowllm.storage.spans import Placement
from slowllm.streaming.devices import Device, Event
from slowllm.streaming.stops import Stops, Weights

# Each tensor of a slot begins on such an address, as allocations on a device do.
ALIGNMENT = 256


def device_bytes_of(placement: Placement) -> int:
    """Return the bytes that a tensor takes in a slot."""
    return round_up(placement.num_bytes, ALIGNMENT)


@dataclass
class _DeviceSlot:
    """A place for one stop on a device, and what is in it."""

    device: Device
    memory: Tensor
    is_kept: bool
    stop: int | None = None
    is_there: bool = False
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    copied: Event = None
    computed: Event = None


class DeviceStops:
    """Stops whose weights are on devices, as stored. Owns its thread and the devices' memory; close it.

    One visitor at a time.

    Args:
        stops: in the host's memory; visited by this object's thread only.
        placements: of every tensor of a stop.
        homes: the number of the device at which each stop is computed.
        devices: of the devices.
        kept: stops that stay.
        num_slots: of each device; at least one where a stop is not kept.
        poison: write over what a slot holds when its stop is given back, to show whoever still uses it.
    Raises:
        PlanError: a device has less memory than was planned for.
    """

    def __init__(
        self,
        stops: Stops,
        placements: Sequence[Sequence[Placement]],
        *,
        homes: Sequence[int],
        devices: Sequence[Device],
        kept: frozenset[int],
        num_slots: Sequence[int],
        poison: bool = False,
    ) -> None:
        self.num_stops = stops.num_stops
        self._stops, self._homes, self._poison = stops, homes, poison
        sizes = [sum(map(device_bytes_of, stop)) for stop in placements]
        # Copied into on another thread, which need not be in inference mode.
        with torch.inference_mode(False):
            self._kept = {
                stop: _DeviceSlot(
                    devices[homes[stop]], devices[homes[stop]].allocate(sizes[stop]), is_kept=True
                )
                for stop in sorted(kept)
            }
            self._slots = [
                [_DeviceSlot(device, device.allocate(size), is_kept=False) for _ in range(count)]
                for number, (device, count) in enumerate(zip(devices, num_slots, strict=True))
                for size in [
                    max((s for i, s in enumerate(sizes) if homes[i] == number and i not in kept), default=0)
                ]
            ]
        self._wanted: list[int] = []
        self._errors: dict[int, BaseException] = {}
        self._failure: BaseException | None = None
        self._closing = False
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="slowllm-stage", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def visit(self, stop: int, upcoming: Sequence[int] = ()) -> Iterator[Weights]:
        """Hold a stop on its device, and copy those that come next meanwhile; see `Stops.visit`.

        Raises:
            RideError: the stops were closed.
            BaseException: what kept the stop from coming.
        """
        assert self._has_place(stop), "the plan was that nobody comes to this stop"
        with self._changed:
            self._wanted = [s for s in dict.fromkeys((stop, *upcoming)) if self._has_place(s)]
            # What failed ahead of need is tried once more for whoever comes for it.
            self._errors.pop(stop, None)
            self._changed.notify_all()
            slot = self._wait_for(stop)
        slot.device.compute_after(slot.copied)
        is_poisoned = self._poison and not slot.is_kept
        try:
            yield slot.weights
        finally:
            try:
                if is_poisoned:
                    slot.memory.fill_(0xFF)  # NaN in every floating-point dtype
                slot.computed = slot.device.computed()
            finally:
                with self._changed:
                    if is_poisoned:
                        slot.stop, slot.is_there = None, False
                    self._wanted = [s for s in dict.fromkeys(upcoming) if self._has_place(s)]
                    self._changed.notify_all()

    def close(self) -> None:
        """End the thread, wait for what the devices have under way, and let go of their memory.

        Whoever waits for a stop gets a `RideError`. The inner stops are closed first, or the thread may wait for them.
        """
        # A forked child has no thread to end, and whoever held the lock is not there to give it back.
        if os.getpid() != self._process:
            return
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        for slot in [*self._kept.values(), *(slot for slots in self._slots for slot in slots)]:
            slot.device.wait(slot.computed)
            slot.weights, slot.memory = {}, slot.memory[:0].clone()

    def _has_place(self, stop: int) -> bool:
        # None where the job was planned without it; the carousel may still expect it.
        return stop in self._kept or bool(self._slots[self._homes[stop]])

    # What follows runs with the lock held, down to `_run`.

    def _wait_for(self, stop: int) -> _DeviceSlot:
        while True:
            if self._closing:
                raise RideError("the model was closed")
            if self._failure is not None:
                raise self._failure
            found = self._find(stop)
            if found is not None and found.is_there:
                return found
            error = self._errors.pop(stop, None)
            if error is not None:
                self._wanted = []  # else it would be tried again at once, and fail again before anybody came
                raise error
            self._changed.wait()

    def _find(self, stop: int) -> _DeviceSlot | None:
        if stop in self._kept:
            return self._kept[stop]
        return next((slot for slot in self._slots[self._homes[stop]] if slot.stop == stop), None)

    def _next(self) -> tuple[int, _DeviceSlot, list[int]] | None:
        """Return the next stop to be copied, its place, and those to be copied after it."""
        missing = [stop for stop in self._wanted if not self._is_there(stop) and stop not in self._errors]
        for place, stop in enumerate(missing):
            slot = self._place_for(stop)
            if slot is not None:
                return stop, slot, missing[:place] + missing[place + 1 :]
        return None

    def _is_there(self, stop: int) -> bool:
        found = self._find(stop)
        return found is not None and found.is_there

    def _place_for(self, stop: int) -> _DeviceSlot | None:
        """Return where a stop is to be copied: over what is wanted last, if that is later than this one."""
        if stop in self._kept:
            return self._kept[stop]

        def next_use(slot: _DeviceSlot) -> int:
            if slot.stop is None or slot.stop not in self._wanted:
                return len(self._wanted)
            return self._wanted.index(slot.stop)

        latest = max(self._slots[self._homes[stop]], key=next_use)
        # What is held is wanted first, so nothing is copied over it.
        return latest if next_use(latest) > self._wanted.index(stop) else None

    # The thread.

    def _run(self) -> None:
        try:
            while (work := self._wait_for_work()) is not None:
                stop, slot, following = work
                error: BaseException | None = None
                try:
                    self._copy(stop, slot, following)
                except BaseException as caught:  # handed to whoever visits this stop
                    error = caught
                if error is not None:
                    with self._changed:
                        slot.stop, slot.is_there, slot.weights = None, False, {}
                        self._errors[stop] = error
                        self._changed.notify_all()
                del work, slot, error
        except BaseException as caught:  # a fault of ours: handed to every visitor
            with self._changed:
                self._failure = caught
                self._changed.notify_all()

    def _wait_for_work(self) -> tuple[int, _DeviceSlot, list[int]] | None:
        with self._changed:
            while not self._closing:
                work = self._next()
                if work is not None:
                    stop, slot, _ = work
                    slot.stop, slot.is_there = stop, False
                    return work
                self._changed.wait()
        return None

    def _copy(self, stop: int, slot: _DeviceSlot, following: Sequence[int]) -> None:
        device = slot.device
        with self._stops.visit(stop, following) as stored:
            device.copy_after(slot.computed)
            try:
                slot.weights = _copy_into(slot.memory, stored, device)
                slot.copied = device.copied()
                with self._changed:
                    slot.is_there = True
                    self._changed.notify_all()
            finally:
                # The host's memory is read by the device until here, whatever went wrong meanwhile.
                device.wait(device.copied())


def _copy_into(memory: Tensor, stored: Weights, device: Device) -> dict[str, Tensor]:
    """Queue copies of tensors, one behind the other, into memory on a device; return them there."""
    weights: dict[str, Tensor] = {}
    start = 0
    for name, tensor in stored.items():
        num_bytes = tensor.numel() * tensor.dtype.itemsize
        target = memory[start : start + num_bytes].view(tensor.dtype).view(tensor.shape)
        device.copy(target, tensor)
        weights[name] = target
        start += round_up(num_bytes, ALIGNMENT)
    return weights
