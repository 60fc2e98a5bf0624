"""A client of a swarm: a model whose ends are here and whose blocks are at the servers.

`open_client` opens the ends of a checkpoint, joins the swarm, and puts remote blocks in the place of the blocks. What
it returns is the same handle as a local model's.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from slowllm.errors import InputError, MissingBlocksError
from slowllm.modeling.cache_labels import LabelSource
from slowllm.modeling.cutting import find_form
from slowllm.modeling.parts import Part
from slowllm.modeling.remote_block import Hop, Remote, make_remote
from slowllm.modeling.soft_prompts import hook_inputs
from slowllm.runtime.description import ModelInfo
from slowllm.runtime.load import open_model
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.swarm.hops import Hops
from slowllm.swarm.network import Network
from slowllm.swarm.records import ServerRecord, model_key

log = logging.getLogger(__name__)

L = TypeVar("L", bound=StreamedLM)

# Fields of a config that say where it came from or how it is computed, not what the model is.
_NOT_OF_THE_MODEL = {
    "dtype",
    "torch_dtype",
    "_name_or_path",
    "transformers_version",
    "use_cache",
    "quantization_config",
}


@dataclass(frozen=True)
class SwarmOptions:
    """How a client uses a swarm.

    Attributes:
        peers: multiaddresses of peers of the swarm, as `slowllm dht` and `slowllm serve` print them.
        allowed: ids of the only servers that may be asked; empty for all.
        blocked: ids of servers that are not asked.
        timeout: seconds for one answer; None to wait as long as a server gives signs of life.
        identity: file of this client's key; None for one that is forgotten.
    """

    peers: tuple[str, ...]
    allowed: frozenset[str] = frozenset()
    blocked: frozenset[str] = frozenset()
    timeout: float | None = None
    identity: Path | None = None


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
    network = Network.open(identity=options.identity, host_maddrs=(), initial_peers=options.peers)
    try:
        records = _servers_of(network, config_key(info.config), num_blocks, options)
        if load_options.get("dtype", "auto") == "auto":
            load_options["dtype"] = records[0].dtype
        lm = open_model(kind, info, part=Part.ends(num_blocks), **load_options)
        try:
            _connect(lm, network, records, options)
        except BaseException:
            lm.close()
            raise
    except BaseException:
        network.close()
        raise
    return lm


def config_key(config: Any) -> str:
    """Return the key under which servers and clients of a model meet: a hash of its config, and its number of blocks.

    A server may have nothing else of the model but its own blocks, so the key has nothing else in it. What the blocks
    are is in their hashes.
    """
    table = {name: value for name, value in config.to_dict().items() if name not in _NOT_OF_THE_MODEL}
    digest = hashlib.sha256(json.dumps(table, sort_keys=True, default=str).encode()).hexdigest()
    return model_key(digest[:32], int(config.get_text_config().num_hidden_layers))


def _servers_of(network: Network, key: str, num_blocks: int, options: SwarmOptions) -> list[ServerRecord]:
    """Return the servers of a model that may be asked."""
    records = [
        record
        for record in network.find(key)
        if record.peer not in options.blocked and (not options.allowed or record.peer in options.allowed)
    ]
    if not any(record.state == "online" for record in records):
        raise MissingBlocksError(
            tuple(range(num_blocks)),
            f"nobody in the swarm of {', '.join(options.peers)} serves blocks of this model (config {key}); it may be a swarm of "
            "another model, or its servers have not joined yet",
        )
    return records


def _connect(lm: StreamedLM, network: Network, records: list[ServerRecord], options: SwarmOptions) -> None:
    """Put remote blocks into a model that has its ends, and let the handle own the network."""
    online = [record for record in records if record.state == "online"]
    dtype = str(lm.model.dtype).removeprefix("torch.")
    if other := next((record for record in online if record.dtype != dtype), None):
        raise InputError(
            f"this client computes in {dtype}, but {other.label} of the swarm in {other.dtype}; load with dtype={other.dtype!r}"
        )
    key, num_blocks = config_key(lm.config), len(lm.layout.blocks)

    def choose(
        found: Sequence[ServerRecord], first: int, num_tokens: int, *, keeps_cache: bool, number: int
    ) -> list[Hop]:
        return choose_route(found, first, num_blocks, options, keeps_cache=keeps_cache, number=number)

    hops = Hops(lambda: network.find(key), network.ask, choose, options.timeout)
    hops.route(0, 1, keeps_cache=True)  # now, so that missing blocks are named before any work
    blocks = lm.layout.blocks
    form = find_form(lm.model, lm.layout.blocks_name)
    remote = Remote(hops, form, lm.config.get_text_config(), lm.away, LabelSource())
    for block_number, block in enumerate(blocks):
        blocks[block_number] = make_remote(block, block_number, remote)
    hook_inputs(blocks)
    lm.become_client(hops, network.close, min(record.max_batch_tokens for record in online))
