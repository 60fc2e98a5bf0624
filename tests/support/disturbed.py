"""A swarm in which every block has two servers at least, work for its client, and moments at which a server is harmed.

A moment is a request (the server is harmed before it is sent, or when it has just been sent) or a time within the work,
as a share of what the work takes undisturbed. All are chosen by a seed, so that a failure can be run again.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessorList

import slowllm
from slowllm.entrypoints.api import LM
from slowllm.swarm.client import SwarmOptions
from tests.support.parted import OUTSIDE, parted
from tests.support.served import GREEDY, deep_prompt_grads, save_model, texts
from tests.support.swarm_processes import LOOPBACK, SwarmProcess, SwarmProcesses, serve_arguments

# Three spans, and as many that are cut at other blocks.
BOUNDS = ((0, 2), (2, 4), (4, 6), (0, 3), (3, 6), (1, 5))
Work = Callable[[Any, list[float]], list[Tensor]]
When = Literal["before", "sent", "time"]


def generation(**settings: Any) -> Work:
    """Return work that generates, and notes the time before each token is chosen."""

    def work(model: Any, marks: list[float]) -> list[Tensor]:
        ids, mask = texts()
        torch.manual_seed(11)  # of what is sampled

        def note(_: Tensor, scores: Tensor) -> Tensor:
            marks.append(time.perf_counter())
            return scores

        given = {**GREEDY, "max_new_tokens": 12, "min_new_tokens": 12, **settings}
        with torch.no_grad():
            found = model.generate(
                ids, attention_mask=mask, logits_processor=LogitsProcessorList([note]),
                return_dict_in_generate=True, output_logits=True, **given,
            )  # fmt: skip
        return [found.sequences, *found.logits]

    return work


def training(model: Any, marks: list[float]) -> list[Tensor]:
    """A step forward and backward with a deep prompt."""
    return deep_prompt_grads(model, *texts())


WORKS: dict[str, Work] = {
    "greedy": generation(),
    "beams": generation(num_beams=4),
    "sampled": generation(do_sample=True, top_p=0.9, temperature=1.3),
    "training": training,
}


@dataclass(frozen=True)
class Moment:
    """When a server is harmed: at the request of a number, or after a share of the work's usual time."""

    when: When
    request: int
    share: float


@dataclass
class Run:
    """What came of a piece of work.

    Attributes:
        outputs: of the work.
        steps: seconds of each.
        num_requests: that were sent.
        harmed: peer that was harmed, if one was.
    """

    outputs: list[Tensor]
    steps: list[float]
    num_requests: int
    harmed: list[str] = field(default_factory=list)


def moments(generator: random.Random, num_requests: int) -> Iterator[Moment]:
    """Return moments without end; the kinds take turns."""
    while True:
        for when in ("before", "sent", "time"):
            yield Moment(when, generator.randrange(num_requests), generator.random())  # type: ignore[arg-type]


def run(
    lm: LM, work: Work, moment: Moment | None = None, do_harm: Callable[[str], object] | None = None,
    is_alive: Callable[[str], bool] = lambda _: True,
) -> Run:  # fmt: skip
    """Do work on a client's model, and harm the server that is asked at a moment, once.

    Args:
        lm: the client's.
        work: to be done.
        moment: at which to harm; None for work that is not disturbed.
        do_harm: harms the server with this id. Called on the thread that asks, or on one of its own.
        is_alive: whether a server can be harmed.
    """
    found, send, lock = Run([], [], 0), lm.swarm._ask, threading.Lock()
    asked: list[str] = []

    def harm(peers: Sequence[str]) -> None:
        assert do_harm is not None
        with lock:
            # One that died before may be asked again, as long as the directory has its record.
            living = next((peer for peer in reversed(peers) if is_alive(peer)), None)
            if living is not None and not found.harmed:
                found.harmed.append(living)
                do_harm(living)

    def ask(peer: str, meta: Any, *args: Any, **options: Any) -> Any:
        if meta["op"] not in ("forward", "backward"):
            return send(peer, meta, *args, **options)
        asked.append(peer)
        is_now = moment is not None and len(asked) > moment.request
        if moment is not None and is_now and moment.when == "before":
            harm([peer])
        answer = send(peer, meta, *args, **options)
        if moment is not None and is_now and moment.when == "sent":
            harm([peer])
        return answer

    timers = []
    if moment is not None and moment.when == "time":
        timers.append(threading.Timer(moment.share, lambda: harm(list(asked))))
    lm.swarm._ask = ask
    marks = [time.perf_counter()]
    for timer in timers:
        timer.start()
    try:
        found.outputs = work(lm.model, marks)
    finally:
        for timer in timers:
            timer.cancel()
            timer.join()
        lm.swarm._ask = send
    marks.append(time.perf_counter())
    found.steps = [after - before for before, after in itertools.pairwise(marks)]
    found.num_requests = len(asked)
    return found


class TwiceServed:
    """The servers of a model, and its client; what dies is started anew. A context manager.

    Args:
        swarm: starts processes.
        folder: where the model is made.
        family: of the model.
    """

    def __init__(self, swarm: SwarmProcesses, folder: Path, family: str) -> None:
        self._swarm = swarm
        self.whole = save_model(folder, family)
        self.meeting = swarm.start("-m", "slowllm", "dht", "--host-maddrs", LOOPBACK, "--no-relay")
        self._by_peer: dict[str, tuple[SwarmProcess, tuple[int, int]]] = {}
        self.start(BOUNDS)
        options = SwarmOptions((self.meeting.address,), timeout=120.0, step_timeout=2.0)
        self._held = contextlib.ExitStack()
        self.lm = self._held.enter_context(
            slowllm.load(parted(self.whole, folder / "ends", OUTSIDE), swarm=options)
        )
        self.local = self._held.enter_context(slowllm.load(self.whole, ram="3GiB", dtype="float32"))

    def start(self, bounds: Sequence[tuple[int, int]]) -> None:
        """Start servers of these spans at the same time."""
        started = self._swarm.start_all(
            serve_arguments(self.whole, f"{first}:{end}", "--initial-peers", self.meeting.address)
            for first, end in bounds
        )
        for process, span in zip(started, bounds, strict=True):
            self._by_peer[process.address.rpartition("/")[2]] = process, span

    def process(self, peer: str) -> SwarmProcess:
        """Return the process of a server."""
        return self._by_peer[peer][0]

    def is_alive(self, peer: str) -> bool:
        """Return whether a server was not harmed for good."""
        return peer in self._by_peer

    def restart(self, peer: str) -> None:
        """Start another server in the place of one that has died."""
        _, span = self._by_peer.pop(peer)
        self.start([span])

    def __enter__(self) -> TwiceServed:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()


@dataclass
class Disturbed:
    """What came of many disturbances.

    Attributes:
        wrong: in which the bits were others, or that ended in an error, in words.
        num_harmed: disturbances; a moment that comes after the work's end is none.
        recoveries: seconds of the longest step of each, less the median of a step that was not disturbed.
    """

    wrong: list[str] = field(default_factory=list)
    num_harmed: int = 0
    recoveries: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        """Return the median and the worst time to recover, in seconds."""
        return {
            "median_recovery_seconds": round(statistics.median(self.recoveries), 3),
            "worst_recovery_seconds": round(max(self.recoveries), 3),
        }


def disturb(
    swarm: TwiceServed, number: int, seed: int, do_harm: Callable[[SwarmProcess, random.Random], object],
    mend: Callable[[str], object],
) -> Disturbed:  # fmt: skip
    """Disturb work of all kinds in turn at random moments, and compare it with the same work on a local model.

    Args:
        swarm: to be disturbed.
        number: of disturbances; work that ended before its moment does not count.
        seed: of the moments.
        do_harm: to the process of a server that is asked at the moment.
        mend: called with the harmed server's id when the work has ended.
    """
    generator, found = random.Random(seed), Disturbed()
    references = {name: work(swarm.local.model, []) for name, work in WORKS.items()}
    usual = {name: [run(swarm.lm, work) for _ in range(3)] for name, work in WORKS.items()}
    for name, runs in usual.items():
        assert all(map(torch.equal, runs[0].outputs, references[name])), f"undisturbed {name}"
    kinds = {name: moments(generator, runs[0].num_requests) for name, runs in usual.items()}
    for count in range(3 * number):
        if found.num_harmed == number:
            break
        name = list(WORKS)[count % len(WORKS)]
        moment = next(kinds[name])
        seconds = statistics.median(sum(one.steps) for one in usual[name])
        moment = Moment(moment.when, moment.request, moment.share * seconds)
        what = f"{found.num_harmed + 1} of {number}, seed {seed}: {name}, {moment}"
        ours: Run | None = None
        harmed: list[str] = []

        def harm(peer: str, harmed: list[str] = harmed) -> None:
            harmed.append(peer)
            do_harm(swarm.process(peer), generator)

        try:
            ours = run(swarm.lm, WORKS[name], moment, harm, swarm.is_alive)
        except slowllm.errors.SlowLLMError as error:
            found.wrong.append(f"{what}: {type(error).__name__}: {error}")
            print(found.wrong[-1], flush=True)
        if ours is not None:
            if not all(map(torch.equal, ours.outputs, references[name])):
                found.wrong.append(f"{what}: other bits")
            undisturbed = statistics.median(step for one in usual[name] for step in one.steps)
            if harmed:
                found.recoveries.append(max(ours.steps) - undisturbed)
            print(f"{what}: longest step {max(ours.steps):.2f} s, usual {undisturbed:.3f} s", flush=True)
        found.num_harmed += bool(harmed)
        for peer in harmed:
            mend(peer)
    return found
