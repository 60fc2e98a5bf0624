"""Which blocks of a model are in a folder, and how many of them stay in memory within a budget?

Reads headers and plans; reads no weight and opens no model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from itertools import groupby

import torch
from transformers import PreTrainedModel

from slowllm.errors import InputError, PlanError
from slowllm.modeling.blocks import find_blocks
from slowllm.modeling.cache_sizes import cache_size_of
from slowllm.modeling.layout import lay_out
from slowllm.modeling.parameter_map import blocks_of_names, place
from slowllm.modeling.parts import Part, block_of
from slowllm.modeling.sizes import sizes_of
from slowllm.modeling.skeleton import build_skeleton
from slowllm.options import Options
from slowllm.planning.budget import Budget
from slowllm.planning.host_plan import START_BYTES, make_plan
from slowllm.planning.job import Job
from slowllm.runtime.description import ModelInfo
from slowllm.runtime.device_placement import make_plans
from slowllm.runtime.rates import choose_dtype
from slowllm.storage.manifest import open_checkpoint
from slowllm.storage.spans import Placement
from slowllm.streaming.devices import Device


def blocks_here(info: ModelInfo) -> frozenset[int]:
    """Return what `find_blocks_here` finds, if it finds any.

    Raises:
        InputError: there are none.
    """
    blocks = find_blocks_here(info)
    if not blocks:
        raise InputError(
            f"{info.folder}: has no block whose shards are all there; fetch some with `slowllm download --blocks`"
        )
    return blocks


def find_blocks_here(info: ModelInfo) -> frozenset[int]:
    """Return the numbers of the blocks of which all shards are in the folder.

    Raises:
        CheckpointError: a file is damaged, or of a kind that is not read.
        ArchitectureError: the model does not have one list of blocks.
    """
    blocks = frozenset(range(int(info.config.get_text_config().num_hidden_layers)))
    with open_checkpoint(info.folder, may_lack_shards=True) as checkpoint:
        if checkpoint.absent:
            model = build_skeleton(info.config, info.folder, torch.bfloat16)
            blocks -= blocks_of_names(model, checkpoint.absent)
    return blocks


def runs_of(blocks: Collection[int]) -> list[range]:
    """Return the runs of consecutive numbers among some, in their order."""
    groups = groupby(enumerate(sorted(blocks)), lambda item: item[1] - item[0])
    runs = [[number for _, number in group] for _, group in groups]
    return [range(run[0], run[-1] + 1) for run in runs]


class _Room:
    """Plans spans of a model's blocks within a budget, the heaviest ones of each length."""

    def __init__(
        self,
        model: PreTrainedModel,
        runs: Collection[range],
        placements: Mapping[str, Placement],
        options: Options,
        budget: Budget,
        devices: list[Device],
    ) -> None:
        self._model, self._runs, self._placements = model, runs, placements
        self._options, self._budget, self._devices = options, budget, devices
        name = find_blocks(model)[0]
        self._block_of = {parameter: block_of(parameter, name) for parameter in placements}
        self._bytes = {block: 0 for run in runs for block in run}
        for parameter, placement in placements.items():
            self._bytes[self._block_of[parameter]] += placement.num_bytes  # type: ignore[index]

    def stay(self, count: int, job: Job) -> bool:
        """Whether the heaviest span of so many blocks stays in memory.

        Raises:
            PlanError: as a whole it cannot be streamed either.
        """
        spans = [run[first : first + count] for run in self._runs for first in range(len(run) - count + 1)]
        span = max(spans, key=lambda blocks: sum(self._bytes[block] for block in blocks))
        part = Part.span(span.start, span.stop)
        placements = {name: p for name, p in self._placements.items() if self._block_of[name] in span}
        layout = lay_out(self._model, placements, "blocks", part)
        sizes = sizes_of(self._model, layout, cache_size_of(self._model, part))
        if not self._devices:
            plan = make_plan(
                [sizes], free_bytes=self._budget.free_bytes, total_bytes=self._budget.total_bytes, job=job
            )
            return not plan.streams
        plan, device_plan = make_plans(
            [layout], [sizes], self._devices, self._options, self._budget, job, None
        )
        return all(
            stop in plan.resident | device_plan.kept
            for stop, size in enumerate(sizes.stops)
            if size.num_bytes
        )

    def most(self, job: Job) -> int:
        """Return how many blocks in a row stay in memory, whichever they are; 1 where not even one does.

        Raises:
            PlanError: a whole one cannot be streamed either.
        """
        longest = max(map(len, self._runs))
        least, above = 1, longest + 1
        if longest > 1 and self._stays(longest, job):
            return longest
        self.stay(1, job)
        while above - least > 1:
            middle = (least + above) // 2
            least, above = (middle, above) if self._stays(middle, job) else (least, middle)
        return least

    def _stays(self, count: int, job: Job) -> bool:
        try:
            return self.stay(count, job)
        except PlanError:  # of fewer blocks some may stay
            return False


def most_resident_blocks(
    info: ModelInfo,
    here: Collection[int],
    options: Options,
    budget: Budget,
    jobs: Collection[Job],
    devices: list[Device],
) -> int:
    """Return how many blocks in a row stay in memory while a server does its job, whichever of those here they are.

    Where not even one stays, it is 1, which streams if that is possible.

    Args:
        info: of the model.
        here: the blocks that are in the folder.
        options: how the model will be opened.
        budget: of RAM, of which nothing is taken.
        jobs: of the server, the first of which that fits is meant.
        devices: where blocks are computed; none for the processor.
    Raises:
        CheckpointError: a shard is damaged.
    """
    # The process may be larger by so much when the model is opened.
    budget = Budget(budget.total_bytes, budget.used_bytes + START_BYTES)
    runs = runs_of(here)
    with open_checkpoint(info.folder, may_lack_shards=True) as checkpoint:
        dtype = choose_dtype(options.dtype, checkpoint, is_on_gpu=bool(devices))
        model = build_skeleton(info.config, info.folder, dtype)
        placements: dict[str, Placement] = {}
        for run in runs:
            placements |= place(model, checkpoint.spans, Part.span(run.start, run.stop), checkpoint.absent)
    room = _Room(model, runs, placements, options, budget, devices)
    for job in jobs:
        with contextlib.suppress(PlanError):
            return room.most(job)
    # Where parts of it cannot be streamed either, opening it says so.
    return 1
