"""Which records of the swarm's directory count: signed by the peer that they speak of, small, and not for ever.

The directory is hivemind's DHT: under one key of a model, each server has one record, whose subkey names the server's
public key, so that only the owner of the private key can write it. Every peer checks what it stores and what it finds.
Knows the form of subkeys and values in bytes; imports nothing of hivemind.
"""

from __future__ import annotations

import logging
import re
import time
from collections import Counter
from collections.abc import Iterable

from slowllm.errors import ProtocolError
from slowllm.swarm.addresses import CLOCK_SECONDS
from slowllm.swarm.identity import peer_of_public_key
from slowllm.swarm.records import MAX_RECORD_BYTES, ServerRecord

logger = logging.getLogger(__name__)
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


class Gate:
    """Lets good records through, counts the others by their fault, and logs each kind of fault once."""

    def __init__(self) -> None:
        self.dropped: Counter[str] = Counter()

    def check(self, model: str, found: Iterable[tuple[object, object, float]]) -> list[ServerRecord]:
        """Return the records that count, in the order of their first blocks.

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
                self.dropped[kind] += 1
                if self.dropped[kind] == 1:
                    logger.warning(
                        "a server's record is left out (%s); more of the kind are only counted", error
                    )
        return sorted(records, key=lambda record: (record.first, record.end, record.peer))


def _record_of(model: str, subkey: object, value: object, expires: float) -> ServerRecord:
    owner = _OWNER.fullmatch(subkey) if isinstance(subkey, bytes) else None
    if owner is None or not isinstance(value, bytes):
        raise ProtocolError("not signed: the subkey names no key, or the value is no record")
    if expires < time.time():
        raise ProtocolError(f"expired: {time.time() - expires:.0f} s ago")
    try:
        signer = peer_of_public_key(owner[1])
    except ValueError as error:
        raise ProtocolError(f"not signed: by a key that can be read ({error})") from error
    try:
        record = ServerRecord.from_bytes(value)
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
