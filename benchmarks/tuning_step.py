"""A step of soft-prompt tuning on a checkpoint larger than memory: the physical limit, us, and accelerate's offload.

    python -m benchmarks.tuning_step --geometry llama-70b --blocks 4 --sentences 32 --ram 5GiB --peer accelerate
    python -m benchmarks.tuning_step --top 1 --sentences 32 --ram 5GiB

`slowllm.tuning` tunes on sentences of random tokens, of which all tokens but the first are learned; a step takes all
sentences. The first step is cold; each later one finds in memory what the one before has left there. accelerate takes
the same step by hand: forward and backward, with all weights frozen. The limit is the larger of two times: reading the
bytes of a step at the disk's rate, and `resident`, the same micro-batches on blocks in memory, with each block
recomputed in the backward pass.

With --top, a deep prompt is tuned on the uppermost blocks; the first epoch, which stores the frozen activations, is
compared with later ones. There is no peer and no limit; the first loss must be that of the same prompt without stored
activations.

With --store, the same steps are also taken on a store of the checkpoint, which is made where it is missing. A lossless
store must give the same loss and gradient; for other stores the difference is reported.

Each run is a process of its own under the same memory cap, with the page cache dropped; the sides run in turn. Before
anything is timed, the gradient of one block must be the resident model's. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, sides
from benchmarks.forward_pass import matrix_sizes
from benchmarks.report import finish
from benchmarks.tuning_sides import Task
from slowllm.options import format_bytes
from slowllm.storage.manifest import STORES

# Number of sentences that are verified.
NUM_VERIFIED = 32
# Tolerance for the gradient of one block, relative to its norm. The forward pass gives the same bits; then the resident
# model rounds the gradient of the logits to bf16, and slowllm only that of the hidden states. On Llama and BLOOM of
# widths 64 and 512 both are 0.008 to 0.011 away from the gradient in fp32, on different sides of it, and 0.006 to 0.008
# from each other.
TOLERANCE = 2e-2
# Tolerance for the loss, a mean over hundreds of tokens, whose errors cancel.
LOSS_TOLERANCE = 1e-3

Run = Callable[[str, Task], dict[str, Any]]


def verify(task: Task, run: Run) -> float:
    """Compare our gradient of one block with the resident model's; return the difference relative to its norm.

    Raises:
        SystemExit: the difference is more than bf16 explains, or a step of `tune` had another loss or gradient.
    """
    task = dataclasses.replace(task, sentences=min(task.sentences, NUM_VERIFIED), steps=1, top=0)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("ours", "resident")]
        ours = run("verify", dataclasses.replace(task, gradient=str(paths[0]), keep_resident=False))
        packed = {key: ours[key] for key in ("rider_tokens", "padding_tokens")}
        resident = run("resident", dataclasses.replace(task, gradient=str(paths[1]), **packed))
        found, expected = (torch.load(path) for path in paths)
    norm = float(expected.norm())
    difference = float((found - expected).norm()) / norm
    if not difference <= TOLERANCE:
        sys.exit(
            f"not verified: our gradient of one block differs from the resident model's by {difference:.3g}"
        )
    check("a step on one block", ours, {**resident, "grad_norm": norm})
    return difference


def check(what: str, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Exit with an error unless a step has the expected loss and gradient norm."""
    for key, tolerance in (("loss", LOSS_TOLERANCE), ("grad_norm", TOLERANCE)):
        if key in expected and not abs(found[key] - expected[key]) <= tolerance * expected[key]:
            sys.exit(f"not verified: {what} has a {key} of {found[key]:.6g}, not {expected[key]:.6g}")


def measure(arguments: argparse.Namespace, task: Task) -> dict[str, Any]:
    """Verify, run all sides in turn, and return the report of the medians."""
    folder, runs = Path(task.checkpoint), dict[str, list[dict[str, Any]]]()
    block_weights, head_weights, width = matrix_sizes(folder)
    num_tokens = task.sentences * task.row_tokens
    has_peer = arguments.peer == "accelerate"
    store = None if arguments.store == "plain" else sides.store_of(folder, arguments.store)
    disk, gemm = [], []
    with sides.capped(arguments.ram) as cgroup:

        def run(name: str, task: Task) -> dict[str, Any]:
            # Only the streamed sides are capped: the resident block and head may be larger than the cap.
            cap = None if name == "resident" else cgroup
            side, lies_in = ("ours", store) if name == "store" and store else (name, folder)
            given = dataclasses.asdict(dataclasses.replace(task, checkpoint=str(lies_in)))
            return sides.run("tuning_sides", side, given, folder=lies_in, cgroup=cap)

        difference = verify(task, run)
        print(f"verified: the gradient of one block differs by {difference:.2g}", file=sys.stderr)
        if task.top:
            whole = run("ours", dataclasses.replace(task, top=arguments.blocks, steps=1))
        names = ["ours"] if task.top else ["ours", "resident", *(["accelerate"] if has_peer else [])]
        if store is not None:
            names.insert(1, "store")
        for _ in range(arguments.repeat):
            disk.append(machine.measure_disk(folder).bytes_per_second)
            gemm.append(machine.gemm_flops_per_second(min(num_tokens, 1024), width))
            for name in names:
                runs.setdefault(name, []).append(found := run(name, task))
                if name == "ours":  # `resident` runs the same micro-batches
                    packed = {key: found[key] for key in ("rider_tokens", "padding_tokens")}
                    task = dataclasses.replace(task, **packed)
                print(f"{name}: {found['wall_s']:.2f} s, disk {disk[-1] / 1e9:.2f} GB/s", file=sys.stderr)
    ours, rate = runs["ours"], statistics.median(disk)
    # A block is computed forward, recomputed, and gives the gradient of its input; the head is not recomputed.
    flops = 6 * block_weights * arguments.blocks * num_tokens + 4 * head_weights * task.num_answers
    report = {
        **dataclasses.asdict(task), "geometry": arguments.geometry, "blocks": arguments.blocks, "tokens": num_tokens,
        "verified": True, "gradient_difference": difference, "capped_by_cgroup": cgroup is not None,
        "repeat": arguments.repeat, "disk_gb_per_s": rate / 1e9, "gemm_tflop_per_s": statistics.median(gemm) / 1e12,
        **{k: ours[0][k] for k in ("weight_bytes", "resident_bytes", "num_resident", "mapped", "rider_tokens")},
        **{k: sides.median(ours, k) for k in ("plan_peak_bytes", "peak_rss_bytes", "predicted_s", "predicted_later_s")},
        "first": step_of([run["steps"][:1] for run in ours]),
        "later": step_of([run["steps"][1:] for run in ours]),
    }  # fmt: skip
    del report["gradient"]
    for name in ("first", "later"):
        report[name]["read_of_forward"] = report[name]["read_bytes"] / report["weight_bytes"]
    if store is not None:
        report |= {"store": arguments.store, "stored": of_store(ours, runs["store"])}
        if arguments.store in ("bf16", "lossless"):
            check("a step on the store", runs["store"][0]["steps"][0], ours[0]["steps"][0])
    if task.top:
        check(
            "the first step above the frozen blocks", ours[0]["steps"][0], {"loss": whole["steps"][0]["loss"]}
        )
        report |= {
            "first_epoch_s": sides.median(ours, "first_epoch_s"), "later_epoch_s": report["later"]["seconds"],
            "without_frozen_s": whole["first_epoch_s"],
        }  # fmt: skip
        report["first_of_later"] = report["first_epoch_s"] / report["later_epoch_s"]
        return report
    report["gemm_limit_s"] = flops / statistics.median(gemm)
    block_s, head_s = (sides.median(runs["resident"], key) for key in ("block_s", "head_s"))
    report |= {
        "resident_block_s": block_s, "resident_head_s": head_s,
        "resident_compute_s": block_s * arguments.blocks + head_s,
        "micro_batches": runs["resident"][0]["micro_batches"],
    }  # fmt: skip
    for name in ("first", "later"):
        step = report[name]
        # The kernel does not report what it reads for a mapped model: everything, once.
        mapped_bytes = report["weight_bytes"] if name == "first" else 0
        step["disk_limit_s"] = (mapped_bytes if report["mapped"] else step["read_bytes"]) / rate
        step["limit_s"] = max(step["disk_limit_s"], report["resident_compute_s"])
        step["efficiency"] = step["limit_s"] / step["seconds"]
    if has_peer:
        theirs = runs["accelerate"]
        check("our first step", ours[0]["steps"][0], theirs[0])
        peer_s = sides.median(theirs, "wall_s")
        report |= {
            "peer": "accelerate", "peer_wall_s": peer_s, "peer_read_bytes": sides.median(theirs, "read_bytes"),
            "peer_peak_rss_bytes": sides.median(theirs, "peak_rss_bytes"), "speedup": peer_s / report["first"]["seconds"],
            "speedup_later": peer_s / report["later"]["seconds"],
        }  # fmt: skip
    return report


def of_store(plain: list[dict[str, Any]], stored: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the times of steps on a store, and how far its first loss and gradient are from the checkpoint's."""
    first, plain_first = stored[0]["steps"][0], plain[0]["steps"][0]
    return {
        "first": step_of([run["steps"][:1] for run in stored]),
        "later": step_of([run["steps"][1:] for run in stored]),
        "peak_rss_bytes": sides.median(stored, "peak_rss_bytes"),
        **{f"{key}_change": first[key] / plain_first[key] - 1 for key in ("loss", "grad_norm")},
    }


def step_of(runs: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the median of the runs' median step."""
    return {
        key: statistics.median(sides.median(steps, key) for steps in runs)
        for key in ("seconds", "read_bytes", "wait_s", "compute_s", "loss")
    }


def summary(report: dict[str, Any]) -> str:
    """Return the limit, the measurement and the ratio as text."""
    lines = [
        f"{report['sentences']} sentences, {report['tokens']} tokens a step; peak RSS "
        f"{format_bytes(report['peak_rss_bytes'])}, planned {format_bytes(report['plan_peak_bytes'])}"
    ]
    for name in ("first", "later"):
        step = report[name]
        text = (
            f"{name} step {step['seconds']:.2f} s: waiting {step['wait_s']:.2f} s, computing {step['compute_s']:.2f} s, "
            f"{format_bytes(step['read_bytes'])} read, {step['read_of_forward']:.2f} of a forward sweep"
        )
        if "limit_s" in step:
            text += (
                f"; limit {step['limit_s']:.2f} s (disk {step['disk_limit_s']:.2f} s, in memory "
                f"{report['resident_compute_s']:.2f} s), {step['efficiency']:.2f} of it"
            )
        lines.append(text)
    if "first_epoch_s" in report:
        lines.append(
            f"first epoch {report['first_epoch_s']:.2f} s, later {report['later_epoch_s']:.2f} s: "
            f"{report['first_of_later']:.2f} times; without frozen blocks {report['without_frozen_s']:.2f} s"
        )
    if "stored" in report:
        stored = report["stored"]
        first, later = stored["first"], stored["later"]
        lines.append(
            f"{report['store']}: first step {first['seconds']:.2f} s, later {later['seconds']:.2f} s, "
            f"{format_bytes(later['read_bytes'])} read; peak RSS {format_bytes(stored['peak_rss_bytes'])}; loss "
            f"{stored['loss_change']:+.2%}, gradient's norm {stored['grad_norm_change']:+.2%}"
        )
    if "peer" in report:
        lines.append(
            f"accelerate {report['peer_wall_s']:.2f} s, {format_bytes(int(report['peer_read_bytes']))} read: "
            f"{report['speedup']:.2f} times the first step, {report['speedup_later']:.2f} times a later one"
        )
    return "\n".join(lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, and refuse options that do not go together."""
    parser = sides.parser(__doc__, peers=("accelerate", "none"))
    parser.add_argument("--sentences", type=int, default=32, help="number of sentences of a step")
    parser.add_argument(
        "--sentence-tokens",
        type=int,
        default=24,
        help="number of tokens of each; all but the first are learned",
    )
    parser.add_argument("--virtual-tokens", type=int, default=8, help="number of virtual tokens")
    parser.add_argument("--steps", type=int, default=3, help="number of steps in one process")
    parser.add_argument("--top", type=int, default=0, help="tune a deep prompt on this many uppermost blocks")
    parser.add_argument(
        "--store", choices=["plain", *STORES], default="plain", help="also measure such a store"
    )
    parser.add_argument("--stream-all", action="store_true", help="keep no block in memory")
    parser.add_argument(
        "--peer-batch", type=int, help="number of sentences of each of the peer's passes; by default all"
    )
    arguments = parser.parse_args(argv)
    if arguments.sentence_tokens < 2:
        parser.error("--sentence-tokens must be at least 2: the first token is not learned")
    if arguments.steps < 2:
        parser.error("--steps must be at least 2: the first is another than the later ones")
    if arguments.top and not 0 < arguments.top < arguments.blocks:
        parser.error(f"--top {arguments.top} leaves no frozen blocks of {arguments.blocks} blocks")
    if arguments.top and arguments.peer == "accelerate":
        parser.error("--top has no peer")
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Measure, then print the limit, the measurement, the ratio and the JSON document."""
    arguments = parse(argv)
    folder = sides.checkpoint(arguments.checkpoint, arguments.geometry, arguments.blocks)
    task = Task(
        str(folder), arguments.ram, arguments.sentences, arguments.sentence_tokens, arguments.virtual_tokens,
        arguments.steps, arguments.top, not arguments.stream_all, arguments.peer_batch or arguments.sentences,
    )  # fmt: skip
    report = measure(arguments, task)
    print(summary(report))
    finish("tuning_step", report, arguments.report)


if __name__ == "__main__":
    main()
