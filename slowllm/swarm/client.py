"""A client of a swarm: a model whose ends are here and whose blocks are at the servers.

`open_client` opens the ends of a checkpoint, joins the swarm, and puts remote blocks in the place of the blocks. What
it returns is the same handle as a local model's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from slowllm.errors import InputError, MissingBlocksError, PlanError
from slowllm.modeling.cache_labels import LabelSource
from slowllm.modeling.cutting import find_form
from slowllm.modeling.parts import Part
from slowllm.modeling.remote_block import make_remote
from slowllm.modeling.remote_spans import Need, Remote
from slowllm.modeling.soft_prompts import hook_inputs
from slowllm.options import AUTO
from slowllm.planning.budget import Budget
from slowllm.runtime.block_identity import block_hashes, config_hash, ends_hash
from slowllm.runtime.blocks_here import find_blocks_here
from slowllm.runtime.description import ModelInfo
from slowllm.runtime.load import open_model
from slowllm.runtime.memory import budget_of
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.swarm.failover import REPLAYS, Failover, Replay
from slowllm.swarm.hop_table import hop_table
from slowllm.swarm.hops import Hops
from slowllm.swarm.network import DIRECTORY_SECONDS, Network
from slowllm.swarm.own_blocks import OwnBlocks
from slowllm.swarm.patience import Patience, check_seconds, check_share
from slowllm.swarm.quotas import MOST_REQUESTS
from slowllm.swarm.records import ServerRecord, model_key
from slowllm.swarm.routing import Wishes, most_batch_tokens
from slowllm.swarm.shared_token import read_token
from slowllm.swarm.spot_check import SpotCheck
from slowllm.swarm.streams import Limits
from slowllm.swarm.weights import check_pin, parse_weights

log = logging.getLogger(__name__)

L = TypeVar("L", bound=StreamedLM)


@dataclass(frozen=True)
class SwarmOptions:
    """How a client uses a swarm.

    Attributes:
        peers: multiaddresses of peers of the swarm, as `slowllm dht` and `slowllm serve` print them.
        wishes: which servers may be asked.
        timeout: seconds for a call of the model through the blocks of all servers, with all retries and what is rebuilt, and
            as many for the backward pass behind it; then it is given up. So is joining the swarm, if it is less.
        step_timeout: seconds of silence after which a server counts as dead; one that works says so all the while.
        replay: how sessions are rebuilt that a server has lost: ``steps`` by the calls in which they grew, with equal bits;
            ``fast`` in one pass over all positions, which rounds otherwise.
        identity: file of this client's key; None for one that is forgotten.
        token_file: of the swarm's shared secret; None for a swarm that is open to all.
        weights: word for the blocks that servers must have, see `slowllm.swarm.weights`; empty for any.
        spot_check: share of the forward calls that are checked: by a block that is in the client's folder, or at a second
            server.
        patience: how often servers are tried, and how long is waited in between.
    """

    peers: tuple[str, ...]
    wishes: Wishes = field(default_factory=Wishes)
    timeout: float = 600.0
    step_timeout: float = 20.0
    replay: Replay = "steps"
    identity: Path | None = None
    token_file: Path | None = None
    weights: str = ""
    spot_check: float = 0.0
    patience: Patience = field(default_factory=Patience)

    def __post_init__(self) -> None:
        """Check what is given.

        Raises:
            InputError: a field has a value that it cannot have; the message names it.
        """
        check_seconds("timeout", self.timeout)
        check_seconds("step_timeout", self.step_timeout)
        check_share("spot_check", self.spot_check)
        if self.weights != "":
            object.__setattr__(self, "weights", parse_weights(self.weights, "weights"))
        if self.replay not in REPLAYS:
            raise InputError(f"sessions are rebuilt by {' or '.join(REPLAYS)}, not by {self.replay!r}")


def options_of(swarm: str | Sequence[str] | SwarmOptions) -> SwarmOptions:
    """Return the options that a caller means: one multiaddress, several, or all options."""
    if isinstance(swarm, SwarmOptions):
        return swarm
    return SwarmOptions((swarm,) if isinstance(swarm, str) else tuple(swarm))


def open_client(
    kind: type[L],
    path_or_hub_id: str | os.PathLike[str] | ModelInfo,
    options: SwarmOptions,
    **load_options: Any,
) -> L:
    """Open the ends of a checkpoint, and join the swarm that has its blocks; return a handle of class `kind`.

    Args:
        kind: `StreamedLM` or a subclass.
        path_or_hub_id: of a folder with config.json, tokenizer and the shards of embedding, norm and head.
        options: of the swarm.
        load_options: as for `open_model`.
    Raises:
        CheckpointError: the ends are not in the folder.
        UnsupportedError: the model cannot be cut between blocks.
        MissingBlocksError: some blocks are served by nobody.
        NetworkError: the swarm cannot be joined.
    """
    info = (
        path_or_hub_id
        if isinstance(path_or_hub_id, ModelInfo)
        else ModelInfo(path_or_hub_id, load_options.pop("prompt", None))
    )
    num_blocks = int(info.config.get_text_config().num_hidden_layers)
    # As many requests as a server takes of one peer; more wait here, and are not refused there.
    limits = Limits(
        silence_seconds=options.step_timeout, streams_per_peer=MOST_REQUESTS,
        connect_seconds=options.patience.connect_seconds,
    )  # fmt: skip
    token = None if options.token_file is None else read_token(options.token_file)
    network = Network.open(
        identity=options.identity, host_maddrs=(), initial_peers=options.peers, limits=limits, token=token,
        open_seconds=min(options.patience.open_seconds, options.timeout),
    )  # fmt: skip
    log.info("this client is peer %s", network.peer)
    with contextlib.ExitStack() as held:
        held.callback(network.close)
        if load_options.get("dtype", "auto") == "auto":
            load_options["dtype"] = _dtype_of(network, config_key(info.config), num_blocks, options)
        if options.spot_check and not isinstance(load_options.get("ram"), Budget):
            # Shared with the blocks that are computed here, which get what the ends leave.
            load_options["ram"] = budget_of(load_options.get("ram", AUTO))
        lm = open_model(kind, info, part=Part.ends(num_blocks), **load_options)
        held.callback(lm.close)
        own = _own_blocks(lm, info, load_options["ram"]) if options.spot_check else None
        if own is not None:
            held.callback(own.close)
        _connect(lm, network, options, own)
        held.pop_all()
    return lm


def _dtype_of(network: Network, key: str, num_blocks: int, options: SwarmOptions) -> str:
    """Return the dtype in which most servers of a model compute."""
    online = [record for record in _find(network, key, options) if options.wishes.refusal(record) is None]
    if not online:
        raise MissingBlocksError(
            tuple(range(num_blocks)),
            f"nobody who may be asked serves blocks of this model in the swarm of {', '.join(options.peers)}: it is the swarm of "
            "another model, or its servers have not joined yet",
        )
    return Counter(record.dtype for record in online).most_common(1)[0][0]


def _find(network: Network, key: str, options: SwarmOptions) -> list[ServerRecord]:
    return network.find(key, min(DIRECTORY_SECONDS, options.timeout))


def config_key(config: Any) -> str:
    """Return the key under which servers and clients of a model meet: a hash of its config, and its number of blocks.

    A server may have nothing else of the model but its own blocks, so the key has nothing else in it. What the blocks
    are is in their hashes.
    """
    return model_key(config_hash(config)[:32], int(config.get_text_config().num_hidden_layers))


def _own_blocks(lm: StreamedLM, info: ModelInfo, budget: Budget) -> OwnBlocks | None:
    """Return the blocks that are in the folder, if there are any and the budget has room for one."""
    numbers = find_blocks_here(info)
    if not numbers:
        return None
    dtype = str(lm.model.dtype).removeprefix("torch.")
    try:
        return OwnBlocks(info, block_hashes(lm.checkpoint, numbers), budget, dtype)
    except PlanError as error:
        log.warning(
            "spot checks ask second servers, because the budget has no room for a block of one's own: %s",
            error,
        )
        return None


def _connect(lm: StreamedLM, network: Network, options: SwarmOptions, own: OwnBlocks | None) -> None:
    """Put remote blocks into a model that has its ends, and let the handle own the network."""
    key, blocks = config_key(lm.config), lm.layout.blocks
    dtype = str(lm.model.dtype).removeprefix("torch.")
    wishes = replace(options.wishes, dtype=dtype, ends_hash=ends_hash(lm), hashes=_own_hashes(lm))
    if options.weights:
        allowed = [record for record in _find(network, key, options) if wishes.refusal(record) is None]
        wishes = replace(wishes, hashes=check_pin(allowed, wishes.hashes, len(blocks), options.weights))
    hops = Hops(lambda: network.look(key), network.ask, network.soon, len(blocks), wishes, options.patience)
    checked = SpotCheck(hops, options.spot_check, own=own) if options.spot_check else None
    spans = Failover(checked or hops, options.timeout, options.replay, options.patience)
    # Now, so that missing blocks are named before any work.
    hops.route(0, Need(1, 1), deadline=time.monotonic() + options.timeout)
    remote = Remote(
        spans, find_form(lm.model, lm.layout.blocks_name), lm.config.get_text_config(), lm.away, LabelSource()
    )
    for number, block in enumerate(blocks):
        blocks[number] = make_remote(block, number, remote)
    hook_inputs(blocks)

    def leave() -> None:
        if hops.times:
            log.info("%s", hop_table(hops.times, spans.rebuilt))
        if checked is not None:
            log.info("%s", checked)
            checked.close()
        spans.close()
        network.close()

    lm.become_client(hops, leave, most_batch_tokens(hops.records(), len(blocks), wishes))


def _own_hashes(lm: StreamedLM) -> dict[int, str]:
    """Return the hashes of the blocks whose shards are in the client's folder: the swarm must have the same."""
    checkpoint = lm.checkpoint
    return {} if checkpoint.absent else block_hashes(checkpoint, range(len(lm.layout.blocks)))
