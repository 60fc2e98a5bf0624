"""The network of a swarm: open, serve, ask, announce, find, close.

This module, `slowllm.swarm.libp2p_start`, `slowllm.swarm.dialling` and `slowllm.swarm.directory` are the only ones that know
hivemind, and of hivemind they use `P2P` (libp2p's daemon, a process of its own that ends when this one does) and `DHTNode`, both on one asyncio loop in one
thread. What forks in hivemind (`DHT`, `ConnectionHandler`, `MPFuture`) is not used: this process has torch's threads, which do
not survive a fork.

Nothing leaves this machine but to the addresses that were given and to peers that are met there: no public relays, no
default bootstrap peers, no port mapping, no dialling for strangers but to servers that the directory names.

All methods can be called from any thread but the network's own, on which handlers run.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from slowllm.errors import (
    DirectoryError,
    InputError,
    NetworkError,
    PeerTimeoutError,
    ProtocolError,
)
from slowllm.swarm import addresses as multiaddresses
from slowllm.swarm.admission import Admission
from slowllm.swarm.dialling import PROTOCOL_NAME, open_stream
from slowllm.swarm.directory import Directory, directory_validator
from slowllm.swarm.directory_token import DirectoryToken
from slowllm.swarm.identity import Identity, holding_identity
from slowllm.swarm.libp2p_log import without_faults_of_leaving
from slowllm.swarm.libp2p_start import start_libp2p
from slowllm.swarm.loop_thread import LoopThread
from slowllm.swarm.messages import Meta, Tensors, encode
from slowllm.swarm.model_list import ModelEntry, list_model, models_of
from slowllm.swarm.presence import Presence
from slowllm.swarm.progress import RequestProgress
from slowllm.swarm.records import ServerRecord
from slowllm.swarm.requests import REQUEST, Handler, StreamServer, decoded, ends_stream, unpack_answer
from slowllm.swarm.shared_token import SharedToken, prove
from slowllm.swarm.stream_pool import StreamPool
from slowllm.swarm.streams import Limits, Parts, Stream, exchange

OPEN_SECONDS = 60.0
DIRECTORY_SECONDS = 30.0
CLOSE_SECONDS = 10.0


class Network:
    """One peer of a swarm. Owns a thread and libp2p's process: close it, or use it as a context.

    Attributes:
        peer: this peer's id.
        addresses: multiaddresses that others give as initial peers; empty where it does not listen.
        dropped: how many records `find` left out, by their fault.
    """

    def __init__(self, identity: Identity, limits: Limits, token: SharedToken | None) -> None:
        """Make what `open` opens."""
        self.peer, self._token = identity.peer, token
        self.addresses: tuple[str, ...] = ()
        self._limits = limits
        self.dropped: Counter[str] = Counter()
        self._p2p: Any = None
        self._node: Any = None
        self._pools: dict[str, StreamPool] = {}
        self._known: dict[str, tuple[str, ...]] = {}
        self._held = contextlib.ExitStack()
        self._loop = LoopThread("slowllm-network")

    @classmethod
    def open(
        cls,
        *,
        identity: Path | None = None,
        host_maddrs: Sequence[str] = ("/ip4/127.0.0.1/tcp/0",),
        announce_maddrs: Sequence[str] = (),
        initial_peers: Sequence[str] = (),
        use_relay: bool = False,
        limits: Limits | None = None,
        token: SharedToken | None = None,
        open_seconds: float = OPEN_SECONDS,
    ) -> Network:
        """Join the swarm of the initial peers, or begin one.

        Args:
            identity: file of this peer's key, made if it is not there; None for a key that is forgotten.
            host_maddrs: multiaddresses to listen at; none for a client that only asks, behind whatever router.
            announce_maddrs: multiaddresses that others are told, where they differ from those listened at.
            initial_peers: multiaddresses of peers of the swarm, with their ids.
            use_relay: allow libp2p's circuit relay through the initial peers, and for others through this one. Which
                of them it uses is libp2p's decision.
            limits: what peers may take.
            token: that all peers of the swarm prove to one another; None for a swarm that is open to all.
            open_seconds: for joining, at most.
        Raises:
            InputError: an address, the identity file or a port cannot be used; or hivemind is not installed.
            NetworkError: none of the initial peers can be joined; or the clock is wrong, or peers cannot reach us.
        """
        try:
            import hivemind  # noqa: F401
        except ImportError as error:
            raise InputError(
                f"hivemind is not installed ({error}); pip install hivemind, or in a checkout pip install '.[swarm]'"
            ) from error
        multiaddresses.check_addresses(host_maddrs, announce_maddrs, initial_peers)
        with contextlib.ExitStack() as held:
            key = held.enter_context(holding_identity(identity))
            multiaddresses.refuse_taken_ports(host_maddrs)
            network = cls(key, limits or Limits(), token)
            held.enter_context(without_faults_of_leaving())
            held.callback(network._loop.close, network._leave)
            network._loop.call(
                lambda: network._join(
                    key, host_maddrs, announce_maddrs, initial_peers, use_relay, open_seconds
                ),
                open_seconds + multiaddresses.EXPLAIN_SECONDS,
            )
            network._held = held.pop_all()
        return network

    def __enter__(self) -> Network:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def serve(
        self,
        handler: Handler,
        left: Callable[[str], object] | None = None,
        allowed: Collection[str] | None = None,
    ) -> None:
        """Answer requests of peers from now on.

        Args:
            handler: called on the network's thread with each `PeerRequest` of `slowllm.swarm.requests`; it may answer
                at once, later, or from another thread, and must not wait. It may be a coroutine function. What it
                raises is the answer.
            left: called on the network's thread with the id of a peer that has asked before, and has left.
            allowed: ids of the only peers that are answered; None for all.
        Raises:
            NetworkError: the network is closed.
        """
        server = StreamServer(
            handler,
            self._limits,
            Admission(self.peer, self._token, allowed, self._limits.connect_seconds).admits,
        )

        async def take(info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            stream = Stream(reader, writer)
            with contextlib.suppress(NetworkError):  # it was closed
                await self._loop.until_closed(lambda: server.serve(str(info.peer_id), stream))

        self._loop.call(lambda: self._p2p.add_binary_stream_handler(PROTOCOL_NAME, take), DIRECTORY_SECONDS)
        if left is not None:
            self._loop.submit(lambda: self._watch(server, left))

    def ask(
        self,
        peer: str,
        meta: Mapping[str, Any],
        tensors: Mapping[str, Tensor] | None = None,
        *,
        timeout: float | None = None,
        compression: Mapping[str, str] | None = None,
        on_progress: Callable[[RequestProgress], None] | None = None,
    ) -> Future[tuple[Meta, Tensors]]:
        """Return the future of a peer's answer, its meta and tensors. Cancelling it tells the peer.

        To block, call its `result()`; to await it on a loop, `asyncio.wrap_future`. Its errors are PeerLostError (the
        peer cannot be reached, or the connection ended), PeerTimeoutError (it was silent, or the time is over),
        RemoteError (it answers with an error), ProtocolError (the answer is damaged), and NetworkError (this network
        was closed).

        Args:
            peer: its id.
            meta: the request; JSON types only.
            tensors: by name. They must not be changed before the answer is there.
            timeout: seconds for the whole answer; None to wait as long as the peer gives signs of life.
            compression: of tensors by their names, see `slowllm.swarm.compression`.
            on_progress: called on the network's thread with what the peer says of the work, about once a second.
        Raises:
            InputError: this is no peer id, or a compression cannot be used for its tensor.
            ProtocolError: the request cannot be sent as it is.
            NetworkError: the network is closed.
        """
        if not multiaddresses.is_peer(peer):
            raise InputError(f"{peer[:80]!r} is no peer id")
        limit = self._limits.message_bytes
        parts = encode({REQUEST: dict(meta)}, tensors, compression=compression, max_bytes=limit)
        return self._loop.submit(lambda: self._ask(peer, parts, timeout, on_progress))

    def soon(self, work: Callable[[], object]) -> None:
        """Do a short piece of work on the network's thread soon, unless it is closed. Takes no lock."""
        self._loop.soon(work)

    def announce(self, record: ServerRecord, ttl: float) -> None:
        """Put this server's record into the swarm's directory for `ttl` seconds, in the place of its last one.

        A record replaces the last one only if it expires later, so one with a shorter life gets the last one's.

        Raises:
            NetworkError: no peer took it or answers at all, or the network is closed.
            ProtocolError: the record is too large.
        """
        assert record.peer == self.peer, f"{record.peer} is not this peer"
        self._loop.call(lambda: self._directory.announce(record, ttl), DIRECTORY_SECONDS)

    def list_model(self, entry: ModelEntry, ttl: float) -> None:
        """Name the model whose blocks this server has in the swarm's list of models, for `ttl` seconds.

        Raises:
            NetworkError: no peer took it, or the network is closed.
        """
        assert entry.peer == self.peer, f"{entry.peer} is not this peer"
        self._loop.call(lambda: list_model(self._directory, entry, ttl), DIRECTORY_SECONDS)

    def models(self) -> list[ModelEntry]:
        """Return one entry for each model whose servers have named it.

        Raises:
            NetworkError: no peer answers any more, the search takes too long, or the network is closed.
        """
        return self._loop.call(lambda: models_of(self._directory), DIRECTORY_SECONDS)

    def find(self, model: str, seconds: float = DIRECTORY_SECONDS) -> list[ServerRecord]:
        """Return the records of a model's servers, in the order of their first blocks, its own among them.

        Records that are forged, expired, too large or malformed are left out and counted in `dropped`.

        Args:
            model: key of the model.
            seconds: for the search.
        Raises:
            DirectoryError: no peer answers any more, or the search takes too long.
            NetworkError: the network is closed.
        """
        return self._loop.call(lambda: self._find(model, seconds), seconds + 1)

    def look(self, model: str, seconds: float = DIRECTORY_SECONDS) -> Future[list[ServerRecord]]:
        """Begin to find the records of a model's servers, and return the future of what `find` returns or raises."""
        return self._loop.submit(lambda: self._find(model, seconds))

    def close(self) -> None:
        """Leave the swarm: end all requests, libp2p's process, and the thread. Again, or after a crash, does no harm."""
        self._held.close()

    async def _join(
        self,
        identity: Identity,
        host: Sequence[str],
        announce: Sequence[str],
        initial: Sequence[str],
        use_relay: bool,
        open_seconds: float,
    ) -> None:
        from hivemind.dht.crypto import RSASignatureValidator
        from hivemind.dht.node import DHTNode
        from hivemind.dht.protocol import ValidationError
        from hivemind.dht.routing import DHTID
        from hivemind.p2p import PeerID
        from hivemind.utils.crypto import RSAPrivateKey

        self._p2p = await start_libp2p(identity, host, announce, initial, use_relay, open_seconds)
        if host:
            self.addresses = tuple(str(address) for address in await self._p2p.get_visible_maddrs())
        # The key that libp2p has; a new one would sign for another peer than this one. As pickle makes the object.
        key = RSAPrivateKey.__new__(RSAPrivateKey)
        key.__setstate__({"_private_key": identity.der})
        signature = RSASignatureValidator(key)
        try:
            self._node = await DHTNode.create(
                # The same after a restart with the same identity: peers that still have the old node would else know two
                # nodes at one peer, store at it twice, and hear from it that the second record is no newer.
                p2p=self._p2p, node_id=DHTID.generate(source=identity.peer), initial_peers=list(initial) or None, client_mode=not host,
                record_validator=directory_validator(signature), authorizer=None if self._token is None else DirectoryToken(self._token), cache_locally=False, cache_nearest=0,
                cache_refresh_before_expiry=0, blacklist_time=0,
            )  # fmt: skip
        except (ValidationError, RuntimeError) as error:
            problem = multiaddresses.explain_refusal(str(error), initial, host)
            raise NetworkError(f"{problem}{self._about_token()}") from error
        peers = {text: PeerID.from_base58(multiaddresses.peer_of(text)) for text in initial}
        self._directory = Directory(self._node, signature.local_public_key, peers, self.dropped)

    def _about_token(self) -> str:
        """Return what may be wrong with the token where peers do not answer: without the right one, they say nothing."""
        if self._token is None:
            return "; if the swarm has a token, give its file with --token-file"
        return "; is the --token-file that of this swarm, and does the swarm have a token?"

    async def _find(self, model: str, seconds: float) -> list[ServerRecord]:
        try:
            async with asyncio.timeout(seconds):
                records = await self._directory.find(model)
        except TimeoutError as error:
            raise DirectoryError(f"the swarm's directory has not answered in {seconds:g} s") from error
        self._known.update({record.peer: record.addresses for record in records})
        return records

    async def _leave(self) -> None:
        """End libp2p's process, which also ends when this process dies: it watches its connection to it."""
        for pool in self._pools.values():
            pool.close()
        if self._p2p is None:
            return
        child = self._p2p._child  # hivemind has no public way to see that it has ended, or to end it by force
        if self._node is not None and child.returncode is None:
            with contextlib.suppress(Exception):  # a peer that does not say goodbye is missed soon enough
                async with asyncio.timeout(CLOSE_SECONDS / 2):
                    await self._node.shutdown()
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._p2p.shutdown()
        except TimeoutError:
            child.kill()
            await child.wait()

    async def _watch(self, server: StreamServer, left: Callable[[str], object]) -> None:
        seconds = self._limits.left_seconds
        presence = Presence(seconds, time.monotonic)
        while self._p2p._child.returncode is None:
            await asyncio.sleep(seconds / 3)
            with contextlib.suppress(OSError, EOFError):  # of libp2p's process, which ends
                connected = {str(info.peer_id) for info in await self._p2p.list_peers()}
                for peer in presence.left(server.take_asking(), connected):
                    left(peer)

    def _dialling(self, peer: str) -> Callable[[], Awaitable[Stream]]:
        # A machine that says nothing for that long is lost, however it is connected.
        seconds = min(self._limits.connect_seconds, self._limits.silence_seconds)

        async def dial() -> Stream:
            stream = await open_stream(self._p2p, peer, self._known.get(peer, ()), seconds)
            if self._token is not None:
                await prove(stream, self._token, self.peer, peer, seconds)
            return stream

        return dial

    async def _ask(
        self,
        peer: str,
        parts: Parts,
        timeout: float | None,
        on_progress: Callable[[RequestProgress], None] | None,
    ) -> tuple[Meta, Tensors]:
        last: list[RequestProgress] = []

        def note(progress: RequestProgress) -> None:
            last[:] = [progress]
            if on_progress is not None:
                on_progress(progress)

        pool = self._pools.get(peer)
        if pool is None:
            pool = self._pools[peer] = StreamPool(self._dialling(peer), self._limits.streams_per_peer)
        try:
            async with asyncio.timeout(timeout):
                async with pool.stream() as stream:
                    body = await exchange(stream, parts, peer, self._limits, note)
                    said, tensors = await decoded(body, self._limits.message_bytes)
                    if ends_stream(said):
                        stream.close()
        except TimeoutError:
            how_far = f"; it {last[0]}" if last else ""
            raise PeerTimeoutError(peer, f"has not answered in {timeout:g} s{how_far}") from None
        except ProtocolError as error:
            raise ProtocolError(f"peer {peer}: {error}") from error
        return unpack_answer(peer, said), tensors


def log_as_others() -> None:
    """Let hivemind log through the root logger, as other modules do, and not by a handler of its own."""
    from hivemind.utils.logging import use_hivemind_log_handler

    use_hivemind_log_handler("nowhere")
