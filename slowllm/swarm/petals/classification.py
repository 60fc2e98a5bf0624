"""Sequence classification on blocks at servers: transformers' own class around a client's base model, and a trained score."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from slowllm.errors import InputError
from slowllm.modeling.streamed_model import StreamedModel
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.swarm.petals.base_model import DistributedBase, distribute
from slowllm.swarm.petals.client_config import ClientConfig, read_call
from slowllm.swarm.petals.config import class_for, with_client
from slowllm.swarm.petals.opening import closed_on_error, open_ends


class Score(nn.Linear):
    """The layer that gives a text's labels their logits. It is fp32, trained, and takes hidden states of any dtype."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the logits (..., labels) of hidden states (..., H)."""
        return super().forward(input.to(self.weight.dtype))


class ForSequenceClassification:
    """Mixin for transformers' sequence classification of a family.

    Attributes:
        family: the only `model_type` that a subclass takes; None for any.
        base_marker: the class that the base model gets beside its own.
    """

    family: ClassVar[str | None] = None
    base_marker: ClassVar[type[Any]] = DistributedBase

    @classmethod
    def from_pretrained(cls, model_name_or_path: Any, **arguments: Any) -> Any:
        """Open what is outside the blocks, join the swarm, and return transformers' own model with remote blocks.

        Args:
            model_name_or_path: a folder, or a hub id that is in the local cache, of a causal language model. The score is
                initialised at random.
            arguments: as for `ForCausalLM.from_pretrained`, and `num_labels`.
        Raises:
            InputError: an argument is unknown or cannot be obeyed, or the family has no such class.
            CheckpointError: there is no such checkpoint.
            NetworkError: the swarm cannot be joined, or lacks blocks.
        """
        call = read_call(model_name_or_path, arguments, ("num_labels",))
        lm = open_ends(call, cls)
        with closed_on_error(lm):
            return cls.of_client(lm, call.client, call.others.get("num_labels"))

    @classmethod
    def of_client(cls, lm: StreamedLM, client: ClientConfig, num_labels: int | None = None) -> Any:
        """Return the classifier on a client's blocks. Used by `from_pretrained`.

        Args:
            lm: whose blocks are remote.
            client: with the prompt to tune.
            num_labels: by default those of the config, which are 2 where it names none.
        Raises:
            InputError: transformers has no such class for the family, or one of another form.
        """
        config = copy.deepcopy(lm.config)
        if num_labels is not None:
            config.num_labels = num_labels
        kind: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
        if kind is None:
            raise InputError(
                f"transformers has no sequence classification for models of type {config.model_type}"
            )
        with torch.device("meta"):
            model = kind(config)
        if not isinstance(getattr(model, "score", None), nn.Linear) or not hasattr(
            model, model.base_model_prefix
        ):
            raise InputError(
                f"{kind.__name__}: has no score behind a base model, so it cannot be put on remote blocks"
            )
        base = distribute(lm, client, class_for(cls.base_marker, lm.config))
        setattr(model, model.base_model_prefix, base)
        text = config.get_text_config()
        model.score = Score(text.hidden_size, config.num_labels, bias=False, dtype=torch.float32)
        nn.init.normal_(model.score.weight, std=float(getattr(text, "initializer_range", 0.02)))
        names: dict[str, Any] = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
        if "transformer" not in model._modules:
            names["transformer"] = property(lambda self: base)
        model.__class__ = type(kind.__name__, (class_for(cls, lm.config), StreamedModel, kind), names)
        model._folder, model._compute_dtype, model._device = lm.folder, lm.model.dtype, lm.model.device
        model.__dict__["_slowllm"] = lm
        model.config, base.config = with_client(config, client), with_client(base.config, client)
        return model.eval()

    def close(self) -> None:
        """Leave the swarm, and give files, threads and memory back. Idempotent."""
        self.__dict__["_slowllm"].close()
