"""A few tokens for many prompts, on a checkpoint larger than memory: us, and accelerate's disk offload.

    python -m benchmarks.generation --geometry llama-70b --blocks 4 --prompts 32 --new-tokens 8 --ram 5GiB --peer accelerate
    python -m benchmarks.generation --geometry gpt-oss-120b --blocks 36 --format native --ram 16GiB --prompts 1 --new-tokens 64 --sample

Prompts of random tokens are continued greedily, or with --sample by tokens drawn from flattened logits: what random weights find
likeliest repeats itself, and so do the experts that it asks for. slowllm continues all of them together; accelerate's `generate`
continues them one by one (a few tokens of one prompt are measured and the rest extrapolated), and all in one padded
batch. Each run is a process of its own under the same memory cap, with the page cache dropped; the sides run in turn.
The limit is the larger of two times: reading the bytes of all sweeps at the disk's rate, and computing the tokens. A
sweep gives every prompt one token. Before a speed is reported, our first tokens must be the peer's, near ties aside.
The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine, sides
from benchmarks.forward_pass import matrix_sizes
from benchmarks.report import finish

# Tokens that are timed one by one: the peer reads the whole checkpoint for every token of every prompt.
NUM_ONE_BY_ONE = 2


@dataclass(frozen=True)
class Task:
    """What one process does; passed as JSON."""

    checkpoint: str
    ram: str
    prompts: int
    prompt_tokens: int
    new_tokens: int
    is_sampled: bool = False


def prompts_of(task: Task, vocab_size: int) -> list[Tensor]:
    """Return random prompts of various lengths, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    shortest = max(1, task.prompt_tokens // 2)
    lengths = torch.randint(
        shortest, 2 * task.prompt_tokens - shortest + 1, (task.prompts,), generator=generator
    )
    return [torch.randint(5, vocab_size, (int(length),), generator=generator) for length in lengths]


def run_ours(task: Task) -> dict[str, Any]:
    """Continue all prompts through slowllm."""
    from slowllm import load
    from slowllm.inference import generation
    from slowllm.inference.generation_types import Prompt, Settings
    from slowllm.runtime.description import ModelInfo
    from slowllm.runtime.rates import quick_rates

    info = ModelInfo(task.checkpoint)
    settings = Settings(max_new_tokens=task.new_tokens, min_new_tokens=task.new_tokens)
    if task.is_sampled:
        settings = dataclasses.replace(settings, do_sample=True, top_k=0, temperature=10.0)
    prompts = [
        Prompt(tuple(ids.tolist()), dataclasses.replace(settings, seed=number if task.is_sampled else None))
        for number, ids in enumerate(prompts_of(task, info.config.vocab_size))
    ]
    rates = quick_rates(info.folder, "bfloat16")
    job = generation.job_of(info, prompts, rates)
    with load(info, ram=task.ram, dtype="bf16", job=job, rates=rates, exact=False) as lm:
        # When each token of the first prompt came, and what was read until then.
        came: list[tuple[float, int]] = []

        def note(prompt: int, sequence: int, ids: tuple[int, ...]) -> None:
            if prompt == 0:
                came.append((time.perf_counter(), lm.read_bytes))

        started = time.perf_counter()
        tokens = [continuation.ids for (continuation,) in generation.generate(lm, prompts, on_tokens=note)]
        wall = time.perf_counter() - started
        report = lm.report
        # The second half, by when the experts that stay have been chosen.
        half = came[len(came) // 2 :]
        steps = [b[0] - a[0] for a, b in itertools.pairwise(half)]
        experts = lm.experts
        return {
            "first_token_s": came[0][0] - started,
            "later_token_s": statistics.median(steps) if steps else None,
            "later_token_bytes": (half[-1][1] - half[0][1]) / max(1, len(steps)),
            "expert_hits": experts.kept.num_hits / max(1, experts.demand.num_asked) if experts else None,
            "wall_s": wall,
            "tokens": tokens,
            "num_sweeps": report.num_passages / lm.num_stops,
            "read_bytes": report.read_bytes,
            "wait_s": report.wait_seconds,
            "compute_s": report.compute_seconds,
            "weight_bytes": lm.weight_bytes,
            "resident_bytes": lm.plan.resident_bytes,
            "plan_peak_bytes": lm.plan.peak_bytes,
            "predicted_s": lm.plan.forecast.seconds,
            "predicted_sweeps": lm.plan.forecast.num_sweeps,
        }


def run_accelerate(task: Task) -> dict[str, Any]:
    """Continue all prompts in one padded batch with accelerate's disk offload."""
    from benchmarks.passes import offloaded

    model, offload = offloaded(task.checkpoint)
    with offload, torch.no_grad():
        prompts = prompts_of(task, model.config.vocab_size)
        width = max(map(len, prompts))
        ids = torch.stack([torch.nn.functional.pad(p, (width - len(p), 0), value=3) for p in prompts])
        mask = torch.stack([(torch.arange(width) >= width - len(p)).long() for p in prompts])
        started = time.perf_counter()
        found = generate(model, ids, mask, task.new_tokens)
        wall = time.perf_counter() - started
    return {"wall_s": wall, "tokens": found[:, width:].tolist()}


def run_accelerate_one_by_one(task: Task) -> dict[str, Any]:
    """Continue the first prompt by a few tokens with accelerate's disk offload, and extrapolate to all prompts."""
    from benchmarks.passes import offloaded

    model, offload = offloaded(task.checkpoint)
    with offload, torch.no_grad():
        ids = prompts_of(task, model.config.vocab_size)[0][None]
        measured = min(NUM_ONE_BY_ONE, task.new_tokens)
        started = time.perf_counter()
        generate(model, ids, torch.ones_like(ids), measured)
        wall = time.perf_counter() - started
    return {"wall_s": wall / measured * task.new_tokens * task.prompts, "measured_tokens": measured}


def generate(model: Any, ids: Tensor, mask: Tensor, num_tokens: int) -> Tensor:
    """Continue greedily by exactly `num_tokens` tokens."""
    continued: Tensor = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False,
        pad_token_id=3,
    )  # fmt: skip
    return continued


RUNNERS = {"ours": run_ours, "accelerate": run_accelerate, "accelerate_one_by_one": run_accelerate_one_by_one}


def measure(arguments: argparse.Namespace, task: Task) -> dict[str, Any]:
    """Run all sides in turn, compare the tokens, and return the report of the medians."""
    folder, runs = Path(task.checkpoint), dict[str, list[dict[str, Any]]]()
    block_weights, head_weights, width = matrix_sizes(folder)
    num_prompt_tokens = sum(map(len, prompts_of(task, 1000)))
    disk, gemm = [], []
    with sides.capped(arguments.ram) as cgroup:
        for _ in range(arguments.repeat):
            disk.append(machine.measure_disk(folder).bytes_per_second)
            gemm.append(machine.gemm_flops_per_second(min(num_prompt_tokens, 1024), width))
            for name in RUNNERS if arguments.peer else ["ours"]:
                found = sides.run("generation", name, dataclasses.asdict(task), folder=folder, cgroup=cgroup)
                runs.setdefault(name, []).append(found)
                print(f"{name}: {found['wall_s']:.2f} s, disk {disk[-1] / 1e9:.2f} GB/s", file=sys.stderr)
    ours = runs["ours"][0]
    walls = {name: statistics.median(run["wall_s"] for run in found) for name, found in runs.items()}
    rate, flops_rate = statistics.median(disk), statistics.median(gemm)
    num_tokens = num_prompt_tokens + task.prompts * (task.new_tokens - 1)
    flops = 2 * (
        block_weights * arguments.blocks * num_tokens + head_weights * task.prompts * task.new_tokens
    )
    read = statistics.median(run["read_bytes"] for run in runs["ours"])
    report = {
        **dataclasses.asdict(task), "geometry": arguments.geometry, "blocks": arguments.blocks,
        "capped_by_cgroup": cgroup is not None, "repeat": arguments.repeat, "disk_gb_per_s": rate / 1e9,
        "gemm_tflop_per_s": flops_rate / 1e12, "disk_limit_s": read / rate, "gemm_limit_s": flops / flops_rate,
        "wall_s": walls["ours"], "tokens_per_sweep": task.prompts * task.new_tokens / ours["num_sweeps"],
        **{k: ours[k] for k in ("num_sweeps", "read_bytes", "wait_s", "compute_s", "weight_bytes", "resident_bytes",
                                "plan_peak_bytes", "predicted_s", "predicted_sweeps", "peak_rss_bytes", "first_token_s",
                                "later_token_s", "later_token_bytes", "expert_hits")},
    }  # fmt: skip
    report["limit_s"] = max(report["disk_limit_s"], report["gemm_limit_s"])
    report["efficiency"] = report["limit_s"] / report["wall_s"]
    if arguments.peer:
        theirs = runs["accelerate"][0]["tokens"]
        # Another batch rounds differently, and random weights have near ties. Only first tokens are compared, because
        # a tie that is decided differently changes all tokens after it.
        same = statistics.mean(a[0] == b[0] for a, b in zip(ours["tokens"], theirs, strict=True))
        if same < 0.5:
            sys.exit(f"not verified: accelerate's first tokens are ours for only {same:.0%} of the prompts")
        report |= {
            "verified": True, "peer": "accelerate", "peer_same_first_tokens": same,
            "peer_batch_s": walls["accelerate"], "peer_one_by_one_s": walls["accelerate_one_by_one"],
            "peer_one_by_one_measured_tokens": runs["accelerate_one_by_one"][0]["measured_tokens"],
            "peer_peak_rss_bytes": statistics.median(run["peak_rss_bytes"] for run in runs["accelerate"]),
            "speedup_batch": walls["accelerate"] / walls["ours"],
            "speedup_one_by_one": walls["accelerate_one_by_one"] / walls["ours"],
        }  # fmt: skip
    return report


def main(argv: list[str] | None = None) -> None:
    """Make or find the checkpoint, measure and report."""
    parser = sides.parser(__doc__)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=16, help="mean number of tokens of a prompt")
    parser.add_argument("--new-tokens", type=int, default=8)
    sides.add_format_option(parser)
    parser.add_argument(
        "--sample", action="store_true", help="draw tokens; without a peer, which would draw others"
    )
    arguments = parser.parse_args(argv)
    if arguments.sample and arguments.peer:
        parser.error("--sample goes without --peer")
    folder = sides.checkpoint(arguments.checkpoint, arguments.geometry, arguments.blocks, arguments.format)
    task = Task(
        str(folder),
        arguments.ram,
        arguments.prompts,
        arguments.prompt_tokens,
        arguments.new_tokens,
        arguments.sample,
    )
    report = measure(arguments, task)
    print(
        f"{task.prompts} prompts x {task.new_tokens} tokens in {report['wall_s']:.2f} s, {report['num_sweeps']:.3g} "
        f"sweeps; limit {report['limit_s']:.2f} s (disk {report['disk_limit_s']:.2f} s, processor "
        f"{report['gemm_limit_s']:.2f} s)"
    )
    if arguments.peer:
        print(
            f"accelerate in one batch {report['peer_batch_s']:.2f} s, one by one {report['peer_one_by_one_s']:.2f} s"
        )
    finish("generation", report, arguments.report)


if __name__ == "__main__":
    if not sides.serve(RUNNERS, Task):
        main()
