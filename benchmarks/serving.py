"""Strangers who ask at the same time, on a checkpoint larger than memory: one, and many with mixed requests.

    python -m benchmarks.serving --geometry llama-70b --blocks 4 --clients 64 --new-tokens 8 --ram 5GiB

Requests go through `slowllm.inference.service`, as those of `slowllm api` do; each client is a thread. Of four clients, two are
continued greedily, one is sampled by a seed of its own, and one has its prompt scored as well. The limit is the time
to read what does not stay in memory, once for each token. Before a speed is reported, the token that a lone client got must
be as likely beside the others as the one that was chosen there, up to the rounding of the dtype. The last line of stdout is
one JSON document.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, sides
from benchmarks.report import finish

# Log-probabilities of equal tokens differ by as much between batches, in bfloat16 at random weights.
TOLERANCE = 0.1


@dataclass(frozen=True)
class Task:
    """What one process does; passed as JSON."""

    checkpoint: str
    ram: str
    clients: int
    prompt_tokens: int
    new_tokens: int


def run_ours(task: Task) -> dict[str, Any]:
    """Answer one client, and then all of them at once."""
    from slowllm import load
    from slowllm.inference.service import Service
    from slowllm.inference.service_types import service_job
    from slowllm.runtime.description import ModelInfo
    from slowllm.runtime.rates import quick_rates

    info = ModelInfo(task.checkpoint)
    length = task.prompt_tokens + task.new_tokens
    job = service_job(info, max(64, 2 * length) * task.clients, max(64, 2 * length), task.clients)
    rates = quick_rates(info.folder, "bfloat16")
    with load(info, ram=task.ram, dtype="bf16", job=job, rates=rates) as lm:
        asks = asks_of(task, info.config.vocab_size)
        with Service(lm, max_rows=task.clients) as service:
            alone = timed(lm, service, asks[:1])
            together = timed(lm, service, asks)
        check(alone.pop("answers")[0], together.pop("answers")[0])
        return {
            **{f"one_{key}": value for key, value in alone.items()},
            **{f"all_{key}": value for key, value in together.items()},
            "wall_s": together["wall_s"],
            "weight_bytes": lm.weight_bytes,
            "resident_bytes": lm.plan.resident_bytes,
            "plan_peak_bytes": lm.plan.peak_bytes,
        }


def asks_of(task: Task, vocab_size: int) -> list[Any]:
    """Return what each client asks."""
    from slowllm.inference.generation_types import Prompt, Settings
    from slowllm.inference.service_types import Ask

    generator = torch.Generator().manual_seed(0)
    plain = Settings(max_new_tokens=task.new_tokens, min_new_tokens=task.new_tokens, top_log_probs=5)
    asks = []
    for client in range(task.clients):
        ids = torch.randint(5, vocab_size, (task.prompt_tokens,), generator=generator)
        settings, num_prompt_top = plain, None
        if client % 4 == 2:
            settings = replace(plain, do_sample=True, temperature=0.8, top_k=0, top_p=0.9, seed=client)
        elif client % 4 == 3:
            num_prompt_top = 5
        asks.append(Ask(Prompt(tuple(ids.tolist()), settings), num_prompt_top))
    return asks


def timed(lm: Any, service: Any, asks: list[Any]) -> dict[str, Any]:
    """Ask from as many threads at once, and return the answers with what they took."""
    answers: list[Any] = [None] * len(asks)
    first: list[float] = [0.0] * len(asks)
    read, computed = lm.report.read_bytes, lm.report.compute_seconds
    sweeps, started = service.status().num_sweeps, time.perf_counter()

    def client(number: int) -> None:
        def told(*_: Any) -> None:
            first[number] = first[number] or time.perf_counter() - started

        answers[number] = service.submit(asks[number], told).result()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(len(asks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall = time.perf_counter() - started
    num_tokens = sum(len(answer.continuations[0].ids) for answer in answers)
    return {
        "answers": answers, "wall_s": wall, "tokens": num_tokens, "tokens_per_s": num_tokens / wall,
        "sweeps": service.status().num_sweeps - sweeps, "read_bytes": lm.report.read_bytes - read,
        "compute_s": lm.report.compute_seconds - computed, "first_token_s": statistics.median(first),
    }  # fmt: skip


def check(alone: Any, beside: Any) -> None:
    """Refuse to report a speed of other answers.

    Raises:
        SystemExit: the first token differs by more than rounding.
    """
    (lone,), (one,) = alone.continuations, beside.continuations
    found = one.top_log_probs[0].get(lone.ids[0], float("-inf"))
    if one.log_probs[0] - found > TOLERANCE:
        sys.exit(f"not verified: beside others, token {lone.ids[0]} has a log-probability of {found:g}")


RUNNERS = {"ours": run_ours}


def measure(arguments: argparse.Namespace, task: Task) -> dict[str, Any]:
    """Run the sides, and return the report of the medians."""
    folder, disk = Path(task.checkpoint), list[float]()
    runs: list[dict[str, Any]] = []
    with sides.capped(arguments.ram) as cgroup:
        for _ in range(arguments.repeat):
            disk.append(machine.measure_disk(folder).bytes_per_second)
            runs.append(sides.run("serving", "ours", dataclasses.asdict(task), folder=folder, cgroup=cgroup))
    done: dict[str, Any] = {
        "verified": True, **dataclasses.asdict(task), "num_threads": torch.get_num_threads(),
        "disk_gb_per_s": statistics.median(disk) / 1e9,
        **{key: sides.median(runs, key) for key in runs[0]},
    }  # fmt: skip
    streamed = done["weight_bytes"] - done["resident_bytes"]
    done["limit_one_tokens_per_s"] = statistics.median(disk) / max(1, streamed)
    done["aggregate_of_one"] = done["all_tokens_per_s"] / done["one_tokens_per_s"]
    return done


def main(argv: list[str] | None = None) -> None:
    """Make the checkpoint where it is missing, measure and report."""
    parser = sides.parser(__doc__, peers=())
    parser.add_argument("--clients", type=int, default=64, help="number of clients that ask at once")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=8)
    arguments = parser.parse_args(argv)
    folder = sides.checkpoint(arguments.checkpoint, arguments.geometry, arguments.blocks)
    task = Task(str(folder), arguments.ram, arguments.clients, arguments.prompt_tokens, arguments.new_tokens)
    done = measure(arguments, task)
    print(
        f"one client: {done['one_tokens_per_s']:.3f} tokens/s (the disk allows {done['limit_one_tokens_per_s']:.3f}); "
        f"{task.clients} clients: {done['all_tokens_per_s']:.2f} tokens/s in {done['all_sweeps']:g} sweeps, "
        f"{done['aggregate_of_one']:.1f} times as many"
    )
    finish("serving", done, arguments.report)


if __name__ == "__main__" and not sides.serve(RUNNERS, Task):
    main()
