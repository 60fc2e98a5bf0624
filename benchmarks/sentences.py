"""Make the sentences and batches of the forward benchmark, the same for all its sides."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slowllm.planning.packing import pack

# Case "mixed": as in real text, many short sentences and a few long ones.
MIXED_SENTENCES, MIXED_TOKENS, MIXED_SHORTEST, MIXED_LONGEST = 64, 1024, 4, 60


@dataclass(frozen=True)
class Task:
    """What one process does; passed as JSON.

    Attributes:
        case: `uniform` (`tokens` in `sequences`), `mixed`, or `many` (`sentences` of `sentence_tokens`).
        rider_tokens: number of tokens of a micro-batch, the same for all sides; 0 until slowllm has planned.
        padding_tokens: maximum number of padding tokens in one, likewise.
        keep_resident: whether slowllm may keep stops in memory.
        logits: file for the logits that are compared; where it is given, nothing is timed.
    """

    checkpoint: str
    ram: str
    case: str
    tokens: int
    sequences: int
    sentences: int
    sentence_tokens: int
    sweeps: int
    keep_resident: bool
    rider_tokens: int = 0
    padding_tokens: int = 0
    logits: str = ""


def lengths_of(task: Task) -> list[int]:
    """Return the number of tokens of each sentence."""
    if task.case == "uniform":
        return [task.tokens // task.sequences] * task.sequences
    if task.case == "many":
        return [task.sentence_tokens] * task.sentences
    steps = torch.linspace(0, 1, MIXED_SENTENCES, dtype=torch.float64)
    spread, extra = MIXED_LONGEST - MIXED_SHORTEST, MIXED_TOKENS - MIXED_SHORTEST * MIXED_SENTENCES
    # By the trapezoid rule the sum of steps**k is (n - 1) / (k + 1) + 1/2.
    power = spread * (MIXED_SENTENCES - 1) / (extra - spread / 2) - 1
    lengths = (MIXED_SHORTEST + spread * steps**power).round().long()
    lengths[MIXED_SENTENCES // 2] += MIXED_TOKENS - int(lengths.sum())  # corrects the rounding
    return lengths[torch.randperm(MIXED_SENTENCES, generator=torch.Generator().manual_seed(0))].tolist()


def sentences(task: Task, vocab_size: int) -> list[Tensor]:
    """Return the random token ids of each sentence, the same in every process."""
    lengths = lengths_of(task)
    ids = torch.randint(5, vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    return list(ids.split(lengths))


def batch(model: Any, rows: list[Tensor]) -> dict[str, Tensor]:
    """Return the model's inputs, padded on the left where lengths differ, so that all rows end in one column."""
    width = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=3) for row in rows])
    if all(len(row) == width for row in rows):
        return {"input_ids": ids}
    mask = torch.stack([(torch.arange(width) >= width - len(row)).long() for row in rows])
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return inputs


def last_logits(model: Any, rows: list[Tensor]) -> Tensor:
    """Return the logits (rows, vocabulary) of each row's last position."""
    inputs = batch(model, rows)
    return model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1]


def micro_batches(rows: list[Tensor], rider_tokens: int, padding_tokens: int) -> list[list[int]]:
    """Pack sentences into micro-batches as slowllm's scoring does."""
    return pack([len(row) for row in rows], rider_tokens, padding_tokens)


def tops(batches: list[list[int]], parts: list[Tensor]) -> list[int]:
    """Return the most likely next token of each sentence, in the sentences' order."""
    tokens = {
        n: int(top)
        for numbers, part in zip(batches, parts, strict=True)
        for n, top in zip(numbers, part.argmax(-1), strict=True)
    }
    return [tokens[number] for number in range(len(tokens))]
