"""What a job's results depend on: whatever must be the same when a state is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers

from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.version import __version__


def run_identity(kind: str, lm: StreamedLM, **settings: Any) -> dict[str, Any]:
    """Return the description of a job for `State`: whatever its results depend on.

    Args:
        kind: the verb that does the job.
        lm: the model.
        settings: what else the results depend on, as JSON has it.
    """
    return {
        "kind": kind,
        "versions": {
            "slowllm": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "model": lm.fingerprint(),
        **computed_by(lm.model),
        **settings,
        "threads": torch.get_num_threads(),
    }


def computed_by(model: Any) -> dict[str, str]:
    """Return the compute dtype of a streamed model and the kind of its device, on which rounding depends."""
    computed = {"dtype": str(model.dtype).removeprefix("torch.")}
    # The processor is left out, so that states that are older than devices can be resumed.
    return computed if model.device.type == "cpu" else {**computed, "device": model.device.type}


def saved_packing(job: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """Return the tokens of a micro-batch, of a sweep and of padding in a saved description.

    None means that they or the dtype beside them are damaged, or another version's.
    """
    packing = job.get("packing")
    if (
        isinstance(packing, list)
        and len(packing) == 3
        and all(type(number) is int and 0 < number < 1 << 40 for number in packing)
        and job.get("dtype") in ("float32", "bfloat16", "float16")
    ):
        return (packing[0], packing[1], packing[2])
    return None
