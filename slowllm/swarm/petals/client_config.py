"""The fields of Petals' client configuration, each obeyed under slowllm's own name or refused by its name.

`FIELDS` says of every field what it is here; docs/petals.md shows the same. Knows options only; opens nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

from slowllm.errors import InputError
from slowllm.options import parse_dtype
from slowllm.swarm.addresses import is_peer
from slowllm.swarm.client import SwarmOptions
from slowllm.swarm.patience import Patience, ShownRoutes, check_patience
from slowllm.swarm.routing import Wishes

# Of each field: what it is here; and for those that cannot be obeyed, the values that ask for nothing.
FIELDS: dict[str, str] = {
    "initial_peers": "`SwarmOptions.peers`; must be given, because there is no public swarm",
    "daemon_startup_timeout": "`Patience.open_seconds`",
    "connect_timeout": "`Patience.connect_seconds`",
    "request_timeout": "`Patience.request_seconds`; by default as long as the server gives signs of life",
    "update_period": "`Patience.refresh_seconds`",
    "max_retries": "`Patience.max_attempts`, within 10 minutes for a call of the model",
    "min_backoff": "`Patience.min_wait_seconds`, where nobody else has the blocks",
    "max_backoff": "`Patience.max_wait_seconds`",
    "ban_timeout": "`Patience.ban_seconds`",
    "show_route": "`Patience.shown_routes`: `True`, `\"inference\"` or `False`; routes are logged at level INFO",
    "allowed_servers": "`Wishes.allowed`",
    "blocked_servers": "`Wishes.blocked`",
    "tuning_mode": "the same: `None`, `\"ptune\"` or `\"deep_ptune\"`",
    "pre_seq_len": "the same: virtual tokens of a prompt that is tuned",
    "dht_prefix": "refused: servers are found by a hash of the model's config",
    "use_server_to_server": "refused if `True`: every hop goes through the client",
    "active_adapter": "refused: merge the adapter into a checkpoint and serve that",
    "max_pinged": "refused: the latency to a server is measured by the requests to it",
    "ping_timeout": "refused: the latency to a server is measured by the requests to it",
    "use_chunked_forward": "refused if `False`: the head always passes in chunks that fit `ram`",
    "chunked_forward_step": "refused: the head's chunks are cut to fit `ram`",
}  # fmt: skip
_ASKS_FOR_NOTHING: dict[str, tuple[object, ...]] = {
    "dht_prefix": (None,), "use_server_to_server": (None, False), "active_adapter": (None,), "max_pinged": (None,),
    "ping_timeout": (None,), "use_chunked_forward": (None, "auto", True), "chunked_forward_step": (None,),
}  # fmt: skip
# The numbers that `Patience` has under other names.
_PATIENCE = {
    "max_retries": "max_attempts", "ban_timeout": "ban_seconds", "min_backoff": "min_wait_seconds",
    "max_backoff": "max_wait_seconds", "request_timeout": "request_seconds", "connect_timeout": "connect_seconds",
    "update_period": "refresh_seconds", "daemon_startup_timeout": "open_seconds",
}  # fmt: skip
_SHOWN_ROUTES: dict[object, ShownRoutes] = {None: "all", True: "all", "inference": "inference", False: "none"}
TUNING_MODES = (None, "ptune", "deep_ptune")

# Arguments of transformers' from_pretrained that have no meaning here: the values that ask for nothing, and what to do.
_OF_TRANSFORMERS: dict[str, tuple[tuple[object, ...], str]] = {
    "token": ((None, False), "files are read from the local cache; fetch them with `slowllm download --ends`"),
    "use_auth_token": ((None, False), "files are read from the local cache; fetch them with `slowllm download --ends`"),
    "cache_dir": ((None,), "set HF_HUB_CACHE, or give the folder"),
    "trust_remote_code": ((None, False), "only transformers' own classes are used"),
    "device_map": ((None,), "give device="),
    "quantization_config": ((None,), "the blocks are as their servers have them"),
    "load_in_8bit": ((None, False), "the blocks are as their servers have them"),
    "load_in_4bit": ((None, False), "the blocks are as their servers have them"),
}  # fmt: skip
_LOAD_OPTIONS = ("ram", "device", "vram", "keep_resident")


@dataclass(frozen=True)
class ClientConfig:
    """How a client uses a swarm, in Petals' words; see `FIELDS`. None stands for slowllm's own default.

    Raises:
        InputError: a field has a value that is not known, or asks for what cannot be obeyed.
    """

    initial_peers: Sequence[str] = ()
    dht_prefix: str | None = None
    daemon_startup_timeout: float | None = None
    show_route: str | bool | None = None
    allowed_servers: Sequence[object] | None = None
    blocked_servers: Sequence[object] | None = None
    use_server_to_server: bool | None = None
    connect_timeout: float | None = None
    request_timeout: float | None = None
    update_period: float | None = None
    max_retries: int | None = None
    min_backoff: float | None = None
    max_backoff: float | None = None
    ban_timeout: float | None = None
    active_adapter: str | None = None
    max_pinged: int | None = None
    ping_timeout: float | None = None
    pre_seq_len: int = 0
    tuning_mode: str | None = None
    use_chunked_forward: str | bool | None = None
    chunked_forward_step: int | None = None

    def __post_init__(self) -> None:
        for name, values in _ASKS_FOR_NOTHING.items():
            value = getattr(self, name)
            if value not in values:
                raise InputError(
                    f"{name}={value!r} is {FIELDS[name].replace('`', '')}; leave {name} out of the call"
                )
        for name, own in _PATIENCE.items():
            if (number := getattr(self, name)) is not None:
                check_patience(own, number, name)
        if self.show_route not in _SHOWN_ROUTES:
            raise InputError(f"show_route={self.show_route!r} is unknown; use True, 'inference' or False")
        if self.tuning_mode not in TUNING_MODES:
            raise InputError(f"tuning_mode={self.tuning_mode!r} is unknown; use 'ptune' or 'deep_ptune'")
        if self.tuning_mode and self.pre_seq_len < 1:
            raise InputError(
                f"pre_seq_len={self.pre_seq_len} gives no virtual tokens; {self.tuning_mode} needs 1 or more"
            )

    def swarm_options(self) -> SwarmOptions:
        """Return the same in slowllm's words.

        Raises:
            InputError: no peer is given, or a server is named by something else than its peer id.
        """
        peers = (self.initial_peers,) if isinstance(self.initial_peers, str) else tuple(self.initial_peers)
        if not peers:
            raise InputError(
                "initial_peers is missing: there is no public swarm; give the multiaddress that `slowllm dht` or `slowllm serve` "
                "prints"
            )
        wishes = Wishes(
            allowed=None if self.allowed_servers is None else _ids("allowed_servers", self.allowed_servers),
            blocked=_ids("blocked_servers", self.blocked_servers or ()),
        )
        given = {own: getattr(self, name) for name, own in _PATIENCE.items()}
        patience = Patience(
            shown_routes=_SHOWN_ROUTES[self.show_route],
            **cast(dict[str, Any], {name: value for name, value in given.items() if value is not None}),
        )
        return SwarmOptions(peers, wishes, patience=patience)


CLIENT_FIELDS = tuple(field.name for field in fields(ClientConfig))


def _ids(field: str, peers: Sequence[object]) -> frozenset[str]:
    """Return peers' ids as texts; hivemind's own kind of id is written by `to_base58`."""
    given = (peers,) if isinstance(peers, str) else peers
    ids = [str(peer.to_base58()) if hasattr(peer, "to_base58") else str(peer) for peer in given]
    for text in ids:
        if not is_peer(text):
            raise InputError(
                f"{field}: {text!r} is no peer id, and servers are not chosen by their names; copy what stands behind /p2p/ in "
                "the line that the server prints"
            )
    return frozenset(ids)


@dataclass(frozen=True)
class Call:
    """What a call of `from_pretrained` asks for.

    Attributes:
        model: a folder or hub id, with its revision.
        client: how the swarm is used.
        load_options: for `open_client`.
        others: the arguments that the class itself takes.
    """

    model: str
    client: ClientConfig
    load_options: Mapping[str, Any]
    others: Mapping[str, Any]


def read_call(model: Any, arguments: Mapping[str, Any], own: Sequence[str] = ()) -> Call:
    """Sort the arguments of a call of `from_pretrained`.

    Args:
        model: a folder or hub id.
        arguments: by name, a config of `AutoDistributedConfig` among them as `config`.
        own: names that the class itself takes.
    Raises:
        InputError: an argument is unknown, or cannot be obeyed.
    """
    left = dict(arguments)
    others = {name: left.pop(name) for name in own if name in left}
    config = left.pop("config", None)
    client = ClientConfig() if config is None else getattr(config, "client", None)
    if not isinstance(client, ClientConfig):
        raise InputError("config must come from AutoDistributedConfig.from_pretrained, or be left out")
    client = replace(client, **{name: left.pop(name) for name in CLIENT_FIELDS if name in left})
    options = {name: left.pop(name) for name in _LOAD_OPTIONS if name in left}
    dtype = left.pop("torch_dtype", None)
    dtype = left.pop("dtype", dtype)
    if dtype is not None:
        options["dtype"] = parse_dtype(str(dtype).removeprefix("torch."))
    left.pop("low_cpu_mem_usage", None)  # memory is never used twice
    revision = left.pop("revision", None)
    name = str(model)
    if revision is not None and not Path(name).expanduser().is_dir():
        name = f"{name}@{revision}"
    for key, value in left.items():
        values, advice = _OF_TRANSFORMERS.get(key, ((), ""))
        if not advice:
            raise InputError(
                f"from_pretrained takes no {key}; it takes {', '.join(CLIENT_FIELDS)} and {', '.join(own)}"
            )
        if value not in values:
            raise InputError(f"{key}={value!r} has no meaning here: {advice}")
    return Call(name, client, options, others)
