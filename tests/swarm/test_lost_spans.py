"""All servers of a span are gone: the client says so in its time, and goes on where one comes back in it."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList

import slowllm
from slowllm.entrypoints.api import LM
from slowllm.errors import MissingBlocksError
from slowllm.swarm.client import SwarmOptions
from tests.support.parted import OUTSIDE, parted
from tests.support.served import GREEDY, save_model, texts
from tests.support.swarm_processes import LOOPBACK, SwarmProcess, SwarmProcesses, serve_arguments

pytestmark = pytest.mark.long


class OneSpanTwice:
    """A server of the first half of a model, and two of the second, which have identities and ports of their own."""

    def __init__(self, swarm: SwarmProcesses, folder: Path) -> None:
        self._swarm, self._folder = swarm, folder
        self.whole = save_model(folder)
        self.ends = parted(self.whole, folder / "ends", OUTSIDE)
        self.first = swarm.serve(self.whole, "0:3", "--public-name", "first")
        self.pair = [self._start(name) for name in ("desk", "lamp")]

    def _start(self, name: str, listen_at: str = LOOPBACK) -> SwarmProcess:
        given = serve_arguments(
            self.whole, "3:6", "--public-name", name, "--identity", self._folder / name, "--initial-peers",
            self.first.address,
        )  # fmt: skip
        return self._swarm.start(*(listen_at if word == LOOPBACK else word for word in given))

    def kill_both(self) -> None:
        for process in self.pair:
            process.kill()

    def bring_back(self, number: int) -> None:
        """Start a server again with the identity and the port that it had."""
        address = self.pair[number].address.partition("/p2p/")[0]
        self.back = self._start(("desk", "lamp")[number], address)

    def client(self, timeout: float) -> LM:
        return slowllm.load(
            self.ends, swarm=SwarmOptions((self.first.address,), timeout=timeout, step_timeout=2.0)
        )


@pytest.fixture
def spans(swarm: SwarmProcesses, tmp_path: Path) -> Iterator[OneSpanTwice]:
    return OneSpanTwice(swarm, tmp_path)


def generated(model: object, do: Callable[[], object] = lambda: None) -> Tensor:
    """Return what a model generates; do something after the third token."""
    ids, mask = texts()
    count = iter(range(1 << 30))

    def process(_: Tensor, scores: Tensor) -> Tensor:
        if next(count) == 3:
            do()
        return scores

    with torch.no_grad():
        return model.generate(  # type: ignore[attr-defined,no-any-return]
            ids, attention_mask=mask, logits_processor=LogitsProcessorList([process]), **GREEDY
        )


def test_a_span_without_servers_ends_the_work_with_blocks_servers_and_reasons(spans: OneSpanTwice) -> None:
    with (
        spans.client(timeout=8.0) as lm,
        pytest.raises(
            MissingBlocksError, match=r"nobody serves blocks 3:6 \(.*; tried for \d+\.\d s: "
        ) as caught,
    ):
        generated(lm.model, spans.kill_both)
    assert caught.value.blocks == (3, 4, 5)
    tried = str(caught.value).partition("; tried for ")[2]
    for name, process in zip(("desk", "lamp"), spans.pair, strict=True):
        label = re.escape(f"{name} ({process.address[-6:]})")
        assert re.search(rf"{label}: peer \w+: (the connection ended|cannot be reached)", tried), tried


def test_work_goes_on_when_a_server_comes_back_with_its_identity_and_port(spans: OneSpanTwice) -> None:
    with slowllm.load(spans.whole, ram="3GiB", dtype="float32") as local:
        theirs = generated(local.model)
    coming = threading.Thread(target=spans.bring_back, args=[1])

    def kill_both() -> None:
        spans.kill_both()
        coming.start()

    with spans.client(timeout=200.0) as lm:
        ours = generated(lm.model, kill_both)
    coming.join()
    assert spans.back.address == spans.pair[1].address
    assert torch.equal(ours, theirs)
