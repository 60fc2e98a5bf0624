"""The skeleton of a model: transformers' own class, parameters on the meta device, buffers real.

Knows transformers; reads config files and no weights. What transformers may ask of a streamed model, and what
has no meaning there, is said here in `StreamedModel`.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from slowllm.errors import ArchitectureError, CheckpointError, UnsupportedError
from slowllm.modeling.streamed_block import UNKNOWN_MASK, text_mask
from slowllm.storage.checkpoint import Checkpoint, read_json

log = logging.getLogger(__name__)

# A config that names more is damaged; making them all would take hours.
MAX_BLOCKS = 10_000


def read_config(folder: Path) -> PreTrainedConfig:
    """Return the config of a checkpoint's folder.

    Raises:
        CheckpointError: config.json cannot be used, or the weights are quantised already.
        ArchitectureError: this version of transformers does not know the model type.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: has no config.json, so it is not a Hugging Face model folder")
    table = read_json(folder / "config.json")
    kind = table.get("model_type")
    if table.get("quantization_config"):
        method = table["quantization_config"]
        method = method.get("quant_method", "?") if isinstance(method, dict) else method
        raise CheckpointError(
            f"{folder}: is already quantised ({method}); use the original checkpoint in bfloat16 or float16"
        )
    try:
        # Without trust_remote_code: a config that names code of its own is read by transformers' class, or refused.
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers' validation may raise on a config
        if kind is None:
            raise CheckpointError(f"{folder}/config.json: names no model_type") from error
        raise ArchitectureError(
            f"model type {kind!r} cannot be used by this version of transformers ({first_line(error)})"
        ) from error
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(count, int) and not 1 <= count <= MAX_BLOCKS:
        raise CheckpointError(f"{folder}/config.json: names {count} blocks")
    if getattr(config, "is_encoder_decoder", False):
        raise ArchitectureError(f"model type {kind!r} is an encoder-decoder; only decoders are streamed")
    return cast(PreTrainedConfig, config)


class _EmptyOnMeta(TorchFunctionMode):
    """Make `torch.empty` give meta tensors: parameters cost nothing, while buffers are computed and real.

    A whole `torch.device("meta")` would leave rotary tables and scales behind that no checkpoint restores.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build_skeleton(config: PreTrainedConfig, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Make the model that a config describes.

    Args:
        config: of the checkpoint.
        folder: where a generation_config.json may lie.
        dtype: compute dtype, which buffers may depend on.
    Raises:
        ArchitectureError: transformers has no causal LM for it.
    """
    kind = str(getattr(config, "model_type", "?"))
    try:
        with _EmptyOnMeta():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # whatever a model's constructor may raise on a config
        raise ArchitectureError(
            f"model type {kind!r} has no usable causal LM ({first_line(error)})"
        ) from error
    # from_pretrained computes buffers a second time, outside the default dtype of the construction: in bfloat16
    # GPT-J's sinusoids would differ. Parameters are on meta, where initialising costs nothing.
    for module in model.modules():
        module._is_hf_initialized = False
    model.initialize_weights()
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise ArchitectureError(
                f"{type(model).__name__}: its buffer {name} is not computed on construction"
            )
    if (folder / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # whatever transformers' validation may raise
            raise CheckpointError(f"{folder}/generation_config.json: {first_line(error)}") from error
    return cast(PreTrainedModel, model)


def choose_dtype(name: str, checkpoint: Checkpoint, *, is_on_gpu: bool = False) -> torch.dtype:
    """Return the compute dtype, and log why where it was chosen here."""
    if name != "auto":
        return cast(torch.dtype, getattr(torch, name))
    largest = max(checkpoint.spans.values(), key=lambda span: span.num_bytes)
    if largest.dtype != "BF16":
        log.info("compute dtype float32 (the checkpoint is %s)", largest.dtype)
        return torch.float32
    if is_on_gpu:
        log.info("compute dtype bfloat16 (that of the checkpoint)")
        return torch.bfloat16
    bf16, fp32 = _gemm_seconds((torch.bfloat16, torch.float32))
    name = "bfloat16" if bf16 < fp32 else "float32"
    log.info(
        "compute dtype %s (measured: a matrix product takes %.1f ms in bfloat16 and %.1f ms in float32)",
        name, bf16 * 1e3, fp32 * 1e3,
    )  # fmt: skip
    return cast(torch.dtype, getattr(torch, name))


def _gemm_seconds(dtypes: Sequence[torch.dtype]) -> list[float]:
    """Return the shortest time of a 256 x 2048 x 2048 product in each dtype.

    In turn and the shortest of several, because on a busy machine one slow run would change the dtype, and with
    it the results.
    """
    pairs = [(torch.ones(256, 2048, dtype=dtype), torch.ones(2048, 2048, dtype=dtype)) for dtype in dtypes]
    seconds = [math.inf] * len(pairs)
    for _ in range(6):
        for number, (a, b) in enumerate(pairs):
            started = time.perf_counter()
            torch.mm(a, b)
            seconds[number] = min(seconds[number], time.perf_counter() - started)
    return seconds


class StreamedModel(PreTrainedModel):
    """Mixin for the class of a streamed model: what transformers may ask of it, and what has no meaning here."""

    _folder: Path
    _compute_dtype: torch.dtype
    _device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype; weights may be stored in another."""
        return self._compute_dtype

    @property
    def device(self) -> torch.device:
        """Where inputs belong, and where a sweep begins and ends; those from elsewhere are moved there."""
        return self._device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # to(), cuda(), half() and the like end here. What changes nothing passes: Trainer calls to("cpu").
        probe = torch.empty(0, dtype=self._compute_dtype, device=self._device)
        moved = fn(probe)
        if moved.dtype != probe.dtype or moved.device != probe.device:
            raise UnsupportedError(
                f"a streamed model stays on {probe.device} in {probe.dtype}; load it again with other options"
            )
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Refuse to train weights: a streamed one has no gradient, and the few others would train in silence."""
        if requires_grad:
            raise UnsupportedError("a streamed model's weights are not trained; use prompt or prefix tuning")
        return super().requires_grad_(False)

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        # Trainer and PEFT ask for checkpointing by this. A streamed block keeps its inputs only and recomputes in any
        # case; transformers' checkpoint around it would visit each block once more: 3 visits a step, not 2.
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
    model: PreTrainedModel, folder: Path, compute_dtype: torch.dtype, device: torch.device
) -> None:
    """Give a model whose parts are streamed the class of a streamed model, under its own class's name."""
    kind = type(model)
    is_elsewhere = device.type != "cpu"

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    @functools.wraps(kind.forward)  # generate() and Trainer look at the signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_elsewhere:
            args = tuple(map(moved, args))
            kwargs = {name: moved(value) for name, value in kwargs.items()}
        mask = kwargs.get("attention_mask")
        if mask is None and len(args) > 1 and isinstance(args[1], Tensor) and args[1].dim() == 2:
            mask = args[1]
        known = mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)
        token = text_mask.set(mask if known else UNKNOWN_MASK)
        try:
            return kind.forward(self, *args, **kwargs)
        finally:
            text_mask.reset(token)

    # The same module and name: transformers looks up by str(class) which outputs it can record.
    names = {"forward": forward, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    model.__class__ = type(kind.__name__, (StreamedModel, kind), names)
    streamed = cast(StreamedModel, model)
    streamed._folder, streamed._compute_dtype, streamed._device = folder, compute_dtype, device
    model.requires_grad_(False).eval()


def computed_by(model: Any) -> dict[str, str]:
    """Return what a streamed model's numbers depend on beside its weights, for the description of a state."""
    found = {"dtype": str(model.dtype).removeprefix("torch.")}
    # Left out for the processor, as in states that are older than devices.
    return found if model.device.type == "cpu" else {**found, "device": model.device.type}


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, for a sentence of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
