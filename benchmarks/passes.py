"""Run one side of the forward benchmark: slowllm, the same blocks in memory, or accelerate.

    python -m benchmarks.passes --side NAME '{"checkpoint": ...}'

All sides compute the same sentences: the logits of each sentence's last position, or the likelihoods of whole
sentences. Only passes are timed, never imports or the opening of a checkpoint.
The last line of stdout is one JSON document.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from benchmarks import sides
from benchmarks.sentences import Task, last_logits, lengths_of, micro_batches, sentences, tops
from slowllm.planning.host_plan import MAX_RIDER_TOKENS, padding_worth
from slowllm.planning.packing import pack

# Sentences that are timed one by one: the peer reads the whole checkpoint for each.
NUM_ONE_BY_ONE = 2
# Sentences of the case "many" that are compared with the resident model.
NUM_VERIFIED = 64
NUM_RESIDENT_ROUNDS = 3


def load_ours(task: Task, *, keep_resident: bool | None = None) -> Any:
    """Open the checkpoint with slowllm; all its options are here."""
    from slowllm.planning.job import Job
    from slowllm.runtime.load import open_model
    from slowllm.runtime.rates import quick_rates
    from slowllm.runtime.streamed_lm import StreamedLM

    keep = task.keep_resident if keep_resident is None else keep_resident
    lengths, rates = lengths_of(task), quick_rates(Path(task.checkpoint), "bfloat16")
    batches = pack(lengths, MAX_RIDER_TOKENS, task.padding_tokens or padding_worth(rates))
    padded = sum(len(batch) * lengths[batch[0]] for batch in batches)
    job = Job(padded, max(lengths), repeated=task.sweeps > 1, forward_only=True, keeps_results=False)
    return open_model(
        StreamedLM, task.checkpoint, ram=task.ram, dtype="bf16", keep_resident=keep, job=job, rates=rates
    )


def run_ours(task: Task) -> dict[str, Any]:
    """Run sweeps with slowllm, all micro-batches in one ride. All are reported; the first is the measurement."""
    passages: list[Any] = []
    opening = time.perf_counter()
    with load_ours(task) as lm, lm.watching(passages.append), torch.no_grad():
        open_s = time.perf_counter() - opening
        config = lm.model.config.get_text_config()
        rows = sentences(task, config.vocab_size)
        batches = micro_batches(rows, task.rider_tokens, task.padding_tokens)
        sweeps = []
        for _ in range(task.sweeps):
            passages.clear()
            before, started = lm.report, time.perf_counter()
            jobs = [
                lambda numbers=numbers: last_logits(lm.model, [rows[n] for n in numbers])
                for numbers in batches
            ]
            parts = lm.ride(jobs)
            wall, after = time.perf_counter() - started, lm.report
            seconds = [0.0] * lm.num_stops
            for passage in passages:
                seconds[passage.stop] += passage.wait_seconds + passage.compute_seconds
            num_body = num_body_stops(lm)
            head_s = sum(seconds[num_body:])
            sweeps.append(
                {
                    "wall_s": wall,
                    "read_bytes": after.read_bytes - before.read_bytes,
                    "wait_s": after.wait_seconds - before.wait_seconds,
                    "compute_s": after.compute_seconds - before.compute_seconds,
                    "block_s": (wall - head_s) / config.num_hidden_layers,
                    "rest_s": head_s,
                }
            )
        return {
            **sweeps[0],
            **predicted(lm),
            "open_s": open_s,
            "sweeps": sweeps,
            **held(lm),
            "micro_batches": [len(numbers) for numbers in batches],
            "top": tops(batches, parts),
        }


def run_many(task: Task) -> dict[str, Any]:
    """Score every sentence with slowllm, as `slowllm forward` does."""
    from slowllm.inference.lines import Line, score_lines

    passages: list[Any] = []
    with load_ours(task) as lm, lm.watching(passages.append), torch.no_grad():
        config = lm.model.config.get_text_config()
        ids = sentences(task, config.vocab_size)
        lines = (Line(number, "", tuple(row.tolist())) for number, row in enumerate(ids, 1))
        process = psutil.Process()
        before, written = lm.report, process.io_counters().write_bytes
        started = time.perf_counter()
        num_scored, log_likelihood = 0, 0.0
        for _, likelihood in score_lines(lm, lines, prefix=None):
            num_scored += len(likelihood.log_probs)
            log_likelihood += likelihood.log_likelihood
        wall, after = time.perf_counter() - started, lm.report
        stops = [passage.stop for passage in passages]
        return {
            "wall_s": wall,
            "read_bytes": after.read_bytes - before.read_bytes,
            "wait_s": after.wait_seconds - before.wait_seconds,
            "compute_s": after.compute_seconds - before.compute_seconds,
            "written_bytes": process.io_counters().write_bytes - written,
            "num_sweeps": 1 + sum(b <= a for a, b in itertools.pairwise(stops)),
            "num_scored": num_scored,
            "mean_log_prob": log_likelihood / num_scored,
            **held(lm),
        }


def held(lm: Any) -> dict[str, Any]:
    """Return the sizes of the model, and what of it stays in memory."""
    body = lm.layout.stops[: num_body_stops(lm)]
    return {
        "weight_bytes": lm.weight_bytes,
        "block_bytes": sum(placement.num_bytes for stop in body for placement in stop),
        "resident_bytes": lm.plan.resident_bytes,
        "granularity": lm.plan.granularity,
        "plan_peak_bytes": lm.plan.peak_bytes,
        "num_resident": len(lm.plan.resident),
        "mapped": not lm.plan.streams,
    }


def predicted(lm: Any) -> dict[str, float]:
    """Return the plan's forecast of a first sweep."""
    return {"predicted_s": lm.plan.forecast.first_seconds}


def num_body_stops(lm: Any) -> int:
    """Return the number of stops before those of the head."""
    return len(lm.layout.modules)


def run_verify(task: Task) -> dict[str, Any]:
    """Save the logits that slowllm computes with the first block alone, every stop streamed; return how it packs."""
    from slowllm.modeling.layout import find_blocks

    with load_ours(task) as lm:
        plan = lm.plan
    del lm  # frees its memory
    with load_ours(task, keep_resident=False) as lm, torch.no_grad():
        _, blocks = find_blocks(lm.model)
        # The carousel skips stops that no rider needs, so the same checkpoint can be used.
        del blocks[1:]
        config = lm.model.config.get_text_config()
        config.num_hidden_layers = 1
        rows = sentences(task, config.vocab_size)[:NUM_VERIFIED]
        jobs = [
            lambda numbers=numbers: last_logits(lm.model, [rows[n] for n in numbers])
            for numbers in micro_batches(rows, plan.rider_tokens, plan.padding_tokens)
        ]
        torch.save(lm.ride(jobs), task.logits)
    return {"rider_tokens": plan.rider_tokens, "padding_tokens": plan.padding_tokens}


def run_logits(task: Task) -> dict[str, Any]:
    """Save the logits that slowllm computes with all blocks."""
    with load_ours(task) as lm, torch.no_grad():
        rows = sentences(task, lm.model.config.get_text_config().vocab_size)
        batches = micro_batches(rows, task.rider_tokens, task.padding_tokens)
        jobs = [
            lambda numbers=numbers: last_logits(lm.model, [rows[n] for n in numbers]) for numbers in batches
        ]
        torch.save(lm.ride(jobs), task.logits)
    return {}


def run_resident(task: Task) -> dict[str, Any]:
    """Run the micro-batches through transformers' own model with one block in memory; time block and head."""
    model = one_block(Path(task.checkpoint))
    rows = sentences(task, model.config.get_text_config().vocab_size)
    rows = rows[:NUM_VERIFIED] if task.logits else rows
    batches = micro_batches(rows, task.rider_tokens, task.padding_tokens)
    with torch.no_grad():
        warm = [last_logits(model, [rows[n] for n in numbers]) for numbers in batches]
        if task.logits:
            torch.save(warm, task.logits)
            return {}
        rounds = [
            _resident_round(model, [[rows[n] for n in numbers] for numbers in batches])
            for _ in range(NUM_RESIDENT_ROUNDS)
        ]
    block_s, head_s = (statistics.median(times) for times in zip(*rounds, strict=True))
    return {"block_s": block_s, "head_s": head_s, "wall_s": block_s + head_s}


def _resident_round(model: Any, batches: list[list[Tensor]]) -> tuple[float, float]:
    """Return the seconds inside the block, and those outside of it: embedding, norm and head."""
    from slowllm.modeling.layout import find_blocks

    (block,) = find_blocks(model)[1]
    marks: list[float] = []
    hooks = [
        block.register_forward_pre_hook(lambda *_: marks.append(time.perf_counter())),
        block.register_forward_hook(lambda *_: marks.append(time.perf_counter())),
    ]
    started = time.perf_counter()
    for rows in batches:
        last_logits(model, rows)
    wall = time.perf_counter() - started
    for hook in hooks:
        hook.remove()
    inside = sum(marks[1::2]) - sum(marks[::2])
    return inside, wall - inside


def one_block(folder: Path) -> Any:
    """Return transformers' own model with only a checkpoint's first block, embedding and head, in memory in bf16."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    from benchmarks.decoded import config_of, first_block

    config = config_of(folder)
    config.get_text_config().num_hidden_layers = 1
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
        None, config=config, state_dict=dict(first_block(folder)), dtype=torch.bfloat16
    )
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    model.eval().requires_grad_(False)
    # A frozen head would be multiplied in a batched product for a slice of positions, for which torch copies its whole
    # weight for every row: 23 s for one sequence at a width of 8192.
    model.get_output_embeddings().weight.requires_grad_(True)
    return model


def run_accelerate(task: Task) -> dict[str, Any]:
    """Run all sentences in one batch with accelerate's disk offload, padded where lengths differ."""
    model, offload = offloaded(task.checkpoint)
    with offload, torch.no_grad():
        rows = sentences(task, model.config.vocab_size)
        started = time.perf_counter()
        logits = last_logits(model, rows)
        wall = time.perf_counter() - started
    return {"wall_s": wall, "top": logits.argmax(-1).tolist()}


def run_accelerate_one_by_one(task: Task) -> dict[str, Any]:
    """Run a few sentences with accelerate, each in a pass of its own, and extrapolate to all sentences."""
    model, offload = offloaded(task.checkpoint)
    with offload, torch.no_grad():
        rows = sentences(task, model.config.vocab_size)
        started = time.perf_counter()
        for row in rows[:NUM_ONE_BY_ONE]:
            last_logits(model, [row])
        wall = time.perf_counter() - started
    measured = len(rows[:NUM_ONE_BY_ONE])
    return {"wall_s": wall / measured * len(rows), "measured": measured}


def offloaded(checkpoint: str) -> tuple[Any, tempfile.TemporaryDirectory[str]]:
    """Open the checkpoint with transformers' device_map and everything on disk: accelerate's disk offload."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(checkpoint)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    base = skeleton.base_model_prefix
    device_map = {f"{base}.{name}": "disk" for name, _ in skeleton.base_model.named_children()}
    device_map["lm_head"] = "disk"
    # Only an index is written to the folder: safetensors are mapped in place.
    offload = tempfile.TemporaryDirectory()
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.bfloat16, device_map=device_map, offload_folder=offload.name
    )
    return model.eval(), offload


RUNNERS = {
    "ours": run_ours,
    "many": run_many,
    "verify": run_verify,
    "logits": run_logits,
    "resident": run_resident,
    "accelerate": run_accelerate,
    "accelerate_one_by_one": run_accelerate_one_by_one,
}


if __name__ == "__main__":
    sides.serve(RUNNERS, Task)
