"""Open a checkpoint for a job: choose dtype, layout and plan, and put the streamed parts into the model."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from typing import TypeVar, get_args

import psutil
import torch
from transformers import PreTrainedModel

from slowllm.errors import InputError
from slowllm.malloc import keep_few_kernels, keep_together
from slowllm.modeling.absent_parts import leave_out
from slowllm.modeling.absent_weight import mark_absent
from slowllm.modeling.batching import forget_rotary_tables
from slowllm.modeling.cache_sizes import cache_size_of
from slowllm.modeling.expert_products import compute_one_by_one
from slowllm.modeling.head import stream_head
from slowllm.modeling.layout import Layout, granularities, lay_out
from slowllm.modeling.logit_transform import find_logit_transform
from slowllm.modeling.materialize import fill, head_rows
from slowllm.modeling.native.formats import native_codecs
from slowllm.modeling.parameter_map import place
from slowllm.modeling.parts import Part
from slowllm.modeling.sizes import sizes_of
from slowllm.modeling.skeleton import build_skeleton
from slowllm.modeling.soft_prompts import SoftPrompt, hook_inputs
from slowllm.modeling.streamed_block import stream_block, stream_leaves
from slowllm.modeling.streamed_model import make_streamed
from slowllm.modeling.unasked_attention import drop_unasked_attention
from slowllm.options import Options, format_bytes, parse_bytes, parse_devices, parse_dtype
from slowllm.planning.budget import Budget
from slowllm.planning.device_plan import DevicePlan
from slowllm.planning.host_plan import keep_decoded, keep_graph, make_plan, widen
from slowllm.planning.job import Granularity, Job, Rates, with_popularity
from slowllm.runtime.description import ModelInfo
from slowllm.runtime.device_placement import DevicePlacement, make_plans, move_kept, place_stops
from slowllm.runtime.expert_history import ExpertHistory, counts_folder
from slowllm.runtime.fingerprint import fingerprint_of
from slowllm.runtime.memory import budget_bytes
from slowllm.runtime.on_demand import OnDemand
from slowllm.runtime.rates import choose_dtype
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.storage.checkpoint import Checkpoint
from slowllm.storage.codecs.registry import warm_up
from slowllm.storage.manifest import open_checkpoint
from slowllm.streaming.buffers import PAGE
from slowllm.streaming.cast_stops import CastStops, cast_buffer_bytes
from slowllm.streaming.devices import Device, open_devices
from slowllm.streaming.mapped_stops import MappedStops
from slowllm.streaming.reader import Reader
from slowllm.streaming.stops import Stops

log = logging.getLogger(__name__)

L = TypeVar("L", bound=StreamedLM)


def open_model(
    kind: type[L],
    path_or_hub_id: str | os.PathLike[str] | ModelInfo,
    *,
    ram: str | int | Budget = "auto",
    dtype: str = "auto",
    device: str = "cpu",
    vram: str | int | None = None,
    keep_resident: bool = True,
    job: Job | None = None,
    rates: Rates | None = None,
    granularity: Granularity | Collection[Granularity] | None = None,
    prompt: str | os.PathLike[str] | SoftPrompt | None = None,
    part: Part | None = None,
    exact: bool = True,
    poison: bool = False,
) -> L:
    """Open a Hugging Face checkpoint for streaming; return a handle of class `kind`, `StreamedLM` or a subclass.

    Reads headers and small tensors only. `slowllm.load` says what the options mean and what is raised.

    Args:
        granularity: how the model may be cut, in one way or one of several; by default in any.
        part: of the model, the rest of which is neither read nor counted; the shards that it does not need may be
            absent. None for the whole model.
    """
    ram_bytes = ram.total_bytes if isinstance(ram, Budget) else budget_bytes(ram)
    options = Options(
        ram_bytes=ram_bytes, dtype=parse_dtype(dtype), device=device,
        vram_bytes=None if vram is None else parse_bytes(vram), keep_resident=keep_resident,
    )  # fmt: skip
    # Before the process is measured, because CUDA makes it larger, for good.
    before = psutil.Process().memory_info().rss
    devices = open_devices(parse_devices(options.device))
    if devices and isinstance(ram, Budget):
        ram.take(max(0, psutil.Process().memory_info().rss - before))
    if not isinstance(job, Job | None):
        raise InputError(f"job must be a slowllm.Job, not {type(job).__name__}")
    allowed = _allowed(granularity, job)
    info = path_or_hub_id if isinstance(path_or_hub_id, ModelInfo) else ModelInfo(path_or_hub_id, prompt)
    checkpoint = open_checkpoint(info.folder, may_lack_shards=part is not None)
    in_store = [span.coding.codecs for span in checkpoint.spans.values() if span.coding is not None]
    warm_up(frozenset().union(*in_store) | native_codecs(info.config, checkpoint.spans, checkpoint.absent))
    budget = ram if isinstance(ram, Budget) else Budget(ram_bytes, psutil.Process().memory_info().rss)
    try:
        compute_dtype = choose_dtype(options.dtype, checkpoint, is_on_gpu=bool(devices))
        model = build_skeleton(info.config, info.folder, compute_dtype)
        if model._can_set_experts_implementation():
            # Its bits are those of transformers' `eager`; the default sorts rows by experts, and adds in another order. On a device
            # that also has all experts of a block decoded at once, which may take more memory than the block itself.
            compute_one_by_one(model)
        lm = _assemble(
            kind, info, model, checkpoint, options, devices, budget, job, rates, allowed, part,
            exact=exact, poison=poison, is_shared=budget is ram,
        )  # fmt: skip
    except BaseException:
        checkpoint.close()
        raise
    if info.soft_prompt is not None and checkpoint.absent:
        log.warning(
            "%s: whether the soft prompt was made for these weights is not checked, because %d tensors are not here",
            info.name, len(checkpoint.absent),
        )  # fmt: skip
    elif info.soft_prompt is not None:
        try:
            info.check_prompt(lm.fingerprint(of_source=True))
        except BaseException:
            lm.close()
            raise
    return lm


def _allowed(
    granularity: Granularity | Collection[Granularity] | None, job: Job | None
) -> Collection[Granularity]:
    """Return how the model may be cut.

    Raises:
        InputError: as is asked for, it cannot.
    """
    asked = get_args(Granularity) if granularity is None else granularity
    if isinstance(asked, str):
        asked = (asked,)
    if unknown := [name for name in asked if name not in get_args(Granularity)]:
        raise InputError(f"granularity {unknown[0]!r} is unknown; use 'blocks', 'experts' or 'leaves'")
    runs_backward = job is not None and (job.turns or (job.serves and not job.forward_only))
    if granularity == "leaves" and job is not None and job.serves and not job.forward_only:
        raise InputError(
            "stops smaller than a block serve forward only; serve without backward, or use whole blocks"
        )
    return [name for name in asked if not (name == "leaves" and runs_backward and granularity is None)]


def _history_of(
    model: PreTrainedModel, checkpoint: Checkpoint, layouts: Mapping[Granularity, Layout]
) -> ExpertHistory | None:
    """Return what earlier runs chose of the experts; None where none are read on demand, or nothing is to be remembered."""
    layout, folder = layouts.get("experts"), counts_folder()
    if layout is None or folder is None:
        return None
    return ExpertHistory(
        folder,
        functools.partial(fingerprint_of, model.config, checkpoint),
        {experts.name: len(experts.units) for experts in layout.experts},
        is_whole=layout.part.is_whole(len(layout.blocks)),
    )


def _assemble(
    kind: type[L],
    info: ModelInfo,
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    options: Options,
    devices: Sequence[Device],
    budget: Budget,
    job: Job | None,
    rates: Rates | None,
    allowed: Collection[Granularity],
    part: Part | None,
    *,
    exact: bool,
    poison: bool,
    is_shared: bool,
) -> L:
    """Plan the memory, open the stops, and put the streamed parts into the model."""
    forget_rotary_tables(model)
    placements = place(model, checkpoint.spans, part, checkpoint.absent)
    names = granularities(model, placements, part) if len(allowed) > 1 else allowed
    layouts = {name: lay_out(model, placements, name, part) for name in names if name in allowed}
    cache = cache_size_of(model, part)
    choices = [sizes_of(model, layout, cache) for layout in layouts.values()]
    history = _history_of(model, checkpoint, layouts)
    if history is not None:
        choices = [with_popularity(sizes, history.popularity()) for sizes in choices]
    logit_transform = find_logit_transform(model)
    device_plan: DevicePlan | None = None
    if devices:
        plan, device_plan = make_plans(list(layouts.values()), choices, devices, options, budget, job, rates)
        layout = layouts[plan.granularity]
    else:
        plan = make_plan(
            choices, free_bytes=budget.free_bytes, total_bytes=budget.total_bytes, job=job, rates=rates,
            keep_resident=options.keep_resident,
        )  # fmt: skip
        layout = layouts[plan.granularity]
        # Weights that are cast into one buffer cannot be kept for the way down.
        is_plain = not layout.experts and not any(
            cast_buffer_bytes(layout.stops, layout.dtypes, layout.picked)
        )
        if job is not None and is_plain:
            plan = keep_graph(plan, choices, job, budget.free_bytes)
        # If there is room, validation rides along with a step.
        if (job is None and not is_shared) or (job is not None and job.turns):
            plan = widen(plan, choices, budget.free_bytes)
        # Where others will be opened in the budget, what is left is theirs.
        if not is_shared or (job is not None and job.turns):
            plan = keep_decoded(plan, choices, budget.free_bytes)
    keep_together()
    keep_few_kernels()
    compute_dtype = next(parameter.dtype for parameter in model.parameters())
    first_device = devices[0].torch_device if devices else None
    leave_out(model, layout, first_device)
    fill(model, layout, checkpoint, compute_dtype, first_device)

    budget.take(plan.peak_bytes)
    source: Reader | MappedStops
    placement: DevicePlacement | None = None
    experts: OnDemand | None = None
    with contextlib.ExitStack() as undoing:
        undoing.callback(budget.give_back, plan.peak_bytes)
        if plan.ring_bytes or layout.experts:
            # Beside experts that are read, maps of the rest would be read slowly, by faults.
            ring_bytes = plan.ring_bytes or PAGE
            source = Reader(layout.stops, ring_bytes=ring_bytes, resident=plan.resident, poison=poison)
        else:
            used = [() if number in plan.unused else stop for number, stop in enumerate(layout.stops)]
            source = MappedStops(checkpoint, used)
        undoing.callback(source.close)
        if device_plan is not None:
            assert isinstance(source, Reader), "with a device there is always a ring"
            placement = place_stops(layout, source, devices, device_plan, poison=poison)
            undoing.callback(placement.close)
        if layout.experts:
            experts = OnDemand.open(
                layout, plan, poison=poison, is_exact=exact, history=history, placement=placement
            )
        undoing.pop_all()
    stops: Stops = source
    if placement is not None:
        stops = placement.copied.stops
        move_kept(model, layout, placement)
    torch_devices = (torch.device("cpu"),) if placement is None else placement.torch_devices
    buffer_bytes = cast_buffer_bytes(layout.stops, layout.dtypes, layout.picked)
    if any(buffer_bytes):
        stops = CastStops(stops, layout.stops, layout.dtypes, buffer_bytes, torch_devices, plan.decoded_bytes)
    lm = kind(info, model, checkpoint, source, stops, plan, choices, budget, layout, placement, experts)
    if isinstance(stops, CastStops):
        stops.num_waiting = lm._carousel.num_waiting
    on_demand = {name for units in layout.experts for name in units.full_names}
    for index in layout.part.blocks:
        block = layout.blocks[index]
        name = f"{layout.blocks_name}.{index}"
        home = None if placement is None else placement.homes[index]
        if layout.granularity != "leaves":
            layout.blocks[index] = stream_block(
                block,
                lm._carousel,
                index,
                name,
                recomputes=not plan.keeps_graph,
                home=home,
                on_demand=on_demand,
            )
        else:
            leaves = {m: stop for stop, m in enumerate(layout.modules) if m.startswith(f"{name}.")}
            stream_leaves(block, lm._carousel, leaves, name, index, home)
    if experts is not None:
        experts.put_into(model, lm.heap_watch.look)
    if layout.granularity != "blocks":  # riders wait within a block
        drop_unasked_attention(model)
    if layout.part.has_ends:
        chunk_rows = head_rows(checkpoint, layout.chunks)
        stream_head(
            layout.head, lm._carousel, layout.chunks, len(layout.modules), logit_transform, chunk_rows
        )
    mark_absent(model, layout.absent_names)
    hook_inputs(layout.blocks)
    make_streamed(
        model,
        layout.blocks_name,
        checkpoint.folder,
        compute_dtype,
        torch_devices[0],
        lm._carousel.refuse_if_forked,
    )
    log.info(
        "%s: %s in %d stops and %d chunks of the head, %s; %d of %d stops stay in memory; compute dtype %s",
        type(model).__name__, lm.part_name, len(layout.modules), len(layout.chunks),
        format_bytes(layout.weight_bytes), len(plan.resident), len(layout.stops), compute_dtype,
    )  # fmt: skip
    return lm
