"""A server of a swarm: a span of blocks, opened within a budget, announced, and served until it is closed or moves.

Owns the network, the thread that announces, and what is opened for its span, which is another one after a move. `serve` of
the command line is a thin shell around it.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import threading
from dataclasses import replace
from types import TracebackType
from typing import Self

from slowllm.errors import BusyError, NetworkError, SlowLLMError
from slowllm.malloc import give_back
from slowllm.modeling.parts import Part, parse_blocks
from slowllm.options import AUTO
from slowllm.runtime.block_identity import block_hashes
from slowllm.runtime.blocks_here import blocks_here
from slowllm.runtime.description import ModelInfo
from slowllm.runtime.streamed_lm import StreamedLM, peak_rss_bytes
from slowllm.swarm.announcer import Announcer
from slowllm.swarm.client import config_key
from slowllm.swarm.joining import take_scarcest
from slowllm.swarm.metrics import RequestCounts, metrics_text
from slowllm.swarm.network import Network
from slowllm.swarm.opened_span import OpenedSpan, count_auto, limits_of
from slowllm.swarm.quotas import RequestQuota
from slowllm.swarm.reach import DialBack
from slowllm.swarm.rebalancer import Move, Rebalancer
from slowllm.swarm.records import ServerRecord, State
from slowllm.swarm.requests import PeerRequest
from slowllm.swarm.server_options import ServerOptions
from slowllm.swarm.shared_token import read_token
from slowllm.swarm.span_server import MOVING, SpanServer
from slowllm.swarm.status import ServerStatus
from slowllm.swarm.weights import weights_hash
from slowllm.version import __version__

log = logging.getLogger(__name__)


class Server:
    """A span of blocks that is served; a context manager.

    Attributes:
        num_blocks: of the model.
        network: by which it is reached.
        failure: what ended it while it moved; None as long as it is well.

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
        self.failure: BaseException | None = None
        self._held = contextlib.ExitStack()
        self._state: State = "joining"
        self._opened: OpenedSpan | None = None
        self._done = ServerStatus(0, 0, 0, 0, 0, 0)
        self._first_used_bytes = 0
        # State, record and span change together; one move at a time.
        self._lock, self._moving = threading.Lock(), threading.Lock()
        self._counts = RequestCounts()
        self._info = info = ModelInfo(path_or_hub_id)
        self.num_blocks = int(info.config.get_text_config().num_hidden_layers)
        wanted = parse_blocks(options.blocks, self.num_blocks)
        token = None if options.token_file is None else read_token(options.token_file)
        self._requests = RequestQuota(options.quotas.requests)
        self._key = config_key(info.config)
        self._rebalancer: Rebalancer | None = None
        with contextlib.ExitStack() as held:
            limits = limits_of(info.config, options)
            self.network = Network.open(
                identity=options.identity, host_maddrs=options.host_maddrs, announce_maddrs=options.announce_maddrs,
                initial_peers=options.initial_peers, use_relay=options.use_relay, limits=limits, token=token,
            )  # fmt: skip
            held.callback(self.network.close)
            part = wanted if isinstance(wanted, Part) else self._choose(wanted)
            self._record = self._joining_record(part)
            self._announcer = Announcer(self.network, self.record, str(info.config.model_type))
            held.callback(self._say_goodbye)
            held.enter_context(self._announcer)  # while it opens its blocks, others must not take them
            held.callback(self._release)
            self._open(part)
            self._reach = held.enter_context(DialBack(lambda: self.network.find(self._key), self.network.ask))
            self.network.serve(self._handle, self._end_sessions_of, options.allowed or None)
            self._go_online()
            if self._rebalancer is not None:
                held.enter_context(self._rebalancer)
            self._held = held.pop_all()

    def _choose(self, wanted: int | str) -> Part:
        """Take the blocks that the swarm lacks most, of those that are here, and prepare to move to others later."""
        here = blocks_here(self._info)
        count = count_auto(self._info, self.options, here) if wanted == AUTO else int(wanted)
        record = self._joining_record(Part.span(0, count))
        record = take_scarcest(self.network, record, self.num_blocks, count, allowed=here)
        if self.options.rebalances:
            self._rebalancer = Rebalancer(
                lambda: self.network.find(self._key),
                self.record,
                self.move,
                self.num_blocks,
                here,
                self._fail,
            )
        return Part.span(record.first, record.end)

    def _joining_record(self, part: Part) -> ServerRecord:
        return ServerRecord(
            peer=self.network.peer, addresses=tuple(self.network.addresses), model=self._key, first=part.first, end=part.end,
            state="joining", dtype=self.options.dtype, version=__version__, compression=self.options.compression,
            max_batch_tokens=self.options.max_batch_tokens, max_length=self.options.max_length, name=self.options.name,
        )  # fmt: skip

    def _open(self, part: Part) -> None:
        opened = OpenedSpan(
            self._info, self.options, part, self._joining_record(part), self._first_used_bytes
        )
        with self._lock:
            self._opened, self._record = opened, opened.record
            self._first_used_bytes = opened.first_used_bytes

    def _release(self) -> None:
        """Close the model, if one is open, and give its memory back to the system, by which the next plan is made."""
        with self._lock:
            opened, self._opened = self._opened, None
            if opened is not None:
                self._done = self._total(opened.spans.status())
        if opened is not None:
            opened.close()
        del opened
        gc.collect()  # a model and its handle refer to each other
        give_back()

    def _go_online(self) -> None:
        with self._lock:
            if self._state == "joining":
                self._state = "online"
            elif self._opened is not None:  # it was told to leave while it moved
                self._opened.spans.drain()
        self._announcer.say()

    def move(self, first: int, end: int, why: str = "it was told to") -> Move:
        """Serve other blocks from now on, if no session is open and no request under way.

        Meanwhile, requests are refused. Where the new blocks cannot be opened, the server goes back to those that it had.

        Args:
            first: the first block.
            end: the number after the last.
            why: for the log.
        Raises:
            InputError: these are no blocks of the model.
            SlowLLMError: neither the new blocks could be opened nor the old ones again. The server has left the swarm then,
                and `failure` is the error.
        """
        part = Part.span(first, end)
        part.check(self.num_blocks)
        with self._moving:
            with self._lock:
                if self._state != "online" or self._opened is None or not self.spans.close_if_unused():
                    return "in use"
                old = self.lm.part
                self._state, self._record = "joining", self._joining_record(part)
            log.warning(
                "this server moves from blocks %d:%d to %d:%d: %s", old.first, old.end, first, end, why
            )
            try:
                return self._swap(old, part)
            except BaseException as error:
                self._fail(error)
                raise

    def _swap(self, old: Part, new: Part) -> Move:
        self._announcer.say()
        self._release()
        try:
            self._open(new)
        except (SlowLLMError, OSError) as error:
            log.warning(
                "blocks %d:%d cannot be served (%s); this server goes back to %d:%d",
                new.first, new.end, error, old.first, old.end,
            )  # fmt: skip
        else:
            self._go_online()
            return "moved"
        # Not in the handler: the error refers to what was opened.
        with self._lock:
            self._record = self._joining_record(old)
        self._announcer.say()
        self._release()
        self._open(old)
        self._go_online()
        return "failed"

    def _fail(self, error: BaseException) -> None:
        """Leave the swarm because of an error, which `check` raises."""
        if self.failure is None:
            self.failure = error
            self._say_goodbye()

    def check(self) -> None:
        """Raise what has ended the server, if anything has."""
        if self.failure is not None:
            raise self.failure

    @property
    def lm(self) -> StreamedLM:
        """The part of the model that is served now."""
        assert self._opened is not None, "no blocks are open while the server moves"
        return self._opened.lm

    @property
    def spans(self) -> SpanServer:
        """What answers requests now."""
        assert self._opened is not None, "no blocks are open while the server moves"
        return self._opened.spans

    @property
    def is_in_use(self) -> bool:
        """Whether sessions are open, or requests are under way."""
        opened = self._opened
        return opened is not None and opened.spans.is_in_use

    def record(self) -> ServerRecord:
        """Return what the server says of itself now."""
        with self._lock:
            free = 0 if self._opened is None else self._opened.spans.sessions.free_tokens
            return replace(self._record, state=self._state, cache_tokens_free=free)

    @functools.cached_property
    def weights(self) -> str:
        """The word for all blocks of the model, if they are in the folder; empty otherwise."""
        checkpoint = self.lm.checkpoint
        if checkpoint.absent:
            return ""
        return weights_hash(list(block_hashes(checkpoint, range(self.num_blocks)).values()))

    def status(self) -> ServerStatus:
        """Return what the server has done since it was started, and holds now."""
        with self._lock:
            opened = self._opened
            own = ServerStatus(0, 0, peak_rss_bytes(), 0, 0, 0) if opened is None else opened.spans.status()
            return self._total(own)

    def _total(self, own: ServerStatus) -> ServerStatus:
        """Return a status of the present span with what the former ones have done."""
        return replace(
            own,
            num_passages=self._done.num_passages + own.num_passages,
            read_bytes=self._done.read_bytes + own.read_bytes,
        )

    def metrics(self) -> str:
        """Return what the server has done and holds, in Prometheus's text format."""
        return metrics_text(self.status(), self._counts, self.record().cache_tokens)

    def _handle(self, request: PeerRequest) -> None:
        """Answer a request of a peer, and count it."""
        self._counts.watch(request)
        operation, opened = request.meta.get("op"), self._opened
        # What frees a server is never refused.
        if operation != "end_session":
            self._requests.begin(request.peer)
            request.add_end_callback(lambda *_: self._requests.end(request.peer))
        if operation == "reach":
            self._reach.handle(request)
        elif operation == "status":
            request.respond(self.status().to_meta())
        elif opened is not None:
            opened.spans.handle(request)
        elif operation == "end_session":  # there is none
            request.respond()
        else:
            raise BusyError(MOVING)

    def _end_sessions_of(self, peer: str) -> None:
        opened = self._opened
        if opened is not None:
            opened.spans.sessions.end_all_of(peer)

    def announce(self) -> None:
        """Tell the swarm what the server is now.

        Raises:
            NetworkError: nobody took it.
        """
        self._announcer.tell()

    def drain(self) -> None:
        """Take no new sessions, and tell the swarm."""
        with self._lock:
            self._state = "draining"
            if self._opened is not None:
                self._opened.spans.drain()
        with contextlib.suppress(NetworkError):
            self.announce()

    def _say_goodbye(self) -> None:
        with self._lock:
            if self._state == "offline":
                return
            self._state = "offline"
        with contextlib.suppress(NetworkError):
            self.announce()

    def close(self) -> None:
        """Tell the swarm that this server has left, and let go of everything, after a move that is under way. Idempotent."""
        if self._rebalancer is not None:
            self._rebalancer.close()
        self._say_goodbye()  # before the blocks are gone
        self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
