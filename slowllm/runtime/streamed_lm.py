"""A handle on a transformers model whose blocks and head are streamed.

`lm.model` is transformers' own class with streamed parts, `lm.tokenizer` its tokenizer, `lm.ride([...])` runs
callables as riders of shared sweeps. The handle owns files, threads and buffers; close it, or use `with`.
"""

from __future__ import annotations

import contextlib
import functools
import math
import resource
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slowllm.errors import InputError, counted
from slowllm.modeling.absent_weight import AbsentWeight
from slowllm.modeling.layout import Layout
from slowllm.modeling.parts import Part, block_of
from slowllm.options import format_binary, format_bytes
from slowllm.planning.budget import Budget
from slowllm.planning.host_plan import sizes_for
from slowllm.planning.job import Sizes
from slowllm.planning.plan import Plan
from slowllm.runtime.description import ModelInfo
from slowllm.runtime.device_placement import DevicePlacement
from slowllm.runtime.fingerprint import fingerprint_of
from slowllm.runtime.heap_watch import HeapWatch
from slowllm.runtime.on_demand import OnDemand
from slowllm.storage.checkpoint import Checkpoint
from slowllm.streaming.carousel import Carousel
from slowllm.streaming.cast_stops import CastStops
from slowllm.streaming.mapped_stops import MappedStops
from slowllm.streaming.reader import Reader
from slowllm.streaming.ride import Ride
from slowllm.streaming.rng_state import SharedGenerators
from slowllm.streaming.stops import Passage, StopRead, Stops, Weights

T = TypeVar("T")
JobT = TypeVar("JobT", bound=Callable[[], Any])


@dataclass(frozen=True)
class Report:
    """The totals of the carousel since the model was loaded.

    Attributes:
        num_passages: stops served.
        read_bytes: bytes read from disk; 0 if the model lies in memory maps.
        wait_seconds: time that the carousel waited for weights.
        compute_seconds: time that it computed.
        peak_rss_bytes: the process's largest resident set so far.
    """

    num_passages: int
    read_bytes: int
    wait_seconds: float
    compute_seconds: float
    peak_rss_bytes: int


class StreamedLM:
    """A loaded model: what `load` returns.

    Attributes:
        name: of the checkpoint: a hub id, or the folder's name.
        model: transformers' own model with streamed blocks and head.
        folder: of the checkpoint.
        plan: which stops stay resident, and how many tokens ride a sweep.
        choices: the sizes that the plan was chosen from.
        soft_prompt: stands before every text that is scored or continued, if there is one.
        layout: the tensors of each stop.
        device_placement: the devices, if blocks are not computed on the processor.
        num_stops: of the carousel: blocks or their leaves, then chunks of the head.
        weight_bytes: of one sweep, as stored.
        budget_bytes: that the process may take.
        swarm: the machines that hold the blocks; None where they are here.
        experts: that are read when routers ask for them; None where blocks are read whole.
        heap_watch: keeps the heap within what is planned.
    """

    def __init__(
        self,
        info: ModelInfo,
        model: PreTrainedModel,
        checkpoint: Checkpoint,
        source: Reader | MappedStops,
        stops: Stops,
        plan: Plan,
        choices: Sequence[Sizes],
        budget: Budget,
        layout: Layout,
        device_placement: DevicePlacement | None = None,
        experts: OnDemand | None = None,
    ) -> None:
        self._info, self.name, self.folder, self.soft_prompt = info, info.name, info.folder, info.soft_prompt
        self.model: Any = model
        self.plan, self.choices = plan, tuple(choices)
        self.layout, self.device_placement, self.num_stops = layout, device_placement, stops.num_stops
        self.weight_bytes = layout.weight_bytes
        self.swarm: Any = None
        self._watchers: list[Callable[[Passage], None]] = []
        self._read_watchers: list[Callable[[StopRead], None]] = []
        source.on_read = functools.partial(_report_read, weakref.ref(self))
        self._source, self._checkpoint, self.budget_bytes = source, checkpoint, budget.total_bytes
        devices = [] if device_placement is None else device_placement.devices
        generators = SharedGenerators([device.generator for device in devices])
        self.experts = experts
        self.heap_watch = HeapWatch(budget)
        self._carousel = Carousel(
            stops,
            functools.partial(_report_passage, weakref.ref(self)),
            generators,
            on_visit=self.heap_watch.look,
            gathers=experts is not None,
        )
        # A caller that keeps only the model keeps its handle alive. A forgotten handle is closed when it is collected,
        # or when the interpreter exits, before daemon threads are stopped in the middle of a product.
        model.__dict__["_slowllm"] = self
        self._owned = contextlib.ExitStack()
        held = (
            self._owned, self._carousel, source, stops, device_placement, checkpoint, budget, plan.peak_bytes,
            experts,
        )  # fmt: skip
        self._finalizer = weakref.finalize(self, _release, *held)

    def away(self, work: Callable[[], T]) -> T:
        """Do `work`, which waits for something elsewhere, while other riders run; see `Carousel.away`."""
        return self._carousel.away(work)

    def become_client(self, swarm: Any, close: Callable[[], None], max_call_tokens: int) -> None:
        """Note that the blocks are at other machines, and own the connection to them.

        Args:
            swarm: the machines; see `slowllm.swarm.hops`.
            close: ends the connection when the handle is closed.
            max_call_tokens: that one call of the model may have.
        """
        self.swarm = swarm
        self._owned.callback(close)
        rider_tokens = min(self.plan.rider_tokens, max_call_tokens)
        self.plan = replace(self.plan, rider_tokens=rider_tokens)

    @property
    def keeps_caches(self) -> bool:
        """Whether keys and values are in this process, so that riders can hand them to one another."""
        return self.swarm is None

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.model.config

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer.

        Raises:
            CheckpointError: the folder has none that transformers can load.
        """
        return self._info.tokenizer

    @property
    def num_virtual_tokens(self) -> int:
        """Tokens of the soft prompt before every text."""
        return self._info.num_virtual_tokens

    @property
    def resident(self) -> frozenset[int]:
        """Stops that are read once: they stay in memory, or on a device."""
        placement = self.device_placement
        return self.plan.resident | (frozenset() if placement is None else placement.plan.kept)

    @property
    def checkpoint(self) -> Checkpoint:
        """The files that the weights come from; closed with the handle."""
        return self._checkpoint

    @property
    def part(self) -> Part:
        """The part of the model that this handle has."""
        return self.layout.part

    @property
    def part_name(self) -> str:
        """The part in words."""
        num_blocks = len(self.layout.blocks)
        return counted(num_blocks, "block") if self.part.is_whole(num_blocks) else str(self.part)

    @property
    def can_run_backward(self) -> bool:
        """Whether gradients can be had; where memory is too small for whole blocks, stops are leaves, which run forward only."""
        return self.layout.granularity != "leaves"

    @property
    def sizes(self) -> Sizes:
        """The sizes of the stops, and the memory of a token."""
        return sizes_for(self.plan, self.choices)

    @property
    def report(self) -> Report:
        """The totals so far."""
        totals = self._carousel.totals
        return Report(
            totals.num_passages, self.read_bytes, totals.wait_seconds, totals.compute_seconds,
            peak_rss_bytes(),
        )  # fmt: skip

    @property
    def read_bytes(self) -> int:
        """Bytes read from files so far, those of experts that routers asked for included."""
        return self._source.stats.read_bytes + (self.experts.read_bytes if self.experts else 0)

    def fingerprint(self, *, of_source: bool = False) -> str:
        """Return a hash of the checkpoint: its config, every span, and samples of every shard.

        Where other machines hold blocks whose shards are not here, their hashes are a part of it.

        Args:
            of_source: hash the checkpoint that a store was made from. An exact store has its source's hash anyway.
        """
        hashes = self.swarm.hashes() if self.swarm is not None and self._checkpoint.absent else None
        return fingerprint_of(self.config, self._checkpoint, hashes, of_source=of_source)

    def weights(self, name: str) -> Tensor:
        """Return a copy of a parameter in the compute dtype and in the processor's memory, which the budget does not count.

        A streamed parameter is read at its stop, a head at all of its stops.

        Args:
            name: as in ``lm.model.named_parameters()``.
        Raises:
            InputError: the model, or the part of it that is here, has no parameter of that name.
        """
        number = block_of(name, self.layout.blocks_name)
        if not (self.part.has_ends if number is None else number in self.part.blocks):
            raise InputError(f"{name}: is not in this part of {self.name}, which has {self.part}")
        try:
            parameter = self.model.get_parameter(name)
        except AttributeError as error:
            raise InputError(f"{self.name}: has no parameter {name!r}") from error
        if not isinstance(parameter, AbsentWeight):
            return cast(Tensor, parameter).detach().clone().cpu()
        if self.experts is not None and number is not None:
            experts = self.experts
            found: Tensor | None = self._carousel.visit(number, "up", lambda _: experts.copied(name))
            if found is not None:
                return found
        first_chunk = self.num_stops - len(self.layout.chunks)
        if name == self.layout.head_parameter:
            places = [(first_chunk + number, chunk.name) for number, chunk in enumerate(self.layout.chunks)]
        else:
            stops = enumerate(self.layout.stops[:first_chunk])
            places = [(stop, name) for stop, group in stops if any(name == one.name for one in group)]

        def read(stop: int, key: str) -> Tensor:
            def copied(weights: Weights) -> Tensor:
                return weights[key].to(self.layout.dtypes[key], copy=True).cpu()

            return self._carousel.visit(stop, "up", copied)

        parts = [read(stop, key) for stop, key in places]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def ride(self, jobs: Iterable[Callable[[], T]], max_riders: int | None = None) -> list[T]:
        """Run each job as a rider of shared sweeps and return the results in order.

        A job calls `lm.model` in any way: `model(...)`, `model.generate(...)`, a loss and its `backward()`. All jobs
        share the sweeps, so weights are read once for all of them. `Carousel.ride` tells how.
        """
        return self._carousel.ride(jobs, max_riders)

    def stream(
        self, jobs: Iterable[JobT], max_riders: int, max_tokens: float = math.inf
    ) -> Iterator[tuple[JobT, Any]]:
        """Yield any number of jobs in order, each with its result; `max_riders` run at a time. See `Carousel.stream`."""
        return self._carousel.stream(jobs, max_riders, max_tokens)

    def board(self, job: Callable[[], T], seed: int | None = None) -> Ride[T]:
        """Let a job ride with the others, and return at once a `Ride` to wait for or to cancel. See `Carousel.board`."""
        return self._carousel.board(job, seed)

    def board_together(self, jobs: Sequence[Callable[[], T]]) -> list[Ride[T]]:
        """Let jobs ride in one sweep, in their order, and return at once; see `Carousel.board_together`."""
        return self._carousel.board_together(jobs)

    def cancelling(self) -> contextlib.AbstractContextManager[Callable[[], None]]:
        """Return a context whose function cancels what this thread rides in it; see `Carousel.cancelling`."""
        return self._carousel.cancelling()

    @contextlib.contextmanager
    def watching(self, watcher: Callable[[Passage], None]) -> Iterator[None]:
        """Call `watcher` after every stop that the carousel serves, as long as the context lasts.

        It is called on the thread that computed there, so it must neither raise nor call the model. The last stop of a ride may
        be reported after `ride` has returned. Several watchers may be at work at once.
        """
        self._watchers.append(watcher)
        try:
            yield
        finally:
            self._watchers.remove(watcher)

    @contextlib.contextmanager
    def watching_reads(self, watcher: Callable[[StopRead], None]) -> Iterator[None]:
        """Call `watcher` with every stop that has been read from files, as long as the context lasts.

        It is called on a thread that reads, so it must neither raise nor take long.
        """
        self._read_watchers.append(watcher)
        try:
            yield
        finally:
            self._read_watchers.remove(watcher)

    def __repr__(self) -> str:
        if not self._finalizer.alive:
            return f"<{type(self).__name__} {self.name}, closed>"
        kept = f"{self.plan.held(len(self.resident), self.num_stops)} resident"
        held = kept if self.plan.streams else "all in memory"
        prompt = f", soft prompt of {counted(self.num_virtual_tokens, 'token')}" if self.soft_prompt else ""
        return (
            f"<{type(self).__name__} {self.name}: {type(self.model).__name__}, {self.part_name}, "
            f"{str(self.model.dtype).removeprefix('torch.')}, {format_bytes(self.weight_bytes)} a sweep, budget "
            f"{format_binary(self.budget_bytes)}, {held}{prompt}>"
        )

    def close(self) -> None:
        """Join threads, close files and give the memory back. Idempotent."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _report_passage(handle: weakref.ref[StreamedLM], passage: Passage) -> None:
    lm = handle()
    if lm is not None and lm.experts is not None:
        lm.experts.remember()
    for watcher in [] if lm is None else lm._watchers.copy():
        watcher(passage)


def _report_read(handle: weakref.ref[StreamedLM], read: StopRead) -> None:
    lm = handle()
    for watcher in [] if lm is None else lm._read_watchers.copy():
        watcher(read)


def _release(
    owned: contextlib.ExitStack,
    carousel: Carousel,
    source: Reader | MappedStops,
    stops: Stops,
    device_placement: DevicePlacement | None,
    checkpoint: Checkpoint,
    budget: Budget,
    num_bytes: int,
    experts: OnDemand | None,
) -> None:
    owned.close()
    if experts is not None:
        experts.close_files()
    source.close()  # before the carousel, because the carousel may be waiting for a read that never returns
    carousel.close()
    if isinstance(stops, CastStops):
        stops.close()
    with contextlib.ExitStack() as last:  # a device that has failed raises again
        if device_placement is not None:
            last.callback(device_placement.close)
        last.callback(budget.give_back, num_bytes)
        last.callback(checkpoint.close)
        if experts is not None:
            experts.close()


def peak_rss_bytes() -> int:
    """Return the process's largest resident set so far."""
    # On Linux, getrusage counts what a forked process held before it executed this program.
    with contextlib.suppress(OSError, ValueError), open("/proc/self/status", encoding="utf-8") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
