"""Put a streamed model on devices: plan both memories, put device stops behind the readers, and move what stays.

Knows transformers' models by their parts, plans and devices. Without a device, none of this is used.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from slowllm.errors import InputError
from slowllm.modeling.layout import Layout, block_numbers
from slowllm.modeling.streamed_block import Home
from slowllm.options import Options, format_bytes
from slowllm.planning.budget import Budget
from slowllm.planning.device_plan import DeviceBudget, DevicePlan, device_rates, homes_of, plan_both
from slowllm.planning.job import Job, Rates, Sizes
from slowllm.planning.plan import Plan
from slowllm.storage.spans import Placement
from slowllm.streaming.device_stops import DeviceStops
from slowllm.streaming.devices import Device, PinnedMemory, allowed_bytes
from slowllm.streaming.kept_stops import KeptStops
from slowllm.streaming.reader import Reader
from slowllm.streaming.stops import Stops

log = logging.getLogger(__name__)


def make_plans(
    layouts: Sequence[Layout],
    choices: Sequence[Sizes],
    devices: Sequence[Device],
    options: Options,
    budget: Budget,
    job: Job | None,
    rates: Rates | None,
) -> tuple[Plan, DevicePlan]:
    """Plan the memory of the devices, and of RAM.

    Args:
        layouts: the model cut into blocks, into blocks without their experts and into leaves where it can be.
        choices: the sizes of each layout.
        budget: of RAM; `options` have that of each device.
    Raises:
        InputError: more is allowed than a device has, or a device cannot multiply what is stored.
        PlanError: one of the budgets is too small.
    """
    _check_codecs(layouts[0], devices)
    rates = device_rates(rates)
    budgets = [
        DeviceBudget(str(device.torch_device), allowed_bytes(device, options.vram_bytes))
        for device in devices
    ]
    device_plan, plan = plan_both(
        choices, [block_numbers(layout) for layout in layouts], budgets, free_bytes=budget.free_bytes,
        total_bytes=budget.total_bytes, job=job, rates=rates, keep_resident=options.keep_resident,
    )  # fmt: skip
    log.info(
        "%s: %d of %d stops stay there and take %s of %s; %d stops stay in RAM",
        ", ".join(item.name for item in budgets), len(device_plan.kept), len(device_plan.homes),
        " + ".join(map(format_bytes, device_plan.used_bytes)), " + ".join(format_bytes(b.num_bytes) for b in budgets),
        len(plan.resident),
    )  # fmt: skip
    return plan, device_plan


def _check_codecs(layout: Layout, devices: Sequence[Device]) -> None:
    codecs = {p.coding.codec for stop in layout.stops for p in stop if p.coding is not None}
    for device in devices if "int8" in codecs else ():
        if not device.multiplies_integers():
            raise InputError(
                f"{device.torch_device} has no products of 8-bit integers, which an int8 store needs; use --device cpu, or a "
                "lossless or int4 store"
            )


@dataclass(frozen=True)
class CopiedStops:
    """Stops that are copied to devices, and the memory that they come from. Owns both; close it.

    Attributes:
        stops: whose weights are on the devices.
        pinned: the host's memory, if a device copies from it by itself.
    """

    stops: DeviceStops
    pinned: PinnedMemory | None

    @classmethod
    def of(
        cls,
        stops: Stops,
        placements: Sequence[Sequence[Placement]],
        memory: Sequence[np.ndarray],
        devices: Sequence[Device],
        *,
        homes: Sequence[int],
        kept: frozenset[int],
        num_slots: Sequence[int],
        poison: bool,
    ) -> Self:
        """Put devices behind stops.

        Args:
            stops, placements, devices, homes, kept, num_slots, poison: see `DeviceStops`.
            memory: that the stops hand out.
        Raises:
            PlanError: a device has less memory than was planned for.
        """
        is_cuda = any(device.torch_device.type == "cuda" for device in devices)
        pinned = PinnedMemory(memory, devices[0].torch_device) if is_cuda else None
        try:
            copied = DeviceStops(
                stops, placements, homes=homes, devices=devices, kept=kept, num_slots=num_slots, poison=poison
            )
        except BaseException:
            if pinned is not None:
                pinned.close()
            raise
        return cls(copied, pinned)

    def close(self) -> None:
        """End the copying, then unpin the memory. Close the reader before."""
        self.stops.close()
        if self.pinned is not None:
            self.pinned.close()


@dataclass(frozen=True)
class DevicePlacement:
    """The devices of a model, and the stops of its blocks there.

    Attributes:
        plan: how the devices' memory is divided.
        copied: blocks, or their leaves, and the chunks of the head.
        devices: that compute; sweeps begin and end on the first.
        homes: the device of each block.
    """

    plan: DevicePlan
    copied: CopiedStops
    devices: tuple[Device, ...]
    homes: tuple[Home, ...]

    @property
    def torch_devices(self) -> tuple[torch.device, ...]:
        """The devices as torch names them."""
        return tuple(device.torch_device for device in self.devices)

    def close(self) -> None:
        """End the copying, and give the devices' memory back. Close the reader before."""
        self.copied.close()


def place_stops(
    layout: Layout, reader: Reader, devices: Sequence[Device], plan: DevicePlan, *, poison: bool = False
) -> DevicePlacement:
    """Put devices behind the reader of a model's stops.

    Raises:
        PlanError: a device has less memory than was planned for.
    """
    first = devices[0].torch_device
    copied = CopiedStops.of(
        reader, layout.stops, reader.buffers, devices, homes=plan.homes, kept=plan.kept, num_slots=plan.num_slots,
        poison=poison,
    )  # fmt: skip
    device_of_block = dict(zip(block_numbers(layout), plan.homes, strict=True))
    last = layout.part.end - 1
    homes = tuple(
        # The norm and the head after the last block are on the first device.
        Home(devices[device_of_block.get(block, 0)].torch_device, first if block == last else None)
        for block in range(len(layout.blocks))
    )
    return DevicePlacement(plan, copied, tuple(devices), homes)


def place_experts(
    layout: Layout, kept: KeptStops, reader: Reader, placement: DevicePlacement, *, poison: bool = False
) -> CopiedStops:
    """Put devices behind experts that are read on demand: each is copied to the device that computes its block.

    Args:
        layout: with experts.
        kept: brings them, and keeps some.
        reader: of them.
        placement: of the model's stops.
    Raises:
        PlanError: a device has less memory than was planned for.
    """
    blocks = [
        number
        for number, experts in zip(layout.expert_blocks, layout.experts, strict=True)
        for _ in experts.units
    ]
    return CopiedStops.of(
        kept, layout.units, [*reader.buffers, *kept.buffers], placement.devices,
        homes=homes_of(blocks, len(placement.devices)), kept=frozenset(),
        num_slots=placement.plan.num_expert_slots, poison=poison,
    )  # fmt: skip


def move_kept(model: PreTrainedModel, layout: Layout, placement: DevicePlacement) -> None:
    """Move buffers, and parameters that no stop brings, to the device that needs them.

    The input embedding stays on the host, where its rows are looked up.
    """
    block_of: dict[nn.Module, int] = {}
    for number, block in enumerate(layout.blocks):
        block_of.update(dict.fromkeys(block.modules(), number))
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if module is layout.embedding:
            continue
        device = placement.torch_devices[0]
        if module in block_of:
            device = placement.homes[block_of[module]].device
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
        for name, parameter in module._parameters.items():
            if parameter is None or parameter.is_meta or parameter is layout.embedding.weight:
                continue
            if id(parameter) not in moved:
                moved[id(parameter)] = nn.Parameter(parameter.data.to(device), requires_grad=False)
            module._parameters[name] = moved[id(parameter)]
