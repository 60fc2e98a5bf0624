"""The skeleton of a model: transformers' own class, parameters on the meta device, buffers real.

Knows transformers; reads config files and no weights.
"""

from __future__ import annotations

import logging
import reprlib
import threading
from pathlib import Path
from typing import Any, cast

import torch
from torch.overrides import TorchFunctionMode
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from slowllm.errors import ArchitectureError, CheckpointError, first_line
from slowllm.modeling.block_counts import MAX_BLOCKS, refuse_many_blocks
from slowllm.modeling.native.formats import refuse_unknown
from slowllm.modeling.native.gguf_config import config_of
from slowllm.modeling.native.modelopt import settings_beside
from slowllm.storage.checkpoint import read_json
from slowllm.storage.gguf import read_set
from slowllm.storage.gguf_files import gguf_files

log = logging.getLogger(__name__)

# Norms, rotary tables and masks are made in memory before any weight is read. Those of Llama-3.1-405B take 10 MB; a config
# that asks for more than this is damaged, and making them could exhaust the machine's memory.
MAX_FILLED_BYTES = 1 << 31
# What makes tensors of a size that a config may name.
_FILLS = (
    torch.ones,
    torch.zeros,
    torch.full,
    torch.arange,
    torch.eye,
    torch.linspace,
    torch.rand,
    torch.randn,
)

# transformers sets torch's default dtype, which all threads share, while it builds a model, and puts it back as it was: of two
# threads that build models at once, the later would leave the other's dtype behind for the whole process.
_BUILDING = threading.Lock()


def read_config(folder: Path) -> PreTrainedConfig:
    """Return the config of a checkpoint's folder, of a config file itself, or of a GGUF file.

    Raises:
        CheckpointError: config.json cannot be used, or the weights are in a quantised format that is not read.
        ArchitectureError: this version of transformers does not know the model type.
    """
    if files := gguf_files(folder):
        return _checked(files[0], config_of(files[0].name, read_set(files)))
    file = folder if folder.is_file() else folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder}: has no config.json, so it is not a Hugging Face model folder")
    table = read_json(file)
    kind = table.get("model_type")
    if kind is None and file == folder:  # transformers would guess it from the file's path
        raise CheckpointError(f"{file}: names no model_type")
    refuse_many_blocks(file, table)
    if settings := table.get("quantization_config"):
        refuse_unknown(str(file), settings)
    try:
        # Without trust_remote_code: a config that names code of its own is read by transformers' class, or refused.
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers' validation may raise on a config
        if kind is None:
            raise CheckpointError(f"{file}: names no model_type") from error
        if isinstance(kind, str) and kind in CONFIG_MAPPING:
            raise CheckpointError(f"{file}: cannot be used ({first_line(error)})") from error
        raise ArchitectureError(
            f"{file}: model type {reprlib.repr(kind)} cannot be used by this version of transformers ({first_line(error)})"
        ) from error
    if not settings and (beside := settings_beside(file.parent)) is not None:
        config.quantization_config = beside
    return _checked(file, config)


def _checked(file: Path, config: Any) -> PreTrainedConfig:
    """Refuse a config whose model is not streamed, and settle what is computed here."""
    kind = reprlib.repr(getattr(config, "model_type", "?"))
    text = config.get_text_config()
    if not isinstance(text, PreTrainedConfig):
        raise CheckpointError(
            f"{file}: has a config of a text model inside, which model type {kind} does not have; fetch it again"
        )
    count = getattr(text, "num_hidden_layers", None)
    if isinstance(count, int) and not 1 <= count <= MAX_BLOCKS:
        raise CheckpointError(f"{file}: names {count} blocks")
    if getattr(config, "is_encoder_decoder", False):
        raise ArchitectureError(f"model type {kind} is an encoder-decoder; only decoders are streamed")
    config.return_dict = True  # what is computed here is looked up by name
    _take_built_in_kernels(config)
    return cast(PreTrainedConfig, config)


# What runs here; other names are of packages, or of repositories whose code transformers would fetch and run.
_ATTENTIONS = (None, "eager", "sdpa")


def _take_built_in_kernels(config: PreTrainedConfig) -> None:
    """Leave attention and experts to transformers' own code, whatever a config.json asks for."""
    inner = [getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ()]
    for part in (config, *(part for part in inner if isinstance(part, PreTrainedConfig))):
        if part._attn_implementation not in _ATTENTIONS:
            log.warning(
                "config.json asks for the attention %s; transformers' own is used", part._attn_implementation
            )
            part._attn_implementation_internal = None
        part._experts_implementation_internal = None


class _EmptyOnMeta(TorchFunctionMode):
    """Make `torch.empty` give meta tensors: parameters cost nothing, while buffers are computed and real.

    Under `torch.device("meta")` rotary tables and scales would be empty as well, and no checkpoint restores them.
    Functions of `torch.nn.init` leave meta tensors as they are; torch would run them through decompositions in Python,
    which took half the time of loading a small model. Buffers of more than `MAX_FILLED_BYTES` altogether are refused.

    Args:
        where: the file that describes the model, for messages.
    """

    def __init__(self, where: str) -> None:
        super().__init__()
        self._where, self._filled_bytes = where, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        elif func in _FILLS:
            self._filled_bytes += func(*args, **{**kwargs, "device": "meta"}).nbytes
            if self._filled_bytes > MAX_FILLED_BYTES:
                raise CheckpointError(
                    f"{self._where}: describes a model with {self._filled_bytes:,} bytes of norms and tables, where "
                    f"{MAX_FILLED_BYTES:,} may be; a size in it is wrong: fetch it again"
                )
        elif (name := getattr(func, "__name__", "")).endswith("_") and hasattr(torch.nn.init, name):
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


def _settle_rescaling(model: PreTrainedModel) -> None:
    """Refuse a model that divides its weights in place at its first call (RWKV); weights on disk stay as they are.

    In the first `rescale_every` blocks it divides by one, which is left out.
    """
    for module in model.modules():
        if getattr(module, "layers_are_rescaled", None) is False:
            every, count = getattr(model.config, "rescale_every", 0), model.config.num_hidden_layers
            if every and count > every:
                raise ArchitectureError(
                    f"{type(model).__name__}: divides weights in place behind every {every} of its {count} blocks, which "
                    "is not streamed; set rescale_every to 0 in config.json, which leaves that out"
                )
            module.layers_are_rescaled = True  # type: ignore[assignment]


def build_skeleton(config: PreTrainedConfig, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Build the model that a config describes.

    Args:
        config: of the checkpoint.
        folder: that may have a generation_config.json.
        dtype: compute dtype, which buffers may depend on.
    Raises:
        ArchitectureError: transformers has no causal LM for it.
        CheckpointError: it names sizes that no model has, or generation_config.json cannot be used.
    """
    kind = str(getattr(config, "model_type", "?"))
    where = folder.name if folder.is_file() else "config.json"
    try:
        with _BUILDING, _EmptyOnMeta(where):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a model's constructor may raise on a config
        raise ArchitectureError(
            f"{where}: model type {kind!r} has no usable causal LM ({first_line(error)})"
        ) from error
    # from_pretrained computes buffers a second time, outside the default dtype of the construction: in bfloat16
    # GPT-J's sinusoids would differ. Parameters are on meta, where initialising costs nothing.
    for module in model.modules():
        module._is_hf_initialized = False
    with _EmptyOnMeta(where):
        model.initialize_weights()
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise ArchitectureError(
                f"{type(model).__name__}: its buffer {name} is not computed on construction"
            )
    _settle_rescaling(model)
    if (folder / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # whatever transformers' validation may raise
            raise CheckpointError(f"{folder}/generation_config.json: {first_line(error)}") from error
    return cast(PreTrainedModel, model)
