"""What a server says of itself to the swarm: one `ServerRecord`, and its bounded, validated form of bytes.

Records come from strangers. `ServerRecord.from_bytes` takes nothing that it has not checked; who signed a record is
checked by `slowllm.swarm.network`. Knows no network and no models.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

from slowllm.errors import ProtocolError
from slowllm.options import COMPRESSIONS
from slowllm.swarm.bounded_json import dump_json, load_json

FORMAT = 1
MAX_RECORD_BYTES = 32 << 10
MAX_BLOCKS = 4096
MAX_ADDRESSES = 16
MAX_PINGS = 64

State = Literal["joining", "online", "draining", "offline"]
STATES: tuple[str, ...] = get_args(State)

# Letters that cannot change how a terminal or a log shows what follows them.
_PEER = re.compile(r"[1-9A-HJ-NP-Za-km-z]{16,128}")
_ADDRESS = re.compile(r"(/[\w.:%-]+){2,24}", re.ASCII)
_WORD = re.compile(r"[\w.:+-]{1,128}", re.ASCII)
_MAX_ADDRESS_LETTERS = 256
MAX_NAME_LETTERS = 64
_LARGEST = 1e15


@dataclass(frozen=True)
class ServerRecord:
    """One server of a model, as it announces itself.

    Attributes:
        peer: id of the server, which is the hash of the key that signs the record.
        addresses: multiaddresses at which it can be reached.
        model: key of the model, see `model_key`.
        first: number of the first block that it serves.
        end: number behind the last block that it serves.
        block_hashes: identities of the blocks first to end - 1, or nothing while it is joining.
        state: only ``online`` servers take new work; ``draining`` ones finish what they have.
        dtype: that its blocks compute in, such as ``bfloat16``.
        compression: of the hidden states that it prefers on the wire, see `slowllm.swarm.compression`.
        forward_tokens_per_second: of one large batch, through all of its blocks.
        decode_seconds: for one token of one session through one of its blocks.
        network_requests_per_second: of one token's hidden states that its network would carry.
        cache_tokens_free: tokens of sessions that it has room for.
        cache_tokens: tokens of sessions that it keeps in all; 0 where it does not say.
        max_batch_tokens: tokens of one request, at most.
        max_length: tokens of one sequence, at most, what its session holds included; 0 where it does not say.
        has_backward: whether it computes gradients.
        name: that people gave it; may be empty.
        version: of its slowllm.
        ends_hash: of config and tensors outside the blocks; empty where the server does not have them.
        next_pings: measured milliseconds to other peers, by their ids; it may be empty.
    """

    peer: str
    addresses: tuple[str, ...]
    model: str
    first: int
    end: int
    state: State
    dtype: str
    version: str
    block_hashes: tuple[str, ...] = ()
    compression: str = "none"
    forward_tokens_per_second: float = 0.0
    decode_seconds: float = 0.0
    network_requests_per_second: float = 0.0
    cache_tokens_free: int = 0
    cache_tokens: int = 0
    max_batch_tokens: int = 0
    max_length: int = 0
    has_backward: bool = False
    name: str = ""
    ends_hash: str = ""
    next_pings: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Refuse what no server may say of itself, with the field's name.

        Raises:
            ProtocolError: a field is not what the class says.
        """
        for name, fits in _CHECKS.items():
            if not fits(value := getattr(self, name)):
                raise ProtocolError(f"a server's record has the impossible {name} {str(value)[:80]!r}")
        if self.first >= self.end:
            raise ProtocolError(f"a server's record has the empty span of blocks {self.first}:{self.end}")
        if len(self.block_hashes) not in (0, self.end - self.first):
            raise ProtocolError(
                f"a server's record has {len(self.block_hashes)} hashes for {self.end - self.first} blocks"
            )
        if self.state == "online" and not self.block_hashes:
            raise ProtocolError("a server's record is online but has no hashes of its blocks")

    def hash_of(self, block: int) -> str:
        """Return the identity of a block, by its number in the model, which must be one that the server has."""
        assert self.first <= block < self.end
        return self.block_hashes[block - self.first]

    @property
    def label(self) -> str:
        """The server's name and the end of its id, short enough for a line of a log."""
        return f"{self.name} ({self.peer[-6:]})" if self.name else self.peer[-6:]

    def to_bytes(self) -> bytes:
        """Return the record as JSON.

        Raises:
            ProtocolError: it has more than `MAX_RECORD_BYTES`.
        """
        fields = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        return dump_json({"format": FORMAT, **fields}, "the server's record", MAX_RECORD_BYTES)

    @classmethod
    def from_bytes(cls, data: bytes) -> ServerRecord:
        """Return the record that `to_bytes` gave. Fields that this version does not know are left out.

        Raises:
            ProtocolError: it is too large, damaged, or of a newer format; the message names the field.
        """
        said = load_json(data, "a server's record", MAX_RECORD_BYTES)
        if said.get("format") != FORMAT:
            raise ProtocolError(
                f"a server's record has the format {str(said.get('format'))[:20]}, not {FORMAT}"
            )
        known: dict[str, Any] = {}
        for entry in dataclasses.fields(cls):
            if entry.name not in said:
                raise ProtocolError(f"a server's record has no {entry.name}")
            value = said[entry.name]
            known[entry.name] = tuple(value) if isinstance(value, list) else value
        return cls(**known)


def model_key(ends_hash: str, num_blocks: int) -> str:
    """Return the key under which the servers of a model find each other.

    Args:
        ends_hash: of the config and the tensors outside of the blocks.
        num_blocks: of the whole model.
    """
    key = f"{ends_hash}-{num_blocks}"
    assert _WORD.fullmatch(key), f"{key!r} is no word"
    return key


def _matches(pattern: re.Pattern[str], most: int = 128) -> Callable[[object], bool]:
    return lambda value: (
        isinstance(value, str) and len(value) <= most and pattern.fullmatch(value) is not None
    )


def _all_in(fits: Callable[[object], bool], most: int) -> Callable[[object], bool]:
    return lambda value: isinstance(value, tuple) and len(value) <= most and all(map(fits, value))


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST


def _is_rate(value: object) -> bool:
    return (
        type(value) in (int, float)
        and 0 <= cast(float, value) <= _LARGEST
        and math.isfinite(cast(float, value))
    )


def is_name(value: object) -> bool:
    """Whether people may call a server so: `MAX_NAME_LETTERS` letters at most, which do nothing to a terminal."""
    return isinstance(value, str) and len(value) <= MAX_NAME_LETTERS and value.isprintable()


def _are_pings(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) <= MAX_PINGS
        and all(_CHECKS["peer"](peer) and _is_rate(ping) for peer, ping in value.items())
    )


_CHECKS: Mapping[str, Callable[[object], bool]] = {
    "peer": _matches(_PEER),
    "addresses": _all_in(_matches(_ADDRESS, _MAX_ADDRESS_LETTERS), MAX_ADDRESSES),
    "model": _matches(_WORD),
    "first": lambda value: _is_count(value) and cast(int, value) < MAX_BLOCKS,
    "end": lambda value: _is_count(value) and cast(int, value) <= MAX_BLOCKS,
    "block_hashes": _all_in(_matches(_WORD), MAX_BLOCKS),
    "state": lambda value: isinstance(value, str) and value in STATES,
    "dtype": _matches(_WORD),
    "compression": lambda value: isinstance(value, str) and value in COMPRESSIONS,
    "forward_tokens_per_second": _is_rate,
    "decode_seconds": _is_rate,
    "network_requests_per_second": _is_rate,
    "cache_tokens_free": _is_count,
    "cache_tokens": _is_count,
    "max_batch_tokens": _is_count,
    "max_length": _is_count,
    "has_backward": lambda value: isinstance(value, bool),
    "name": is_name,
    "version": _matches(_WORD),
    "ends_hash": lambda value: value == "" or _matches(_WORD)(value),
    "next_pings": _are_pings,
}
