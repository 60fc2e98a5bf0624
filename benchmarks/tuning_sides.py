"""Run one side of the benchmark of a tuning step: slowllm, one block in memory, or accelerate.

    python -m benchmarks.tuning_sides --side NAME '{"checkpoint": ...}'

All sides take the same steps: forward and backward of the same sentences after the same prompt. Only steps are timed,
never imports or the opening of a checkpoint. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import dataclasses
import functools
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

from benchmarks import sides

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


if __name__ == "__main__":
    sides.serve(RUNNERS, Task)
