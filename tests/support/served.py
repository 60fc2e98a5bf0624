"""A checkpoint whose blocks are served by several processes, its client and the local model to compare it with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import slowllm
from slowllm.entrypoints.api import LM
from slowllm.modeling.remote_spans import Hop
from slowllm.modeling.soft_prompts import SoftPrompt
from tests.support.families import save_tiny, speaking
from tests.support.parted import OUTSIDE, parted, shard_of
from tests.support.swarm_processes import LOOPBACK, SwarmProcess, SwarmProcesses, serve_arguments

NUM_BLOCKS = 6
# Of different lengths, two of them side by side and the third across both.
SPANS = ((0, 2), (2, 6), (1, 4))
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


@dataclass(frozen=True)
class Served:
    """A checkpoint and the swarm that has its blocks.

    Attributes:
        whole: folder with all shards.
        ends: folder with config, tokenizer, and the shard of what is outside the blocks.
        address: of a peer of the swarm.
        servers: one for each of `SPANS`, in that order.
    """

    whole: Path
    ends: Path
    address: str
    servers: Sequence[SwarmProcess]

    def load(self, **options: Any) -> LM:
        """Open a client, which has only the ends."""
        return slowllm.load(self.ends, **{"swarm": [self.address], "ram": "3GiB", **options})

    def load_local(self, **options: Any) -> LM:
        """Open the same model without a swarm."""
        return slowllm.load(self.whole, **{"ram": "3GiB", "dtype": "float32", **options})


def save_model(folder: Path, family: str = "llama-2", **fields: Any) -> Path:
    """Save a tiny model of six blocks with a tokenizer, a shard for each block and one for the rest."""
    num_blocks = {"n_layer" if family == "bloom" else "num_hidden_layers": NUM_BLOCKS}
    # As many tokens as the tokenizer has.
    save_tiny(family, folder / "plain", vocab_size=4096, **num_blocks, **fields)
    return parted(speaking(folder / "plain", folder / "speaking"), folder / "whole")


def start_served(processes: SwarmProcesses, folder: Path, *options: object) -> Served:
    """Start the servers of a new checkpoint at the same time, each on a folder with only its own shards."""
    whole = save_model(folder)
    meeting = processes.start("-m", "slowllm", "dht", "--host-maddrs", LOOPBACK, "--no-relay")
    arguments = []
    for first, end in SPANS:
        own = parted(whole, folder / f"{first}-{end}", *(shard_of(block) for block in range(first, end)))
        arguments.append(serve_arguments(own, f"{first}:{end}", "--initial-peers", meeting.address, *options))
    servers = processes.start_all(arguments)
    return Served(whole, parted(whole, folder / "ends", OUTSIDE), meeting.address, servers)


def texts() -> tuple[Tensor, Tensor]:
    """Return two rows of ids, the second padded on the left, and their mask."""
    ids = torch.randint(3, 300, (2, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return ids, mask


def deep_prompt(model: Any) -> SoftPrompt:
    """Return a prompt of four vectors for the embedding and for each block, which want gradients."""
    generator = torch.Generator().manual_seed(3)
    size = model.config.hidden_size
    made = [torch.randn(4, size, generator=generator).requires_grad_(True) for _ in range(NUM_BLOCKS + 1)]
    return SoftPrompt("deep", made[0], tuple(made[1:]))


def deep_prompt_grads(model: Any, ids: Tensor, mask: Tensor) -> list[Tensor]:
    """Take a step with a deep prompt before rows of text; return the logits of text and the gradients of all vectors."""
    prompt = deep_prompt(model)
    rows = torch.cat([torch.tensor(prompt.virtual_ids).expand(2, -1), ids], 1)
    whole = torch.cat([torch.ones(2, 4, dtype=torch.int64), mask], 1)
    with prompt.applied(model, rows, whole) as given:
        logits = model(**given, use_cache=False).logits
    logits.logsumexp(-1)[whole.bool()].sum().backward()
    return [logits.detach()[whole.bool()], *(tensor.grad for tensor in prompt.tensors)]


def same(work: Callable[[Any], list[Tensor]], ours: Any, theirs: Any) -> None:
    """Assert that work on two models gives the same bits."""
    pairs = list(zip(work(ours), work(theirs), strict=True))
    for number, (our, their) in enumerate(pairs):
        assert torch.equal(our, their), f"tensor {number} of {work}"


def use_route(lm: LM, *hops: tuple[int, int, str]) -> None:
    """Let a client take this route, as first block, end and peer, for every call from now on."""
    chosen = [Hop(*hop) for hop in hops]
    lm.swarm.route = lambda first, *_, **__: [hop for hop in chosen if hop.first >= first]
