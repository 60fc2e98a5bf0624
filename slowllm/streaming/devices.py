"""What a device does for stops: its memory, copies into it, and the order between copying and computing.

Knows devices, streams and host memory; knows nothing of stops or models. Copies are queued on a stream of their own,
beside the device's computing, which is queued on the stream that is current for the calling thread. An event is a
place in one of the two queues: the other queue can be made to wait for it, or the caller can wait.
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

# Where nobody gave a budget, this much of a card's free memory is left to others: a screen needs some.
RESERVE_BYTES = 256 * MIB
# cudaHostRegisterPortable: pinned for every device of the process.
PORTABLE = 1

# A place in a queue, in whatever form the device has it; None where there is nothing to wait for.
Event = Any


class Device(Protocol):
    """One device, as `DeviceStops` needs it.

    Attributes:
        torch_device: torch's name of it.
        generator: the random generator that sampling there draws from.
    """

    torch_device: torch.device
    generator: torch.Generator

    def free_bytes(self) -> int:
        """Return what this process could allocate now."""

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
        """Queue a copy from the host, behind earlier copies. `source` must stay valid until the copy has ended."""

    def copied(self) -> Event:
        """Return an event behind all copies so far."""

    def computed(self) -> Event:
        """Return an event behind the computing that the calling thread has queued so far."""

    def copy_after(self, event: Event) -> None:
        """Make later copies wait for an event."""

    def compute_after(self, event: Event) -> None:
        """Make the computing that the calling thread queues later wait for an event."""

    def wait(self, event: Event) -> None:
        """Block the calling thread until an event has happened."""


class CudaDevice(Device):
    """A CUDA device. Creating it starts CUDA there, which takes some of its memory.

    Computing is on the stream that is current for the calling thread, by default the device's first: a caller who
    computes on other streams has to order them by himself.
    """

    def __init__(self, torch_device: torch.device) -> None:
        torch.cuda.init()  # creates the generators
        self.torch_device = torch_device
        self._stream = torch.cuda.Stream(torch_device)
        self.generator = torch.cuda.default_generators[torch_device.index]

    def multiplies_integers(self) -> bool:
        """Return whether cuBLAS has products of 8-bit integers: from compute capability 7.5 on."""
        return bool(torch.cuda.get_device_capability(self.torch_device) >= (7, 5))

    def free_bytes(self) -> int:
        """Return what this process could allocate now; memory that torch caches unused counts as free."""
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        cached = torch.cuda.memory_reserved(self.torch_device) - torch.cuda.memory_allocated(
            self.torch_device
        )
        return int(free + cached)

    def total_bytes(self) -> int:
        return int(torch.cuda.mem_get_info(self.torch_device)[1])

    def allocate(self, num_bytes: int) -> Tensor:
        try:
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.torch_device)
        except torch.OutOfMemoryError as error:
            raise PlanError(
                f"{self.torch_device}: {format_bytes(num_bytes)} more cannot be had there "
                f"({format_bytes(self.free_bytes())} are free); allow less with --vram"
            ) from error

    def copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def copied(self) -> Event:
        return _record(self._stream)

    def computed(self) -> Event:
        return _record(torch.cuda.current_stream(self.torch_device))

    def copy_after(self, event: Event) -> None:
        if event is not None:
            self._stream.wait_event(event)

    def compute_after(self, event: Event) -> None:
        if event is not None:
            torch.cuda.current_stream(self.torch_device).wait_event(event)

    def wait(self, event: Event) -> None:
        if event is not None:
            event.synchronize()


def _record(stream: torch.cuda.Stream) -> torch.cuda.Event:
    # Blocking: a thread that waits for the event sleeps, where it would else keep a core busy.
    event = torch.cuda.Event(blocking=True)
    event.record(stream)
    return event


def open_devices(names: Sequence[str]) -> list[Device]:
    """Open the devices that `options.parse_devices` named; return none for the processor.

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
    return [CudaDevice(torch.device(name)) for name in names]


def allowed_bytes(device: Device, vram_bytes: int | None) -> int:
    """Return the budget on a device: the given one, or the free memory less a reserve.

    Raises:
        InputError: more was given than the device has, or than others have left of it.
    """
    total, free = device.total_bytes(), device.free_bytes()
    if vram_bytes is None:
        return max(0, free - RESERVE_BYTES)
    budget = f"a vram budget of {format_binary(vram_bytes)}"
    if vram_bytes > total:
        raise InputError(f"{budget} is more than the {format_bytes(total)} of {device.torch_device}")
    if vram_bytes > free:
        raise InputError(
            f"{budget} is more than the {format_bytes(free)} that are free on {device.torch_device}; "
            "other programs or models hold the rest"
        )
    return vram_bytes


class PinnedMemory:
    """Host buffers from which a device copies by itself, without the processor. Close it once no copy is under way.

    Keeps the buffers alive until then: memory must not be unmapped while the driver has it registered.

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
        """Unpin the memory. Idempotent."""
        while self._buffers:
            torch.cuda.cudart().cudaHostUnregister(self._buffers.pop().ctypes.data)


def _forget_error(device: torch.device) -> None:
    """Clear CUDA's last error, which torch would otherwise report for the next kernel that it starts."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device=device).add_(1)
