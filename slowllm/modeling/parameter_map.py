"""Map checkpoint names to parameters and slices of them, by transformers' own conversion mapping.

Checkpoint names are not parameter names: transformers renames keys, adds or strips the base model's prefix, and
fuses tensors (`fused_parameters`). Knows transformers; reads no weight.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from slowllm.errors import CheckpointError
from slowllm.modeling.fused_parameters import place_fused
from slowllm.storage.spans import Placement, Run, Span

log = logging.getLogger(__name__)


def place(model: PreTrainedModel, spans: Mapping[str, Span]) -> dict[str, Placement]:
    """Return, for every parameter and persistent buffer of `model`, the bytes that fill it.

    Args:
        model: with parameters on the meta device; only names and shapes are used.
        spans: of the checkpoint, by name on disk.
    Returns:
        by parameter name. A tied parameter is listed once, under the name that the checkpoint has.
    Raises:
        CheckpointError: a parameter is missing, filled twice, or of another shape or dtype; or the checkpoint has more
            blocks than the config says.
        ArchitectureError: a parameter cannot be filled by copying runs of bytes.
    """
    wanted = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}

    plain: dict[str, Span] = {}
    fused: dict[tuple[str, int], list[tuple[str, Span]]] = defaultdict(list)
    unexpected: list[str] = []
    for name in sorted(spans, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
        if target not in wanted and name in wanted:  # a parameter's name already, which a renaming changed
            target, pattern = name, None
        if target not in wanted:
            unexpected.append(name)
        elif pattern is not None:
            fused[target, id(by_pattern[pattern])].append((pattern, spans[name]))
        elif target in plain:
            raise CheckpointError(f"{plain[target].name} and {name} are both {target}; one must go")
        else:
            plain[target] = spans[name]
    _refuse_unexpected_blocks(model, unexpected)

    placements: dict[str, Placement] = {}
    for target, span in plain.items():
        _check_shape(span, target, tuple(wanted[target].shape))
        runs = (Run(span, 0, 0, span.num_bytes),) if span.num_bytes else ()
        placements[target] = Placement(target, span.shape, span.torch_dtype, runs, span.coding)
    for (target, _), sources in fused.items():
        for placement in place_fused(model, target, by_pattern[sources[0][0]], sources, wanted):
            if placement.name in placements:
                raise CheckpointError(
                    f"{placement.name} is filled twice; a tensor stands in the checkpoint twice"
                )
            placements[placement.name] = placement

    _refuse_missing(model, wanted, placements, spans)
    return placements


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


def _refuse_missing(
    model: PreTrainedModel,
    wanted: Mapping[str, Tensor],
    placements: Mapping[str, Placement],
    spans: Mapping[str, Span],
) -> None:
    tied = {**model.all_tied_weights_keys, **{v: k for k, v in model.all_tied_weights_keys.items()}}
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
