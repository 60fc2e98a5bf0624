"""A server of a swarm: a span of blocks, opened within a budget, announced, and served until it is closed.

Owns the model, the network and the thread that announces. `serve` of the command line is a thin shell around it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import torch

from slowllm.errors import NetworkError, PlanError
from slowllm.modeling.parts import Part, parse_blocks
from slowllm.modeling.span import SpanCall
from slowllm.runtime.block_identity import block_hashes, ends_hash
from slowllm.runtime.description import ModelInfo
from slowllm.runtime.load import open_model
from slowllm.runtime.memory import budget_of
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.swarm.announcer import Announcer
from slowllm.swarm.client import config_key
from slowllm.swarm.joining import take_scarcest
from slowllm.swarm.messages import MAX_MESSAGE_BYTES
from slowllm.swarm.metrics import RequestCounts, metrics_text
from slowllm.swarm.network import Network
from slowllm.swarm.quotas import RequestQuota
from slowllm.swarm.reach import DialBack
from slowllm.swarm.records import ServerRecord, State
from slowllm.swarm.requests import PeerRequest
from slowllm.swarm.server_options import ServerOptions
from slowllm.swarm.shared_token import read_token
from slowllm.swarm.span_checks import ServedSpan
from slowllm.swarm.span_server import SpanServer
from slowllm.swarm.streams import Limits
from slowllm.swarm.weights import weights_hash
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


class Server:
    """A span of blocks that is served; a context manager.

    Args:
        path_or_hub_id: of a folder with the config and at least the shards of its blocks; or a store.
        options: of the server.
    Raises:
        InputError: the blocks or an option cannot be used.
        PlanError: the span, its sessions and requests do not fit the budget.
        UnsupportedError: the model cannot be cut between blocks.
        NetworkError: the swarm cannot be joined.
        ProtocolError: the record of so many blocks is too large.
    """

    def __init__(self, path_or_hub_id: str | os.PathLike[str], options: ServerOptions) -> None:
        self.options = options
        self._held = contextlib.ExitStack()
        self._state: State = "joining"
        self._free_tokens: Callable[[], int] = lambda: 0
        self._no_backward = "" if options.backward else "it was started with --forward-only"
        self._counts = RequestCounts()
        info = ModelInfo(path_or_hub_id)
        self.num_blocks = int(info.config.get_text_config().num_hidden_layers)
        wanted = parse_blocks(options.blocks, self.num_blocks)
        token = None if options.token_file is None else read_token(options.token_file)
        self._requests = RequestQuota(options.quotas.requests)
        with contextlib.ExitStack() as held:
            self.network = Network.open(
                identity=options.identity, host_maddrs=options.host_maddrs, announce_maddrs=options.announce_maddrs,
                initial_peers=options.initial_peers, use_relay=options.use_relay, limits=limits_of(info.config, options), token=token,
            )  # fmt: skip
            held.callback(self.network.close)
            key = config_key(info.config)
            self._record = self._joining_record(key, wanted)
            if isinstance(wanted, int):
                self._record = take_scarcest(self.network, self._record, self.num_blocks, wanted)
                wanted = Part.span(self._record.first, self._record.end)
            self._announcer = Announcer(self.network, self.record, str(info.config.model_type))
            held.callback(self._say_goodbye)
            held.enter_context(self._announcer)  # while it opens its blocks, others must not take them
            self.lm = held.enter_context(self._open(info, wanted))
            served = ServedSpan(
                wanted.first, wanted.end, options.max_batch_tokens, options.max_length, options.waiting_tokens,
                options.cache_tokens, options.session_seconds,
                limits_of(info.config, options).message_bytes, self._no_backward,
            )  # fmt: skip
            self.spans = SpanServer(self.lm, served, options.quotas)
            self._free_tokens = lambda: self.spans.sessions.free_tokens
            self._record = self._full_record(served)
            self.spans.block_seconds = self._record.decode_seconds
            self._record.to_bytes()  # one that is too large would not be taken the next time either
            self._reach = held.enter_context(DialBack(lambda: self.network.find(key), self.network.ask))
            self.network.serve(self._handle, self.spans.sessions.end_all_of, options.allowed or None)
            self._state = "online"
            self._announcer.say()
            self._held = held.pop_all()

    def _open(self, info: ModelInfo, part: Part) -> StreamedLM:
        options = self.options
        # Requests that were read and wait, and one answer, are memory that the plan of the model does not know.
        limits = limits_of(info.config, options)
        budget = budget_of(options.ram, limits.held_bytes + limits.message_bytes)
        opened = functools.partial(
            open_model,
            StreamedLM,
            info,
            ram=budget,
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

    def _joining_record(self, key: str, wanted: Part | int) -> ServerRecord:
        first, end = (0, wanted) if isinstance(wanted, int) else (wanted.first, wanted.end)
        return ServerRecord(
            peer=self.network.peer, addresses=tuple(self.network.addresses), model=key, first=first, end=end,
            state="joining", dtype=self.options.dtype, version=__version__, compression=self.options.compression,
            max_batch_tokens=self.options.max_batch_tokens, max_length=self.options.max_length, name=self.options.name,
        )  # fmt: skip

    def _full_record(self, served: ServedSpan) -> ServerRecord:
        batch_rate, decode_seconds = self._measure(served)
        return replace(
            self._record, dtype=str(self.lm.model.dtype).removeprefix("torch."),
            block_hashes=tuple(block_hashes(self.lm, range(served.first, served.end)).values()), ends_hash=self._ends_hash(),
            forward_tokens_per_second=batch_rate, decode_seconds=decode_seconds / (served.end - served.first),
            cache_tokens=served.cache_tokens, has_backward=served.has_backward,
        )  # fmt: skip

    def _ends_hash(self) -> str:
        """Return the hash of the model's ends, if they are in the folder."""
        checkpoint = self.lm.checkpoint
        return "" if checkpoint.absent else ends_hash(checkpoint)

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

    def record(self) -> ServerRecord:
        """Return what the server says of itself now."""
        state = self._state  # before the record, which is complete before the server is online
        return replace(self._record, state=state, cache_tokens_free=self._free_tokens())

    @functools.cached_property
    def weights(self) -> str:
        """The word for all blocks of the model, if they are in the folder; empty otherwise."""
        checkpoint = self.lm.checkpoint
        if checkpoint.absent:
            return ""
        return weights_hash(list(block_hashes(checkpoint, range(self.num_blocks)).values()))

    def metrics(self) -> str:
        """Return what the server has done and holds, in Prometheus's text format."""
        return metrics_text(self.spans.status(), self._counts, self.spans.served.cache_tokens)

    def _handle(self, request: PeerRequest) -> None:
        """Answer a request of a peer, and count it."""
        self._counts.watch(request)
        # What frees a server is never refused.
        if request.meta.get("op") != "end_session":
            self._requests.begin(request.peer)
            request.add_end_callback(lambda *_: self._requests.end(request.peer))
        (self._reach if request.meta.get("op") == "reach" else self.spans).handle(request)

    def announce(self) -> None:
        """Tell the swarm what the server is now.

        Raises:
            NetworkError: nobody took it.
        """
        self._announcer.tell()

    def drain(self) -> None:
        """Take no new sessions, and tell the swarm."""
        self._state = "draining"
        self.spans.drain()
        with contextlib.suppress(NetworkError):
            self.announce()

    def _say_goodbye(self) -> None:
        if self._state == "offline":
            return
        self._state = "offline"
        with contextlib.suppress(NetworkError):
            self.announce()

    def close(self) -> None:
        """Tell the swarm that this server has left, and let go of everything. Idempotent."""
        self._say_goodbye()  # before the blocks are gone
        self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
