"""Run, score and tune language models far larger than memory, by streaming their weights from disk.

The names below are imported when they are first used: importing slowllm loads neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slowllm.version import __version__ as __version__

__all__ = [
    "LM", "Budget", "Continuation", "Job", "JobProgress", "Likelihood", "Rates", "Recipe", "Report", "SlowLLMError", "SoftPrompt",
    "StreamedLM", "Tuned", "load", "log_probs", "tune",
]  # fmt: skip

if TYPE_CHECKING:
    from slowllm.entrypoints.api import LM, load
    from slowllm.entrypoints.api_tune import tune
    from slowllm.entrypoints.job_progress import JobProgress
    from slowllm.errors import SlowLLMError
    from slowllm.inference.generation_types import Continuation
    from slowllm.inference.likelihood import Likelihood
    from slowllm.modeling.log_probs import log_probs
    from slowllm.modeling.soft_prompts import SoftPrompt
    from slowllm.planning.budget import Budget
    from slowllm.planning.job import Job, Rates
    from slowllm.runtime.streamed_lm import Report, StreamedLM
    from slowllm.tuning.recipe import Recipe
    from slowllm.tuning.tuned import Tuned

_HOMES = {
    "Budget": "planning.budget",
    "Continuation": "inference.generation_types",
    "Job": "planning.job",
    "JobProgress": "entrypoints.job_progress",
    "LM": "entrypoints.api",
    "Likelihood": "inference.likelihood",
    "Rates": "planning.job",
    "Recipe": "tuning.recipe",
    "Report": "runtime.streamed_lm",
    "SlowLLMError": "errors",
    "SoftPrompt": "modeling.soft_prompts",
    "StreamedLM": "runtime.streamed_lm",
    "Tuned": "tuning.tuned",
    "load": "entrypoints.api",
    "log_probs": "modeling.log_probs",
    "tune": "entrypoints.api_tune",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'slowllm' has no attribute {name!r}")
    return getattr(importlib.import_module(f"slowllm.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
