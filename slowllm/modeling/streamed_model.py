"""The class of a streamed model, which refuses what has no meaning on streamed weights."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, Self, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slowllm.errors import UnsupportedError
from slowllm.modeling.finite import UNKNOWN_MASK
from slowllm.streaming.call_context import OwnerCall, call_context

log = logging.getLogger(__name__)


class StreamedModel(PreTrainedModel):
    """Mixin for the class of a streamed model: answers what transformers asks of it, and refuses the rest."""

    _folder: Path
    _compute_dtype: torch.dtype
    _device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype; weights may be stored in another."""
        return self._compute_dtype

    @property
    def device(self) -> torch.device:
        """The device where a sweep begins and ends; inputs on another are moved there."""
        return self._device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Called by to(), cuda(), half() and the like. A call that changes nothing is allowed: Trainer calls to("cpu").
        probe = torch.empty(0, dtype=self._compute_dtype, device=self._device)
        moved = fn(probe)
        if moved.dtype != probe.dtype or moved.device != probe.device:
            raise UnsupportedError(
                f"a streamed model stays on {probe.device} in {probe.dtype}; load it again with other options"
            )
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Refuse to train weights: streamed ones have no gradient, and the few others would train unnoticed."""
        if requires_grad:
            raise UnsupportedError("a streamed model's weights are not trained; use prompt or prefix tuning")
        return super().requires_grad_(False)

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        # Called by Trainer and PEFT. A streamed block keeps only its inputs and recomputes anyway; with transformers'
        # checkpoint around it each block would be visited once more: 3 visits a step, not 2.
        log.info("activations are recomputed in any case; checkpointing adds nothing")

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: the weights are on disk already."""
        raise UnsupportedError(f"a streamed model is not saved: its weights lie unchanged in {self._folder}")

    def load_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: weights come from the checkpoint."""
        raise UnsupportedError("a streamed model takes its weights from its checkpoint only")

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: the embedding is mapped from the checkpoint."""
        raise UnsupportedError(
            "a streamed model's embedding is mapped from its checkpoint and cannot be resized"
        )

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise UnsupportedError("a streamed model owns threads and files and cannot be copied; load it again")


def make_streamed(
    model: PreTrainedModel,
    blocks_name: str,
    folder: Path,
    compute_dtype: torch.dtype,
    device: torch.device,
    check: Callable[[], None],
) -> None:
    """Give a model whose parts are streamed the class of a streamed model, under its own class's name.

    The module that owns the blocks tells them of each of its calls, whether it is called by the model or by itself.

    Args:
        model: whose blocks and head are streamed.
        blocks_name: of the list of blocks.
        folder: of its checkpoint.
        compute_dtype: of its blocks.
        device: where a sweep begins and ends.
        check: called before each call of the model, to refuse it.
    """
    owner = model.get_submodule(blocks_name.rpartition(".")[0])
    if owner is not model:
        _replace_forward(owner, (), lambda forward: _watched(forward, is_owner=True, check=check))
    is_elsewhere = device.type != "cpu"

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    def wrapped(forward: Callable[..., Any]) -> Callable[..., Any]:
        watched = _watched(forward, is_owner=owner is model, check=check)
        if not is_elsewhere:
            return watched

        @functools.wraps(forward)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return watched(self, *map(moved, args), **{name: moved(value) for name, value in kwargs.items()})

        return call

    _replace_forward(model, (StreamedModel,), wrapped)
    streamed = cast(StreamedModel, model)
    streamed._folder, streamed._compute_dtype, streamed._device = folder, compute_dtype, device
    model.requires_grad_(False).eval()


def _replace_forward(
    module: Any, mixins: tuple[type, ...], wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    """Give a module a subclass of its class whose `forward` is wrapped."""
    kind = type(module)
    # The same module and name: transformers looks up by str(class) which outputs it can record.
    names = {"forward": wrap(kind.forward), "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    module.__class__ = type(kind.__name__, (*mixins, kind), names)


def _watched(forward: Callable[..., Any], *, is_owner: bool, check: Callable[[], None]) -> Callable[..., Any]:
    """Return a `forward` that says in the `CallContext` which positions hold text, and what the blocks' owner was given."""
    parameters = list(inspect.signature(forward).parameters)[1:]

    @functools.wraps(forward)  # generate() and Trainer look at the signature
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        check()
        given = {**dict(zip(parameters, args, strict=False)), **kwargs}
        mask = given.get("attention_mask")
        is_readable = mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)
        changes: dict[str, Any] = {"text_mask": mask if is_readable else UNKNOWN_MASK}
        if is_owner:
            changes["owner_call"] = OwnerCall({k: value for k, value in given.items() if value is not None})
        with call_context(**changes):
            return forward(self, *args, **kwargs)

    return call
