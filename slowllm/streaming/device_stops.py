"""Stops on devices: the next stop is copied to where it is computed, while the last one still computes.

A layer between the reader, whose stops lie in RAM, and the visitor. Knows stops, their tensors and devices; knows
nothing of models, and of CUDA no more than a `Device` says. A thread, the one visitor of the inner stops, copies what
comes next into a slot of its device: a double buffer where there are two slots. Some stops stay on their device for
good. Events in the devices' queues prevent three races: computing with a stop before it was copied; overwriting a slot
that is still computed with; and giving memory of the host back before it was copied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from slowllm.rounding import round_up
from slowllm.storage.spans import Placement
from slowllm.streaming.devices import Device, Event
from slowllm.streaming.prefetch import PrefetchedStops
from slowllm.streaming.stops import Stops, Weights

# Each tensor of a slot begins on such an address, as allocations on a device do.
ALIGNMENT = 256


def device_bytes_of(placement: Placement) -> int:
    """Return the bytes that a tensor takes in a slot."""
    return round_up(placement.num_bytes, ALIGNMENT)


@dataclass
class _DeviceSlot:
    """Memory for one stop on a device, and the stop that is in it, or on its way there."""

    device: Device
    memory: Tensor
    is_kept: bool
    stop: int | None = None
    is_ready: bool = False
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    copied: Event = None
    computed: Event = None


@dataclass(frozen=True)
class _Copy:
    """What the thread is to do: copy a stop into a slot, while the inner stops prefetch those that follow."""

    stop: int
    slot: _DeviceSlot
    following: Sequence[int]


class DeviceStops(PrefetchedStops[_DeviceSlot, _Copy]):
    """Stops whose weights are on devices, as stored. Owns its thread and the devices' memory; close it.

    One visitor at a time.

    Args:
        stops: in the host's memory; visited by this object's thread only.
        placements: of every tensor of a stop.
        homes: the number of the device at which each stop is computed.
        devices: from `open_devices`.
        kept: stops that stay on their device.
        num_slots: of each device; at least one where a stop is not kept.
        poison: overwrite a slot when its stop is given back, to expose whoever still uses it.
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
        super().__init__(stops.num_stops, ["slowllm-stage"])
        self._stops, self._homes, self._poison = stops, homes, poison
        sizes = [sum(map(device_bytes_of, stop)) for stop in placements]
        # The thread copies into this memory, and need not be in inference mode.
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
        self._all_slots = [*self._kept.values(), *(slot for slots in self._slots for slot in slots)]
        self._start_threads()

    @contextlib.contextmanager
    def visit(self, stop: int, upcoming: Sequence[int] = ()) -> Iterator[Weights]:
        """Hold a stop on its device, and copy those that come next meanwhile; see `Stops.visit`.

        Raises:
            RideError: the stops were closed.
            BaseException: what kept the stop from being copied.
        """
        assert self._has_slot(stop), "the plan was that nobody comes to this stop"
        upcoming = [s for s in upcoming if self._has_slot(s)]
        with self._changed:
            slot = self._wait_for(stop, upcoming)
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
                        slot.stop, slot.is_ready = None, False
                    self._want(upcoming)

    def close(self) -> None:
        """End the thread, wait for what the devices have under way, and free their memory.

        A visitor that waits for a stop gets a `RideError`. Close the inner stops first, or the thread may wait for
        them.
        """
        if self._is_forked():
            return
        self._end_threads()
        for slot in self._all_slots:
            slot.device.wait(slot.computed)
            slot.weights, slot.memory = {}, slot.memory[:0].clone()

    def _has_slot(self, stop: int) -> bool:
        # A job may be planned without a stop; the carousel may still expect it.
        return stop in self._kept or bool(self._slots[self._homes[stop]])

    # Called with the lock held, down to `_work`.

    def _find(self, stop: int) -> _DeviceSlot | None:
        slots = [self._kept[stop]] if stop in self._kept else self._slots[self._homes[stop]]
        return next((slot for slot in slots if slot.stop == stop and slot.is_ready), None)

    def _next_work(self) -> _Copy | None:
        there = {slot.stop for slot in self._all_slots if slot.is_ready}
        missing = [stop for stop in self._wanted if stop not in there and stop not in self._errors]
        full = set[int]()  # devices that have no slot for a stop, and so none for those that are wanted later
        for number, stop in enumerate(missing):
            if stop not in self._kept and self._homes[stop] in full:
                continue
            if (slot := self._slot_for(stop)) is not None:
                slot.stop, slot.is_ready = stop, False
                return _Copy(stop, slot, missing[:number] + missing[number + 1 :])
            full.add(self._homes[stop])
        return None

    def _slot_for(self, stop: int) -> _DeviceSlot | None:
        """Return the slot to copy a stop into: the one whose stop is wanted last, if that is later than this stop."""
        if stop in self._kept:
            return self._kept[stop]

        def next_use(slot: _DeviceSlot) -> int:
            if slot.stop is None or slot.stop not in self._wanted:
                return len(self._wanted)
            return self._wanted.index(slot.stop)

        last = max(self._slots[self._homes[stop]], key=next_use)
        # The stop that is held is the first of those wanted, so nothing overwrites it.
        return last if next_use(last) > self._wanted.index(stop) else None

    def _work(self) -> None:
        while (work := self._wait_for_work()) is not None:
            try:
                self._copy(work)
            except BaseException as error:  # handed to whoever visits this stop
                with self._changed:
                    if not work.slot.is_ready:  # else it is whole on the device, and may be held already
                        work.slot.stop, work.slot.weights = None, {}
                    self._errors[work.stop] = error
                    self._changed.notify_all()
            del work

    def _copy(self, work: _Copy) -> None:
        slot, device = work.slot, work.slot.device
        with self._stops.visit(work.stop, work.following) as stored:
            device.copy_after(slot.computed)
            try:
                slot.weights = _copy_into(slot.memory, stored, device)
                slot.copied = device.copied()
                with self._changed:
                    slot.is_ready = True
                    self._changed.notify_all()
            finally:
                # The device reads the host's memory until here, whatever went wrong meanwhile.
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
