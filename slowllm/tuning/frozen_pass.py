"""Pass the rows of all trials through the frozen blocks, once for all steps."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from slowllm.errors import InputError
from slowllm.modeling.soft_prompts import SoftPrompt
from slowllm.options import format_bytes
from slowllm.planning.packing import pack
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.streaming.riders import Sized
from slowllm.tuning.frozen_activations import FrozenActivations
from slowllm.tuning.passes import fill_rider
from slowllm.tuning.rows import all_rows
from slowllm.tuning.step_jobs import PADDING_TOKENS
from slowllm.tuning.trial import Trial


def pass_frozen_blocks(
    lm: StreamedLM,
    trials: Sequence[Trial],
    *,
    first_block: int,
    max_rider_tokens: int,
    max_riders: int,
    memory_bytes: int,
    state_folder: Path | None,
    key_parts: Sequence[str | int],
) -> dict[str, FrozenActivations]:
    """Return the output of the last frozen block for the rows of each trial, by the trial's name.

    Trials with the same task and the same soft prompt below `first_block` share it. Without a state folder it is kept
    in memory, of which it may take `memory_bytes`; `key_parts` are what it depends on beside the trial.

    Raises:
        InputError: it is too large for memory.
        StateError: a file of the state folder cannot be made.
    """
    hidden_size, dtype = int(lm.config.get_text_config().hidden_size), lm.model.dtype
    by_key: dict[str, FrozenActivations] = {}
    by_name: dict[str, FrozenActivations] = {}
    for trial in trials:
        prompt, rows = trial.prompt(), all_rows(trial.task)
        lower = SoftPrompt(prompt.kind, prompt.embeddings, (), prompt.pairs[:first_block])
        text = json.dumps([lower.digest(), trial.task.digest(), *key_parts])
        key = hashlib.sha256(text.encode()).hexdigest()
        if key in by_key:
            by_name[trial.name] = by_key[key]
            continue
        lengths = [len(prompt.virtual_ids) + len(row.ids) for row in rows]
        num_bytes = sum(lengths) * hidden_size * dtype.itemsize
        path = None
        if state_folder is not None:
            # Named as in earlier versions, so that their folders can be resumed.
            path = state_folder / "riders" / f"trunk-{key[:16]}.bin"
        elif num_bytes > memory_bytes:
            raise InputError(
                f"the frozen blocks' output of {format_bytes(num_bytes)} is too large to be kept in memory; name a "
                "folder for it with --state"
            )
        else:
            memory_bytes -= num_bytes
        activations = FrozenActivations(first_block, lengths, hidden_size, dtype, path, key)
        by_key[key] = by_name[trial.name] = activations
        if activations.is_filled:
            continue
        batches = pack(lengths, max(max_rider_tokens, *lengths), PADDING_TOKENS)
        jobs = [
            Sized(
                functools.partial(fill_rider, lm, prompt, [rows[n] for n in batch], first_block),
                len(batch) * lengths[batch[0]],
            )
            for batch in batches
        ]
        outputs = lm.stream(jobs, max_riders, lm.plan.sweep_tokens)
        for batch, (_, output) in zip(batches, outputs, strict=True):
            activations.put(batch, output)
        activations.finish()
    return by_name
