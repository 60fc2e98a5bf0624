"""Questions answered by likelihood, on a checkpoint larger than memory: us, and accelerate's disk offload.

    python -m benchmarks.scoring --geometry llama-70b --blocks 4 --ram 5GiB --peer accelerate
    python -m benchmarks.scoring --questions 64 --header-tokens 200 --choice-tokens 3

Questions have one header in common, and each has its own tokens and some choices, all of them random. slowllm answers
them as `lm.choose` does; `whole` is slowllm without sharing the rows' common prefixes; accelerate runs padded batches of
`--peer-batch` rows, of which a few are measured and the rest extrapolated. Each run is a process of its own under the
same memory cap, with the page cache dropped; the sides run in turn. Our probabilities must agree with each other and
with accelerate's before a speed is reported. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, sides
from benchmarks.report import finish
from slowllm.inference.text import Query

# Number of the peer's passes that are measured.
NUM_PEER_PASSES = 2
# bf16, a different order of summation, and logits of random weights, which are close together.
TOLERANCE = 0.05


@dataclass(frozen=True)
class Task:
    """What one process does; passed as JSON."""

    checkpoint: str
    ram: str
    questions: int
    header_tokens: int
    question_tokens: int
    choices: int
    choice_tokens: int
    peer_batch: int
    is_exact: bool = False


def queries_of(task: Task, vocab_size: int) -> list[Query]:
    """Return the choices of every question, in order, the same in every process."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, vocab_size, (count,), generator=generator).tolist())

    header = ids(task.header_tokens)
    found = []
    for _ in range(task.questions):
        length = int(
            torch.randint(task.question_tokens // 2, task.question_tokens * 3 // 2, (), generator=generator)
        )
        context = header + ids(length)
        found += [Query(context, ids(task.choice_tokens)) for _ in range(task.choices)]
    return found


def run_ours(task: Task, *, share: bool = True) -> dict[str, Any]:
    """Answer all questions through slowllm."""
    from slowllm import load
    from slowllm.inference.scoring import job_of_queries, score_queries
    from slowllm.runtime.description import ModelInfo
    from slowllm.runtime.rates import quick_rates

    info = ModelInfo(task.checkpoint)
    queries = queries_of(task, info.config.vocab_size)
    rates = quick_rates(info.folder, "bfloat16")
    job = job_of_queries(queries, info, rates, share=share)
    relative = task.choice_tokens == 1
    with load(info, ram=task.ram, dtype="bf16", job=job, rates=rates, exact=task.is_exact) as lm:
        started = time.perf_counter()
        found = [a.log_likelihood for a in score_queries(lm, queries, relative=relative, share=share)]
        wall = time.perf_counter() - started
        report = lm.report
        return {
            "wall_s": wall,
            "probabilities": probabilities(task, found),
            "num_sweeps": report.num_passages / (len(lm.layout.modules) if relative else lm.num_stops),
            "read_bytes": report.read_bytes,
            "wait_s": report.wait_seconds,
            "compute_s": report.compute_seconds,
            "weight_bytes": lm.weight_bytes,
            "plan_peak_bytes": lm.plan.peak_bytes,
            "planned_tokens": job.num_tokens,
            "predicted_s": lm.plan.forecast.seconds,
        }


def run_whole(task: Task) -> dict[str, Any]:
    """Answer all questions through slowllm, without sharing common prefixes."""
    return run_ours(task, share=False)


def run_accelerate(task: Task) -> dict[str, Any]:
    """Answer the first batches of questions with accelerate's disk offload, and extrapolate to all."""
    from benchmarks.passes import offloaded

    model, offload = offloaded(task.checkpoint)
    with offload, torch.no_grad():
        queries = queries_of(task, model.config.vocab_size)
        rows = list(batches(task, queries))
        found: list[float] = []
        started = time.perf_counter()
        for row in rows[:NUM_PEER_PASSES]:
            found += scores(model, row)
        wall = time.perf_counter() - started
    measured = len(rows[:NUM_PEER_PASSES])
    return {
        "wall_s": wall / measured * len(rows),
        "measured": measured,
        "num_sweeps": len(rows),
        "probabilities": probabilities(task, found),
    }


def batches(task: Task, queries: list[Query]) -> Iterator[list[Query]]:
    """Yield the queries of whole questions, batched as well as a user of the peer can batch them.

    A question whose choices have one token needs one row, as in lm-eval; otherwise each choice needs its own.
    """
    rows_each = 1 if task.choice_tokens == 1 else task.choices
    step = max(1, task.peer_batch // rows_each) * task.choices
    for start in range(0, len(queries), step):
        yield queries[start : start + step]


def scores(model: Any, queries: list[Query]) -> list[float]:
    """Return the log-likelihoods of queries, from one padded pass."""
    contexts = list(dict.fromkeys(query.ids for query in queries))
    width = max(map(len, contexts))
    ids = torch.zeros(len(contexts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, context in enumerate(contexts):
        ids[row, : len(context)], mask[row, : len(context)] = torch.tensor(context), 1
    shortest = min(len(query.context) for query in queries)
    logits = model(
        input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=width - shortest + 1
    ).logits
    first, place = shortest - 1, {context: row for row, context in enumerate(contexts)}
    found = []
    for query in queries:
        start = len(query.context) - 1 - first
        log_probs = logits[place[query.ids], start : start + len(query.continuation)].float().log_softmax(-1)
        found.append(float(log_probs.gather(-1, torch.tensor(query.continuation)[:, None]).sum()))
    return found


def probabilities(task: Task, found: list[float]) -> list[float]:
    """Return the probability of each question's first choice."""
    return torch.tensor(found).view(-1, task.choices).softmax(-1)[:, 0].tolist()


RUNNERS = {"ours": run_ours, "whole": run_whole, "accelerate": run_accelerate}


def measure(arguments: argparse.Namespace, task: Task) -> dict[str, Any]:
    """Run all sides in turn, compare the answers, and return the report of the medians."""
    folder, runs = Path(task.checkpoint), dict[str, list[dict[str, Any]]]()
    disk = []
    with sides.capped(arguments.ram) as cgroup:
        for _ in range(arguments.repeat):
            disk.append(machine.measure_disk(folder).bytes_per_second)
            for name in (
                "ours",
                *(() if arguments.only else ("whole",)),
                *(["accelerate"] if arguments.peer else ()),
            ):
                runs.setdefault(name, []).append(
                    found := sides.run(
                        "scoring", name, dataclasses.asdict(task), folder=folder, cgroup=cgroup
                    )
                )
                print(f"{name}: {found['wall_s']:.2f} s, disk {disk[-1] / 1e9:.2f} GB/s", file=sys.stderr)
    ours = runs["ours"][0]
    for name, (found, *_) in runs.items():
        pairs = list(zip(ours["probabilities"], found["probabilities"], strict=False))
        worst = max(abs(a - b) for a, b in pairs)
        if worst > TOLERANCE:
            sys.exit(f"not verified: {name} gives a choice another probability, by {worst:.3g}")
    walls = {name: statistics.median(run["wall_s"] for run in found) for name, found in runs.items()}
    rate = statistics.median(disk)
    report = {
        **dataclasses.asdict(task), "geometry": arguments.geometry, "blocks": arguments.blocks, "verified": len(runs) > 1,
        "capped_by_cgroup": cgroup is not None, "repeat": arguments.repeat, "disk_gb_per_s": rate / 1e9,
        "disk_limit_s": ours["weight_bytes"] / rate, "wall_s": walls["ours"],
        "questions_per_sweep": task.questions / ours["num_sweeps"],
        "questions_per_second": task.questions / walls["ours"],
        **{k: ours[k] for k in ("num_sweeps", "read_bytes", "wait_s", "compute_s", "peak_rss_bytes", "plan_peak_bytes",
                                "planned_tokens", "predicted_s")},
    }  # fmt: skip
    if "whole" in walls:
        report |= {"whole_s": walls["whole"], "speedup_by_sharing": walls["whole"] / walls["ours"]}
    if arguments.peer:
        report |= {
            "peer": "accelerate", "peer_wall_s": walls["accelerate"], "speedup": walls["accelerate"] / walls["ours"],
            "peer_passes": runs["accelerate"][0]["num_sweeps"], "peer_passes_measured": runs["accelerate"][0]["measured"],
        }  # fmt: skip
    return report


def main(argv: list[str] | None = None) -> None:
    """Make or find the checkpoint, measure and report."""
    parser = sides.parser(__doc__)
    sides.add_format_option(parser)
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument(
        "--header-tokens", type=int, default=100, help="number of tokens that all questions begin with"
    )
    parser.add_argument(
        "--question-tokens", type=int, default=24, help="mean number of further tokens of a question"
    )
    parser.add_argument("--choices", type=int, default=2)
    parser.add_argument("--choice-tokens", type=int, default=1)
    parser.add_argument("--peer-batch", type=int, default=16, help="number of rows of the peer's batch")
    parser.add_argument(
        "--only", action="store_true", help="leave out rows that share no prefix; nothing is compared then"
    )
    parser.add_argument(
        "--exact",
        action="store_true",
        help="of a mixture, let each micro-batch have the bits that it has alone",
    )
    arguments = parser.parse_args(argv)
    folder = sides.checkpoint(arguments.checkpoint, arguments.geometry, arguments.blocks, arguments.format)
    task = Task(
        str(folder), arguments.ram, arguments.questions, arguments.header_tokens, arguments.question_tokens,
        arguments.choices, arguments.choice_tokens, arguments.peer_batch, arguments.exact,
    )  # fmt: skip
    report = measure(arguments, task)
    print(
        f"{report['questions']} questions in {report['wall_s']:.2f} s, {report['num_sweeps']:.3g} sweeps"
        + (f"; each by itself {report['whole_s']:.2f} s" if "whole_s" in report else "")
        + (f"; accelerate {report['peer_wall_s']:.2f} s" if "peer" in report else "")
    )
    finish("scoring", report, arguments.report)


if __name__ == "__main__":
    if not sides.serve(RUNNERS, Task):
        main()
