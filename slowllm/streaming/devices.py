"""What a device does for stops: its memory, copies into it, and the order between copying and computing.

Knows devices, streams and host memory; knows nothing of stops or models. Copies go by a stream of their own, beside
the device's computing, which is queued on the stream that is current where it is asked for. A mark is a place in
one of the two queues: the other can be made to wait for it, or the caller can wait.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from slowllm.errors import InputError, PlanError
from slowllm.options import MIB, format_binary, format_bytes

log = logging.getLogger(__name__)

# Of what is free on a card, this much is left to others where nobody gave a budget: a screen needs some.
RESERVE_BYTES = 256 * MIB
# cudaHostRegisterPortable: pinned for every device of the process.
PORTABLE = 1

# A place in a queue, in whatever form the lane has it; None where there is nothing to wait for.
Event = Any


class Device(Protocol):
    """One device, as `DeviceStops` needs it.

    Attributes:
        device: which.
        generator: from which sampling draws there.
    """

    device: torch.device
    generator: torch.Generator

    def free_bytes(self) -> int:
        """Return what could be allocated now, by this process."""

    def total_bytes(self) -> int:
        """Return the size of the device's memory."""

    def multiplies_integers(self) -> bool:
        """Return whether the device has products of 8-bit integers."""

    def allocate(self, num_bytes: int) -> Tensor:
        """Return (num_bytes,) uint8 on the device.

        Raises:
            PlanError: the device has not that much left.
        """

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy from the host, behind those before it. `source` must stay until it has ended."""

    def copied(self) -> Event:
        """Return a mark behind all copies so far."""

    def computed(self) -> Event:
        """Return a mark behind what the calling thread has had computed so far."""

    def copy_after(self, mark: Event) -> None:
        """Let copies that are queued from here on wait for a mark."""

    def compute_after(self, mark: Event) -> None:
        """Let what the calling thread has computed from here on wait for a mark."""

    def wait(self, mark: Event) -> None:
        """Wait for a mark."""


class HostLane:
    """A device whose copies are done at once: the processor's own memory. For tests."""

    def __init__(self, num_bytes: int = 1 << 40) -> None:
        self.device = torch.device("cpu")
        self.generator = torch.Generator()
        self._num_bytes = num_bytes

    def free_bytes(self) -> int:
        """See `Device`."""
        return self._num_bytes

    def total_bytes(self) -> int:
        """See `Device`."""
        return self._num_bytes

    def multiplies_integers(self) -> bool:
        """See `Device`."""
        return True

    def allocate(self, num_bytes: int) -> Tensor:
        """See `Device`."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """See `Device`."""
        target.copy_(source)

    def copied(self) -> Event:
        """See `Device`."""

    def computed(self) -> Event:
        """See `Device`."""

    def copy_after(self, mark: Event) -> None:
        """See `Device`."""

    def compute_after(self, mark: Event) -> None:
        """See `Device`."""

    def wait(self, mark: Event) -> None:
        """See `Device`."""


class CudaLane:
    """A CUDA device. Making it starts CUDA there, which takes some of its memory.

    Computing is on the stream that is current for the calling thread, by default the device's first: a caller who
    computes on other streams has to order them by himself.
    """

    def __init__(self, device: torch.device) -> None:
        torch.cuda.init()  # the generators are made by it
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self.generator = torch.cuda.default_generators[device.index]

    def multiplies_integers(self) -> bool:
        """See `Device`; cuBLAS has them from compute capability 7.5 on."""
        return bool(torch.cuda.get_device_capability(self.device) >= (7, 5))

    def free_bytes(self) -> int:
        """See `Device`; what torch holds of it unused counts as free."""
        free, _ = torch.cuda.mem_get_info(self.device)
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return int(free + unused)

    def total_bytes(self) -> int:
        """See `Device`."""
        return int(torch.cuda.mem_get_info(self.device)[1])

    def allocate(self, num_bytes: int) -> Tensor:
        """See `Device`."""
        try:
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError as error:
            raise PlanError(
                f"{self.device}: {format_bytes(num_bytes)} more cannot be had there ({format_bytes(self.free_bytes())} "
                "are free); allow less with --vram"
            ) from error

    def copy(self, target: Tensor, source: Tensor) -> None:
        """See `Device`."""
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def copied(self) -> Event:
        """See `Device`."""
        return self._mark(self._stream)

    def computed(self) -> Event:
        """See `Device`."""
        return self._mark(torch.cuda.current_stream(self.device))

    def copy_after(self, mark: Event) -> None:
        """See `Device`."""
        if mark is not None:
            self._stream.wait_event(mark)

    def compute_after(self, mark: Event) -> None:
        """See `Device`."""
        if mark is not None:
            torch.cuda.current_stream(self.device).wait_event(mark)

    def wait(self, mark: Event) -> None:
        """See `Device`."""
        if mark is not None:
            mark.synchronize()

    def _mark(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        # Blocking: whoever waits for it sleeps, where it would else keep a core busy.
        event = torch.cuda.Event(blocking=True)
        event.record(stream)
        return event


def open_lanes(names: Sequence[str]) -> list[Device]:
    """Return the lanes of devices, from `options.parse_devices`; none for the processor.

    Raises:
        InputError: torch has no CUDA here, or not so many devices.
    """
    if tuple(names) == ("cpu",):
        return []
    if not torch.cuda.is_available():
        why = "sees no GPU" if torch.backends.cuda.is_built() else "is built without CUDA"
        raise InputError(f"device {names[0]} cannot be used: this torch ({torch.__version__}) {why}; use cpu")
    count = torch.cuda.device_count()
    for name in names:
        if int(name.partition(":")[2]) >= count:
            there = "cuda:0 only" if count == 1 else f"cuda:0 to cuda:{count - 1}"
            raise InputError(f"there is no device {name}; this machine has {there}")
    return [CudaLane(torch.device(name)) for name in names]


def allowed_bytes(lane: Device, vram_bytes: int | None) -> int:
    """Return the budget on a device: what was given, or what is free there less a reserve.

    Raises:
        InputError: more was given than the device has, or than others have left of it.
    """
    total, free = lane.total_bytes(), lane.free_bytes()
    if vram_bytes is None:
        return max(0, free - RESERVE_BYTES)
    if vram_bytes > total:
        raise InputError(
            f"a vram budget of {format_binary(vram_bytes)} is more than the {format_bytes(total)} of {lane.device}"
        )
    if vram_bytes > free:
        raise InputError(
            f"a vram budget of {format_binary(vram_bytes)} is more than the {format_bytes(free)} that are free on "
            f"{lane.device}; other programs or models hold the rest"
        )
    return vram_bytes


class PinnedMemory:
    """Host buffers from which a device copies by itself, without the processor. Close it once no copy is under way.

    The buffers stay alive until then: memory must not be unmapped while the driver has it.

    Args:
        buffers: of uint8, each beginning on a page.
        device: one that copies from them; all others may as well.
    """

    def __init__(self, buffers: Sequence[np.ndarray], device: torch.device) -> None:
        self._buffers: list[np.ndarray] = []
        for buffer in buffers:
            if not buffer.size:
                continue
            error = torch.cuda.cudart().cudaHostRegister(buffer.ctypes.data, buffer.nbytes, PORTABLE)
            if int(error):
                # The same bytes arrive, by way of the driver's own buffers.
                log.warning(
                    "%s of memory could not be pinned (CUDA error %d); copies to the GPU will be slower",
                    format_bytes(buffer.nbytes), int(error),
                )  # fmt: skip
                _forget_error(device)
                continue
            self._buffers.append(buffer)

    def close(self) -> None:
        """Give the memory back to the host. Idempotent."""
        while self._buffers:
            torch.cuda.cudart().cudaHostUnregister(self._buffers.pop().ctypes.data)


def _forget_error(device: torch.device) -> None:
    """Take note of CUDA's last error, which torch would else report of the next kernel that it starts."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device=device).add_(1)
