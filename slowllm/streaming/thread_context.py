"""Carry a thread's grad mode, inference mode, autocast and context variables to another thread."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable
from typing import Any

import torch


def current_autocasts() -> list[Callable[..., torch.autocast]]:
    """Return what makes contexts with this thread's autocast settings, for the CPU and for GPUs if in use."""
    return [functools.partial(torch.autocast, *settings) for settings in _autocast_settings()]


def _autocast_settings() -> list[tuple[str, torch.dtype, bool]]:
    kinds = ["cpu", "cuda"] if torch.cuda.is_initialized() else ["cpu"]
    return [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds]


def with_this_context() -> Callable[..., Any]:
    """Return a function that runs work, in any thread, with the settings that torch and Python keep for this one.

    A backward pass inside that work runs in the same thread as well. Autograd has one thread for each GPU, which all
    callers share: a block that is computed again within a backward pass would deadlock there, waiting for itself.
    """
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    autocasts, cache_enabled = _autocast_settings(), torch.is_autocast_cache_enabled()
    context, num_threads = contextvars.copy_context(), torch.get_num_threads()

    def run(work: Callable[..., Any], *args: Any) -> Any:
        # Each thread has a number of its own, and takes the process's only with its first parallel operation.
        if torch.get_num_threads() != num_threads:
            torch.set_num_threads(num_threads)
        with contextlib.ExitStack() as stack:
            # Only what differs: entering everything takes as long as a small block.
            if torch.is_inference_mode_enabled() != inference:
                stack.enter_context(torch.inference_mode(inference))
            if torch.is_grad_enabled() != grad:
                stack.enter_context(torch.set_grad_enabled(grad))
            for kind, dtype, is_enabled in autocasts:
                here = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
                if is_enabled or here != (dtype, is_enabled) or not cache_enabled:
                    stack.enter_context(torch.autocast(kind, dtype, is_enabled, cache_enabled))
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            # A copy: all riders of a party start from one context, and none may see what another sets.
            return context.copy().run(work, *args)

    return run
