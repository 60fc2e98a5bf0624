"""What a configuration alone says of a model: its sizes, before any weight is on this machine.

Builds transformers' model on the meta device, as opening a checkpoint does, and takes shapes from there instead of from
shards. Reads config files, an index and a tokenizer where they are there; needs no network.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from slowllm.errors import CheckpointError, InputError
from slowllm.modeling.blocks import find_blocks
from slowllm.modeling.cache_sizes import cache_size_of
from slowllm.modeling.layout import granularities, lay_out
from slowllm.modeling.linear_maps import linear_maps
from slowllm.modeling.native.formats import settings_of
from slowllm.modeling.native.imagined import imagined_placement
from slowllm.modeling.sizes import sizes_of
from slowllm.modeling.skeleton import build_skeleton, read_config
from slowllm.planning.job import WHOLE_BLOCKS, Granularity, Sizes
from slowllm.runtime.description import load_tokenizer
from slowllm.runtime.known_models import KNOWN_MODELS, KnownModel, find_folder_or_known, find_known
from slowllm.storage.checkpoint import INDEX, read_json, read_weight_map
from slowllm.storage.manifest import is_store
from slowllm.storage.spans import DTYPE_NAMES, Placement, Run, Span

log = logging.getLogger(__name__)

CONFIG = "config.json"
# An index whose sum of bytes differs by more from what the shapes take belongs to other weights.
INDEX_TOLERANCE = 0.1


@dataclass(frozen=True)
class Blueprint:
    """A model of which the configuration is known, and no weight.

    Attributes:
        name: a hub id, or the name of the folder or file.
        config: transformers' config.
        dtype: of the weights, as far as config or index say it.
        source: what the sizes are taken from, in words.
        folder: that may hold a tokenizer; None for a model of the package's own table.
        index_bytes: of all tensors by the index, None without one.
    """

    name: str
    config: Any
    dtype: torch.dtype
    source: str
    folder: Path | None = None
    index_bytes: int | None = None

    # As `TextSide` wants it: no soft prompt stands before the texts.
    soft_prompt = None
    num_virtual_tokens = 0

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer beside the config.

        Raises:
            CheckpointError: there is none.
        """
        if self.folder is None:
            raise CheckpointError(f"{self.name}: its tokenizer is not on this machine")
        return load_tokenizer(self.folder)


def find_blueprint(model: str | None, config: str | os.PathLike[str] | None) -> Blueprint | None:
    """Return the blueprint by which a model is planned, None where its weights are there.

    Args:
        model: folder, hub id, or None where only a config is given.
        config: a config.json, or a folder with one, which is taken instead of the model's own.
    Raises:
        CheckpointError: there is no such config, or it cannot be used.
        ArchitectureError: this version of transformers does not know the model type.
        InputError: the model is neither a folder, nor in the cache, nor one of the package's table.
    """
    if config is not None:
        return _from_file(Path(config).expanduser(), None)
    assert model is not None, "a model or its config is given"
    folder = find_folder_or_known(model)
    if not isinstance(folder, Path):
        return _from_table(*folder)
    if not _lacks_weights(folder):
        return None
    is_path = Path(model).expanduser() == folder
    return _from_file(folder, folder.resolve().name if is_path else model)


def _lacks_weights(folder: Path) -> bool:
    """Whether a folder has a config, and none of its weights or not all of them."""
    if not (folder / CONFIG).is_file() or is_store(folder):
        return False
    if (folder / INDEX).is_file() and not (folder / "model.safetensors").is_file():
        shards = set((read_weight_map(folder / INDEX) or {}).values())
        return not all(os.path.isfile(folder / shard) for shard in shards)
    others = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
    return not any(any(folder.glob(pattern)) for pattern in others)


def known_blueprint(hub_id: str) -> Blueprint:
    """Return the blueprint of a model of the package's table, whether or not it is on this machine.

    Raises:
        InputError: the table does not have it.
    """
    if (found := find_known(hub_id)) is None:
        raise InputError(f"{hub_id}: is no known model; there are {', '.join(KNOWN_MODELS)}")
    return _from_table(*found)


def _from_table(hub_id: str, known: KnownModel) -> Blueprint:
    config: Any = AutoConfig.for_model(known.model_type, **known.options)
    config.return_dict = True
    if known.quantisation is not None:
        config.quantization_config = dict(known.quantisation)
    return Blueprint(hub_id, config, getattr(torch, known.dtype), "its published shape")


def _from_file(path: Path, name: str | None) -> Blueprint:
    file = path / CONFIG if path.is_dir() else path
    try:
        if not file.is_file():
            raise CheckpointError(f"{path}: has no {CONFIG}" if path.is_dir() else f"{path}: no such file")
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    config: Any = read_config(file)
    # An older transformers wrote the dtype under the other name, which is read as well.
    dtype = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    dtype = dtype if dtype in (torch.float32, torch.float16, torch.bfloat16) else None
    index = file.parent / INDEX
    num_bytes, source = None, file.name
    if index.is_file():
        num_bytes, source = _total_size(index), f"{file.name} and its index"
    name = name or (file.parent.resolve().name if file.name == CONFIG else file.stem)
    if dtype is None and num_bytes is None:
        log.warning("%s names no dtype; the plan counts two bytes a weight", file.name)
    return Blueprint(name, config, dtype or torch.bfloat16, source, file.parent, num_bytes)


def _total_size(index: Path) -> int | None:
    """Return the bytes of all tensors that an index names, None where it does not say."""
    read_weight_map(index)  # refuses what is no index
    metadata = read_json(index).get("metadata")
    size = metadata.get("total_size") if isinstance(metadata, dict) else None
    return int(size) if isinstance(size, int | float) and 0 < size < 2**63 else None


@dataclass(frozen=True)
class BlueprintSizes:
    """The sizes of a model without its weights.

    Attributes:
        choices: the sizes cut into whole blocks, and into leaves where it can be.
        weight_bytes: of one sweep.
        stored_dtype: of the weights.
    """

    choices: tuple[Sizes, ...]
    weight_bytes: int
    stored_dtype: torch.dtype

    @property
    def num_stops(self) -> dict[Granularity, int]:
        """The number of stops by granularity."""
        return {sizes.granularity: len(sizes.stops) for sizes in self.choices}


def stored_dtype_of(blueprint: Blueprint) -> torch.dtype:
    """Return the dtype of a model's weights: the config's, or the one that the index's bytes amount to."""
    num_bytes = blueprint.index_bytes
    if num_bytes is None or settings_of(blueprint.config) is not None:
        return blueprint.dtype
    model = build_skeleton(blueprint.config, _folder_of(blueprint), torch.bfloat16)
    count = sum(tensor.numel() for tensor in _stored_tensors(model).values())
    for dtype in (blueprint.dtype, torch.bfloat16, torch.float32):
        if abs(num_bytes / (count * dtype.itemsize) - 1) <= INDEX_TOLERANCE:
            return dtype
    raise CheckpointError(
        f"{blueprint.name}: the index counts {num_bytes:,} bytes, which is no dtype's size of the {count:,} weights "
        "that config.json describes; they do not belong together"
    )


def measure_blueprint(
    blueprint: Blueprint, stored_dtype: torch.dtype, dtype: torch.dtype, *, forward_only: bool
) -> BlueprintSizes:
    """Return the sizes of a model's stops by its configuration.

    Args:
        blueprint: of the model.
        stored_dtype: of the weights.
        dtype: compute dtype.
        forward_only: whether blocks may be cut into leaves, which cannot run backward.
    Raises:
        ArchitectureError: the model does not fit the carousel.
    """
    model = build_skeleton(blueprint.config, _folder_of(blueprint), dtype)
    placements = {
        name: _placement(name, tensor, stored_dtype) for name, tensor in _stored_tensors(model).items()
    }
    if (settings := settings_of(blueprint.config)) is not None:
        for name, parameter in linear_maps(model, *find_blocks(model)):
            if (coded := imagined_placement(name, tuple(parameter.shape), settings)) is not None:
                placements[name] = coded
    names: tuple[Granularity, ...] = granularities(model, placements)
    if not forward_only:
        names = tuple(name for name in names if name in WHOLE_BLOCKS)
    layouts = [lay_out(model, placements, name) for name in names]
    cache = cache_size_of(model)
    return BlueprintSizes(
        tuple(sizes_of(model, layout, cache) for layout in layouts), layouts[0].weight_bytes, stored_dtype
    )


def _folder_of(blueprint: Blueprint) -> Path:
    return blueprint.folder or Path(os.devnull)


def _stored_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the tensors that a checkpoint of the model has, tied ones once."""
    tied = model.all_tied_weights_keys
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def _placement(name: str, tensor: torch.Tensor, stored_dtype: torch.dtype) -> Placement:
    dtype = stored_dtype if tensor.dtype.is_floating_point else tensor.dtype
    shape, num_bytes = tuple(tensor.shape), math.prod(tensor.shape) * dtype.itemsize
    span = Span(name, Path(INDEX), DTYPE_NAMES[dtype], shape, 0, num_bytes)
    return Placement(name, shape, dtype, (Run(span, 0, 0, num_bytes),) if num_bytes else ())
