"""A forward pass over a checkpoint larger than memory: the physical limit, us, and accelerate's disk offload.

    python -m benchmarks.forward_pass --geometry llama-70b --blocks 4 --tokens 13 --ram 5GiB --peer accelerate
    python -m benchmarks.forward_pass --case mixed --ram 5GiB --peer accelerate
    python -m benchmarks.forward_pass --case many --sentences 5000 --sentence-tokens 20 --ram 5GiB --repeat 1
    python -m benchmarks.forward_pass --warm --tokens 13 --ram 16GiB --peer accelerate
    python -m benchmarks.forward_pass --store lossless --tokens 13 --ram 5GiB
    python -m benchmarks.forward_pass --formats bf16,fp8,mxfp4,int4,gguf --tokens 13 --ram 5GiB --llama-python PATH

Each run is a process of its own under the same memory cap (a cgroup where the machine allows one), on the same
bytes. The page cache of its files is dropped before the run; with --warm there is no cap, and the files are read into
the page cache first. Only the pass is timed, not the imports and not the opening of the checkpoint. Before anything is
timed, our logits after one block must equal those of transformers' own model in memory, bit for bit. The rates of the
disk and the processor, and the time of the same micro-batches on blocks in memory, are measured in turn with the runs.
The last line of stdout is one JSON document.

With --store, a store is made beside the checkpoint where it is missing, and passes over both are run in turn. The
blocks are compared: their bytes, and the time until the head begins. The head keeps 16 bits, and has a larger share of
a model of a few blocks than of a whole one. A lossless store must give the same bits; for other stores, the distance of
the logits after one block from the resident model's is reported.

With --formats, checkpoints of the same geometry in several formats are passed in turn, and a table is printed; --checkpoint is then the
folder of the checkpoints' folders. With --llama-python, llama.cpp passes the GGUF file in turn with us, run by that interpreter.
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
from transformers import AutoModelForCausalLM

from benchmarks import format_passes, machine, sides
from benchmarks.decoded import config_of
from benchmarks.make_checkpoint import num_model_blocks
from benchmarks.report import finish
from benchmarks.sentences import Task, lengths_of
from slowllm.modeling.layout import find_blocks
from slowllm.options import format_bytes
from slowllm.storage.manifest import STORES

Runs = dict[str, list[dict[str, Any]]]


def verify(
    task: Task, run: Callable[[str, Task], dict[str, Any]], store: Path | None, is_exact: bool
) -> tuple[dict[str, int], float]:
    """Compare our logits after one block, and those of a store, with the resident model's.

    Returns:
        how micro-batches are packed, and the distance of the store's logits, relative to the norm.
    Raises:
        SystemExit: a bit differs that must not; the message gives the largest difference.
    """
    with tempfile.TemporaryDirectory() as folder:
        ours, resident, stored = (Path(folder) / name for name in ("ours", "resident", "stored"))
        ours_report = run("verify", dataclasses.replace(task, logits=str(ours)))
        packed = {name: int(ours_report[name]) for name in ("rider_tokens", "padding_tokens")}
        run("resident", dataclasses.replace(task, logits=str(resident), **packed))
        wanted = torch.load(resident)
        compare(torch.load(ours), wanted)
        if store is None:
            return packed, 0.0
        run("verify", dataclasses.replace(task, checkpoint=str(store), logits=str(stored), **packed))
        if is_exact:
            compare(torch.load(stored), wanted)
        one, other = (torch.cat(parts).double() for parts in (torch.load(stored), wanted))
        return packed, float((one - other).norm() / other.norm())


def compare(ours: list[torch.Tensor], resident: list[torch.Tensor]) -> None:
    """Exit with an error unless the logits of every micro-batch are equal."""
    largest = 0.0
    for a, b in zip(ours, resident, strict=True):
        if not torch.equal(a, b):
            largest = max(largest, float((a.double() - b.double()).abs().nan_to_num(nan=torch.inf).max()))
    if largest:
        sys.exit(
            f"not verified: our logits of one block differ from the resident model's by up to {largest:.3g}"
        )


def measure(arguments: argparse.Namespace, task: Task) -> dict[str, Any]:
    """Verify, run all sides in turn, and return the report of the medians."""
    names = {
        "uniform": ["ours", "resident", "accelerate"],
        "mixed": ["ours", "resident", "accelerate", "accelerate_one_by_one"],
        "many": ["many"],
    }[task.case]
    folder, runs = Path(task.checkpoint), Runs()
    store = None if arguments.store == "plain" else sides.store_of(folder, arguments.store)
    if store is not None:
        names.insert(1, "store")
    block_weights, head_weights, width = matrix_sizes(folder)
    disk, gemm = [], []
    with sides.capped(None if arguments.warm else arguments.ram) as cgroup:

        def run(name: str, task: Task) -> dict[str, Any]:
            # Only the streamed sides are capped: the resident block and head may be larger than the cap.
            cap = None if name == "resident" else cgroup
            side, lies_in = ("ours", store) if name == "store" and store else (name, Path(task.checkpoint))
            given = dataclasses.asdict(dataclasses.replace(task, checkpoint=str(lies_in)))
            return sides.run("passes", side, given, folder=lies_in, cgroup=cap, warm=arguments.warm)

        packed, distance = verify(task, run, store, arguments.store in ("bf16", "lossless"))
        print("verified: one block gives the resident model's bits", file=sys.stderr)
        task = dataclasses.replace(task, **packed)
        for _ in range(arguments.repeat):
            disk.append(machine.measure_disk(folder))
            gemm.append(
                machine.gemm_flops_per_second(min(sum(lengths_of(task)), task.rider_tokens, 1024), width)
            )
            for name in names:
                if name.startswith("accelerate") and not arguments.peer:
                    continue
                runs.setdefault(name, []).append(found := run(name, task))
                rate = f"disk {disk[-1].bytes_per_second / 1e9:.2f} GB/s"
                print(f"{name}: {found['wall_s']:.2f} s, {rate}", file=sys.stderr)

    ours = runs[names[0]]
    lengths = lengths_of(task)
    num_heads = ours[0].get("num_scored", len(lengths))
    flops = 2 * (block_weights * arguments.blocks * sum(lengths) + head_weights * num_heads)
    report = {
        "geometry": arguments.geometry, "blocks": arguments.blocks, "case": task.case, "tokens": sum(lengths),
        "sequences": len(lengths), "ram": task.ram, "store": arguments.store,
        "page_cache": "warm" if arguments.warm else "cold", "capped_by_cgroup": cgroup is not None,
        "repeat": arguments.repeat, "verified": True, **packed,
        "disk_gb_per_s": statistics.median(rate.bytes_per_second for rate in disk) / 1e9,
        "read_core_s_per_gb": statistics.median(rate.core_seconds_per_gb for rate in disk),
        "gemm_tflop_per_s": statistics.median(gemm) / 1e12,
        "gemm_limit_s": flops / statistics.median(gemm),
        "walls_s": [run["wall_s"] for run in ours],
        "weight_bytes": ours[0]["weight_bytes"], "resident_bytes": ours[0]["resident_bytes"],
        "num_resident": ours[0]["num_resident"], "mapped": ours[0]["mapped"],
    }  # fmt: skip
    for key in ("wall_s", "read_bytes", "wait_s", "compute_s", "peak_rss_bytes", "predicted_s"):
        if key in ours[0]:
            report[key] = sides.median(ours, key)
    report["gb_per_s"] = report["weight_bytes"] / report["wall_s"] / 1e9
    report["disk_limit_s"] = disk_bytes(report) / report["disk_gb_per_s"] / 1e9
    if task.case == "many":
        report.update({key: ours[0][key] for key in ("num_sweeps", "num_scored", "mean_log_prob")})
        report["written_bytes"] = max(run["written_bytes"] for run in ours)
        report["limit_s"] = max(report["disk_limit_s"], report["gemm_limit_s"])
        report["gemm_efficiency"] = report["gemm_limit_s"] / report["wall_s"]
    else:
        report.update(of_passes(arguments, report, ours, runs["resident"]))
    report["efficiency"] = report["limit_s"] / report["wall_s"]
    if store is not None:
        report["stored"] = of_store(ours, runs["store"], arguments.blocks, distance, report["disk_gb_per_s"])
    if arguments.peer:
        report.update(of_peer(task, report, runs))
    return report


def of_store(
    plain: list[dict[str, Any]], stored: list[dict[str, Any]], num_blocks: int, distance: float, disk: float
) -> dict[str, Any]:
    """Return the bytes and the time of a store's blocks, also relative to those of the plain checkpoint."""
    block_bytes, plain_bytes = stored[0]["block_bytes"], plain[0]["block_bytes"]
    wall_s, plain_s = (num_blocks * sides.median(runs, "block_s") for runs in (stored, plain))
    return {
        "block_bytes": block_bytes, "block_bytes_of_plain": block_bytes / plain_bytes,
        "blocks_s": wall_s, "plain_blocks_s": plain_s, "blocks_of_plain": wall_s / plain_s,
        "blocks_disk_s": block_bytes / disk / 1e9, "head_s": sides.median(stored, "rest_s"),
        "plain_head_s": sides.median(plain, "rest_s"), "logits_distance": distance,
        **{key: sides.median(stored, key) for key in ("wall_s", "wait_s", "compute_s", "read_bytes", "peak_rss_bytes")},
        "walls_s": [run["wall_s"] for run in stored],
        "same_tokens": statistics.mean(a == b for a, b in zip(stored[0]["top"], plain[0]["top"], strict=True)),
        "predicted_s": sides.median(stored, "predicted_s"), "granularity": stored[0]["granularity"],
    }  # fmt: skip


def disk_bytes(report: dict[str, Any]) -> float:
    """Return the bytes that the measured pass must read from the disk.

    A first sweep must read no more than the weights: what is read twice is our fault, not a limit. The kernel does not
    report what it reads for a mapped model; it reads everything unless the page cache is warm.
    """
    if report["mapped"]:
        return 0 if report["page_cache"] == "warm" else report["weight_bytes"]
    if report["case"] == "many":
        return report["read_bytes"]
    return min(report["read_bytes"], report["weight_bytes"])


def of_passes(
    arguments: argparse.Namespace,
    report: dict[str, Any],
    ours: list[dict[str, Any]],
    resident: list[dict[str, Any]],
) -> dict[str, Any]:
    """Return the limit that resident blocks set, the later sweeps, and the time of the whole model."""
    block_s, head_s = sides.median(resident, "block_s"), sides.median(resident, "head_s")
    compute_s = arguments.blocks * block_s + head_s
    later = [
        {key: statistics.median(run["sweeps"][n][key] for run in ours) for key in ("wall_s", "read_bytes")}
        for n in range(1, arguments.sweeps)
    ]
    for sweep in later:
        sweep["limit_s"] = max(sweep["read_bytes"] / report["disk_gb_per_s"] / 1e9, compute_s)
    return {
        "micro_batches": ours[0]["micro_batches"],
        "resident_block_s": block_s, "resident_head_s": head_s, "resident_compute_s": compute_s,
        "limit_s": max(report["disk_limit_s"], compute_s),
        "later_sweeps": later,
        # A first sweep reads every block, so its blocks take as long as those of a model with more blocks.
        "full_model_s": sides.median(ours, "block_s") * num_model_blocks(arguments.geometry) + sides.median(ours, "rest_s"),
    }  # fmt: skip


def of_peer(task: Task, report: dict[str, Any], runs: Runs) -> dict[str, Any]:
    """Return the times of the peer, for each way of running it."""
    peers, wall = runs["accelerate"], report["wall_s"]
    peer_wall = sides.median(peers, "wall_s")
    ours_top, peer_top = runs["ours"][0]["top"], peers[0]["top"]
    same = statistics.mean(a == b for a, b in zip(ours_top, peer_top, strict=True))
    # Another batch rounds differently, and random weights have near ties; but not this many.
    if same < 0.5:
        sys.exit(f"accelerate finds the same likeliest token for only {same:.0%} of the sequences")
    found = {
        "peer": "accelerate",
        "peer_wall_s": peer_wall,
        "peer_gb_per_s": report["weight_bytes"] / peer_wall / 1e9,
        "peer_peak_rss_bytes": sides.median(peers, "peak_rss_bytes"),
        "peer_same_tokens": same,
    }
    if task.case == "mixed":
        singles = runs["accelerate_one_by_one"]
        found["peer_padded_s"], found["peer_one_by_one_s"] = peer_wall, sides.median(singles, "wall_s")
        found["peer_one_by_one_measured"] = singles[0]["measured"]
        found["speedup_padded"] = peer_wall / wall
        found["speedup_one_by_one"] = found["peer_one_by_one_s"] / wall
        found["peer_wall_s"] = min(peer_wall, found["peer_one_by_one_s"])
    found["speedup"] = found["peer_wall_s"] / wall
    if report["later_sweeps"]:
        later = statistics.median(sweep["wall_s"] for sweep in report["later_sweeps"])
        found["speedup_later"] = found["peer_wall_s"] / later
    return found


def matrix_sizes(folder: Path) -> tuple[float, int, int]:
    """Return how many weights of a block a token is multiplied with, how many of the head, and the model's width."""
    config = config_of(folder)
    config.num_hidden_layers = 1
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    _, (block,) = find_blocks(model)
    num_experts = getattr(config, "num_local_experts", 1)
    share = getattr(config, "num_experts_per_tok", 1) / num_experts
    matrices = [(name, weight.numel()) for name, weight in block.named_parameters() if weight.dim() > 1]
    weights = sum(count * (share if "experts" in name else 1) for name, count in matrices)
    return weights, model.get_output_embeddings().weight.numel(), config.hidden_size


def summary(report: dict[str, Any]) -> str:
    """Return the limit, the measurement and the ratio as text."""
    computing = (
        f"computing in memory {report['resident_compute_s']:.2f} s, "
        if "resident_compute_s" in report
        else ""
    )
    lines = [
        f"limit      {report['limit_s']:.2f} s: disk {report['disk_limit_s']:.2f} s at {report['disk_gb_per_s']:.2f} "
        f"GB/s, {computing}GEMM {report['gemm_limit_s']:.2f} s at {report['gemm_tflop_per_s']:.2f} TFLOP/s",
        f"measured   {report['wall_s']:.2f} s, page cache {report['page_cache']}: waiting {report['wait_s']:.2f} s, "
        f"computing {report['compute_s']:.2f} s, {format_bytes(report['read_bytes'])} read, "
        f"peak RSS {format_bytes(report['peak_rss_bytes'])}",
        f"ratio      {report['efficiency']:.2f} of the limit",
    ]
    if "full_model_s" in report:
        lines.append(f"all blocks {report['full_model_s']:.0f} s, extrapolated")
    if "stored" in report:
        stored = report["stored"]
        lines += [
            f"{report['store']:<10} blocks {stored['blocks_s']:.2f} s, {stored['blocks_of_plain']:.2f} of bf16's "
            f"{stored['plain_blocks_s']:.2f} s, with {stored['block_bytes_of_plain']:.3f} of the bytes (the disk needs "
            f"{stored['blocks_disk_s']:.2f} s); head {stored['head_s']:.2f} s",
            f"           waiting {stored['wait_s']:.2f} s, computing {stored['compute_s']:.2f} s, peak RSS "
            f"{format_bytes(stored['peak_rss_bytes'])}; logits after one block {stored['logits_distance']:.2g} away",
        ]
    if "peer" in report:
        lines.append(f"{report['peer']} {report['peer_wall_s']:.2f} s: {report['speedup']:.2f} times as long")
    if "peer_padded_s" in report:
        lines.append(
            f"           padded {report['peer_padded_s']:.2f} s; one by one {report['peer_one_by_one_s']:.2f} s "
            f"({report['peer_one_by_one_measured']} measured, the rest extrapolated)"
        )
    return "\n".join(lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, and refuse options that do not go together."""
    parser = sides.parser(__doc__)
    sides.add_format_option(parser)
    parser.add_argument(
        "--formats",
        type=format_passes.formats_of,
        metavar="A,B,...",
        help="compare these formats instead of one",
    )
    parser.add_argument(
        "--llama-python",
        type=Path,
        metavar="PATH",
        help="interpreter that has llama-cpp-python, for the format gguf",
    )
    parser.add_argument("--case", choices=["uniform", "mixed", "many"], default="uniform")
    parser.add_argument(
        "--tokens", type=int, default=13, help="case uniform: number of tokens of all sequences together"
    )
    parser.add_argument(
        "--sequences", type=int, default=1, help="case uniform: number of sequences of equal length"
    )
    parser.add_argument("--sentences", type=int, default=5000, help="case many: number of sentences to score")
    parser.add_argument(
        "--sentence-tokens", type=int, default=20, help="case many: number of tokens of each sentence"
    )
    parser.add_argument(
        "--store", choices=["plain", *STORES], default="plain", help="kind of store of the weights"
    )
    parser.add_argument(
        "--sweeps", type=int, default=1, help="number of sweeps in one process; the first is compared"
    )
    parser.add_argument(
        "--warm", action="store_true", help="read all files into the page cache first, and set no cap"
    )
    parser.add_argument("--stream-all", action="store_true", help="keep no block in memory")
    arguments = parser.parse_args(argv)
    if arguments.tokens % arguments.sequences:
        parser.error(f"--tokens {arguments.tokens} are not {arguments.sequences} sequences of equal length")
    if arguments.case == "many" and (arguments.peer or arguments.sweeps > 1 or arguments.store != "plain"):
        parser.error("--case many has no peer and no store, and as many sweeps as it takes")
    if arguments.case == "many" and arguments.sentence_tokens < 2:
        parser.error("--sentence-tokens must be at least 2: the first token is not scored")
    if arguments.formats and (
        (arguments.case, arguments.store, arguments.sweeps) != ("uniform", "plain", 1) or arguments.peer
    ):
        parser.error("--formats are compared in one sweep of the case uniform, without --store and --peer")
    if arguments.llama_python and (
        format_passes.GGUF not in (arguments.formats or []) or arguments.sequences != 1
    ):
        parser.error("--llama-python passes one sequence of the format gguf; name it in --formats")
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Measure, then print the limit, the measurement, the ratio and the JSON document."""
    arguments = parse(argv)
    folder = None
    if not arguments.formats:
        folder = sides.checkpoint(
            arguments.checkpoint, arguments.geometry, arguments.blocks, arguments.format
        )
    task = Task(
        checkpoint=str(folder), ram=arguments.ram, case=arguments.case, tokens=arguments.tokens,
        sequences=arguments.sequences, sentences=arguments.sentences, sentence_tokens=arguments.sentence_tokens,
        sweeps=arguments.sweeps, keep_resident=not arguments.stream_all,
    )  # fmt: skip
    if arguments.formats:
        report = format_passes.measure(arguments, task, verify, matrix_sizes)
        print(format_passes.summary(report))
    else:
        report = measure(arguments, task)
        print(summary(report))
    finish("forward_pass", report, arguments.report)


if __name__ == "__main__":
    main()
