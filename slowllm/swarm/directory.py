"""The swarm's directory: who is announced in it, and which records count: signed by the peer that they speak of, and small.

The directory is hivemind's DHT: under one key of a model, each server has one record, whose subkey names the server's
public key, so that only the owner of the private key can write it. Every peer checks what it stores and what it finds.
Knows the form of subkeys and values in bytes, and how a node is asked.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from slowllm.errors import DirectoryError, NetworkError, ProtocolError
from slowllm.swarm.addresses import CLOCK_SECONDS
from slowllm.swarm.identity import peer_of_public_key
from slowllm.swarm.records import MAX_RECORD_BYTES, ServerRecord

logger = logging.getLogger(__name__)
DIED = "libp2p's process of this peer has ended; open the network again"
MAX_TTL_SECONDS = 3600.0
_OWNER = re.compile(rb"\[owner:(ssh-rsa [A-Za-z0-9+/=]{1,1000})\]")
# msgpack's three forms of a byte string: the first byte, and how many bytes of length follow.
_BINARY_FORMS = {0xC4: 1, 0xC5: 2, 0xC6: 4}


def directory_key(model: str) -> str:
    """Return the DHT's key for the servers of a model."""
    return f"slowllm.1.{model}"


def may_be_stored(subkey: bytes, value: bytes, expires: float) -> bool:
    """Whether a record has the form of a server's record. Its signature is checked elsewhere.

    What has not would be stored for ever, overwrite a whole directory, or end another peer's search with an error.

    Args:
        subkey: in msgpack.
        value: in msgpack, without its signature.
        expires: in seconds of Unix time.
    """
    owner, content = _binary_in(subkey), _binary_in(value)
    return (
        owner is not None
        and _OWNER.fullmatch(owner) is not None
        and content is not None
        and len(content) <= MAX_RECORD_BYTES
        and expires <= time.time() + MAX_TTL_SECONDS + 2 * CLOCK_SECONDS
    )


def directory_validator(signature: Any) -> Any:
    """Return the validator of records: hivemind's signatures, and the form of a server's record."""
    from hivemind.dht.validation import CompositeValidator, RecordValidatorBase

    class OnlyServers(RecordValidatorBase):  # type: ignore[misc]
        def validate(self, record: Any) -> bool:
            return may_be_stored(record.subkey, record.value, record.expiration_time)

    return CompositeValidator([signature, OnlyServers()])


class Directory:
    """What this peer sees of the directory, and says in it. Used on the network's loop.

    Args:
        node: hivemind's DHTNode.
        owner: the subkey under which this peer can write.
        initial: hivemind's ids of the initial peers, by the addresses that were given.
        dropped: where records that are left out are counted, by their fault.
    """

    def __init__(self, node: Any, owner: bytes, initial: Mapping[str, Any], dropped: Counter[str]) -> None:
        self._node, self._owner, self._initial, self._dropped = node, owner, initial, dropped
        self._expires: dict[str, float] = {}

    async def announce(self, record: ServerRecord, ttl: float) -> None:
        """Put a record of this peer in the place of its last one, which it outlives, if only by a millisecond.

        Raises:
            NetworkError: nobody took it or answers at all.
            ProtocolError: the record is too large.
        """
        assert 0 < ttl <= MAX_TTL_SECONDS, f"{ttl} s is no time to live"
        await self._stay_joined()
        await self.put(record.model, record.to_bytes(), ttl, f"the record of {record.label}")

    async def find(self, model: str) -> list[ServerRecord]:
        """Return the records of a model that count, in the order of their first blocks.

        Raises:
            DirectoryError: nobody answers any more.
        """
        return self.check(model, await self.entries(model))

    async def entries(self, name: str) -> list[tuple[object, object, float]]:
        """Return what stands under a name, unchecked: subkeys, values, and when they expire.

        Raises:
            DirectoryError: nobody answers any more.
        """
        await self._stay_joined()
        found = await self._node.get(directory_key(name), latest=True)
        if found is None and self._is_alone():
            # Peers that do not answer are noticed by asking them: an empty answer of nobody is none.
            await self._stay_joined()
            found = await self._node.get(directory_key(name), latest=True)
        if found is None or not isinstance(found.value, dict):
            return []
        return [(owner, item.value, item.expiration_time) for owner, item in found.value.items()]

    async def put(self, name: str, data: bytes, ttl: float, what: str) -> None:
        """Put bytes of this peer under a name, in the place of what it put there before, and which they outlive.

        Args:
            name: under which they are found.
            data: to be stored.
            ttl: in seconds.
            what: this is, for the message of an error.
        Raises:
            NetworkError: nobody took them.
        """
        expires = max(time.time() + ttl, self._expires.get(name, 0.0) + 1e-3)
        key = directory_key(name)
        # Of several peers that were asked, the answer is that of the last one, which may be none.
        if not await self._node.store(key, data, expires, subkey=self._owner) and not await self._holds(
            key, data
        ):
            raise NetworkError(f"no peer of the swarm took {what}; is this machine's clock right?")
        self._expires[name] = expires

    def check(self, model: str, found: Iterable[tuple[object, object, float]]) -> list[ServerRecord]:
        """Return the records that count; count the others by their fault, and log each kind of fault once.

        Args:
            model: key of the model.
            found: subkeys, values, and when they expire.
        """
        records = []
        for subkey, value, expires in found:
            try:
                records.append(_record_of(model, subkey, value, expires))
            except ProtocolError as error:
                kind = str(error).partition(":")[0]
                self._dropped[kind] += 1
                if self._dropped[kind] == 1:
                    logger.warning(
                        "a server's record is left out (%s); more of the kind are only counted", error
                    )
        return sorted(records, key=lambda record: (record.first, record.end, record.peer))

    async def _holds(self, key: str, data: bytes) -> bool:
        """Whether this is what the directory says of this peer."""
        found = await self._node.get(key, latest=True)
        if found is None or not isinstance(found.value, dict):
            return False
        own = found.value.get(self._owner)
        return own is not None and own.value == data

    def _is_alone(self) -> bool:
        return bool(self._initial) and not self._node.protocol.routing_table.uid_to_peer_id

    async def _stay_joined(self) -> None:
        """Join the initial peers again if all peers were lost, which hivemind does not do."""
        if self._node.p2p._child.returncode is not None:  # there is no public way to see it
            raise NetworkError(DIED)
        if self._is_alone() and not any(
            await asyncio.gather(*map(self._node.protocol.call_ping, self._initial.values()))
        ):
            raise DirectoryError(
                f"no peer of the swarm answers any more; it was joined by {', '.join(self._initial)}"
            )


def signer_of(subkey: object, value: object, expires: float) -> tuple[str, bytes]:
    """Return the id of the peer that signed an entry of the directory, and the entry.

    Raises:
        ProtocolError: it is not signed, no bytes, or expired.
    """
    owner = _OWNER.fullmatch(subkey) if isinstance(subkey, bytes) else None
    if owner is None or not isinstance(value, bytes):
        raise ProtocolError("not signed: the subkey names no key, or the value is no record")
    if expires < time.time():
        raise ProtocolError(f"expired: {time.time() - expires:.0f} s ago")
    try:
        return peer_of_public_key(owner[1]), value
    except ValueError as error:
        raise ProtocolError(f"not signed: by a key that can be read ({error})") from error


def _record_of(model: str, subkey: object, value: object, expires: float) -> ServerRecord:
    signer, data = signer_of(subkey, value, expires)
    try:
        record = ServerRecord.from_bytes(data)
    except ProtocolError as error:
        raise ProtocolError(f"malformed: by peer {signer}: {error}") from error
    if record.peer != signer:
        raise ProtocolError(f"forged: peer {signer} signed a record of peer {record.peer}")
    if record.model != model:
        raise ProtocolError(f"of another model: peer {signer} announces {record.model} under {model}")
    return record


def _binary_in(packed: bytes) -> bytes | None:
    """Return the byte string that is all of a msgpack text, None for anything else."""
    width = _BINARY_FORMS.get(packed[0] if packed else 0, 0)
    content = packed[1 + width :]
    if len(packed) <= width:
        return None
    return content if width and int.from_bytes(packed[1 : 1 + width], "big") == len(content) else None
