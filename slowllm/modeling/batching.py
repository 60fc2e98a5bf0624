"""Which rows may share a batch: those for which a model then computes what it computes for each of them alone.

Several things make a row depend on its neighbours. Rotary tables that stretch with length (LongRoPE, dynamic NTK) are
chosen by the longest row of a batch. Some models cannot leave out padding before a row: recurrent ones, whose state it
changes, and those that number positions from the first column. A few are not causal, mix the rows of a batch, or keep
their state in their modules.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

# What cannot be seen from a model's class, by model type; `tests/modeling/test_company.py` looks for others.
# Without `position_ids`, but positions are biases by distance (ALiBi).
_RELATIVE_POSITIONS = {"bloom", "mpt"}
# Takes `position_ids` or a mask, and does not use it for padding on the left.
_IGNORES_LEFT_PADDING = {"git", "reformer"}
# A token sees those after it, so a row depends on its length.
_NOT_CAUSAL = {"cpmant"}
# Rows of one batch are computed otherwise than each alone, even if they are equally long.
_MIXES_ROWS = {"doge", "rwkv"}
# The state of a conversation is an attribute of a module.
_STATE_IN_MODULES = {"recurrent_gemma"}


@dataclass(frozen=True)
class BatchRule:
    """Which rows of a model may share a micro-batch, a prefix or a sweep.

    Attributes:
        pads_left: whether rows may begin in different columns, with padding before them.
        rides_alone: whether each row is a micro-batch of its own.
        takes_turns: whether only one rider at a time may generate.
        tables: the kind of each rotary table that depends on length, and the length up to which it does not.
        is_causal: whether a token does not see those after it.
    """

    pads_left: bool
    rides_alone: bool
    takes_turns: bool
    tables: tuple[tuple[str, int], ...]
    is_causal: bool

    def length_class(self, num_positions: int) -> Hashable:
        """Return the class of a row of a length: rows of one class may share a micro-batch.

        LongRoPE has one table for rows up to a length and another for longer ones. Dynamic NTK has a table for each
        length beyond that of training. See `dynamic_rope_update` in transformers' modeling_rope_utils.py.
        """
        if not self.is_causal:
            return num_positions
        return tuple(
            num_positions > limit if kind == "longrope" else max(num_positions, limit)
            for kind, limit in self.tables
        )

    def growing_class(self, num_positions: int, num_new: int) -> Hashable:
        """Return the class of a row that grows; one that changes its class shares a batch with rows of its length."""
        before = self.length_class(num_positions)
        return (before, None if self.length_class(num_positions + num_new) == before else num_positions)

    def may_share(self, length_class: Hashable) -> bool:
        """Return whether rows of a class may continue shorter rows' keys and values."""
        return self.is_causal and not self.rides_alone and length_class == self.length_class(1)

    def reasons(self) -> list[str]:
        """Return what keeps rows apart, in words."""
        return [
            reason
            for applies, reason in (
                (not self.pads_left, "prompts share a micro-batch only if they are equally long"),
                (self.tables, "rows share a micro-batch only if they take the same rotary table"),
                (not self.is_causal, "rows share a micro-batch only if they are equally long"),
                (self.rides_alone, "each row rides alone"),
                (self.takes_turns, "one rider generates at a time"),
            )
            if applies
        ]


def batch_rule(config: Any) -> BatchRule:
    """Return the rule for a model.

    Args:
        config: of the model.
    """
    text = config.get_text_config()
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    parameters = set() if kind is None else set(inspect.signature(kind.forward).parameters)
    layers = DynamicCache(config=text).layers
    has_state = any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    has_state |= bool(getattr(kind, "_is_stateful", False))
    counts_positions = "position_ids" in parameters or config.model_type in _RELATIVE_POSITIONS
    return BatchRule(
        pads_left="attention_mask" in parameters
        and counts_positions
        and not has_state
        and config.model_type not in _IGNORES_LEFT_PADDING,
        rides_alone=config.model_type in _MIXES_ROWS,
        takes_turns=config.model_type in _STATE_IN_MODULES,
        tables=tuple(_tables(text)),
        is_causal=config.model_type not in _NOT_CAUSAL,
    )


def _tables(config: Any) -> Iterator[tuple[str, int]]:
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, Mapping):
        return
    # One table, or one for each type of layer.
    tables = [value for value in parameters.values() if isinstance(value, Mapping)] or [parameters]
    for table in tables:
        kind, limit = table.get("rope_type"), None
        if kind == "longrope":
            limit = table.get("original_max_position_embeddings")
        elif isinstance(kind, str) and "dynamic" in kind:
            limit = getattr(config, "max_position_embeddings", None)
        if isinstance(kind, str) and isinstance(limit, int):
            yield kind, limit


def forget_rotary_tables(model: PreTrainedModel) -> None:
    """Let rotary tables depend on the call alone: what a longer row of an earlier call left there is taken back.

    Only dynamic NTK keeps something from call to call; LongRoPE chooses its table in each.

    Args:
        model: as built, before its first call.
    """
    for module in model.modules():
        kind = getattr(module, "rope_type", None)  # one, or one for each type of layer
        if any("dynamic" in str(name) for name in (kind.values() if isinstance(kind, dict) else [kind])):
            attributes = {
                name: value
                for name, value in vars(module).items()
                if not name.startswith("_") and name != "training"
            }
            restore = functools.partial(_restore, attributes, dict(module._buffers))
            module.register_forward_pre_hook(restore)


def _restore(
    attributes: Mapping[str, Any], buffers: Mapping[str, Any], module: nn.Module, inputs: Sequence[Any]
) -> None:
    vars(module).update(attributes)
    module._buffers.update(buffers)
