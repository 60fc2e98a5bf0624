"""Let go of attention weights that nobody asked for, in blocks that wait for others with their work half done.

Eager attention returns its weights (B, heads, T, S) beside its result, and the block that drops them keeps them until it returns
(`hidden, _ = self.self_attn(..)`). Where riders wait in the middle of a block, for experts, that would be memory of every rider at
once: 95 kB a token of gpt-oss at 745 tokens, three times as much as all else.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder


def drop_unasked_attention(model: PreTrainedModel) -> None:
    """Have the attention modules of a model return None instead of weights where nothing listens to them.

    What transformers records (`output_attentions=True`) and hooks of others find them as before.

    Args:
        model: whose classes say which modules return attention weights (`_can_record_outputs`); where they do not, nothing happens.
    """
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            for kind, index in _kinds_of(part):
                for module in part.modules():
                    if isinstance(module, kind) and not hasattr(module, _MARK):
                        setattr(module, _MARK, True)
                        module.register_forward_hook(functools.partial(_drop, index))


# The attribute of a module that has its hook.
_MARK = "_slowllm_drops_attention"


def _kinds_of(model: PreTrainedModel) -> Iterator[tuple[type[nn.Module], int]]:
    """Yield the classes that return attention weights, and where in a tuple."""
    recorded: Any = (getattr(model, "_can_record_outputs", None) or {}).get("attentions", ())
    for one in recorded if isinstance(recorded, list | tuple) else (recorded,):
        kind, index = (one.target_class, one.index) if isinstance(one, OutputRecorder) else (one, 1)
        if isinstance(kind, type):
            yield kind, index


def _drop(index: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Return the output of an attention module without its weights; None, which leaves it, where others look at it as well."""
    del args
    if len(module._forward_hooks) > 1 or not isinstance(output, tuple) or len(output) <= index:
        return None
    if not isinstance(output[index], Tensor) or output[index].dim() != 4:
        return None
    return (*output[:index], None, *output[index + 1 :])
