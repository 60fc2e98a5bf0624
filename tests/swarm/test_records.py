"""A server's record comes back as it was, and what no server may say is refused with the field's name."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slowllm.errors import ProtocolError
from slowllm.options import COMPRESSIONS
from slowllm.swarm.records import MAX_RECORD_BYTES, STATES, ServerRecord, model_key
from tests.support.properties import num_examples

PEER = "QmbFTxrLH22v1EbhBqqeZSgDdQFCUVdXjQnrCvvGUVTJqn"
RECORD = ServerRecord(
    peer=PEER,
    addresses=("/ip4/127.0.0.1/tcp/4001/p2p/" + PEER, "/dns4/a.example/tcp/1/p2p/X/p2p-circuit"),
    model=model_key("ab12", 70),
    first=3,
    end=5,
    state="online",
    dtype="bfloat16",
    version="0.3.0",
    block_hashes=("int8:aa", "bb"),
    compression="int8",
    forward_tokens_per_second=1500.5,
    decode_seconds=0.002,
    network_requests_per_second=800,
    cache_tokens_free=4096,
    cache_tokens=8192,
    max_batch_tokens=512,
    max_length=2048,
    has_backward=True,
    name="Zoë's desk",
    next_pings={PEER: 12.5},
)

WORDS = st.text("abz019_.:+-", min_size=1, max_size=40)
PEERS = st.text("abcXYZ123", min_size=16, max_size=60)
RATES = st.floats(0, 1e15)


@st.composite
def any_record(draw: st.DrawFn) -> ServerRecord:
    """Return any record that is allowed."""
    first = draw(st.integers(0, 100))
    end = draw(st.integers(first + 1, first + 5))
    hashes = draw(st.lists(WORDS, min_size=end - first, max_size=end - first))
    state: Any = draw(st.sampled_from(STATES))
    return ServerRecord(
        peer=draw(PEERS), addresses=tuple(draw(st.lists(st.just("/ip4/1.2.3.4/tcp/5"), max_size=3))), model=draw(WORDS),
        first=first, end=end, state=state, dtype=draw(WORDS), version=draw(WORDS),
        block_hashes=() if state == "joining" else tuple(hashes), compression=draw(st.sampled_from(COMPRESSIONS)),
        forward_tokens_per_second=draw(RATES), decode_seconds=draw(RATES), network_requests_per_second=draw(RATES),
        cache_tokens_free=draw(st.integers(0, 1 << 40)), max_batch_tokens=draw(st.integers(0, 1 << 40)),
        cache_tokens=draw(st.integers(0, 1 << 40)), max_length=draw(st.integers(0, 1 << 40)),
        has_backward=draw(st.booleans()), name=draw(st.text(st.characters(exclude_categories=["C", "Z"]), max_size=64)),
        next_pings=draw(st.dictionaries(PEERS, RATES, max_size=5)),
    )  # fmt: skip


@given(any_record())
def test_a_record_comes_back_as_it_was(record: ServerRecord) -> None:
    assert ServerRecord.from_bytes(record.to_bytes()) == record


def test_fields_of_newer_versions_are_left_out() -> None:
    said = json.loads(RECORD.to_bytes())
    assert ServerRecord.from_bytes(json.dumps({**said, "colour": "blue"}).encode()) == RECORD


def test_a_record_knows_its_blocks_and_can_be_kept_in_a_set() -> None:
    assert RECORD.hash_of(3) == "int8:aa"
    assert RECORD.hash_of(4) == "bb"
    assert len({RECORD, dataclasses.replace(RECORD, state="draining"), RECORD}) == 2
    assert RECORD.label == f"Zoë's desk ({PEER[-6:]})"
    assert dataclasses.replace(RECORD, name="").label == PEER[-6:]


@given(
    st.binary(max_size=200)
    | st.dictionaries(
        st.sampled_from([*json.loads(RECORD.to_bytes())]),
        st.integers() | st.text() | st.none() | st.lists(st.integers() | st.text()),
    ).map(lambda change: json.dumps({**json.loads(RECORD.to_bytes()), **change}).encode())
)
@num_examples(300)
def test_whatever_arrives_is_a_record_or_a_protocol_error(data: bytes) -> None:
    try:
        record = ServerRecord.from_bytes(data)
    except ProtocolError:
        return
    assert ServerRecord.from_bytes(record.to_bytes()) == record


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": 2}, "has the format 2, not 1"),
        ({"peer": "short"}, "impossible peer 'short'"),
        ({"peer": "0OIl" * 8}, "impossible peer"),
        ({"addresses": ["hello"]}, "impossible addresses"),
        ({"addresses": ["/ip4/1.2.3.4/tcp/1\x1b[2J"]}, "impossible addresses"),
        ({"addresses": ["/ip4/1.2.3.4/tcp/1"] * 17}, "impossible addresses"),
        ({"addresses": "/ip4/1.2.3.4/tcp/1"}, "impossible addresses"),
        ({"model": ""}, "impossible model"),
        ({"first": -1}, "impossible first '-1'"),
        ({"first": True}, "impossible first 'True'"),
        ({"end": 5000}, "impossible end '5000'"),
        ({"first": 5}, "empty span of blocks 5:5"),
        ({"block_hashes": ["a"]}, "has 1 hashes for 2 blocks"),
        ({"block_hashes": []}, "is online but has no hashes"),
        ({"block_hashes": ["a", 5]}, "impossible block_hashes"),
        ({"state": "asleep"}, "impossible state 'asleep'"),
        ({"state": ["online"]}, "impossible state"),
        ({"dtype": "b f"}, "impossible dtype"),
        ({"compression": "zip"}, "impossible compression 'zip'"),
        ({"forward_tokens_per_second": -1.0}, "impossible forward_tokens_per_second"),
        ({"decode_seconds": "1"}, "impossible decode_seconds"),
        ({"network_requests_per_second": 1e16}, "impossible network_requests_per_second"),
        ({"cache_tokens_free": 1.5}, "impossible cache_tokens_free '1.5'"),
        ({"max_length": -1}, "impossible max_length '-1'"),
        ({"max_batch_tokens": None}, "impossible max_batch_tokens"),
        ({"has_backward": 1}, "impossible has_backward"),
        ({"name": "a\x1b[2J"}, "impossible name"),
        ({"name": "n" * 65}, "impossible name"),
        ({"version": "a b"}, "impossible version"),
        ({"next_pings": {"x": 1.0}}, "impossible next_pings"),
        ({"next_pings": []}, "impossible next_pings"),
    ],
)
def test_what_no_server_may_say_is_named(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ProtocolError, match=match):
        ServerRecord.from_bytes(json.dumps({**json.loads(RECORD.to_bytes()), **change}).encode())


def test_a_field_that_is_missing_is_named() -> None:
    said = json.loads(RECORD.to_bytes())
    del said["dtype"]
    with pytest.raises(ProtocolError, match="a server's record has no dtype"):
        ServerRecord.from_bytes(json.dumps(said).encode())


def test_a_record_that_is_too_large_is_neither_written_nor_read() -> None:
    large = dataclasses.replace(RECORD, end=603, block_hashes=tuple(["h" * 64] * 600))
    with pytest.raises(
        ProtocolError, match=r"the server's record has 4\d,\d{3} bytes of JSON, more than the 32,768"
    ):
        large.to_bytes()
    with pytest.raises(ProtocolError, match="a server's record has 32,769 bytes of JSON"):
        ServerRecord.from_bytes(b" " * (MAX_RECORD_BYTES + 1))
