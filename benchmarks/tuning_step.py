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
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks import machine, sides
from benchmarks.forward_pass import matrix_sizes
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
# So small that the prompt hardly moves, and every step is the same work.
LEARNING_RATE = 1e-6
FROZEN = "the frozen blocks"


@dataclass(frozen=True)
class Task:
    """What one process does; passed as JSON.

    Attributes:
        top: number of uppermost blocks that a deep prompt is tuned on; 0 for a shallow prompt.
        keep_resident: whether slowllm may keep stops in memory.
        peer_batch: number of sentences of each of the peer's passes.
        rider_tokens: number of tokens of a micro-batch of `resident`, as slowllm has planned it.
        padding_tokens: maximum number of padding tokens in one, likewise.
        gradient: file for the gradient that is compared; where it is given, nothing is timed.
    """

    checkpoint: str
    ram: str
    sentences: int
    sentence_tokens: int
    virtual_tokens: int
    steps: int
    top: int
    keep_resident: bool
    peer_batch: int
    rider_tokens: int = 0
    padding_tokens: int = 0
    gradient: str = ""

    @property
    def row_tokens(self) -> int:
        """Number of input tokens of a sentence, prompt included; its last token is only a target."""
        return self.virtual_tokens + self.sentence_tokens - 1

    @property
    def num_answers(self) -> int:
        """Number of tokens that are learned in a step."""
        return self.sentences * (self.sentence_tokens - 1)


def sentences_of(task: Task, vocab_size: int) -> Tensor:
    """Return the token ids of all sentences, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(5, vocab_size, (task.sentences, task.sentence_tokens), generator=generator)


def start_of(task: Task, model: Any) -> Tensor:
    """Return the vectors (P, H) float32 that a recipe with init="vocab" and seed 0 starts from; they need a gradient."""
    vocab_size = model.config.get_text_config().vocab_size
    ids = torch.randint(vocab_size, (task.virtual_tokens,), generator=torch.Generator().manual_seed(0))
    vectors: Tensor = model.get_input_embeddings()(ids)
    return vectors.detach().float().requires_grad_(True)


def embedded(model: Any, prompt: Tensor, rows: Tensor) -> Tensor:
    """Return the input embeddings of sentences after a prompt."""
    text = model.get_input_embeddings()(rows[:, :-1])
    return torch.cat([prompt.to(text.dtype).expand(len(rows), -1, -1), text], 1)


def loss_of(model: Any, prompt: Tensor, rows: Tensor, total: int) -> Tensor:
    """Return the sentences' share of the mean cross entropy of `total` tokens, computed by transformers' own model."""
    inputs = embedded(model, prompt, rows)
    hidden = model.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
    # Only the positions that are learned, as one matrix; `passes.one_block` says what a slice costs.
    logits = model.get_output_embeddings()(hidden[:, len(prompt) :].flatten(0, 1))
    return F.cross_entropy(logits.float(), rows[:, 1:].flatten(), reduction="sum") / total


def tune(task: Task, on_open: Callable[..., Any], on_record: Callable[[dict[str, Any]], Any]) -> None:
    """Tune with slowllm; all its options are here."""
    from slowllm.runtime.description import ModelInfo
    from slowllm.tuning.examples import Example
    from slowllm.tuning.examples import Task as Learned
    from slowllm.tuning.recipe import Recipe
    from slowllm.tuning.session import RunOptions
    from slowllm.tuning.tune import tune_tasks

    info = ModelInfo(task.checkpoint)
    rows = sentences_of(task, info.config.get_text_config().vocab_size).tolist()
    examples = [Example(f"sentence {n}", tuple(row[:1]), tuple(row[1:])) for n, row in enumerate(rows, 1)]
    recipe = Recipe(
        kind="deep" if task.top else "shallow", top=task.top or None, num_tokens=task.virtual_tokens, init="vocab",
        num_steps=task.steps, batch_size=task.sentences, schedule="constant", learning_rate=LEARNING_RATE,
    )  # fmt: skip
    options = RunOptions(
        task.ram, dtype="bf16", keep_resident=task.keep_resident, on_open=on_open, on_record=on_record
    )
    tune_tasks(info, [Learned("sentences", tuple(examples))], [recipe], options)


def run_ours(task: Task) -> dict[str, Any]:
    """Tune with slowllm; report every step, and the time from opening the model to the end of the first step."""
    opened: list[tuple[float, Any]] = []
    marks: list[tuple[float, Any]] = []
    steps: list[dict[str, Any]] = []

    def on_open(lm: Any, job: Any, what: str, *_: Any) -> None:
        # Of two models only the second is used later: a reference to the first would keep its memory.
        started = opened[0][0] if opened else time.perf_counter()
        opened[:] = [(started, None if what == FROZEN else lm)]
        marks[:] = [(started, lm.report)]

    def on_record(record: dict[str, Any]) -> None:
        before, after = marks[-1][1], opened[0][1].report
        marks.append((time.perf_counter(), after))
        copied = {key: record[key] for key in ("seconds", "read_bytes", "loss", "grad_norm")}
        waited, computed = (
            getattr(after, key) - getattr(before, key) for key in ("wait_seconds", "compute_seconds")
        )
        steps.append({**copied, "wait_s": waited, "compute_s": computed})

    tune(task, on_open, on_record)
    ((started, lm),) = opened
    return {
        "wall_s": steps[0]["seconds"],
        "steps": steps,
        "first_epoch_s": marks[1][0] - started,
        "weight_bytes": lm.weight_bytes,
        "mapped": not lm.plan.ring_bytes,
        "resident_bytes": lm.plan.resident_bytes,
        "num_resident": len(lm.plan.resident),
        "rider_tokens": lm.plan.rider_tokens,
        "padding_tokens": lm.plan.padding_tokens,
        "plan_peak_bytes": lm.plan.peak_bytes,
        "predicted_s": lm.plan.forecast.first_seconds,
        "predicted_later_s": lm.plan.forecast.later_seconds,
    }


def run_verify(task: Task) -> dict[str, Any]:
    """Save the gradient that slowllm computes with the first block alone, and report the step that `tune` takes."""
    from slowllm.modeling.layout import find_blocks
    from slowllm.modeling.losses import token_losses

    found: dict[str, Any] = {}

    def gradient(lm: Any, rows: Tensor) -> Tensor:
        places = torch.arange(len(rows)).repeat_interleave(task.sentence_tokens - 1)
        positions = task.virtual_tokens + torch.arange(task.sentence_tokens - 1).repeat(len(rows))
        prompt = start_of(task, lm.model)
        losses = token_losses(
            lm.model, places, positions, rows[:, 1:].flatten(), inputs_embeds=embedded(lm.model, prompt, rows)
        )
        return torch.autograd.grad(losses.sum() / task.num_answers, prompt)[0]

    def on_open(lm: Any, *_: Any) -> None:
        _, blocks = find_blocks(lm.model)
        # The carousel skips stops that no rider needs, so the same checkpoint can be used.
        del blocks[1:]
        config = lm.model.config.get_text_config()
        config.num_hidden_layers = 1
        found.update({key: getattr(lm.plan, key) for key in ("rider_tokens", "padding_tokens")})
        packed = dataclasses.replace(task, **found)
        jobs = [
            functools.partial(gradient, lm, rows)
            for rows in micro_batches(packed, sentences_of(task, config.vocab_size))
        ]
        torch.save(sum(lm.ride(jobs)), task.gradient)

    tune(task, on_open, found.update)
    return {key: found[key] for key in ("rider_tokens", "padding_tokens", "loss", "grad_norm")}


def micro_batches(task: Task, rows: Tensor) -> list[Tensor]:
    """Pack sentences into micro-batches as slowllm does."""
    from slowllm.planning.packing import pack

    batches = pack([task.row_tokens] * len(rows), task.rider_tokens, task.padding_tokens)
    return [rows[torch.tensor(batch)] for batch in batches]


def run_resident(task: Task) -> dict[str, Any]:
    """Run the step's micro-batches forward and backward with one block in memory; time it, and embedding, norm and head."""
    from benchmarks.passes import one_block
    from slowllm.modeling.layout import find_blocks

    model = one_block(Path(task.checkpoint)).requires_grad_(False)
    (block,) = find_blocks(model)[1]
    block.forward = functools.partial(
        checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
    )
    batches = micro_batches(task, sentences_of(task, model.config.get_text_config().vocab_size))
    prompt = start_of(task, model)

    def learn(batches: list[Tensor]) -> float:
        losses = []
        for rows in batches:
            losses.append(loss := loss_of(model, prompt, rows, task.num_answers))
            loss.backward()
        return float(sum(loss.detach() for loss in losses))

    if task.gradient:
        loss = learn(batches)
        torch.save(prompt.grad, task.gradient)
        return {"loss": loss}
    learn(batches[:1])
    marks = mark_block(block)
    started = time.perf_counter()
    learn(batches)
    wall = time.perf_counter() - started
    inside = sum(marks[1::2]) - sum(marks[::2])
    return {"wall_s": wall, "block_s": inside, "head_s": wall - inside, "micro_batches": len(batches)}


def mark_block(block: Any) -> list[float]:
    """Return a list to which the time is appended when a block is entered and left, in the forward and the backward pass."""
    marks: list[float] = []

    def mark(*_: Any) -> None:
        marks.append(time.perf_counter())

    def enter(module: Any, args: tuple[Any, ...]) -> None:
        args[0].register_hook(mark)  # its gradient is complete: the backward pass leaves the block
        mark()

    def leave(module: Any, args: tuple[Any, ...], output: Any) -> None:
        mark()
        (output[0] if isinstance(output, tuple) else output).register_hook(mark)

    block.register_forward_pre_hook(enter)
    block.register_forward_hook(leave)
    return marks


def run_accelerate(task: Task) -> dict[str, Any]:
    """Take the step by hand with accelerate's disk offload."""
    from benchmarks.passes import offloaded

    model, offload = offloaded(task.checkpoint)
    with offload:
        model.requires_grad_(False)
        rows = sentences_of(task, model.config.get_text_config().vocab_size)
        prompt, loss = start_of(task, model), 0.0
        process = psutil.Process()
        before, started = process.io_counters().read_bytes, time.perf_counter()
        for batch in rows.split(task.peer_batch):
            part = loss_of(model, prompt, batch, task.num_answers)
            part.backward()
            loss += float(part.detach())
        wall = time.perf_counter() - started
        read = process.io_counters().read_bytes - before
    assert prompt.grad is not None, "of the backward passes"
    return {"wall_s": wall, "read_bytes": read, "loss": loss, "grad_norm": float(prompt.grad.norm())}


RUNNERS = {"ours": run_ours, "verify": run_verify, "resident": run_resident, "accelerate": run_accelerate}
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
            return sides.run("tuning_step", side, given, folder=lies_in, cgroup=cap)

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
        **{k: median(ours, k) for k in ("plan_peak_bytes", "peak_rss_bytes", "predicted_s", "predicted_later_s")},
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
            "first_epoch_s": median(ours, "first_epoch_s"), "later_epoch_s": report["later"]["seconds"],
            "without_frozen_s": whole["first_epoch_s"],
        }  # fmt: skip
        report["first_of_later"] = report["first_epoch_s"] / report["later_epoch_s"]
        return report
    report["gemm_limit_s"] = flops / statistics.median(gemm)
    block_s, head_s = (median(runs["resident"], key) for key in ("block_s", "head_s"))
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
        peer_s = median(theirs, "wall_s")
        report |= {
            "peer": "accelerate", "peer_wall_s": peer_s, "peer_read_bytes": median(theirs, "read_bytes"),
            "peer_peak_rss_bytes": median(theirs, "peak_rss_bytes"), "speedup": peer_s / report["first"]["seconds"],
            "speedup_later": peer_s / report["later"]["seconds"],
        }  # fmt: skip
    return report


def of_store(plain: list[dict[str, Any]], stored: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the times of steps on a store, and how far its first loss and gradient are from the checkpoint's."""
    first, plain_first = stored[0]["steps"][0], plain[0]["steps"][0]
    return {
        "first": step_of([run["steps"][:1] for run in stored]),
        "later": step_of([run["steps"][1:] for run in stored]),
        "peak_rss_bytes": median(stored, "peak_rss_bytes"),
        **{f"{key}_change": first[key] / plain_first[key] - 1 for key in ("loss", "grad_norm")},
    }


def median(runs: list[dict[str, Any]], key: str) -> float:
    """Return the median of a figure over several runs."""
    return statistics.median(run[key] for run in runs)


def step_of(runs: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the median of the runs' median step."""
    return {
        key: statistics.median(median(steps, key) for steps in runs)
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
    print(json.dumps(report))


if __name__ == "__main__":
    if not sides.serve(RUNNERS, Task):
        main()
