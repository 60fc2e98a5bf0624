"""Strangers are told in one sentence why they are not served: by token, by id, by quota. Real libp2p on the loopback."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slowllm.errors import InputError, NetworkError, PeerLostError, RefusedError, RemoteError
from slowllm.modeling.span import SpanCall
from slowllm.swarm.dialling import PROTOCOL_NAME
from slowllm.swarm.directory_token import PROOF_SECONDS, DirectoryToken
from slowllm.swarm.messages import body_bytes, decode, encode
from slowllm.swarm.network import Network
from slowllm.swarm.quotas import PeerQuotas
from slowllm.swarm.server import ServerOptions
from slowllm.swarm.shared_token import SharedToken, demand_proof, limited, prove, prove_to_server, read_token
from slowllm.swarm.streams import Limits, Stream
from tests.support.served import save_model
from tests.support.serving import hidden_states, send, serving

TOKEN, OTHER = SharedToken(b"a token of this swarm"), SharedToken(b"a token of another one")
PATIENCE = 60


def make_token(folder: Path, text: str = "a token of this swarm\n", mode: int = 0o600) -> Path:
    path = folder / "swarm.token"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_token_file_is_read_without_the_white_space_at_its_end(tmp_path: Path) -> None:
    token = read_token(make_token(tmp_path))
    assert token.is_proof(TOKEN.proof("a", "b"), "a", "b")
    assert not token.is_proof(TOKEN.proof("a", "b"), "ab")
    assert not token.is_proof(OTHER.proof("a", "b"), "a", "b")
    assert not token.is_proof("not hexadecimal", "a")


@pytest.mark.parametrize(
    ("text", "mode", "why"),
    [
        ("a token of this swarm", 0o640, r"may be read or written by others \(mode 640\), .* `chmod 600"),
        ("short\n\n\n\n\n\n\n\n\n\n\n\n\n\n", 0o600, "a token has 16 to 4,096 bytes, not 5; make one with"),
        ("x" * 5000, 0o600, "a token has 16 to 4,096 bytes, not 4,097"),
    ],
)
def test_a_token_file_that_is_no_secret_is_refused(tmp_path: Path, text: str, mode: int, why: str) -> None:
    with pytest.raises(InputError, match=why):
        read_token(make_token(tmp_path, text, mode))


def test_a_token_file_that_is_not_there_or_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_token(tmp_path / "none")
    with pytest.raises(InputError, match="is no ordinary file"):
        read_token(tmp_path)


@pytest.fixture(scope="module")
def host() -> Iterator[Network]:
    """A peer of a swarm with a token, which answers all requests of those who prove it."""
    with Network.open(token=TOKEN) as network:
        network.serve(lambda request: request.respond({"here": True}))
        yield network


def open_stream(network: Network, peer: str) -> Stream:
    """Open a stream as a stranger would, with hivemind's own functions."""
    from hivemind.p2p import PeerID

    work = lambda: network._p2p.call_binary_stream_handler(PeerID.from_base58(peer), PROTOCOL_NAME)  # noqa: E731
    _, reader, writer = network._loop.call(work, PATIENCE)
    return Stream(reader, writer)


def in_loop(network: Network, work: Callable[[], Any]) -> Any:
    return network._loop.call(work, PATIENCE)


async def read_meta(stream: Stream) -> dict[str, Any]:
    length = body_bytes(await stream.read_prefix(), 1 << 20)
    return decode(await stream.read_body(length), max_bytes=1 << 20)[0]


def test_those_who_have_the_token_find_and_ask_one_another(host: Network) -> None:
    with Network.open(host_maddrs=(), initial_peers=host.addresses, token=TOKEN) as client:
        for _ in range(3):
            assert client.ask(host.peer, {}).result(PATIENCE)[0] == {"here": True}
        assert client.find("m-1") == []


@pytest.mark.parametrize(
    ("token", "hint"),
    [
        (None, r"if the swarm has a token, give its file with --token-file"),
        (OTHER, r"is the --token-file that of this swarm"),
    ],
)
def test_a_stranger_does_not_get_into_the_directory(
    host: Network, token: SharedToken | None, hint: str
) -> None:
    with pytest.raises(NetworkError, match=f"answers as a peer of the swarm's directory; {hint}"):
        Network.open(host_maddrs=(), initial_peers=host.addresses, token=token)


@pytest.fixture(scope="module")
def stranger(host: Network) -> Iterator[Network]:
    """A peer of another swarm that knows the address of the host."""
    with Network.open() as network:
        network._known[host.peer] = host.addresses
        yield network


def test_a_stranger_without_the_token_is_told_to_give_it(host: Network, stranger: Network) -> None:
    why = "answers RefusedError: this swarm asks for a token; give its file with --token-file"
    for request in ({}, {"long": "x" * 10_000}):
        with pytest.raises(RemoteError, match=why):
            stranger.ask(host.peer, request).result(PATIENCE)


def test_a_stranger_with_another_token_is_told_so(host: Network, stranger: Network) -> None:
    stranger._token = OTHER
    try:
        with pytest.raises(RefusedError, match="has another token than that of --token-file"):
            stranger.ask(host.peer, {}).result(PATIENCE)
    finally:
        stranger._token = None


def test_a_swarm_without_a_token_is_not_taken_for_one_with(host: Network, stranger: Network) -> None:
    stranger.serve(lambda request: request.respond())
    host._known[stranger.peer] = stranger.addresses
    with pytest.raises(RefusedError, match="asks for no token, so it is not of this swarm"):
        host.ask(stranger.peer, {}).result(PATIENCE)


def test_a_proof_that_is_replayed_or_of_another_peer_fails(host: Network, stranger: Network) -> None:
    """What a member said to the host is worth nothing on another stream, nor from another peer."""
    nonce = secrets.token_hex(32)

    async def proved(stream: Stream, peer: str, old: str = "") -> tuple[str, dict[str, Any]]:
        await stream.write(encode({"hello": nonce}))
        said = await read_meta(stream)
        proof = old or TOKEN.proof("client", peer, host.peer, said["nonce"], nonce).hex()
        await stream.write(encode({"proof": proof}))
        await stream.write(encode({"request": {}}))
        return proof, await read_meta(stream)

    stream = open_stream(stranger, host.peer)
    proof, answer = in_loop(stranger, lambda: proved(stream, stranger.peer))
    assert answer == {"answer": {"here": True}}  # it knows the token after all
    refused = {"error": ["RefusedError", "the token was not proved; is the --token-file that of this swarm?"]}
    replayed, stolen, honest = (open_stream(stranger, host.peer) for _ in range(3))
    assert in_loop(stranger, lambda: proved(replayed, stranger.peer, proof))[1] == refused
    assert in_loop(stranger, lambda: proved(stolen, "Q" * 20))[1] == refused
    assert in_loop(stranger, lambda: proved(honest, stranger.peer))[1] == answer


def pair() -> tuple[Stream, Stream]:
    """Return two ends of one stream, within a loop."""

    class Writer:
        def __init__(self, reader: asyncio.StreamReader) -> None:
            self.reader, self.transport = reader, self

        def write(self, data: bytes) -> None:
            self.reader.feed_data(bytes(data))

        async def drain(self) -> None: ...

        def abort(self) -> None: ...

    left, right = asyncio.StreamReader(), asyncio.StreamReader()
    return Stream(left, Writer(right)), Stream(right, Writer(left))  # type: ignore[arg-type]


def test_each_side_sees_that_the_other_one_has_another_token() -> None:
    async def meet(client: SharedToken, server: SharedToken) -> list[Any]:
        ours, theirs = pair()
        asking = asyncio.ensure_future(prove_to_server(ours, client, "client", "server"))
        asked = asyncio.ensure_future(demand_proof(theirs, server, "server", "client"))
        _, waiting = await asyncio.wait([asking, asked], timeout=0.5)
        for task in waiting:
            task.cancel()
        return [None if task in waiting else task.exception() for task in (asking, asked)]

    assert asyncio.run(meet(TOKEN, TOKEN)) == [None, None]
    error, _ = asyncio.run(meet(OTHER, TOKEN))
    assert isinstance(error, RefusedError)


def test_a_request_to_the_directory_holds_once_for_a_minute_and_as_it_is() -> None:
    from hivemind.proto import dht_pb2

    clock = [1000.0]
    ours, theirs, others = (DirectoryToken(token, lambda: clock[0]) for token in (TOKEN, TOKEN, OTHER))

    def signed() -> Any:
        request = dht_pb2.FindRequest(keys=[b"key"])
        asyncio.run(ours.sign_request(request, None))
        return request

    def copy(request: Any) -> Any:
        return dht_pb2.FindRequest.FromString(request.SerializeToString())

    def is_valid(by: DirectoryToken, request: Any) -> bool:
        return asyncio.run(by.validate_request(request))

    request = signed()
    replayed, changed, strange = (copy(request) for _ in range(3))
    changed.keys.append(b"more")
    assert not is_valid(others, strange)
    assert not is_valid(theirs, changed)
    assert is_valid(theirs, request)
    assert not is_valid(theirs, replayed)
    late = signed()
    clock[0] += PROOF_SECONDS + 1
    assert not is_valid(theirs, late)
    assert not is_valid(theirs, dht_pb2.FindRequest(keys=[b"key"]))


def test_an_answer_of_the_directory_belongs_to_its_request() -> None:
    from hivemind.proto import dht_pb2

    ours, theirs, others = DirectoryToken(TOKEN), DirectoryToken(TOKEN), DirectoryToken(OTHER)

    async def answered(by: DirectoryToken, same_request: bool) -> bool:
        requests = [dht_pb2.PingRequest(), dht_pb2.PingRequest()]
        for request in requests:
            await ours.sign_request(request, None)
        response = dht_pb2.PingResponse(available=True)
        await by.sign_response(response, requests[not same_request])
        return await ours.validate_response(response, requests[0])

    assert asyncio.run(answered(theirs, True))
    assert not asyncio.run(answered(theirs, False))
    assert not asyncio.run(answered(others, True))
    assert not asyncio.run(ours.validate_response(None, None))


def test_peers_that_are_not_allowed_are_told_so() -> None:
    with Network.open() as server, Network.open(initial_peers=server.addresses) as friend:
        server.serve(lambda request: request.respond(), allowed=[friend.peer])
        assert friend.ask(server.peer, {}).result(PATIENCE)[0] == {}
        with Network.open(host_maddrs=(), initial_peers=server.addresses) as other:
            why = "answers RefusedError: is not among the peers that this server was told to serve"
            for _ in range(2):
                with pytest.raises(RemoteError, match=why):
                    other.ask(server.peer, {}).result(PATIENCE)


def test_an_allowed_key_that_is_no_id_is_refused() -> None:
    with pytest.raises(InputError, match="--allow-keys 'desk' is no peer id"):
        ServerOptions("0:1", allowed=("desk",))


def test_a_server_of_a_swarm_with_a_token_refuses_a_thousand_sessions_of_one_peer(tmp_path: Path) -> None:
    token = make_token(tmp_path)
    options = {"token_file": token, "quotas": PeerQuotas(sessions=5), "cache_tokens": 2000}
    with serving(save_model(tmp_path / "model"), "0:1", **options) as server:
        limits = Limits(silence_seconds=60)
        with Network.open(
            host_maddrs=(), initial_peers=server.network.addresses, token=TOKEN, limits=limits
        ) as network:
            call = SpanCall(0, 1, hidden_states(64, num_positions=1))
            for number in range(5):
                send(network, server.network.peer, call, f"session {number}").result(PATIENCE)
            for begin in range(5, 1000, 40):
                asked = [
                    send(network, server.network.peer, call, f"session {n}") for n in range(begin, begin + 40)
                ]
                for answer in asked:
                    with pytest.raises(RemoteError, match="BusyError: this peer has 5 sessions open here"):
                        answer.result(PATIENCE)
            assert len(server.spans.sessions) == 5
            send(network, server.network.peer, replace(call, length=1), "session 0", 1).result(PATIENCE)


def test_a_server_that_leaves_before_it_has_proved_the_token_is_lost() -> None:
    async def meet(give_up: float) -> None:
        ours, _ = pair()
        if give_up:
            await prove(ours, TOKEN, "client", "server", give_up)
        ours._reader.feed_eof()
        await prove(ours, TOKEN, "client", "server", 60)

    with pytest.raises(PeerLostError, match="the connection ended before the token was proved"):
        asyncio.run(meet(0))
    with pytest.raises(RefusedError, match=r"has not proved the swarm's token in 0\.01 s"):
        asyncio.run(meet(0.01))


def test_what_is_no_proof_is_refused() -> None:
    async def meet() -> None:
        ours, theirs = pair()
        await ours.write([(5).to_bytes(8, "big"), b"noise"])
        await limited(demand_proof(theirs, TOKEN, "server", "client"), "client", 60)

    with pytest.raises(RefusedError, match="sends what is no proof of a token"):
        asyncio.run(meet())
