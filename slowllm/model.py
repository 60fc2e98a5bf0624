"""load(): a handle on a transformers model whose blocks and head are streamed.

`lm.model` is transformers' own class with streamed parts, `lm.tokenizer` its tokenizer, `lm.ride([...])` runs
callables as riders of shared sweeps. The handle owns files, threads and buffers; close it, or use `with`.
"""

from __future__ import annotations

import ctypes
import functools
import json
import logging
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar, cast

import huggingface_hub
import psutil
import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from slowllm.blocks import UNKNOWN_MASK, find_blocks, stream_block, text_mask
from slowllm.carousel import Carousel, Passage, Stops
from slowllm.checkpoint import Checkpoint, Placement, read_json
from slowllm.errors import ArchitectureError, CheckpointError, InputError, UnsupportedError
from slowllm.head import TILE_COLUMNS, cut_head, find_finish, stream_embedding, stream_head
from slowllm.naming import place
from slowllm.options import Options, format_bytes, parse_bytes, parse_dtype
from slowllm.plan import Budget, Plan, Sizes, make_plan
from slowllm.reader import MappedStops, Reader, ring_bytes_of, smallest_ring
from slowllm.swap import CastStops, swap_bytes

log = logging.getLogger(__name__)
T = TypeVar("T")

# Sequences are assumed no longer than this when scratch memory of attention is counted.
ASSUMED_LENGTH = 1024


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


class StreamedModel(PreTrainedModel):
    """Mixin for the class of a streamed model: what transformers may ask of it, and what has no meaning here."""

    _folder: Path
    _compute_dtype: torch.dtype

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype; weights may be stored in another."""
        return self._compute_dtype

    @property
    def device(self) -> torch.device:
        """Where inputs belong."""
        return torch.device("cpu")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # to(), cuda(), half() and the like end here. What changes nothing passes: Trainer calls to("cpu").
        probe = torch.empty(0, dtype=self._compute_dtype)
        moved = fn(probe)
        if moved.dtype != probe.dtype or moved.device != probe.device:
            raise UnsupportedError(
                f"a streamed model stays on {probe.device} in {probe.dtype}; load it again with other options"
            )
        return self

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: the weights are on disk already."""
        raise UnsupportedError(f"a streamed model is not saved: its weights lie unchanged in {self._folder}")

    def load_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: weights come from the checkpoint."""
        raise UnsupportedError("a streamed model takes its weights from its checkpoint only")

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: the embedding is mapped from the checkpoint."""
        raise UnsupportedError("a streamed model's embedding is mapped from its checkpoint and cannot be resized")

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise UnsupportedError("a streamed model owns threads and files and cannot be copied; load it again")


def _streamed_class(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Derive the class of a streamed model: of the model's own class, under its own name."""

    @functools.wraps(kind.forward)  # generate() and Trainer look at the signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask")
        if mask is None and len(args) > 1 and isinstance(args[1], Tensor) and args[1].dim() == 2:
            mask = args[1]
        known = mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)
        token = text_mask.set(mask if known else UNKNOWN_MASK)
        try:
            return kind.forward(self, *args, **kwargs)
        finally:
            text_mask.reset(token)

    # The same module and name: transformers looks up by str(class) which outputs it can record.
    names = {"forward": forward, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return cast("type[PreTrainedModel]", type(kind.__name__, (StreamedModel, kind), names))


class StreamedLM:
    """A loaded model: what `load` returns.

    Attributes:
        model: transformers' own model with streamed blocks and head.
        folder: of the checkpoint.
        plan: what stays resident, and how many tokens ride a sweep.
        num_stops: of the carousel: blocks, then chunks of the head.
        weight_bytes: that one sweep passes through, as stored.
        on_passage: set it to be told of every stop served, on the carousel's thread.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        folder: Path,
        checkpoint: Checkpoint,
        source: Reader | MappedStops,
        stops: Stops,
        plan: Plan,
        budget: Budget,
        weight_bytes: int,
    ) -> None:
        self.model: Any = model
        self.folder = folder
        self.plan = plan
        self.num_stops = stops.num_stops
        self.weight_bytes = weight_bytes
        self.on_passage: Callable[[Passage], None] | None = None
        self._checkpoint, self._source, self._budget = checkpoint, source, budget
        self._carousel = Carousel(stops, self._tell)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer.

        Raises:
            CheckpointError: the folder has none that transformers can load.
        """
        try:
            return AutoTokenizer.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
            raise CheckpointError(f"{self.folder}: its tokenizer cannot be loaded ({_first_line(error)})") from error

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

    def ride(self, jobs: Iterable[Callable[[], T]], max_riders: int | None = None) -> list[T]:
        """Run each job as a rider of shared sweeps and return the results in order.

        A job calls `lm.model` in any way: `model(...)`, `model.generate(...)`, a loss and its `backward()`. All
        jobs share the sweeps, so weights are read once for all of them. See `Carousel.ride`.
        """
        return self._carousel.ride(jobs, max_riders)

    def stream(self, jobs: Iterable[Callable[[], T]], max_riders: int) -> Iterator[T]:
        """Yield the results of any number of jobs in order, `max_riders` aboard at a time. See `Carousel.stream`."""
        return self._carousel.stream(jobs, max_riders)

    def close(self) -> None:
        """End threads, close files and give the memory back. Idempotent."""
        if self._budget is not None:
            self._carousel.close()
            self._source.close()
            self._checkpoint.close()
            self._budget.give_back(self.plan.peak_bytes)
            self._budget = cast(Any, None)

    def _tell(self, passage: Passage) -> None:
        if self.on_passage is not None:
            self.on_passage(passage)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load(
    path_or_hub_id: str | os.PathLike[str],
    *,
    ram: str | int | Budget = "16GiB",
    dtype: str = "auto",
    device: str = "cpu",
    keep_resident: bool = True,
    poison: bool = False,
) -> StreamedLM:
    """Open a Hugging Face checkpoint for streaming. Reads headers and small tensors only.

    Args:
        path_or_hub_id: a folder with config.json and safetensors, or a hub id that is in the local cache.
        ram: budget for the whole process, such as ``16GiB``; or a `Budget` that several models share.
        dtype: compute dtype: ``auto``, ``bfloat16`` or ``float32`` (also ``bf16``, ``fp32``).
        device: only ``cpu`` so far.
        keep_resident: whether blocks that fit the budget stay in memory.
        poison: overwrite weights with NaN when they are given back, to find code that keeps them.
    Raises:
        CheckpointError: a file is missing, damaged or of a kind that is not streamed.
        ArchitectureError: the model does not fit the carousel.
        PlanError: the budget is too small; the message names the smallest that would do.
        InputError: an option cannot be used.
    """
    ram_bytes = ram.total_bytes if isinstance(ram, Budget) else parse_bytes(ram)
    options = Options(ram_bytes=ram_bytes, dtype=parse_dtype(dtype), device=device, keep_resident=keep_resident)
    folder = find_folder(path_or_hub_id)
    checkpoint = Checkpoint.open(folder)
    config = _read_config(folder)
    model = _build(config, folder, _choose_dtype(options.dtype, checkpoint))
    budget = ram if isinstance(ram, Budget) else Budget(ram_bytes, psutil.Process().memory_info().rss)
    try:
        return _assemble(model, checkpoint, options, budget, poison)
    except BaseException:
        checkpoint.close()
        raise


def _assemble(
    model: PreTrainedModel, checkpoint: Checkpoint, options: Options, budget: Budget, poison: bool
) -> StreamedLM:
    placements = place(model, checkpoint.spans)
    dtypes = _compute_dtypes(model, placements)
    blocks_name, blocks = find_blocks(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    family = type(model).__name__
    if not isinstance(head, nn.Linear):
        raise ArchitectureError(f"{family}: has no linear head (found {type(head).__name__}); only causal LMs stream")
    finish = find_finish(model)
    embedding_name = _name_of(model, embedding, placements)
    head_name = _name_of(model, head, placements)

    groups: list[list[Placement]] = [[] for _ in blocks]
    kept: list[Placement] = []
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, placement in placements.items():
        stop = _block_of(name, blocks_name)
        if stop is not None and name in parameters:
            groups[stop].append(placement)
        elif name not in (embedding_name, head_name):
            kept.append(placement)
    embedding_weight = checkpoint.mapped(placements[embedding_name])
    if embedding_weight is None:
        kept.append(placements[embedding_name])
    chunks = cut_head(placements[head_name], max(sum(map(ring_bytes_of, group)) for group in groups))
    stops = [*groups, *([chunk] for chunk in chunks)]
    for chunk in chunks:
        dtypes[chunk.name] = dtypes[head_name]

    scratch_bytes = swap_bytes(stops, dtypes)
    kept_bytes = sum(p.num_bytes + p.num_bytes // p.dtype.itemsize * dtypes[p.name].itemsize for p in kept)
    sizes = Sizes(
        stop_bytes=tuple(sum(map(ring_bytes_of, stop)) for stop in stops),
        smallest_ring_bytes=smallest_ring(stops),
        kept_bytes=kept_bytes + scratch_bytes,
        **_token_bytes(model, groups, dtypes),
    )
    plan = make_plan(
        sizes,
        free_bytes=budget.free_bytes,
        total_bytes=budget.total_bytes,
        keep_resident=options.keep_resident,
    )
    budget.take(plan.peak_bytes)
    _limit_arenas()

    _fill_kept(model, kept, dtypes)
    source: Reader | MappedStops
    if plan.ring_bytes:
        source = Reader(
            stops,
            ring_bytes=plan.ring_bytes,
            resident=plan.resident,
            num_threads=options.num_read_threads,
            request_bytes=options.request_bytes,
            poison=poison,
        )
    else:
        source = MappedStops(checkpoint, stops)
    served: Stops = CastStops(source, dtypes, scratch_bytes) if scratch_bytes else source
    weight_bytes = sum(p.num_bytes for stop in stops for p in stop)
    lm = StreamedLM(model, checkpoint.folder, checkpoint, source, served, plan, budget, weight_bytes)
    compute_dtype = next(p.dtype for p in model.parameters())
    if embedding_weight is not None:
        stream_embedding(embedding, embedding_weight, compute_dtype)
    for index, block in enumerate(blocks):
        blocks[index] = stream_block(block, lm._carousel, index, f"{blocks_name}.{index}")
    if head.weight is not embedding.weight and head_name == embedding_name:
        head._parameters["weight"] = embedding.weight  # tied: one parameter, counted once
    stream_head(head, lm._carousel, chunks, len(blocks), finish)

    model.__class__ = _streamed_class(type(model))
    streamed = cast(StreamedModel, model)
    streamed._folder, streamed._compute_dtype = checkpoint.folder, compute_dtype
    model.requires_grad_(False).eval()
    log.info(
        "%s: %d blocks and %d chunks of head, %s; %d of %d stops stay in memory; compute dtype %s",
        family, len(blocks), len(chunks), format_bytes(weight_bytes), len(plan.resident), len(stops), compute_dtype,
    )  # fmt: skip
    return lm


def find_folder(path_or_hub_id: str | os.PathLike[str]) -> Path:
    """Return the folder of a checkpoint: as given, or a hub id's snapshot in the local cache.

    Raises:
        CheckpointError: neither is there.
    """
    folder = Path(path_or_hub_id).expanduser()
    if folder.is_dir():
        return folder
    text = str(path_or_hub_id)
    if folder.exists():
        raise CheckpointError(f"{text}: is a file; give the folder that holds config.json and the safetensors")
    if text.count("/") > 1 or text.startswith((".", "/", "~")):
        raise CheckpointError(f"{text}: no such folder")
    try:
        return Path(huggingface_hub.snapshot_download(text, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, FileNotFoundError) as error:
        raise CheckpointError(
            f"{text}: no such folder, and no such model in the Hugging Face cache; "
            f"if it is a hub id, fetch it with `hf download {text}`"
        ) from error


def _read_config(folder: Path) -> PreTrainedConfig:
    table = read_json(folder / "config.json")
    kind = table.get("model_type")
    if table.get("quantization_config"):
        method = table["quantization_config"]
        method = method.get("quant_method", "?") if isinstance(method, dict) else method
        raise CheckpointError(
            f"{folder}: is already quantised ({method}); use the original checkpoint in bfloat16 or float16"
        )
    try:
        # Without trust_remote_code: a config that names code of its own is read by transformers' class, or refused.
        return cast(
            PreTrainedConfig, AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if kind is None:
            raise CheckpointError(f"{folder}/config.json: names no model_type") from error
        raise ArchitectureError(
            f"model type {kind!r} cannot be used by this version of transformers ({_first_line(error)})"
        ) from error


class _EmptyOnMeta(TorchFunctionMode):
    """Make `torch.empty` give meta tensors: parameters cost nothing, while buffers are computed and real.

    A whole `torch.device("meta")` would leave rotary tables and scales behind that no checkpoint restores.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _build(config: PreTrainedConfig, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Make the model with parameters on the meta device and real buffers."""
    kind = str(getattr(config, "model_type", "?"))
    try:
        with _EmptyOnMeta():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RuntimeError, ImportError) as error:
        raise ArchitectureError(f"model type {kind!r} has no usable causal LM ({_first_line(error)})") from error
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise ArchitectureError(f"{type(model).__name__}: its buffer {name} is not computed on construction")
    if (folder / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{folder}/generation_config.json: {_first_line(error)}") from error
    return cast(PreTrainedModel, model)


def _choose_dtype(name: str, checkpoint: Checkpoint) -> torch.dtype:
    """Return the compute dtype, and log why where it was chosen here."""
    if name != "auto":
        return cast(torch.dtype, getattr(torch, name))
    largest = max(checkpoint.spans.values(), key=lambda span: span.num_bytes)
    if largest.dtype != "BF16":
        log.info("compute dtype float32 (the checkpoint is %s)", largest.dtype)
        return torch.float32
    seconds = {dtype: _gemm_seconds(dtype) for dtype in (torch.bfloat16, torch.float32)}
    fast = seconds[torch.bfloat16] < seconds[torch.float32]
    log.info(
        "compute dtype %s (measured: a product takes %.2f ms in bfloat16, %.2f ms in float32)",
        "bfloat16" if fast else "float32", seconds[torch.bfloat16] * 1e3, seconds[torch.float32] * 1e3,
    )  # fmt: skip
    return torch.bfloat16 if fast else torch.float32


def _gemm_seconds(dtype: torch.dtype) -> float:
    a, b = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    times = []
    for _ in range(4):
        started = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - started)
    return min(times[1:])


def _compute_dtypes(model: PreTrainedModel, placements: dict[str, Placement]) -> dict[str, torch.dtype]:
    """Return the compute dtype of every placed tensor: the model's, or float32 where its class insists."""
    state = model.state_dict()
    strict = model._keep_in_fp32_modules_strict or ()
    patterns = [pattern.replace("*", ".*") for pattern in strict]
    dtypes = {}
    for name, placement in placements.items():
        dtype = state[name].dtype
        if dtype.is_floating_point != placement.dtype.is_floating_point:
            raise CheckpointError(f"{name}: is stored as {placement.dtype}, but the model computes it in {dtype}")
        keep = dtype in (torch.float16, torch.bfloat16) and any(re.search(p, name) for p in patterns)
        dtypes[name] = torch.float32 if keep else dtype
    return dtypes


def _name_of(model: PreTrainedModel, module: nn.Module, placements: dict[str, Placement]) -> str:
    """Return the name under which the checkpoint has a module's weight: its own, or one that is tied to it."""
    own = next(name for name, candidate in model.named_modules() if candidate is module) + ".weight"
    if own in placements:
        return own
    tied = model.all_tied_weights_keys
    for name in (tied.get(own), *(target for target, source in tied.items() if source == own)):
        if name in placements:
            return cast(str, name)
    raise CheckpointError(f"{own}: missing from the checkpoint")


def _block_of(name: str, blocks_name: str) -> int | None:
    if not name.startswith(f"{blocks_name}."):
        return None
    return int(name[len(blocks_name) + 1 :].partition(".")[0])


def _token_bytes(
    model: PreTrainedModel, groups: list[list[Placement]], dtypes: dict[str, torch.dtype]
) -> dict[str, int]:
    """Estimate the scratch memory of a token inside a block or the head, and between stops.

    Each matrix of a block leaves one output, and about as much again in activations and residuals; attention
    written out in full (BLOOM) holds its scores in fp32 and in the compute dtype.
    """
    config = model.config.get_text_config()
    itemsize = max((dtypes[p.name].itemsize for group in groups for p in group), default=4)
    hidden = int(config.hidden_size)
    widest = 0
    for group in groups:
        outputs = sum(max(p.shape[-2:]) for p in group if len(p.shape) >= 2)
        widest = max(widest, outputs)
    num_heads = int(getattr(config, "num_attention_heads", 1) or 1)
    attention = num_heads * ASSUMED_LENGTH * (2 * 4 + 2 * itemsize)
    head_tile = TILE_COLUMNS * (itemsize + 3 * 4)
    return {
        "block_token_bytes": max(2 * itemsize * (widest + 4 * hidden) + attention, head_tile),
        "rider_token_bytes": 6 * itemsize * hidden + 1024,
    }


def _fill_kept(model: PreTrainedModel, kept: list[Placement], dtypes: dict[str, torch.dtype]) -> None:
    """Read the tensors that always stay and put them into the model."""
    if not kept:
        return
    reader = Reader([kept], ring_bytes=4096, resident=frozenset([0]))
    try:
        with reader.visit(0) as weights:
            copies = {name: tensor.to(dtypes[name], copy=True) for name, tensor in weights.items()}
    finally:
        reader.close()
    for name, tensor in copies.items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        if attribute in module._buffers:
            module._buffers[attribute] = tensor
        else:
            module._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)


def _limit_arenas() -> None:
    """Keep glibc from giving each rider's thread an arena of its own, whose freed memory never comes back."""
    try:
        ctypes.CDLL(None).mallopt(-8, 2)  # M_ARENA_MAX
    except (OSError, AttributeError):
        log.info("this C library has no mallopt; forty riders may hold more memory than planned")


def peak_rss_bytes() -> int:
    """Return the process's largest resident set so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
