"""The list of a swarm's models has entries that their peers have signed, and nothing else."""

from __future__ import annotations

import time
from typing import Any

import pytest

from slowllm.errors import ProtocolError
from slowllm.swarm.identity import new_identity
from slowllm.swarm.model_list import MAX_ENTRY_BYTES, MAX_MODELS, MODELS, ModelEntry, check_entries
from slowllm.swarm.network import Network

PEER = new_identity().peer
KEY = "0123abcd" * 4 + "-6"


def test_an_entry_comes_back_and_says_how_many_blocks() -> None:
    entry = ModelEntry(PEER, KEY, "llama")
    assert ModelEntry.from_bytes(entry.to_bytes()) == entry
    assert entry.num_blocks == 6


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"model": "models"}, "the impossible model 'models'"),
        ({"model": "0123abcd-0"}, "the impossible model"),
        ({"model": "0123abcd-5000"}, "the impossible model"),
        ({"kind": "\x1b[2J"}, "the impossible kind"),
        ({"kind": ""}, "the impossible kind"),
        ({"peer": None}, "has no peer"),
    ],
)
def test_what_no_server_may_say_is_refused(change: dict[str, Any], why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        ModelEntry(**{"peer": PEER, "model": KEY, "kind": "llama", **change})


@pytest.mark.parametrize(
    ("data", "why"),
    [(b"{}", "the format None, not 1"), (b'{"format":1}', "has no peer"), (b" " * (MAX_ENTRY_BYTES + 1), "more than")],
)  # fmt: skip
def test_damaged_bytes_are_refused(data: bytes, why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        ModelEntry.from_bytes(data)


def test_servers_name_their_models_and_nobody_names_one_for_another() -> None:
    with Network.open() as first, Network.open(initial_peers=first.addresses) as other:
        other.list_model(ModelEntry(other.peer, KEY, "llama"), 60)
        assert [entry.model for entry in first.models()] == [KEY]
        with pytest.raises(AssertionError, match="is not this peer"):
            other.list_model(ModelEntry(PEER, KEY, "llama"), 60)
        # As a stranger would, past the assertion.
        forged = ModelEntry(first.peer, KEY, "llama").to_bytes()
        other._loop.call(lambda: other._directory.put(MODELS, forged, 70, "it"), 30)
        assert first.models() == []


def test_a_list_that_is_too_long_is_cut(caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    entries = [ModelEntry(PEER, f"{n:08x}-2", "llama").to_bytes() for n in range(MAX_MODELS + 5)]
    monkeypatch.setattr("slowllm.swarm.model_list.signer_of", lambda subkey, value, expires: (PEER, value))
    assert len(check_entries([(b"", data, time.time() + 9) for data in entries])) == MAX_MODELS
    assert f"lists {MAX_MODELS + 5} models, of which {MAX_MODELS} are looked at" in caplog.text
