"""A forward pass over a checkpoint larger than memory: the physical limit, us, and accelerate's disk offload.

    python -m benchmarks.forward_pass --geometry llama-70b --blocks 4 --tokens 13 --ram 5GiB --peer accelerate

Each run is a process of its own under the same memory cap (a cgroup where the machine allows one), on the same
bytes, the page cache of its files dropped before (unless --warm). Both sides compute the logits of each
sequence's last position. What is timed is the pass, not imports and not opening the checkpoint. The disk's and the
processor's rates are measured in turn with the runs. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.make_checkpoint import GEOMETRIES, make_checkpoint, num_model_blocks
from slowllm.options import format_bytes, parse_bytes


def batch(num_tokens: int, num_sequences: int, vocab_size: int) -> torch.Tensor:
    """Return (sequences, tokens / sequences) random ids, the same on both sides."""
    shape = (num_sequences, num_tokens // num_sequences)
    return torch.randint(5, vocab_size, shape, generator=torch.Generator().manual_seed(0))


def run_ours(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run sweeps with slowllm; each is reported."""
    import slowllm

    with slowllm.load(arguments.checkpoint, ram=arguments.ram, dtype="bf16") as lm, torch.no_grad():
        ids = batch(arguments.tokens, arguments.sequences, lm.model.config.vocab_size)
        # Micro-batches of whole sequences, as the plan says.
        size = max(1, lm.plan.rider_tokens // ids.shape[1])
        sweeps = []
        for _ in range(arguments.sweeps):
            before, started = lm.report, time.perf_counter()
            jobs = [
                lambda part=part: lm.model(part, logits_to_keep=1, use_cache=False).logits[:, -1]
                for part in ids.split(size)
            ]
            logits = torch.cat(lm.ride(jobs))
            wall, after = time.perf_counter() - started, lm.report
            sweeps.append(
                {
                    "wall_s": wall,
                    "read_bytes": after.read_bytes - before.read_bytes,
                    "wait_s": after.wait_seconds - before.wait_seconds,
                    "compute_s": after.compute_seconds - before.compute_seconds,
                }
            )
        return {
            **sweeps[0],
            "sweeps": sweeps,
            "num_resident": len(lm.plan.resident),
            "weight_bytes": lm.weight_bytes,
            "logits_sum": float(logits.double().sum()),
            "top": logits.argmax(-1).tolist(),
        }


def run_accelerate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the same pass with transformers' device_map and disk offload, as accelerate does it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(arguments.checkpoint)
    with torch.device("meta"):
        blocks = AutoModelForCausalLM.from_config(config)
    base = blocks.base_model_prefix
    device_map = {f"{base}.{name}": "disk" for name, _ in blocks.base_model.named_children()}
    device_map["lm_head"] = "disk"
    # The folder gets an index only: safetensors are mapped where they lie.
    with tempfile.TemporaryDirectory() as offload:
        model = AutoModelForCausalLM.from_pretrained(
            arguments.checkpoint, dtype=torch.bfloat16, device_map=device_map, offload_folder=offload
        ).eval()
    ids = batch(arguments.tokens, arguments.sequences, config.vocab_size)
    started = time.perf_counter()
    with torch.no_grad():
        logits = model(ids, logits_to_keep=1, use_cache=False).logits[:, -1].float()
    wall = time.perf_counter() - started
    return {"wall_s": wall, "logits_sum": float(logits.double().sum()), "top": logits.argmax(-1).tolist()}


RUNNERS = {"ours": run_ours, "accelerate": run_accelerate}


def run_child(name: str, arguments: argparse.Namespace, cgroup: Path | None) -> dict[str, Any]:
    """Run one side in a process of its own and return what it reports."""
    command = [
        sys.executable, "-m", "benchmarks.forward_pass", "--child", name, "--checkpoint", str(arguments.checkpoint),
        "--geometry", arguments.geometry, "--blocks", str(arguments.blocks), "--tokens", str(arguments.tokens),
        "--sequences", str(arguments.sequences), "--ram", arguments.ram, "--sweeps", str(arguments.sweeps),
    ]  # fmt: skip
    if not arguments.warm:
        machine.drop_page_cache(arguments.checkpoint)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment,
        preexec_fn=(lambda: machine.enter_cgroup(cgroup)) if cgroup else None,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{name} failed ({done.returncode}):\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run everything in turn and put the medians together."""
    hidden = GEOMETRIES[arguments.geometry][2]["hidden_size"]
    cgroup = None if arguments.warm else machine.memory_cgroup("slowllm-bench", parse_bytes(arguments.ram))
    if cgroup is None and not arguments.warm:
        print("no memory cgroup can be made here; only --ram caps us, and nothing the peer", file=sys.stderr)
    runs: dict[str, list[dict[str, Any]]] = {}
    disk, gemm = [], []
    try:
        for _ in range(arguments.repeat):
            machine.drop_page_cache(arguments.checkpoint)
            disk.append(machine.disk_bytes_per_second(arguments.checkpoint))
            gemm.append(machine.gemm_flops_per_second(min(arguments.tokens, 1024), hidden))
            for name in ["ours", *([arguments.peer] if arguments.peer else [])]:
                found = run_child(name, arguments, cgroup)
                runs.setdefault(name, []).append(found)
                print(f"{name}: {found['wall_s']:.2f} s, disk {disk[-1] / 1e9:.2f} GB/s", file=sys.stderr)
    finally:
        if cgroup is not None:
            machine.remove_cgroup(cgroup)

    def median(name: str, key: str) -> float:
        return statistics.median(run[key] for run in runs[name])

    weight_bytes = runs["ours"][0]["weight_bytes"]
    disk_rate, gemm_rate = statistics.median(disk), statistics.median(gemm)
    disk_s = median("ours", "read_bytes") / disk_rate
    gemm_s = weight_bytes / 2 * 2 * arguments.tokens / gemm_rate
    wall = median("ours", "wall_s")
    report: dict[str, Any] = {
        "geometry": arguments.geometry, "blocks": arguments.blocks, "tokens": arguments.tokens,
        "sequences": arguments.sequences, "ram": arguments.ram, "page_cache": "warm" if arguments.warm else "cold",
        "capped_by_cgroup": cgroup is not None,
        "disk_gb_per_s": disk_rate / 1e9, "gemm_tflop_per_s": gemm_rate / 1e12,
        "disk_limit_s": disk_s, "gemm_limit_s": gemm_s, "limit_s": max(disk_s, gemm_s),
        "wall_s": wall, "efficiency": max(disk_s, gemm_s) / wall,
        "read_bytes": median("ours", "read_bytes"), "wait_s": median("ours", "wait_s"),
        "compute_s": median("ours", "compute_s"), "peak_rss_bytes": median("ours", "peak_rss_bytes"),
        "later_sweeps": [
            {key: statistics.median(run["sweeps"][n][key] for run in runs["ours"]) for key in ("wall_s", "read_bytes")}
            for n in range(1, arguments.sweeps)
        ],
        "num_resident": runs["ours"][0]["num_resident"],
    }  # fmt: skip
    per_block = wall * num_model_blocks(arguments.geometry) / arguments.blocks
    report["full_model_s_at_most"] = per_block
    if arguments.peer:
        assert runs["ours"][0]["top"] == runs[arguments.peer][0]["top"], (
            "both sides must find the same tokens"
        )
        report["peer"] = arguments.peer
        report["peer_wall_s"] = median(arguments.peer, "wall_s")
        report["speedup"] = report["peer_wall_s"] / wall
    return report


def main() -> None:
    """Parse the command line, measure, print the limit, the measurement and the ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--geometry", choices=sorted(GEOMETRIES), default="llama-70b")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=13)
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--ram", default="5GiB")
    parser.add_argument(
        "--sweeps", type=int, default=1, help="sweeps in one process; the first is the one compared"
    )
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--peer", choices=["accelerate"])
    parser.add_argument("--warm", action="store_true", help="leave the page cache, and no cap")
    parser.add_argument("--checkpoint", type=Path, help="made there if it is missing")
    parser.add_argument("--child", choices=sorted(RUNNERS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        report = RUNNERS[arguments.child](arguments)
        report["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(report))
        return
    if arguments.checkpoint is None:
        arguments.checkpoint = Path("/var/tmp") / f"slowllm-{arguments.geometry}-{arguments.blocks}"
    if not (arguments.checkpoint / "config.json").is_file():
        make_checkpoint(arguments.geometry, arguments.blocks, arguments.checkpoint)
    report = measure(arguments)
    print(
        f"limit {report['limit_s']:.2f} s ({format_bytes(report['read_bytes'])} at {report['disk_gb_per_s']:.2f} GB/s; "
        f"GEMM {report['gemm_limit_s']:.2f} s)\nmeasured {report['wall_s']:.2f} s, efficiency {report['efficiency']:.2f}, "
        f"peak RSS {format_bytes(report['peak_rss_bytes'])}"
    )
    if arguments.peer:
        print(f"{report['peer']} {report['peer_wall_s']:.2f} s: {report['speedup']:.2f} times as long")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
