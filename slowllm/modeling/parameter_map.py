"""Map checkpoint names to parameters and slices of them, by transformers' own conversion mapping.

Checkpoint names are not parameter names: transformers renames keys, adds or strips the base model's prefix, and
fuses tensors (`fused_parameters`). Knows transformers; reads no weight.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D

from slowllm.errors import CheckpointError
from slowllm.modeling.blocks import find_blocks
from slowllm.modeling.fused_parameters import place_fused
from slowllm.modeling.native.coded_tensor import ordered_runs, stacked_placement, whole_placement
from slowllm.modeling.native.companions import weight_of, whole_ones
from slowllm.modeling.native.formats import find_native, refuse_lying, settings_of
from slowllm.modeling.native.packed import PACKED_CODECS
from slowllm.modeling.parts import Part, block_of, names_in
from slowllm.storage.spans import Placement, Run, Span

log = logging.getLogger(__name__)


def place(
    model: PreTrainedModel,
    spans: Mapping[str, Span],
    part: Part | None = None,
    absent: Mapping[str, str] | None = None,
) -> dict[str, Placement]:
    """Return, for every parameter and persistent buffer of a part of `model`, the bytes that fill it.

    Args:
        model: with parameters on the meta device; only names and shapes are used.
        spans: of the checkpoint, by name on disk.
        part: None for the whole model.
        absent: tensors of the checkpoint whose shard is not there, each with its shard.
    Returns:
        by parameter name. A tied parameter is listed once, under the name that the checkpoint has.
    Raises:
        CheckpointError: a parameter is missing, filled twice, or of another shape or dtype; or the checkpoint has more
            blocks than the config says.
        ArchitectureError: a parameter cannot be filled by copying runs of bytes.
        InputError: the part reaches out of the model.
    """
    state = model.state_dict()
    is_in = names_in(model, part)
    wanted = {name: tensor for name, tensor in state.items() if is_in(name)}
    by_pattern = {pattern: entry for entry in _converters(model) for pattern in entry.source_patterns}

    if absent and settings_of(model.config) is not None:
        spans = whole_ones(spans, absent)
        absent = {weight_of(name): shard for name, shard in absent.items()}
    native = find_native(model.config, spans)
    if not (native.coded or absent or (part is not None and not part.blocks)):
        refuse_lying(model.config, spans.values())
    sources: dict[str, Span] = {
        **native.plain,
        **{name: one.as_plain() for name, one in native.coded.items()},
    }
    plain: dict[str, Span] = {}
    orders: dict[str, tuple[int, ...]] = {}
    fused: dict[tuple[str, int], list[tuple[str, Span]]] = defaultdict(list)
    unexpected: list[str] = []
    for name, target, pattern in _targets(model, state, sources):
        if target not in state:
            unexpected.append(name)
        elif target not in wanted:
            continue
        elif pattern is not None:
            fused[target, id(by_pattern[pattern])].append((pattern, sources[name]))
        elif target in plain:
            raise CheckpointError(f"{plain[target].name} and {name} are both {target}; one must go")
        else:
            plain[target] = sources[name]
            if name in native.orders:
                orders[target] = native.orders[name]
    _refuse_unexpected_blocks(model, unexpected)
    _refuse_absent(model, wanted, plain, absent or {})

    placements: dict[str, Placement] = {}
    for target, span in plain.items():
        if (coded := native.coded.get(span.name)) is not None:
            if coded.codec in PACKED_CODECS and isinstance(
                model.get_submodule(target.rpartition(".")[0]), Conv1D
            ):
                coded = replace(coded, is_transposed=True)
            placements[target] = whole_placement(target, coded)
            _check_shape(replace(span, shape=placements[target].shape), target, tuple(wanted[target].shape))
            continue
        _check_shape(span, target, tuple(wanted[target].shape))
        runs: tuple[Run, ...] = (Run(span, 0, 0, span.num_bytes),) if span.num_bytes else ()
        if target in orders:
            runs = ordered_runs(span, orders[target])
        placements[target] = Placement(target, span.shape, span.torch_dtype, runs, span.coding)
    for (target, _), parts in fused.items():
        are_coded = {span.name in native.coded for _, span in parts}
        if len(are_coded) > 1:
            raise CheckpointError(f"{target}: some of its parts are quantised and others are not")
        for traced in place_fused(model, target, by_pattern[parts[0][0]], parts, wanted):
            placement = stacked_placement(traced, native.coded) if True in are_coded else traced
            if placement.name in placements:
                raise CheckpointError(
                    f"{placement.name} is filled twice; a tensor stands in the checkpoint twice"
                )
            placements[placement.name] = placement

    _refuse_missing(model, wanted, placements, spans)
    return placements


def names_of_part(model: PreTrainedModel, names: Iterable[str], part: Part) -> list[str]:
    """Return those of a checkpoint's names whose tensors a part needs.

    Args:
        model: a skeleton.
        names: of the checkpoint, by its index for example.
        part: of the model.
    Raises:
        InputError: the part reaches out of the model.
    """
    is_in, state = names_in(model, part), model.state_dict()
    arrays: dict[str, list[str]] = defaultdict(list)
    is_quantised = settings_of(model.config) is not None
    for name in names:
        arrays[weight_of(name) if is_quantised else name].append(name)
    return [
        name
        for weight, target, _ in _targets(model, state, arrays)
        if target in state and is_in(target)
        for name in arrays[weight]
    ]


def blocks_of_names(model: PreTrainedModel, names: Iterable[str]) -> frozenset[int]:
    """Return the numbers of the blocks that a checkpoint's tensors belong to.

    Args:
        model: a skeleton.
        names: of tensors, as in the checkpoint.
    """
    blocks_name, state = find_blocks(model)[0], model.state_dict()
    numbers = {
        block_of(target, blocks_name) for _, target, _ in _targets(model, state, names) if target in state
    }
    return frozenset(number for number in numbers if number is not None)


def _converters(model: PreTrainedModel) -> list[WeightConverter]:
    return [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightConverter)]


def _targets(
    model: PreTrainedModel, state: Mapping[str, Tensor], names: Iterable[str]
) -> Iterator[tuple[str, str, str | None]]:
    """Yield each name of a checkpoint with the parameter that it goes to, and the pattern of the converter that it matches."""
    known, converters = dict(state), _converters(model)
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if target not in state and name in state:  # a parameter's name already, which a renaming changed
            target, pattern = name, None
        yield name, target, pattern


def _check_shape(span: Span, name: str, shape: tuple[int, ...]) -> None:
    if span.shape != shape:
        raise CheckpointError(
            f"{span.path.name}: {span.name} has shape {list(span.shape)} but {name} needs {list(shape)}; "
            "config.json and the weights do not belong together"
        )


def _refuse_unexpected_blocks(model: PreTrainedModel, unexpected: list[str]) -> None:
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    unread = [name for name in unexpected if not any(pattern.search(name) for pattern in ignored)]
    # Buffers that older versions of transformers saved are harmless; another block means a config.json of another model.
    config = model.config.get_text_config()
    num_blocks = config.num_hidden_layers
    # Blocks behind the last that predict further tokens (DeepSeek-V3, GLM-4.5); transformers does not use them either.
    num_predicting = getattr(config, "num_nextn_predict_layers", None)
    num_known = num_blocks + (num_predicting if isinstance(num_predicting, int) else 0)
    for name in unread:
        match = re.search(r"(?:^|\.)(?:h|layers|blocks)\.(\d+)\.", name)
        if match and int(match[1]) >= num_known:
            raise CheckpointError(
                f"{name} belongs to a block beyond the {num_blocks} that config.json names; "
                "config.json and the weights do not belong together"
            )
    if unread:
        log.warning(
            "%d tensors belong to no parameter and are not read: %s", len(unread), ", ".join(unread[:5])
        )


def _refuse_absent(
    model: PreTrainedModel,
    wanted: Mapping[str, Tensor],
    plain: Mapping[str, Span],
    absent: Mapping[str, str],
) -> None:
    """Refuse a part one of whose parameters lies in a shard that is not there."""
    tied = _tied_names(model)
    lacking = [
        (target, name)
        for name, target, _ in _targets(model, wanted, absent)
        if target in wanted and tied.get(target) not in plain
    ]
    if lacking:
        target, name = lacking[0]
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise CheckpointError(
            f"{target}{more}: missing; the index says that it is in {absent[name]}, which is not there; "
            "fetch this shard"
        )


def _tied_names(model: PreTrainedModel) -> dict[str, str]:
    tied = model.all_tied_weights_keys
    return {**tied, **{source: name for name, source in tied.items()}}


def _refuse_missing(
    model: PreTrainedModel,
    wanted: Mapping[str, Tensor],
    placements: Mapping[str, Placement],
    spans: Mapping[str, Span],
) -> None:
    tied = _tied_names(model)
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    missing = [
        name
        for name in wanted
        if name not in placements
        and tied.get(name) not in placements
        and not any(pattern.search(name) for pattern in ignored)
    ]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        if wrapper := _wrapper_of(spans):
            raise CheckpointError(
                f"the names of the checkpoint's tensors begin with {wrapper}, as a wrapper of torch "
                "(DistributedDataParallel, torch.compile) makes them; save the model that is inside the wrapper"
            )
        shards = sorted({span.path.name for span in spans.values()})
        raise CheckpointError(
            f"{missing[0]}{more}: missing from the checkpoint ({shards[0]}{' and others' if shards[1:] else ''}); "
            "fetch it again, or use a config.json that belongs to it"
        )


def _wrapper_of(names: Iterable[str]) -> str | None:
    """Return the prefix that wrappers of torch put before the names of a module, if all names have it."""
    prefixes = {match[0] if (match := re.match(r"(?:module\.|_orig_mod\.)+", name)) else "" for name in names}
    return prefixes.pop() or None if len(prefixes) == 1 else None
