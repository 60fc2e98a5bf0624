"""What a swarm costs beside one machine: a model of which three servers on the loopback have a third of the blocks each.

    python -m benchmarks.swarm --blocks 24 --width 1024 --heads 16
    python -m benchmarks.swarm --delay-ms 50

A BLOOM of random weights in fp32: a prompt is read, tokens are decoded with a cache, and a long text passes without one; by
plain transformers, by slowllm on one machine, both in memory, and by a client that has the ends of the model and asks the
servers. All sides have as many threads, run in turn, and of the rounds the fastest counts, so that other work on the machine
disturbs the ratios little; the medians are reported beside. One hop computes at a time, so the limit of the swarm is what plain
transformers takes, and a round trip of `--delay-ms` for each server. Tokens are also generated with and without a draft by prompt
look-up, which random weights flatter, because their texts soon repeat. Before a speed is reported, the logits of all sides must
have equal bits, and tokens be the same. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import slowllm
from benchmarks.report import add_report_option, finish
from benchmarks.swarm_servers import servers, spans_of
from benchmarks.visit_cost import make_model
from slowllm.entrypoints.api import LM
from slowllm.inference import generation, speculative
from slowllm.inference.generation_types import Prompt, Settings
from slowllm.inference.speculative_loop import Acceptance

TOKENIZER = Path(__file__).parents[1] / "weights" / "tiny-bloom"
WORK = ("prefill", "token", "forward")
SIDES = ("plain", "local", "swarm")


@dataclass(frozen=True)
class Shares:
    """Seconds of requests: on the way, in the queues of servers, and computed there."""

    network: float = 0.0
    queue: float = 0.0
    compute: float = 0.0

    def since(self, before: Shares) -> Shares:
        """Return what has come since then."""
        return Shares(self.network - before.network, self.queue - before.queue, self.compute - before.compute)


def shares_of(lm: LM) -> Shares:
    """Return where the time of all requests of a client has gone so far; nothing for a local model."""
    times = list(lm.swarm.times.values()) if lm.swarm is not None else []
    return Shares(
        sum(one.network_seconds for one in times),
        sum(one.queue_seconds for one in times),
        sum(one.compute_seconds for one in times),
    )


@dataclass(frozen=True)
class Timed:
    """What one side took for one piece of work, and where its requests spent it."""

    seconds: float
    shares: Shares
    logits: Tensor


class Side:
    """A model, and how long it takes."""

    def __init__(self, model: Any, lm: LM | None = None) -> None:
        self._model, self._lm = model, lm

    def _timed(self, work: Callable[[], Tensor], count: int = 1) -> Timed:
        shares = Shares() if self._lm is None else shares_of(self._lm)
        started = time.perf_counter()
        logits = work()
        seconds = time.perf_counter() - started
        after = Shares() if self._lm is None else shares_of(self._lm)
        spent = Shares(*(value / count for value in dataclasses.astuple(after.since(shares))))
        return Timed(seconds / count, spent, logits)

    def run(self, prompt: Tensor, text: Tensor, num_tokens: int) -> dict[str, Timed]:
        """Read a prompt (1, T), decode tokens behind it, and pass a text (1, T) without a cache.

        Returns:
            the time of each kind of `WORK`; of a token on the average, with the logits of the last one.
        """

        def forward() -> Tensor:
            logits: Tensor = self._model(text, use_cache=False).logits
            return logits

        with torch.no_grad():
            return {**self._with_cache(prompt, num_tokens), "forward": self._timed(forward)}

    def _with_cache(self, prompt: Tensor, num_tokens: int) -> dict[str, Timed]:
        """Read a prompt and decode; the cache, and a swarm's sessions with it, are gone behind it."""
        cache = DynamicCache(config=self._model.config)

        def step(ids: Tensor) -> Tensor:
            logits: Tensor = self._model(ids, past_key_values=cache).logits[:, -1]
            return logits

        def decode() -> Tensor:
            logits = prefill.logits
            for _ in range(num_tokens):
                logits = step(logits.argmax(-1, keepdim=True))
            return logits

        prefill = self._timed(lambda: step(prompt))
        return {"prefill": prefill, "token": self._timed(decode, num_tokens)}


def generate(lm: LM, prompt: Prompt, *, has_draft: bool) -> tuple[float, tuple[int, ...], float]:
    """Continue a prompt; return the seconds of a token, the tokens, and how many each pass gave on the average."""
    counts = Acceptance()
    started = time.perf_counter()
    if has_draft:
        ((found,),) = speculative.generate(lm, [prompt], "lookup", counts=counts)
    else:
        ((found,),) = generation.generate(lm, [prompt])
    seconds = time.perf_counter() - started
    per_pass = counts.num_tokens / counts.num_passes if counts.num_passes else 1.0
    return seconds / len(found.ids), tuple(found.ids), per_pass


def bytes_read_by_servers(client: LM) -> int:
    """Return what the servers have read from their disks so far."""
    assert client.swarm is not None, "it is a client"
    return sum(client.swarm.status(record.peer).read_bytes for record in client.swarm.records())


def check_equal(wanted: dict[str, Timed], found: dict[str, Timed], name: str) -> None:
    """Refuse to report a side whose logits differ.

    Raises:
        SystemExit: in which work, and by how much.
    """
    for kind in WORK:
        if not torch.equal(wanted[kind].logits, found[kind].logits):
            off = float((wanted[kind].logits - found[kind].logits).abs().max())
            sys.exit(
                f"not verified: {kind} of {name} differs from plain transformers' logits by up to {off:g}"
            )


def measure(arguments: argparse.Namespace, folder: Path, address: str) -> dict[str, Any]:
    """Run all sides in turn, and return the report."""
    prompt = torch.arange(5, 5 + arguments.prompt_tokens)[None] % arguments.vocab
    text = torch.randint(
        3, arguments.vocab, (1, arguments.forward_tokens), generator=torch.Generator().manual_seed(0)
    )
    settings = Settings(max_new_tokens=arguments.tokens, min_new_tokens=arguments.tokens)
    asked = Prompt(tuple(prompt[0].tolist()), settings)
    runs: dict[str, dict[str, list[Timed]]] = {name: defaultdict(list) for name in SIDES}
    drafts: dict[str, list[float]] = defaultdict(list)
    with contextlib.ExitStack() as held:
        local = held.enter_context(slowllm.load(folder, dtype="float32", ram=arguments.ram))
        if local.plan.ring_bytes:
            sys.exit("not measured: the model does not lie in memory; allow more --ram")
        client = held.enter_context(slowllm.load(folder, swarm=[address], dtype="float32", ram=arguments.ram))
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        sides = {"plain": Side(plain), "local": Side(local.model), "swarm": Side(client.model, client)}
        wanted, read_bytes = sides["plain"].run(prompt, text, arguments.tokens), bytes_read_by_servers(client)
        _, tokens, _ = generate(local, asked, has_draft=False)
        for _ in range(arguments.rounds):
            for name, side in sides.items():
                found = side.run(prompt, text, arguments.tokens)
                check_equal(wanted, found, name)
                for kind in WORK:
                    runs[name][kind].append(found[kind])
            for name, has_draft in (("generate", False), ("lookup", True)):
                seconds, ids, per_pass = generate(client, asked, has_draft=has_draft)
                if ids != tokens:
                    sys.exit(f"not verified: the swarm's {name} gives other tokens than the local model")
                drafts[name].append(seconds)
        if bytes_read_by_servers(client) != read_bytes:
            sys.exit("not measured: not all blocks of the servers lie in memory; allow more --ram")
    return report(arguments, runs, drafts, per_pass)


def report(
    arguments: argparse.Namespace,
    runs: dict[str, dict[str, list[Timed]]],
    drafts: dict[str, list[float]],
    tokens_per_pass: float,
) -> dict[str, Any]:
    """Return what the rounds say: the fastest and the median of each, the limit, and where the swarm's time went."""
    done: dict[str, Any] = {
        "verified": True, **{name: value for name, value in vars(arguments).items() if name != "report"}, "num_threads": torch.get_num_threads(),
        "lookup_tokens_per_pass": tokens_per_pass,
    }  # fmt: skip
    for kind in WORK:
        fastest = {name: min(runs[name][kind], key=lambda one: one.seconds) for name in SIDES}
        limit = fastest["plain"].seconds + arguments.servers * arguments.delay_ms / 1e3
        for name in SIDES:
            done[f"{name}_{kind}_s"] = fastest[name].seconds
            done[f"{name}_{kind}_median_s"] = statistics.median(one.seconds for one in runs[name][kind])
        seconds, shares = fastest["swarm"].seconds, fastest["swarm"].shares
        done[f"limit_{kind}_s"] = limit
        done[f"swarm_{kind}_of_limit"] = limit / seconds
        inside = shares.network + shares.queue + shares.compute
        for share, value in {**dataclasses.asdict(shares), "client": seconds - inside}.items():
            done[f"swarm_{kind}_{share}_share"] = value / seconds
    for name in SIDES:
        done[f"{name}_tokens_per_s"] = 1 / done[f"{name}_token_s"]
    for name, taken in drafts.items():
        done[f"swarm_{name}_tokens_per_s"] = 1 / min(taken)
    return done


def main(argv: list[str] | None = None) -> None:
    """Make the model, start the servers, measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--servers", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=16, help="tokens that are decoded in a round")
    parser.add_argument("--forward-tokens", type=int, default=1024, help="tokens of the text without a cache")
    parser.add_argument("--rounds", type=int, default=5, help="of which the fastest counts")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each process")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="added to a round trip to a server")
    parser.add_argument("--ram", default="4GiB", help="budget of each process, enough for all blocks")
    add_report_option(parser)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    options: list[object] = [
        "--dtype", "fp32", "--ram", arguments.ram, "--max-batch-tokens", max(2048, arguments.forward_tokens),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        make_model(folder, arguments.blocks, arguments.width, arguments.heads, arguments.vocab, torch.float32)
        AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
        with servers(
            folder, spans_of(arguments.blocks, arguments.servers), options, threads=arguments.threads,
            delay_seconds=arguments.delay_ms / 1e3, folder=Path(name),
        ) as address:  # fmt: skip
            done = measure(arguments, folder, address)
    for side in SIDES:
        print(
            f"{side}: {done[f'{side}_tokens_per_s']:.2f} tokens/s, a prompt {1e3 * done[f'{side}_prefill_s']:.0f} ms, "
            f"a text {1e3 * done[f'{side}_forward_s']:.0f} ms"
        )
    for kind in WORK:
        shares = ", ".join(
            f"{share} {done[f'swarm_{kind}_{share}_share']:.0%}"
            for share in ("compute", "queue", "network", "client")
        )
        print(f"swarm, {kind}: {done[f'swarm_{kind}_of_limit']:.2f} of the limit; {shares}")
    print(
        f"swarm, generate: {done['swarm_generate_tokens_per_s']:.2f} tokens/s, with look-up {done['swarm_lookup_tokens_per_s']:.2f}"
    )
    finish("swarm", done, arguments.report)


if __name__ == "__main__":
    # As Ctrl-C does, so that the servers end as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    main()
