"""A device that is the processor's own memory."""

from __future__ import annotations

import torch
from torch import Tensor

from slowllm.streaming.devices import Device, Event


class HostDevice(Device):
    """A device whose copies are done at once."""

    def __init__(self, num_bytes: int = 1 << 40, torch_device: torch.device = torch.device("cpu")) -> None:  # noqa: B008
        self.torch_device = torch_device
        self.generator = torch.Generator()
        self._num_bytes = num_bytes

    def free_bytes(self) -> int:
        return self._num_bytes

    def total_bytes(self) -> int:
        return self._num_bytes

    def multiplies_integers(self) -> bool:
        return True

    def allocate(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.torch_device)

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def copied(self) -> Event: ...

    def computed(self) -> Event: ...

    def copy_after(self, event: Event) -> None: ...

    def compute_after(self, event: Event) -> None: ...

    def wait(self, event: Event) -> None: ...
