"""Servers in processes of their own are killed or frozen in the middle of the work, and the results have the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList

import slowllm
from slowllm.swarm.client import SwarmOptions
from tests.support.served import GREEDY, NUM_BLOCKS, Served, serve_arguments, texts
from tests.support.swarm_processes import SwarmProcess, SwarmProcesses

HALF = NUM_BLOCKS // 2


class Replicas:
    """Two servers for each half of a model's blocks, and a client that gives up a silent server after two seconds."""

    def __init__(self, swarm: SwarmProcesses, served: Served) -> None:
        spans = (f"0:{HALF}", f"{HALF}:{NUM_BLOCKS}")
        # Longer than the test takes: sessions must move.
        drain = ("--drain", "600")
        first = swarm.start(*serve_arguments(served.whole, spans[0], *drain))
        others = [
            serve_arguments(served.whole, span, "--initial-peers", first.address, *drain)
            for span in (*spans, spans[1])
        ]
        started = [first, *swarm.start_all(others)]
        self.by_peer = {process.address.rpartition("/")[2]: process for process in started}
        options = SwarmOptions((first.address, started[1].address), timeout=60.0, step_timeout=2.0)
        self.lm = slowllm.load(served.ends, swarm=options)

    def used(self) -> SwarmProcess:
        """Return a server of the second half that was asked already."""
        peers = [peer for peer in self.lm.swarm.times if peer in self.by_peer]
        spans = {record.peer: record.first for record in self.lm.swarm.records()}
        return self.by_peer[next(peer for peer in peers if spans[peer] == HALF)]


@pytest.fixture
def replicas(swarm: SwarmProcesses, served: Served) -> Iterator[Replicas]:
    replicas = Replicas(swarm, served)
    with replicas.lm:
        yield replicas


def at_step(number: int, do: Callable[[], object]) -> LogitsProcessorList:
    """Return a logits processor that does something once, before a token is chosen."""
    count = iter(range(1 << 30))

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        if next(count) == number:
            do()
        return scores

    return LogitsProcessorList([process])


@pytest.mark.parametrize(
    ("what", "settings"),
    [
        ("kill", {"num_beams": 4}),
        pytest.param("leave", {"num_beams": 4}, marks=pytest.mark.long),
        pytest.param("kill", {}, marks=pytest.mark.long),
        pytest.param("freeze", {}, marks=pytest.mark.long),
        pytest.param("freeze", {"num_beams": 4}, marks=pytest.mark.long),
    ],
)
def test_a_generation_outlives_a_server(
    what: str, settings: dict[str, Any], replicas: Replicas, local: slowllm.StreamedLM
) -> None:
    ids, mask = texts()
    given = {"attention_mask": mask, **GREEDY, **settings}

    harmed: list[SwarmProcess] = []

    def do_harm() -> None:
        harmed.append(replicas.used())
        getattr(harmed[0], what)()

    harm = at_step(3, do_harm)
    with torch.no_grad():
        ours = replicas.lm.model.generate(ids, logits_processor=harm, **given)
        assert torch.equal(ours, local.model.generate(ids, **given))
    if what == "leave":
        assert harmed[0].wait().returncode == 0


@pytest.mark.long
def test_a_gradient_outlives_a_server(replicas: Replicas, local: slowllm.StreamedLM) -> None:
    ids, _ = texts()
    grads = []
    for lm in (replicas.lm, local):
        embeddings = lm.model.get_input_embeddings()(ids).detach().requires_grad_(True)
        loss = lm.model(inputs_embeds=embeddings, labels=ids, use_cache=False).loss
        if lm is replicas.lm:
            replicas.used().kill()
        loss.backward()
        grads.append(embeddings.grad)
    assert torch.equal(*grads)
