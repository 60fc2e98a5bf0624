"""Forward passes over one geometry in several formats, in turn: bytes, the disk's limit and the time of each.

Called by `benchmarks.forward_pass` with `--formats`. The limit of a format is the larger of its bytes over the disk's rate and of the
products over the processor's. Before anything is timed, one block must give the bits of transformers' own model with the decoded
weights. llama.cpp is measured on the same GGUF file, in a process of the interpreter that is named; all blocks must give it logits that
are near ours, as it rounds activations to 8 bits. It reads while it opens a file, so its opening is counted, and ours is shown too.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, sides
from benchmarks.make_checkpoint import GEOMETRIES, make_checkpoint
from benchmarks.make_gguf import make_gguf
from benchmarks.native_weights import FORMATS
from benchmarks.sentences import Task, sentences
from slowllm.options import format_bytes

# Short words of the command line.
WORDS = {"int4": "compressed-int4", "mxfp4": "compressed-mxfp4", "gguf": "gguf-q4_k"}
GGUF = "gguf-q4_k"
# The least cosine of our logits and llama.cpp's; random weights of another seed have about zero.
NEAR = 0.98
LLAMA = "llama.cpp"

Runs = dict[str, list[dict[str, Any]]]
Verify = Callable[..., tuple[dict[str, int], float]]


def formats_of(text: str) -> list[str]:
    """Return the formats that a comma-separated list names, as `type` of argparse.

    Raises:
        argparse.ArgumentTypeError: a name is not known, or stands there twice.
    """
    names = [WORDS.get(word, word) for word in text.split(",")]
    known = [*sorted(FORMATS), GGUF]
    for name in names:
        if name not in known or names.count(name) > 1:
            raise argparse.ArgumentTypeError(
                f"{name!r} is no format, or named twice; there are {', '.join([*known, *WORDS])}"
            )
    return names


def folder_of(parent: Path, geometry: str, blocks: int, storage: str) -> Path:
    """Return the folder of a format's checkpoint, which is written where it is missing."""
    folder = parent / f"slowllm-{geometry}-{blocks}-{storage}"
    if storage == GGUF:
        if not any(folder.glob("*.gguf")):
            make_gguf(geometry, blocks, folder)
    elif not (folder / "config.json").is_file():
        make_checkpoint(geometry, blocks, folder, storage=storage)
    return folder


def measure(
    arguments: argparse.Namespace, task: Task, verify: Verify, sizes: Callable[[Path], tuple[float, int, int]]
) -> dict[str, Any]:
    """Verify all formats, run them in turn, and return the report of the medians.

    Args:
        arguments: of the command line.
        task: of each run, but for its checkpoint.
        verify: compares one block with transformers' model in memory, and returns how micro-batches are packed.
        sizes: returns the weights of a block and of the head that a token is multiplied with, and the model's width.
    """
    parent = arguments.checkpoint or Path("/var/tmp")
    folders = {
        name: folder_of(parent, arguments.geometry, arguments.blocks, name) for name in arguments.formats
    }
    tasks = {name: dataclasses.replace(task, checkpoint=str(folder)) for name, folder in folders.items()}
    runs, rates, cosine = Runs(), [], None
    block_weights, head_weights, width = sizes(folders[arguments.formats[0]])
    with sides.capped(None if arguments.warm else arguments.ram) as cgroup:

        def run(name: str, task: Task) -> dict[str, Any]:
            cap = None if name == "resident" else cgroup
            folder = Path(task.checkpoint)
            return sides.run(
                "passes", name, dataclasses.asdict(task), folder=folder, cgroup=cap, warm=arguments.warm
            )

        def run_llama(logits: str = "") -> dict[str, Any]:
            given = {**llama_task(tasks[GGUF]), "logits": logits}
            program = [str(arguments.llama_python), str(Path(__file__).with_name("llama_side.py"))]
            return sides.run_program(program, given, folder=folders[GGUF], cgroup=cgroup, warm=arguments.warm)

        for name, own in tasks.items():
            packed, _ = verify(own, run, None, is_exact=True)
            tasks[name] = dataclasses.replace(own, **packed)
            print(f"verified: one block of {name} gives the resident model's bits", file=sys.stderr)
        if arguments.llama_python:
            cosine = cosine_of(tasks[GGUF], run, run_llama)
            print(f"verified: {LLAMA}'s logits and ours have a cosine of {cosine:.4f}", file=sys.stderr)
        for _ in range(arguments.repeat):
            for name, own in tasks.items():
                disk = machine.measure_disk(folders[name]).bytes_per_second
                gemm = machine.gemm_flops_per_second(min(arguments.tokens, own.rider_tokens, 1024), width)
                rates.append((disk, gemm))
                sidesteps = {name: lambda own=own: run("ours", own)}
                if name == GGUF and arguments.llama_python:
                    sidesteps[LLAMA] = run_llama
                for side, start in sidesteps.items():
                    runs.setdefault(side, []).append(found := start())
                    print(f"{side}: {found['wall_s']:.2f} s, disk {disk / 1e9:.2f} GB/s", file=sys.stderr)

    disk, gemm = (statistics.median(rate) for rate in zip(*rates, strict=True))
    flops = 2 * (block_weights * arguments.blocks * arguments.tokens + head_weights * arguments.sequences)
    report = {
        "geometry": arguments.geometry, "blocks": arguments.blocks, "case": task.case, "tokens": arguments.tokens,
        "sequences": arguments.sequences, "ram": task.ram, "page_cache": "warm" if arguments.warm else "cold",
        "capped_by_cgroup": cgroup is not None, "repeat": arguments.repeat, "verified": True, "disk_gb_per_s": disk / 1e9,
        "gemm_tflop_per_s": gemm / 1e12, "gemm_limit_s": flops / gemm,
        "formats": {name: of_format(runs[name], disk, flops / gemm) for name in tasks},
    }  # fmt: skip
    if LLAMA in runs:
        report["peer"] = of_llama(runs[LLAMA], report["formats"][GGUF], cosine)
    return report


def llama_task(task: Task) -> dict[str, Any]:
    """Return what the peer is told: the file, the tokens that we pass, and the number of threads."""
    (file,) = Path(task.checkpoint).glob("*.gguf")
    (ids,) = sentences(task, GEOMETRIES[file.stem][2]["vocab_size"])
    return {"file": str(file), "ids": ids.tolist(), "threads": len(os.sched_getaffinity(0))}


def cosine_of(
    task: Task, run: Callable[[str, Task], dict[str, Any]], run_llama: Callable[[str], dict[str, Any]]
) -> float:
    """Return the cosine of our logits of the last token and the peer's, over all blocks.

    Raises:
        SystemExit: they are further apart than roundings can be.
    """
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder) / "ours", Path(folder) / "theirs"
        run("logits", dataclasses.replace(task, logits=str(ours)))
        run_llama(str(theirs))
        own = torch.cat(torch.load(ours)).float().flatten()
        other = torch.frombuffer(bytearray(theirs.read_bytes()), dtype=torch.float32)
    cosine = float(torch.nn.functional.cosine_similarity(own, other, 0))
    if not cosine > NEAR:
        sys.exit(f"not verified: {LLAMA}'s logits and ours have a cosine of {cosine:.3f}")
    return cosine


def of_format(runs: list[dict[str, Any]], disk: float, gemm_s: float) -> dict[str, Any]:
    """Return a format's bytes, limit and time."""
    wall_s, num_bytes = sides.median(runs, "wall_s"), runs[0]["weight_bytes"]
    if not runs[0]["mapped"]:
        num_bytes = min(num_bytes, sides.median(runs, "read_bytes"))
    limit_s = max(num_bytes / disk, gemm_s)
    return {
        "sweep_bytes": num_bytes, "disk_limit_s": num_bytes / disk, "limit_s": limit_s, "wall_s": wall_s,
        "efficiency": limit_s / wall_s, "walls_s": [run["wall_s"] for run in runs], "mapped": runs[0]["mapped"],
        **{key: sides.median(runs, key) for key in ("open_s", "wait_s", "compute_s", "peak_rss_bytes")},
        "top": runs[0]["top"],
    }  # fmt: skip


def of_llama(runs: list[dict[str, Any]], ours: dict[str, Any], cosine: float | None) -> dict[str, Any]:
    """Return the peer's times on the GGUF file, and how many times as long as ours they are."""
    keys = ("open_s", "pass_s", "wall_s", "peak_rss_bytes")
    found = {"peer": LLAMA, **{key: sides.median(runs, key) for key in keys}, "cosine": cosine}
    return {
        **found,
        "same_token": runs[0]["top"] == ours["top"],
        "of_our_pass": found["pass_s"] / ours["wall_s"],
        "of_ours_with_opening": found["wall_s"] / (ours["wall_s"] + ours["open_s"]),
    }


def summary(report: dict[str, Any]) -> str:
    """Return the formats as a table, and the peer."""
    lines = [
        f"disk {report['disk_gb_per_s']:.2f} GB/s, GEMM {report['gemm_tflop_per_s']:.2f} TFLOP/s: "
        f"{report['gemm_limit_s']:.2f} s; {report['tokens']} tokens, page cache {report['page_cache']}",
        f"{'format':<18} {'a sweep':>10} {'limit s':>8} {'median s':>9} {'share':>6} {'peak RSS':>10}",
    ]
    for name, row in report["formats"].items():
        lines.append(
            f"{name:<18} {format_bytes(row['sweep_bytes']):>10} {row['limit_s']:>8.2f} {row['wall_s']:>9.2f} "
            f"{row['efficiency']:>6.2f} {format_bytes(row['peak_rss_bytes']):>10}"
            f"{'  mapped' if row['mapped'] else ''}"
        )
    if peer := report.get("peer"):
        lines.append(
            f"{LLAMA} on {GGUF}: opening {peer['open_s']:.2f} s, pass {peer['pass_s']:.2f} s; ours with opening "
            f"{report['formats'][GGUF]['open_s'] + report['formats'][GGUF]['wall_s']:.2f} s, so "
            f"{peer['of_ours_with_opening']:.2f} times as long; cosine of the logits {peer['cosine']:.4f}"
        )
    return "\n".join(lines)
