"""Run, score and tune language models far larger than memory, by streaming their weights from disk.

The names below are loaded when first used: importing slowllm loads neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slowllm.version import __version__ as __version__

__all__ = [
    "LM",
    "Budget",
    "Continuation",
    "Job",
    "Likelihood",
    "Rates",
    "Recipe",
    "Report",
    "SlowLLMError",
    "SoftPrompt",
    "StreamedLM",
    "Tuned",
    "load",
    "log_probs",
    "tune",
]

if TYPE_CHECKING:
    from slowllm.entrypoints.api import LM, Likelihood, load
    from slowllm.errors import SlowLLMError
    from slowllm.inference.generation import Continuation
    from slowllm.modeling.head import log_probs
    from slowllm.modeling.soft_prompts import SoftPrompt
    from slowllm.planning.forecast import Job, Rates
    from slowllm.planning.host_plan import Budget
    from slowllm.runtime.streamed_lm import Report, StreamedLM
    from slowllm.tuning.session import Tuned, tune
    from slowllm.tuning.trial import Recipe

_HOMES = {
    "Budget": "planning.host_plan",
    "Job": "planning.forecast",
    "Rates": "planning.forecast",
    "Recipe": "tuning.trial",
    "Report": "runtime.streamed_lm",
    "SoftPrompt": "modeling.soft_prompts",
    "Tuned": "tuning.session",
    "tune": "tuning.session",
    "SlowLLMError": "errors",
    "LM": "entrypoints.api",
    "Likelihood": "entrypoints.api",
    "Continuation": "inference.generation",
    "StreamedLM": "runtime.streamed_lm",
    "load": "entrypoints.api",
    "log_probs": "modeling.head",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'slowllm' has no attribute {name!r}")
    return getattr(importlib.import_module(f"slowllm.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
