"""A span of blocks that a server has opened: the part of the model, what answers requests for it, and its record.

Owns the model. Knows no network; a server opens another one when it moves.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Collection
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import torch

from slowllm.errors import InputError, PlanError, counted
from slowllm.modeling.cache_sizes import cache_size_of
from slowllm.modeling.parts import Part, parse_blocks
from slowllm.modeling.sizes import planned_token_bytes
from slowllm.modeling.skeleton import build_skeleton
from slowllm.modeling.span import SpanCall
from slowllm.options import AUTO, Options, format_binary, parse_bytes, parse_devices, parse_dtype
from slowllm.planning.budget import Budget
from slowllm.planning.host_plan import SLACK_BYTES
from slowllm.runtime.block_identity import block_hashes, config_hash, ends_hash
from slowllm.runtime.blocks_here import blocks_here, most_resident_blocks, runs_of
from slowllm.runtime.description import ModelInfo
from slowllm.runtime.load import open_model
from slowllm.runtime.memory import budget_of
from slowllm.runtime.rates import choose_dtype
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.storage.manifest import open_checkpoint
from slowllm.streaming.devices import open_devices
from slowllm.swarm.identity import new_identity
from slowllm.swarm.messages import MAX_MESSAGE_BYTES
from slowllm.swarm.records import ServerRecord, model_key
from slowllm.swarm.server_options import ServerOptions
from slowllm.swarm.span_checks import ServedSpan
from slowllm.swarm.span_server import SpanServer
from slowllm.swarm.streams import Limits
from slowllm.version import __version__

log = logging.getLogger(__name__)

# Tokens of the batch by which the throughput is measured at the start.
_MEASURED_TOKENS = 256
# A tiny model's server takes messages of this size all the same.
_LEAST_MESSAGE_BYTES = 16 << 20


def limits_of(config: Any, options: ServerOptions) -> Limits:
    """Return what peers may take of a server: messages as large as its requests need, and so many of them at once."""
    token_bytes = 4 * int(config.get_text_config().hidden_size)
    # Hidden states and their gradients, and as much again for vectors or a prefix.
    request_bytes = 4 * options.max_batch_tokens * token_bytes
    message_bytes = min(MAX_MESSAGE_BYTES, max(_LEAST_MESSAGE_BYTES, request_bytes))
    return Limits(
        message_bytes=message_bytes, held_bytes=message_bytes + 2 * options.waiting_tokens * token_bytes
    )


def count_auto(info: ModelInfo, options: ServerOptions, here: Collection[int]) -> int:
    """Return how many blocks ``--blocks auto`` means: as many in a row as stay in memory, at least one.

    Args:
        info: of the model.
        options: of the server.
        here: the blocks that are in the folder.
    """
    devices = open_devices(parse_devices(options.device))
    budget = _budget(info, options)
    opened = Options(
        ram_bytes=budget.total_bytes, dtype=parse_dtype(options.dtype), device=options.device,
        vram_bytes=None if options.vram is None else parse_bytes(options.vram),
    )  # fmt: skip
    jobs = [options.job()] + ([replace(options, backward=False).job()] if options.backward else [])
    return most_resident_blocks(info, here, opened, budget, jobs, devices)


def _budget(info: ModelInfo, options: ServerOptions, first_used_bytes: int = 0) -> Budget:
    # Requests that were read and wait, and one answer, are memory that the plan of the model does not know.
    limits = limits_of(info.config, options)
    budget = budget_of(options.ram, limits.held_bytes + limits.message_bytes)
    if first_used_bytes:
        # Thread stacks and the libraries' own buffers, which stay when a model is closed, are what each plan has slack for.
        budget.used_bytes = max(first_used_bytes, budget.used_bytes - SLACK_BYTES)
    return budget


def with_cache_tokens(info: ModelInfo, options: ServerOptions, part: Part) -> ServerOptions:
    """Return options in which room for sessions is counted in tokens, as many as have the given bytes in some blocks.

    Raises:
        InputError: these hold not even one token.
    """
    if options.cache_bytes is None:
        return options
    with open_checkpoint(info.folder, may_lack_shards=True) as checkpoint:
        is_on_gpu = parse_devices(options.device) != ("cpu",)
        dtype = choose_dtype(parse_dtype(options.dtype), checkpoint, is_on_gpu=is_on_gpu)
    size = cache_size_of(build_skeleton(info.config, info.folder, dtype), part)
    token_bytes = max(1, planned_token_bytes(size))
    num_tokens = options.cache_bytes // token_bytes
    if not num_tokens:
        raise InputError(
            f"--attn-cache-size {format_binary(options.cache_bytes)} holds no token: the keys and values of one have "
            f"{token_bytes:,} bytes in {part}"
        )
    log.info("sessions of %s tokens in %s, each of %s bytes", f"{num_tokens:,}", part, f"{token_bytes:,}")
    return replace(options, cache_tokens=num_tokens, cache_bytes=None)


def measured(info: ModelInfo, options: ServerOptions) -> ServerRecord:
    """Return what a server of such options would say of itself, without a network: its rates above all.

    Of blocks that it would choose by what others serve, it takes the first ones that are here.

    Raises:
        InputError, PlanError, CheckpointError, UnsupportedError: as for `Server`.
    """
    num_blocks = int(info.config.get_text_config().num_hidden_layers)
    part = parse_blocks(options.blocks, num_blocks)
    if not isinstance(part, Part):
        here = blocks_here(info)
        count = count_auto(info, options, here) if part == AUTO else int(part)
        first = next((run.start for run in runs_of(here) if len(run) >= count), None)
        if first is None:
            raise InputError(f"{info.folder}: has no {counted(count, 'block')} in a row")
        part = Part.span(first, first + count)
    record = ServerRecord(
        new_identity().peer, (), model_key(config_hash(info.config)[:32], num_blocks), part.first, part.end, "joining",
        options.dtype, __version__,
    )  # fmt: skip
    with OpenedSpan(info, options, part, record) as opened:
        return opened.record


class OpenedSpan:
    """A span that is open; a context manager.

    Attributes:
        lm: the part of the model.
        spans: answers requests for it.
        record: what the server says of itself, in the state of the record that was given.
        first_used_bytes: of the budget, what the process held before its first span was opened.

    Args:
        info: of the model.
        options: of the server.
        part: the blocks.
        record: of the server while it joins.
        first_used_bytes: of the span that was opened first; 0 for that one.
    Raises:
        InputError: sessions have less room than one token needs.
        PlanError: the span, its sessions and requests do not fit the budget.
        CheckpointError: a shard is missing or damaged.
        UnsupportedError: the model cannot be cut between blocks.
        ProtocolError: the record of so many blocks is too large.
    """

    def __init__(
        self,
        info: ModelInfo,
        options: ServerOptions,
        part: Part,
        record: ServerRecord,
        first_used_bytes: int = 0,
    ) -> None:
        options = with_cache_tokens(info, options, part)
        self._info, self._options = info, options
        self._budget = _budget(info, options, first_used_bytes)
        self.first_used_bytes = first_used_bytes or self._budget.used_bytes
        self._no_backward = "" if options.backward else "it was started with --forward-only"
        with contextlib.ExitStack() as held:
            self.lm = held.enter_context(self._open(part))
            served = ServedSpan(
                part.first, part.end, options.max_batch_tokens, options.max_length, options.waiting_tokens,
                options.cache_tokens, options.session_seconds,
                limits_of(info.config, options).message_bytes, self._no_backward,
            )  # fmt: skip
            self.spans = SpanServer(self.lm, served, options.quotas)
            self.record = self._full_record(record)
            self.record.to_bytes()  # one that is too large would not be taken the next time either
            held.pop_all()

    def _open(self, part: Part) -> StreamedLM:
        options = self._options
        opened = functools.partial(
            open_model,
            StreamedLM,
            self._info,
            ram=self._budget,
            dtype=options.dtype,
            device=options.device,
            vram=options.vram,
            keep_resident=options.keep_resident,
            part=part,
        )
        try:
            lm = opened(job=options.job())
        except PlanError as error:
            if not options.backward:
                raise
            try:
                lm = opened(job=replace(options, backward=False).job())
            except PlanError as smaller:
                raise PlanError(f"{smaller}; gradients need more than that") from None
            self._no_backward = "its budget has no room for them"
            log.warning("gradients are not served, because the budget has no room for them: %s", error)
            return lm
        if options.backward and not lm.can_run_backward:
            self._no_backward = "its budget streams blocks in parts"
        return lm

    def _full_record(self, record: ServerRecord) -> ServerRecord:
        served = self.spans.served
        batch_rate, decode_seconds = self._measure(served)
        decode_seconds /= served.end - served.first
        self.spans.block_seconds = decode_seconds
        if said := self._options.tokens_per_second:
            log.info("measured %.1f tokens a second; %g are announced", batch_rate, said)
            # As much faster or slower at single tokens, by which generation chooses its route.
            batch_rate, decode_seconds = said, decode_seconds * batch_rate / said
        return replace(
            record, dtype=str(self.lm.model.dtype).removeprefix("torch."),
            block_hashes=tuple(block_hashes(self.lm, range(served.first, served.end)).values()),
            ends_hash="" if self.lm.checkpoint.absent else ends_hash(self.lm.checkpoint),
            forward_tokens_per_second=batch_rate, decode_seconds=decode_seconds,
            cache_tokens=served.cache_tokens, has_backward=served.has_backward,
        )  # fmt: skip

    def _measure(self, served: ServedSpan) -> tuple[float, float]:
        """Return the tokens a second of a batch, and the seconds of a single token, through the whole span."""

        def seconds_of(num_tokens: int) -> float:
            shape = (1, num_tokens, *self.spans.form.hidden_shape)
            generator = torch.Generator().manual_seed(0)
            hidden = torch.randn(shape, generator=generator).to(self.spans.form.hidden_dtype)
            call = SpanCall(served.first, served.end, hidden)
            began = time.perf_counter()
            self.lm.ride([lambda: self.spans.runner.forward(call)])
            return time.perf_counter() - began

        seconds_of(1)  # what stays resident is read first
        num_tokens = min(_MEASURED_TOKENS, served.max_batch_tokens)
        return num_tokens / seconds_of(num_tokens), seconds_of(1)

    def close(self) -> None:
        """Join the model's threads and close its files; its memory is free when nothing refers to this any more."""
        self.lm.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
