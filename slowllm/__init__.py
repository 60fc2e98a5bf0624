"""Run, score and tune language models far larger than memory, by streaming their weights from disk.

The names below are loaded when first used: importing slowllm loads neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
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
    from slowllm.api import LM, Likelihood, load
    from slowllm.errors import SlowLLMError
    from slowllm.forecast import Job, Rates
    from slowllm.generation import Continuation
    from slowllm.head import log_probs
    from slowllm.model import Report, StreamedLM
    from slowllm.plan import Budget
    from slowllm.recipes import Recipe
    from slowllm.soft_prompts import SoftPrompt
    from slowllm.tuning import Tuned, tune

_HOMES = {
    "Budget": "plan",
    "Job": "forecast",
    "Rates": "forecast",
    "Recipe": "recipes",
    "Report": "model",
    "SoftPrompt": "soft_prompts",
    "Tuned": "tuning",
    "tune": "tuning",
    "SlowLLMError": "errors",
    "LM": "api",
    "Likelihood": "api",
    "Continuation": "generation",
    "StreamedLM": "model",
    "load": "api",
    "log_probs": "head",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'slowllm' has no attribute {name!r}")
    return getattr(importlib.import_module(f"slowllm.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
