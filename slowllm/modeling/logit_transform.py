"""Find what a model does to its logits after the head: soft caps, scales, casts."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

log = logging.getLogger(__name__)
LogitTransform = Callable[[Tensor], Tensor]


class _Returns(nn.Module):
    """A module that returns one value from every call.

    Other attributes are those of `likeness`, whose dtype a forward may ask for; without one, each is this module
    itself, for a forward that calls a part of its base model.
    """

    def __init__(self, value: Any, likeness: nn.Module | None = None) -> None:
        super().__init__()
        self.__dict__["value"], self.__dict__["likeness"] = value, likeness

    def __getattr__(self, name: str) -> Any:
        return self if self.__dict__["likeness"] is None else getattr(self.__dict__["likeness"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.value


class _Output(BaseModelOutputWithPast):
    """A base model's output that has only hidden states; every other field is None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def find_logit_transform(model: PreTrainedModel) -> LogitTransform | None:
    """Return what the model does to its logits after the head.

    It is the model's own forward, with a base model and a head that only return what they were given. Returns None
    where that cannot be separated from the head, or is not element by element: log-probabilities then take whole logits.
    """
    kind, head = type(model), model.get_output_embeddings()
    names = [name for name, module in model.named_children() if module is head]
    base = model.base_model_prefix
    if len(names) != 1 or base not in model._modules:
        log.info("%s: its head is no child of the model; log-probabilities take whole logits", kind.__name__)
        return None
    stand_in = copy.copy(model)
    stand_in.__dict__ = {**model.__dict__, "_modules": dict(model._modules)}
    ids = torch.zeros(1, 1, dtype=torch.int64)

    def transform(logits: Tensor) -> Tensor:
        hidden = logits.new_zeros(*logits.shape[:-1], 1)
        stand_in._modules[base] = _Returns(_Output(last_hidden_state=cast(Any, hidden)))
        stand_in._modules[names[0]] = _Returns(logits, head)
        return cast(Tensor, kind.forward(stand_in, input_ids=ids, use_cache=False, return_dict=True).logits)

    probe = torch.linspace(-40.0, 40.0, 24).view(1, 3, 8)
    try:
        with torch.no_grad():
            whole = transform(probe)
            parts = torch.cat([transform(probe[..., :5]), transform(probe[..., 5:])], -1)
            separable = torch.equal(whole, parts) and transform(probe[..., :0]).shape[-1] == 0
    except Exception as error:  # whatever a model's forward may raise on such stubs
        log.info("%s: %r; log-probabilities take whole logits", kind.__name__, error)
        return None
    if not separable:
        log.info("%s: transforms its logits together; log-probabilities take whole logits", kind.__name__)
        return None
    return transform
