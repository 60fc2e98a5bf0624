"""Every field of Petals' client is obeyed or refused by its name, and the document says which."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from slowllm.errors import InputError
from slowllm.runtime.block_identity import config_hash
from slowllm.swarm.petals import (
    AutoDistributedConfig,
    AutoDistributedModelForCausalLM,
    AutoDistributedSpeculativeModel,
    ClientConfig,
    DistributedBloomConfig,
    DistributedLlamaConfig,
    DistributedLlamaForCausalLM,
)
from slowllm.swarm.petals.client_config import CLIENT_FIELDS, FIELDS, read_call
from tests.support.paths import ROOT, TINY_BLOOM

PEER = "/ip4/127.0.0.1/tcp/9/p2p/QmbFTxrLH22v1EbhBqqeZSgDdQFCUVdXjQnrCvvGUVTJqn"
ID = PEER.rpartition("/")[2]


class PeerID:
    """Stands for hivemind's, which is written by this method."""

    def to_base58(self) -> str:
        return ID


def test_fields_are_obeyed_under_slowllms_names() -> None:
    options = ClientConfig(
        initial_peers=[PEER], allowed_servers=[PeerID()], blocked_servers=ID, max_retries=3, min_backoff=0.5, max_backoff=9,
        ban_timeout=7, request_timeout=11, connect_timeout=4, update_period=30, daemon_startup_timeout=20,
        show_route="inference",
    ).swarm_options()  # fmt: skip
    patience = options.patience
    assert options.peers == (PEER,)
    assert options.wishes.allowed == {ID}
    assert options.wishes.blocked == {ID}
    assert (patience.max_attempts, patience.ban_seconds, patience.request_seconds) == (3, 7, 11)
    assert (patience.min_wait_seconds, patience.max_wait_seconds) == (0.5, 9)
    assert (patience.connect_seconds, patience.refresh_seconds, patience.open_seconds) == (4, 30, 20)
    assert patience.shown_routes == "inference"
    assert [patience.wait_seconds(n) for n in (0, 1, 2, 9, 10_000)] == [0.5, 1, 2, 9, 9]
    assert ClientConfig(initial_peers=PEER).swarm_options().wishes.allowed is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dht_prefix", "bloom-petals"), ("use_server_to_server", True), ("active_adapter", "repo/lora"), ("max_pinged", 3),
        ("ping_timeout", 2.0), ("use_chunked_forward", False), ("chunked_forward_step", 16384),
    ],
)  # fmt: skip
def test_what_cannot_be_obeyed_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"^{field}={value!r} is refused.*leave {field} out of the call"):
        ClientConfig(**{field: value})


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"show_route": "always"}, "show_route='always' is unknown"),
        ({"tuning_mode": "lora", "pre_seq_len": 3}, "tuning_mode='lora' is unknown"),
        ({"tuning_mode": "ptune"}, "pre_seq_len=0 gives no virtual tokens"),
    ],
)
def test_values_that_are_not_known_are_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        ClientConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, "initial_peers is missing: there is no public swarm"),
        (
            {"initial_peers": [PEER], "max_retries": 0},
            "max_retries=0 is no number of attempts; give 1 or more",
        ),
        ({"initial_peers": [PEER], "max_retries": "x"}, "max_retries='x' is no number of attempts"),
        (
            {"initial_peers": [PEER], "request_timeout": 0},
            "request_timeout=0 is no time .* more than 0 .* or math.inf",
        ),
        ({"initial_peers": [PEER], "ban_timeout": -1}, "ban_timeout=-1 is no time .* from 0 and up"),
        ({"initial_peers": [PEER], "min_backoff": math.nan}, "min_backoff=nan is no time"),
        (
            {"initial_peers": [PEER], "allowed_servers": ["desk"]},
            "allowed_servers: 'desk' is no peer id, and servers",
        ),
        ({"initial_peers": [PEER], "blocked_servers": [ID[:-1]]}, "blocked_servers: .* is no peer id"),
    ],
)
def test_a_swarm_is_not_joined_with_wrong_numbers(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        AutoDistributedModelForCausalLM.from_pretrained(TINY_BLOOM, **fields)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"initial_peer": PEER}, "from_pretrained takes no initial_peer; it takes initial_peers"),
        (
            {"load_in_8bit": True},
            "load_in_8bit=True has no meaning here: the blocks are as their servers have them",
        ),
        ({"trust_remote_code": True}, "trust_remote_code=True has no meaning here"),
        ({"torch_dtype": torch.int8}, "dtype 'int8' is unknown"),
        ({"config": object()}, "config must come from AutoDistributedConfig.from_pretrained"),
    ],
)
def test_arguments_of_from_pretrained_are_known_or_refused(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        read_call("m", arguments)


def test_arguments_of_from_pretrained_are_sorted() -> None:
    call = read_call(
        "repo/name",
        {
            "torch_dtype": torch.float32, "low_cpu_mem_usage": True, "revision": "v1", "ram": "8GiB", "num_labels": 3,
            "initial_peers": [PEER], "token": None, "max_retries": 2,
        },
        ("num_labels",),
    )  # fmt: skip
    assert call.model == "repo/name@v1"
    assert call.load_options == {"ram": "8GiB", "dtype": "float32"}
    assert call.others == {"num_labels": 3}
    assert (call.client.initial_peers, call.client.max_retries) == ([PEER], 2)


def test_a_config_carries_the_clients_fields_and_no_hash_knows_of_them() -> None:
    config = AutoDistributedConfig.from_pretrained(
        TINY_BLOOM, initial_peers=[PEER], pre_seq_len=4, tuning_mode="ptune"
    )
    plain = DistributedBloomConfig.from_pretrained(TINY_BLOOM)
    assert isinstance(config, DistributedBloomConfig)
    assert (config.initial_peers, config.pre_seq_len, config.tuning_mode) == ([PEER], 4, "ptune")
    assert config.num_hidden_layers == plain.num_hidden_layers
    config.max_retries = 5
    assert config.client.max_retries == 5
    assert config_hash(config) == config_hash(plain)
    assert "_client" not in config.to_json_string()
    assert read_call("m", {"config": config, "pre_seq_len": 9}).client == ClientConfig(
        initial_peers=[PEER], pre_seq_len=9, tuning_mode="ptune", max_retries=5
    )
    with pytest.raises(AttributeError, match="has no attribute 'max_retrys'"):
        config.max_retrys  # noqa: B018


def test_a_class_of_another_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="DistributedLlamaConfig is for models of type llama, but this one is of type bloom"
    ):
        DistributedLlamaConfig.from_pretrained(TINY_BLOOM)
    with pytest.raises(InputError, match="DistributedLlamaForCausalLM is for models of type llama"):
        DistributedLlamaForCausalLM.from_pretrained(TINY_BLOOM, initial_peers=[PEER])
    with pytest.raises(InputError, match="small_model is missing"):
        AutoDistributedSpeculativeModel.from_pretrained(TINY_BLOOM, initial_peers=[PEER])


def test_the_document_has_every_field_with_these_words() -> None:
    document = (ROOT / "docs" / "petals.md").read_text()
    assert set(FIELDS) == set(CLIENT_FIELDS)
    for name, words in FIELDS.items():
        assert f"| `{name}` | {words} |" in document, name
