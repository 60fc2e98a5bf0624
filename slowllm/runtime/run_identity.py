"""What a job's results depend on: whatever must be the same when a state is resumed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from slowllm.errors import StateError
from slowllm.planning.job import Job
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.storage.gguf import read_set
from slowllm.storage.gguf_files import gguf_files
from slowllm.version import __version__

# The files from which transformers makes a tokenizer and its chat templates.
TOKENIZER_FILES = tuple(
    f"{name}.{kind}"
    for name in (
        "tokenizer*", "special_tokens_map*", "added_tokens*", "vocab*", "merges*", "spiece*", "sentencepiece*",
        "chat_template*", "additional_chat_templates/*",
    )
    for kind in ("json", "txt", "model", "jinja")
)  # fmt: skip
# Variables of the environment by which torch and its libraries choose kernels that round differently.
ROUNDING_VARIABLES = (
    "ATEN_CPU_CAPABILITY", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE",
)  # fmt: skip


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
        "tokenizer": _tokenizer_digest(lm.folder),
        "generation_config": _digest_of_files(lm.folder, "generation_config.json"),
        **computed_by(lm.model),
        # Where rows of several riders are multiplied together, who rides together counts.
        **({} if lm.experts is None or lm.experts.settings.is_exact else {"exact": False}),
        **settings,
        "threads": torch.get_num_threads(),
        "kernels": {
            "processor": torch.backends.cpu.get_cpu_capability(),
            **{name: os.environ[name] for name in ROUNDING_VARIABLES if name in os.environ},
        },
    }


def batch_identity(kind: str, lm: StreamedLM, **settings: Any) -> dict[str, Any]:
    """Return the `run_identity` of a job whose micro-batches are packed by the plan."""
    return run_identity(
        kind, lm,
        prompt=None if lm.soft_prompt is None else lm.soft_prompt.digest(),
        **settings,
        packing=[lm.plan.rider_tokens, lm.plan.sweep_tokens, lm.plan.padding_tokens],
    )  # fmt: skip


def _tokenizer_digest(folder: Path) -> str:
    """Return a hash of what the tokenizer is made of: files of the folder, or the header of a GGUF file."""
    found = _digest_of_files(folder, *TOKENIZER_FILES)
    if files := gguf_files(folder):
        offsets = (span.offset for span in read_set(files).spans.values() if span.path == files[0])
        with open(files[0], "rb") as file:
            header = file.read(min(offsets, default=-1))
        found = hashlib.sha256(found.encode() + header).hexdigest()
    return found


def _digest_of_files(folder: Path, *patterns: str) -> str:
    """Return a hash of the files of a folder whose names match a pattern."""
    found = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        content = path.read_bytes()
        found.update(f"{path.relative_to(folder)} {len(content)}\n".encode() + content)
    return found.hexdigest()


def digest_of(values: Iterable[Any]) -> str:
    """Return the SHA-256 of any number of values, as JSON has them, as hexadecimal digits."""
    found = hashlib.sha256()
    for value in values:
        found.update(json.dumps(value, sort_keys=True).encode() + b"\n")
    return found.hexdigest()


def computed_by(model: Any) -> dict[str, str]:
    """Return the compute dtype of a streamed model and the kind of its device, on which rounding depends."""
    computed = {"dtype": str(model.dtype).removeprefix("torch.")}
    return computed if model.device.type == "cpu" else {**computed, "device": model.device.type}


def packed_as_begun(job: Job, begun: Mapping[str, Any] | None) -> Job:
    """Return a job whose micro-batches are packed as they were when it was begun.

    Args:
        job: as it would be planned by itself.
        begun: from `state.read_job`; None where no process began the job.
    Raises:
        StateError: the state is another version's.
    """
    if begun is None:
        return job
    packing = saved_packing(begun)
    if packing is None:
        raise StateError(
            "the state is another job's or version's, or damaged; name another folder, or delete it"
        )
    return replace(job, packing=packing)


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
