"""A swarm's shared secret: read from a private file, proved at the begin of each stream, and never sent.

Both sides prove it. The client says a fresh nonce; the server answers with one of its own and a proof over both peers and
both nonces; the client checks it, and sends its proof with its first request. So each proof holds for one stream of one pair
of peers, and one that was overheard is worth nothing anywhere else. libp2p has proved both ids by then.

Knows streams and messages; knows no network and no requests.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
from pathlib import Path
from typing import Any

from slowllm.errors import InputError, PeerLostError, ProtocolError, RefusedError
from slowllm.files import read_secret
from slowllm.swarm.messages import body_bytes, decode, encode
from slowllm.swarm.streams import Stream

MIN_TOKEN_BYTES, MAX_TOKEN_BYTES = 16, 4096
# What is said before the first request; a request that is longer is not read.
HELLO_BYTES = 4096
_NONCE_BYTES = 32
# Who asks gets a proof to guess at, so each guess at a word that people made up must be dear: a tenth of a second, 64 MiB.
_SCRYPT = {"n": 1 << 16, "r": 8, "p": 1, "maxmem": 128 << 20, "dklen": 32}
_SALT = b"slowllm swarm token 1"
WITHOUT = "this swarm asks for a token; give its file with --token-file"


class SharedToken:
    """A secret that all peers of a swarm know.

    Args:
        secret: at least `MIN_TOKEN_BYTES`.
    """

    def __init__(self, secret: bytes) -> None:
        assert len(secret) >= MIN_TOKEN_BYTES, "the secret is too short"
        self._key = hashlib.scrypt(secret, salt=_SALT, **_SCRYPT)

    def proof(self, *parts: str | bytes) -> bytes:
        """Return what only those can tell who know the secret, about some parts in their order."""
        data = [part.encode() if isinstance(part, str) else part for part in parts]
        # Lengths, so that no two lists of parts are one text.
        text = b"".join(len(part).to_bytes(8, "big") + part for part in data)
        return hmac.digest(self._key, text, "sha256")

    def is_proof(self, given: object, *parts: str | bytes) -> bool:
        """Whether this is the proof about these parts, as bytes or in hexadecimal; takes as long for all wrong ones."""
        if isinstance(given, str):
            try:
                given = bytes.fromhex(given)
            except ValueError:
                return False
        return isinstance(given, bytes) and hmac.compare_digest(given, self.proof(*parts))


def read_token(path: Path) -> SharedToken:
    """Return the token of a file, whose white space at the end does not count.

    Raises:
        InputError: it cannot be read, others than its owner may read it, or it is too short or too long.
    """
    make = f"make one with `head -c 32 /dev/urandom | base64 > {path.name}` and `chmod 600 {path.name}`"
    secret = read_secret(path, MAX_TOKEN_BYTES, make).rstrip()
    if not MIN_TOKEN_BYTES <= len(secret) <= MAX_TOKEN_BYTES:
        raise InputError(
            f"{path}: a token has {MIN_TOKEN_BYTES} to {MAX_TOKEN_BYTES:,} bytes, not {len(secret):,}; {make}"
        )
    return SharedToken(secret)


async def prove_to_server(stream: Stream, token: SharedToken, own: str, peer: str) -> None:
    """Prove the token to a server at the begin of a stream, after it has proved it.

    Args:
        stream: of which nothing was used yet.
        token: of the swarm.
        own: id of this peer.
        peer: id of the server.
    Raises:
        RefusedError: the server does not prove the token.
        EOFError: the stream ended.
        OSError: the connection is lost.
    """
    nonce = secrets.token_hex(_NONCE_BYTES)
    await stream.write(encode({"hello": nonce}))
    said = await _read(stream, peer)
    theirs = said.get("nonce")
    if "error" in said or not isinstance(theirs, str):
        raise RefusedError(
            peer, "asks for no token, so it is not of this swarm; leave out --token-file to use it"
        )
    if not token.is_proof(said.get("proof"), "server", peer, own, nonce, theirs):
        raise RefusedError(peer, "has another token than that of --token-file, so it is of another swarm")
    await stream.write(encode({"proof": token.proof("client", own, peer, theirs, nonce).hex()}))


async def demand_proof(stream: Stream, token: SharedToken, own: str, peer: str) -> None:
    """Demand the token's proof of a client at the begin of a stream, and prove it.

    Args:
        stream: of which nothing was used yet.
        token: of the swarm.
        own: id of this peer.
        peer: id of the client.
    Raises:
        RefusedError: the client does not prove the token.
        ProtocolError: what it says is no message.
        EOFError: the stream ended.
        OSError: the connection is lost.
    """
    hello = (await _read(stream, peer)).get("hello")
    if not isinstance(hello, str) or len(hello) != 2 * _NONCE_BYTES:
        raise RefusedError(peer, WITHOUT)
    nonce = secrets.token_hex(_NONCE_BYTES)
    proof = token.proof("server", own, peer, hello, nonce).hex()
    await stream.write(encode({"nonce": nonce, "proof": proof}))
    said = await _read(stream, peer)
    if not token.is_proof(said.get("proof"), "client", peer, own, nonce, hello):
        raise RefusedError(peer, "the token was not proved; is the --token-file that of this swarm?")


async def prove(stream: Stream, token: SharedToken, own: str, peer: str, seconds: float) -> None:
    """Prove the token to a server as `prove_to_server` does, in so many seconds; close the stream where that fails.

    Raises:
        RefusedError: the server does not prove the token, or not in time.
        PeerLostError: the connection ended.
    """
    try:
        await limited(prove_to_server(stream, token, own, peer), peer, seconds)
    except (EOFError, OSError) as error:
        stream.close()
        raise PeerLostError(peer, "the connection ended before the token was proved") from error
    except BaseException:
        stream.close()
        raise


async def _read(stream: Stream, peer: str) -> dict[str, Any]:
    """Return the next message's meta; one that is too long to be of the proof is a request without one."""
    length = 0
    while not length:  # beats
        length = body_bytes(await stream.read_prefix(), 1 << 62)
    if length > HELLO_BYTES:
        raise RefusedError(peer, WITHOUT)
    said, _ = decode(await stream.read_body(length), max_bytes=HELLO_BYTES)
    return said


async def limited(work: Any, peer: str, seconds: float) -> None:
    """Await a proof, at most so long.

    Raises:
        RefusedError: the time is over, or what came is no message of a proof.
    """
    try:
        async with asyncio.timeout(seconds):
            await work
    except TimeoutError:
        raise RefusedError(peer, f"has not proved the swarm's token in {seconds:g} s") from None
    except ProtocolError as error:
        raise RefusedError(peer, f"sends what is no proof of a token ({error})") from error
