"""Carry a thread's grad mode, inference mode, autocast and context variables to another thread."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Autocast:
    """How autocast is set for one kind of device."""

    kind: str
    enabled: bool
    dtype: torch.dtype

    def again(self, cache_enabled: bool | None = None) -> torch.autocast:
        """Return a context in which it is so."""
        return torch.autocast(self.kind, self.dtype, self.enabled, cache_enabled)


def autocast_here() -> list[Autocast]:
    """Return how autocast is set for this thread, for the processor and for GPUs where they are in use."""
    kinds = ["cpu"]
    if torch.cuda.is_initialized():
        kinds.append("cuda")
    return [Autocast(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]


def as_here() -> Callable[..., Any]:
    """Return a function that runs work, in whatever thread, with what torch and Python keep for this one.

    A backward pass inside that work runs in the same thread as well. Autograd has one thread for each GPU, which all
    callers share: a block that is computed again within a backward pass would wait there for itself.
    """
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    autocasts, cache = autocast_here(), torch.is_autocast_cache_enabled()
    context = contextvars.copy_context()

    def run(work: Callable[..., Any], *args: Any) -> Any:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(inference))
            stack.enter_context(torch.set_grad_enabled(grad))
            for autocast in autocasts:
                stack.enter_context(autocast.again(cache))
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            # A copy: all riders of a party start from one context, and none may see what another sets.
            return context.copy().run(work, *args)

    return run
