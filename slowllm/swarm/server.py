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
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from slowllm.errors import InputError, NetworkError, PlanError
from slowllm.modeling.parts import Part, parse_blocks
from slowllm.modeling.span import SpanCall
from slowllm.planning.job import Job
from slowllm.runtime.block_identity import block_hashes, ends_hash
from slowllm.runtime.description import ModelInfo
from slowllm.runtime.load import open_model
from slowllm.runtime.memory import budget_of
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.swarm.announcer import Announcer
from slowllm.swarm.client import config_key
from slowllm.swarm.compression import COMPRESSIONS
from slowllm.swarm.joining import take_scarcest
from slowllm.swarm.messages import MAX_MESSAGE_BYTES
from slowllm.swarm.network import Network
from slowllm.swarm.records import ServerRecord, State
from slowllm.swarm.span_checks import ServedSpan
from slowllm.swarm.span_server import SpanServer
from slowllm.swarm.streams import Limits
from slowllm.version import __version__

log = logging.getLogger(__name__)

# Tokens of the batch by which the throughput is measured at the start.
_MEASURED_TOKENS = 256
# A tiny model's server takes messages of this size all the same.
_LEAST_MESSAGE_BYTES = 16 << 20


@dataclass(frozen=True)
class ServerOptions:
    """What a server serves, and within which limits.

    Attributes:
        blocks: ``A:B``, or how many, of which the swarm then gets those that it lacks most.
        ram: budget for the whole process, as for `slowllm.load`.
        dtype: compute dtype.
        device: where blocks are computed.
        vram: budget on each GPU.
        cache_tokens: that the sessions of all clients hold together.
        max_batch_tokens: of one request.
        max_length: of one sequence, what its session holds included.
        max_waiting_tokens: of all requests that are under way or wait; four times as many by default.
        backward: whether gradients are computed.
        compression: of hidden states on the wire.
        name: that people see.
        session_seconds: after which an idle session ends.
        identity: file of the server's key.
        host_maddrs: multiaddresses to listen at.
        announce_maddrs: multiaddresses that others are told, where they differ.
        initial_peers: of the swarm; a new one is begun without.
        use_relay: whether peers may be reached through others.
        keep_resident: whether blocks that fit the budget stay in memory.
    Raises:
        InputError: a number is none that a server can have, or the compression is unknown.
    """

    blocks: str
    ram: str | int = "auto"
    dtype: str = "auto"
    device: str = "cpu"
    vram: str | None = None
    cache_tokens: int = 4096
    max_batch_tokens: int = 2048
    max_length: int = 2048
    max_waiting_tokens: int | None = None
    backward: bool = True
    compression: str = "none"
    name: str = ""
    session_seconds: float = 600.0
    identity: Path | None = None
    host_maddrs: tuple[str, ...] = ("/ip4/127.0.0.1/tcp/0",)
    announce_maddrs: tuple[str, ...] = ()
    initial_peers: tuple[str, ...] = ()
    use_relay: bool = False
    keep_resident: bool = True

    def __post_init__(self) -> None:
        if self.compression not in COMPRESSIONS:
            raise InputError(f"the compression {self.compression!r} is none of {', '.join(COMPRESSIONS)}")
        if self.session_seconds <= 0:
            raise InputError(f"a session cannot end after {self.session_seconds:g} s; give a time above 0")
        if self.max_length < 1:
            raise InputError(f"a sequence cannot have {self.max_length} tokens")
        self.job()

    def job(self) -> Job:
        """Return what the plan must know."""
        waiting = self.waiting_tokens
        return Job.serving(
            cache_tokens=self.cache_tokens, batch_tokens=self.max_batch_tokens, max_batch_tokens=waiting,
            backward=self.backward, longest=self.max_length,
        )  # fmt: skip

    @property
    def waiting_tokens(self) -> int:
        """Tokens of all requests that are under way or wait."""
        return 4 * self.max_batch_tokens if self.max_waiting_tokens is None else self.max_waiting_tokens


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
        info = ModelInfo(path_or_hub_id)
        self.num_blocks = int(info.config.get_text_config().num_hidden_layers)
        wanted = parse_blocks(options.blocks, self.num_blocks)
        with contextlib.ExitStack() as held:
            self.network = Network.open(
                identity=options.identity, host_maddrs=options.host_maddrs, announce_maddrs=options.announce_maddrs,
                initial_peers=options.initial_peers, use_relay=options.use_relay, limits=limits_of(info.config, options),
            )  # fmt: skip
            held.callback(self.network.close)
            key = config_key(info.config)
            self._record = self._joining_record(key, wanted)
            if isinstance(wanted, int):
                self._record = take_scarcest(self.network, self._record, self.num_blocks, wanted)
                wanted = Part.span(self._record.first, self._record.end)
            self._announcer = Announcer(self.network, self.record)
            held.callback(self._say_goodbye)
            held.enter_context(self._announcer)  # while it opens its blocks, others must not take them
            self.lm = held.enter_context(self._open(info, wanted))
            served = ServedSpan(
                wanted.first, wanted.end, options.max_batch_tokens, options.max_length, options.waiting_tokens,
                options.cache_tokens, options.session_seconds,
                limits_of(info.config, options).message_bytes, self._no_backward,
            )  # fmt: skip
            self.spans = SpanServer(self.lm, served)
            self._free_tokens = lambda: self.spans.sessions.free_tokens
            self._record = self._full_record(served)
            self.spans.block_seconds = self._record.decode_seconds
            self._record.to_bytes()  # one that is too large would not be taken the next time either
            self.network.serve(self.spans.handle, self.spans.sessions.end_all_of)
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
            except PlanError:
                raise error from None
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
