"""load(): a handle on a transformers model whose blocks and head are streamed.

`lm.model` is transformers' own class with streamed parts, `lm.tokenizer` its tokenizer, `lm.ride([...])` runs
callables as riders of shared sweeps. The handle owns files, threads and buffers; close it, or use `with`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import resource
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import huggingface_hub
import psutil
import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from transformers import AutoTokenizer, PreTrainedModel

from slowllm.errors import CheckpointError, InputError
from slowllm.malloc import keep_together
from slowllm.modeling.head import find_finish, stream_head
from slowllm.modeling.layout import Layout, granularities, lay_out, sizes_of
from slowllm.modeling.materialize import fill, head_rows
from slowllm.modeling.parameter_map import place
from slowllm.modeling.skeleton import build_skeleton, choose_dtype, first_line, make_streamed, read_config
from slowllm.modeling.soft_prompt_files import load_prompt
from slowllm.modeling.soft_prompts import SoftPrompt, check_fits, let_vectors_in
from slowllm.modeling.streamed_block import stream_block, stream_leaves
from slowllm.options import Options, format_bytes, parse_bytes, parse_devices, parse_dtype
from slowllm.planning.device_plan import DevicePlan
from slowllm.planning.forecast import Granularity, Job, Rates, Sizes
from slowllm.planning.host_plan import Budget, Plan, keep_graph, make_plan, widen
from slowllm.runtime.device_placement import Placed, make_plans, move_kept, place_stops
from slowllm.storage.checkpoint import Checkpoint
from slowllm.storage.codecs.registry import warm_up
from slowllm.storage.manifest import open_checkpoint
from slowllm.streaming.carousel import Carousel
from slowllm.streaming.cast_stops import CastStops, swap_bytes
from slowllm.streaming.devices import Lane, open_lanes
from slowllm.streaming.reader import MappedStops, Reader
from slowllm.streaming.rng_state import Dice
from slowllm.streaming.stops import Passage, Stops

log = logging.getLogger(__name__)
T = TypeVar("T")
L = TypeVar("L", bound="StreamedLM")


class Description:
    """What a checkpoint says of itself before any weight is touched.

    Args:
        path_or_hub_id: as for `load`.
        prompt: a soft prompt that stands before every text, or its folder.
    Attributes:
        name: a hub id, or the folder's name.
        folder: of the checkpoint.
        config: transformers' config.
        soft_prompt: that stands before every text, if one does.
    Raises:
        CheckpointError: there is no such checkpoint, or its config cannot be used.
        ArchitectureError: this version of transformers does not know the model type.
        InputError: the prompt cannot be read, or was made for another model.
    """

    def __init__(
        self,
        path_or_hub_id: str | os.PathLike[str],
        prompt: str | os.PathLike[str] | SoftPrompt | None = None,
    ) -> None:
        self.folder = find_folder(path_or_hub_id)
        is_path = Path(path_or_hub_id).expanduser() == self.folder
        self.name = self.folder.resolve().name if is_path else str(path_or_hub_id)
        self.config: Any = read_config(self.folder)
        self.soft_prompt: SoftPrompt | None = None
        self._made_for, self._prompt_name = None, "the soft prompt"
        if isinstance(prompt, SoftPrompt):
            self.soft_prompt = prompt
        elif prompt is not None:
            self.soft_prompt, about = load_prompt(prompt)
            self._made_for, self._prompt_name = about.get("fingerprint"), str(prompt)
        if self.soft_prompt is not None:
            check_fits(self.soft_prompt, self.config, self._prompt_name)

    @property
    def num_virtual_tokens(self) -> int:
        """Tokens of the soft prompt before every text."""
        return 0 if self.soft_prompt is None else self.soft_prompt.num_tokens

    def check_prompt(self, fingerprint: str) -> None:
        """Refuse a soft prompt that says it was made for other weights.

        Raises:
            InputError: it was.
        """
        if self._made_for not in (None, fingerprint):
            raise InputError(
                f"{self._prompt_name}: was made for another model, whose weights are not those of {self.name}"
            )

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer.

        Raises:
            CheckpointError: the folder has none that transformers can load.
        """
        return _load_tokenizer(self.folder)


def _load_tokenizer(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a damaged tokenizer may trip over
        raise CheckpointError(f"{folder}: its tokenizer cannot be loaded ({first_line(error)})") from error


@dataclass(frozen=True)
class Report:
    """What the carousel has done since the model was loaded.

    Attributes:
        num_passages: stops visited.
        read_bytes: bytes read from disk; 0 where the model lies in memory maps.
        wait_seconds: time the carousel waited for weights.
        compute_seconds: time it computed.
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
        plan: what stays resident, and how many tokens ride a sweep.
        choices: what the plan was chosen from.
        soft_prompt: that stands before every text that is scored or continued, if one does.
        layout: which tensors make which stop.
        placed: the devices, where blocks are not computed on the processor.
        num_stops: of the carousel: blocks or their leaves, then chunks of the head.
        weight_bytes: that one sweep passes through, as stored.
        on_passage: set it to be told of every stop served, on the carousel's thread.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        checkpoint: Checkpoint,
        source: Reader | MappedStops,
        stops: Stops,
        plan: Plan,
        choices: Sequence[Sizes],
        budget: Budget,
        layout: Layout,
        placed: Placed | None = None,
    ) -> None:
        self.model: Any = model
        self.folder = checkpoint.folder
        self.name = checkpoint.folder.name
        self.plan, self.choices = plan, tuple(choices)
        self.layout, self.placed, self.num_stops = layout, placed, stops.num_stops
        self.weight_bytes = layout.weight_bytes
        self.soft_prompt: SoftPrompt | None = None
        self.on_passage: Callable[[Passage], None] | None = None
        self._source, self._checkpoint = source, checkpoint
        dice = Dice([] if placed is None else [lane.generator for lane in placed.lanes])
        self._carousel = Carousel(stops, functools.partial(_tell, weakref.ref(self)), dice)
        # Who keeps only the model keeps its handle too. A handle that is forgotten is closed when it is collected,
        # or when the interpreter ends, before daemon threads are stopped in the middle of a product.
        model.__dict__["_slowllm"] = self
        self._finalizer = weakref.finalize(
            self, _release, self._carousel, source, stops, placed, checkpoint, budget, plan.peak_bytes
        )

    @classmethod
    def open(
        cls,
        path_or_hub_id: str | os.PathLike[str] | Description,
        *,
        ram: str | int | Budget = "16GiB",
        dtype: str = "auto",
        device: str = "cpu",
        vram: str | int | None = None,
        keep_resident: bool = True,
        job: Job | None = None,
        rates: Rates | None = None,
        granularity: Granularity | None = None,
        prompt: str | os.PathLike[str] | SoftPrompt | None = None,
        poison: bool = False,
    ) -> Self:
        """Open a Hugging Face checkpoint for streaming. Reads headers and small tensors only.

        Args:
            path_or_hub_id: a folder with config.json and safetensors, or a hub id that is in the local cache; or its
                `Description`.
            ram: budget for the whole process, such as ``16GiB``; or a `Budget` that several models share.
            dtype: compute dtype: ``auto``, ``bfloat16`` or ``float32`` (also ``bf16``, ``fp32``).
            device: where blocks are computed: ``cpu``, ``cuda``, ``cuda:1``, or several, which take turns, as in
                ``cuda:0,cuda:1``.
            vram: budget on each GPU; by default what is free there, less a reserve.
            keep_resident: whether stops that fit the budget stay in memory.
            job: what the model is opened for; by default a session of any calls, gradients among them.
            rates: of this machine, for the plan; assumed where nobody measured.
            granularity: stream whole ``blocks``, or their ``leaves``, which takes less memory and cannot run backward;
                by default blocks, unless they do not fit, or the job is forward only and leaves are faster.
            prompt: a soft prompt that stands before every text that is scored or continued, or its folder; a
                `Description` has its own.
            poison: overwrite weights with NaN when they are given back, to find code that keeps them.
        Raises:
            CheckpointError: a file is missing, damaged or of a kind that is not streamed.
            ArchitectureError: the model does not fit the carousel.
            PlanError: the budget is too small; the message names the smallest that would do.
            InputError: an option cannot be used.
        """
        ram_bytes = ram.total_bytes if isinstance(ram, Budget) else parse_bytes(ram)
        options = Options(
            ram_bytes=ram_bytes,
            dtype=parse_dtype(dtype),
            device=device,
            vram_bytes=None if vram is None else parse_bytes(vram),
            keep_resident=keep_resident,
        )
        # Before the process is measured: CUDA makes it larger, for good.
        before = psutil.Process().memory_info().rss
        lanes = open_lanes(parse_devices(options.device))
        if lanes and isinstance(ram, Budget):
            ram.take(max(0, psutil.Process().memory_info().rss - before))
        memory = psutil.virtual_memory().total
        if ram_bytes > memory:
            log.warning(
                "the budget is %s, but this machine has %s", format_bytes(ram_bytes), format_bytes(memory)
            )
        if granularity not in (None, "blocks", "leaves"):
            raise InputError(f"granularity {granularity!r} is unknown; use 'blocks' or 'leaves'")
        if not isinstance(job, Job | None):
            raise InputError(f"job must be a slowllm.Job, not {type(job).__name__}")
        known = (
            path_or_hub_id if isinstance(path_or_hub_id, Description) else Description(path_or_hub_id, prompt)
        )
        checkpoint = open_checkpoint(known.folder)
        warm_up(span.coding.codec for span in checkpoint.spans.values() if span.coding is not None)
        budget = ram if isinstance(ram, Budget) else Budget(ram_bytes, psutil.Process().memory_info().rss)
        try:
            chosen = choose_dtype(options.dtype, checkpoint, is_on_gpu=bool(lanes))
            model = build_skeleton(known.config, known.folder, chosen)
            lm = _assemble(
                model, checkpoint, options, lanes, budget, job, rates, granularity, poison, budget is ram, cls
            )
        except BaseException:
            checkpoint.close()
            raise
        lm.name = known.name
        if known.soft_prompt is not None:
            try:
                known.check_prompt(lm.fingerprint(of_source=True))
            except BaseException:
                lm.close()
                raise
            lm.soft_prompt = known.soft_prompt
        return lm

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.model.config

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer; see `Description.tokenizer`."""
        return _load_tokenizer(self.folder)

    @property
    def num_virtual_tokens(self) -> int:
        """Tokens of the soft prompt before every text."""
        return 0 if self.soft_prompt is None else self.soft_prompt.num_tokens

    @property
    def resident(self) -> frozenset[int]:
        """Stops that are read once: they stay in memory, or on a device."""
        return self.plan.resident | (frozenset() if self.placed is None else self.placed.plan.kept)

    @property
    def report(self) -> Report:
        """What has been done so far."""
        totals = self._carousel.totals
        return Report(
            totals.num_passages,
            self._source.stats.read_bytes,
            totals.wait_seconds,
            totals.compute_seconds,
            peak_rss_bytes(),
        )

    def fingerprint(self, *, of_source: bool = False) -> str:
        """Return a hash of the checkpoint: its config, every span, and samples of every shard.

        Args:
            of_source: of the checkpoint that a store was made from. An exact store has its source's in any case.
        """
        config = {
            **self.config.to_dict(),
            "dtype": None,
            "_name_or_path": None,
        }  # the compute dtype and the folder, which are no part of the checkpoint
        return self._checkpoint.fingerprint(
            json.dumps(config, sort_keys=True, default=str), of_source=of_source
        )

    def ride(self, jobs: Iterable[Callable[[], T]], max_riders: int | None = None) -> list[T]:
        """Run each job as a rider of shared sweeps and return the results in order.

        A job calls `lm.model` in any way: `model(...)`, `model.generate(...)`, a loss and its `backward()`. All
        jobs share the sweeps, so weights are read once for all of them. See `Carousel.ride`.
        """
        return self._carousel.ride(jobs, max_riders)

    def stream(
        self, jobs: Iterable[Callable[[], T]], max_riders: int, max_tokens: float = math.inf
    ) -> Iterator[T]:
        """Yield the results of any number of jobs in order, `max_riders` aboard at a time. See `Carousel.stream`."""
        return self._carousel.stream(jobs, max_riders, max_tokens)

    def close(self) -> None:
        """End threads, close files and give the memory back. Idempotent."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _tell(handle: weakref.ref[StreamedLM], passage: Passage) -> None:
    lm = handle()
    if lm is not None and lm.on_passage is not None:
        lm.on_passage(passage)


def _release(
    carousel: Carousel,
    source: Reader | MappedStops,
    stops: Stops,
    placed: Placed | None,
    checkpoint: Checkpoint,
    budget: Budget,
    num_bytes: int,
) -> None:
    source.close()  # first: the carousel may be waiting for a read that never returns
    carousel.close()
    if isinstance(stops, CastStops):
        stops.close()
    checkpoint.close()
    budget.give_back(num_bytes)
    if placed is not None:  # last: a device that has failed says so again
        placed.close()


load = StreamedLM.open


def _assemble(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    options: Options,
    lanes: Sequence[Lane],
    budget: Budget,
    job: Job | None,
    rates: Rates | None,
    granularity: Granularity | None,
    poison: bool,
    is_shared: bool,
    kind: type[L],
) -> L:
    placements = place(model, checkpoint.spans)
    wanted = granularities(model, placements) if granularity is None else (granularity,)
    layouts = {name: lay_out(model, placements, name) for name in wanted}
    choices = [sizes_of(model, layout) for layout in layouts.values()]
    finish = find_finish(model)
    devices: DevicePlan | None = None
    if lanes:
        plan, devices = make_plans(list(layouts.values()), choices, lanes, options, budget, job, rates)
        layout = layouts[plan.granularity]
    else:
        plan = make_plan(
            choices,
            free_bytes=budget.free_bytes,
            total_bytes=budget.total_bytes,
            job=job,
            rates=rates,
            keep_resident=options.keep_resident,
        )
        layout = layouts[plan.granularity]
        # Weights that are cast into one buffer cannot be kept for a way down.
        if job is not None and not any(swap_bytes(layout.stops, layout.dtypes)):
            plan = keep_graph(plan, choices, job, budget.free_bytes)
        # Validation rides along with a step where there is room.
        if (job is None and not is_shared) or (job is not None and job.turns):
            plan = widen(plan, choices, budget.free_bytes)
    keep_together()
    compute_dtype = next(parameter.dtype for parameter in model.parameters())
    fill(model, layout, checkpoint, compute_dtype, lanes[0].device if lanes else None)

    budget.take(plan.peak_bytes)
    source: Reader | MappedStops
    if plan.ring_bytes:
        source = Reader(
            layout.stops,
            ring_bytes=plan.ring_bytes,
            resident=plan.resident,
            num_threads=options.num_read_threads,
            request_bytes=options.request_bytes,
            poison=poison,
        )
    else:
        used = [() if number in plan.unused else stop for number, stop in enumerate(layout.stops)]
        source = MappedStops(checkpoint, used)
    buffer_bytes = swap_bytes(layout.stops, layout.dtypes)
    stops: Stops = source
    placed: Placed | None = None
    if devices is not None:
        assert isinstance(source, Reader), "with a device there is always a ring"
        try:
            placed = place_stops(layout, source, lanes, devices, poison=poison)
        except BaseException:
            source.close()
            budget.give_back(plan.peak_bytes)
            raise
        stops = placed.stops
        move_kept(model, layout, placed)
    if any(buffer_bytes):
        where = (torch.device("cpu"),) if placed is None else placed.devices
        stops = CastStops(stops, layout.stops, layout.dtypes, buffer_bytes, where)
    lm = kind(model, checkpoint, source, stops, plan, choices, budget, layout, placed)
    for index, block in enumerate(layout.blocks):
        name = f"{layout.blocks_name}.{index}"
        home = None if placed is None else placed.homes[index]
        if layout.granularity == "blocks":
            layout.blocks[index] = stream_block(
                block, lm._carousel, index, name, replays=not plan.keeps_graph, home=home
            )
        else:
            leaves = {m: stop for stop, m in enumerate(layout.modules) if m.startswith(f"{name}.")}
            stream_leaves(block, lm._carousel, leaves, name, index, home)
    stream_head(
        layout.head,
        lm._carousel,
        layout.chunks,
        len(layout.modules),
        finish,
        head_rows(checkpoint, layout.chunks),
    )
    let_vectors_in(layout.blocks)
    device = torch.device("cpu") if placed is None else placed.devices[0]
    make_streamed(model, checkpoint.folder, compute_dtype, device)
    log.info(
        "%s: %d blocks in %d stops and %d chunks of head, %s; %d of %d stops stay in memory; compute dtype %s",
        type(model).__name__, len(layout.blocks), len(layout.modules), len(layout.chunks),
        format_bytes(layout.weight_bytes), len(plan.resident), len(layout.stops), compute_dtype,
    )  # fmt: skip
    return lm


def find_folder(path_or_hub_id: str | os.PathLike[str]) -> Path:
    """Return the folder of a checkpoint: as given, or a hub id's snapshot in the local cache.

    Raises:
        CheckpointError: neither is there.
        InputError: this is no name.
    """
    if not isinstance(path_or_hub_id, str | os.PathLike):
        raise InputError(f"a model is given by its folder or hub id, not as {type(path_or_hub_id).__name__}")
    text = str(path_or_hub_id)
    if not text:
        raise CheckpointError("the name of the model is empty")
    try:
        folder = Path(path_or_hub_id).expanduser()
        exists, is_folder = folder.exists(), folder.is_dir()
    except (
        OSError,
        RuntimeError,
    ) as error:  # a name too long, a folder that may not be searched, no such home
        raise CheckpointError(f"{text}: {getattr(error, 'strerror', None) or error}") from error
    if is_folder:
        return folder
    if exists:
        raise CheckpointError(
            f"{text}: is a file; give the folder that holds config.json and the safetensors"
        )
    if text.count("/") > 1 or text.startswith((".", "/", "~")):
        raise CheckpointError(f"{text}: no such folder")
    try:
        # One pattern: without it, a snapshot that was fetched in part, such as one without its pickles, is refused.
        return Path(
            huggingface_hub.snapshot_download(text, local_files_only=True, allow_patterns=["config.json"])
        )
    except (LocalEntryNotFoundError, HFValidationError, FileNotFoundError) as error:
        raise CheckpointError(
            f"{text}: no such folder, and no such model in the Hugging Face cache; "
            f"if it is a hub id, fetch it with `slowllm download {text}`"
        ) from error


def peak_rss_bytes() -> int:
    """Return the process's largest resident set so far."""
    # On Linux getrusage counts what a forked process held before it became this program.
    with contextlib.suppress(OSError, ValueError), open("/proc/self/status", encoding="utf-8") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
