"""Petals' classes by their names: for any family (Auto...), and for the four that Petals has."""

from __future__ import annotations

from typing import Any, ClassVar

from slowllm.swarm.petals.base_model import DistributedBase, distribute
from slowllm.swarm.petals.causal_lm import ForCausalLM, ForSpeculation
from slowllm.swarm.petals.classification import ForSequenceClassification
from slowllm.swarm.petals.client_config import read_call
from slowllm.swarm.petals.config import class_for
from slowllm.swarm.petals.opening import closed_on_error, open_ends


class AutoDistributedModel(DistributedBase):
    """A base model, which ends with hidden states, of any family."""

    family: ClassVar[str | None] = None

    @classmethod
    def from_pretrained(cls, model_name_or_path: Any, **arguments: Any) -> Any:
        """Open the base model; see `ForCausalLM.from_pretrained`.

        Args:
            model_name_or_path: a folder, or a hub id that is in the local cache.
            arguments: as there.
        """
        call = read_call(model_name_or_path, arguments)
        lm = open_ends(call, cls)
        with closed_on_error(lm):
            return distribute(lm, call.client, class_for(cls, lm.config))

    def close(self) -> None:
        """Leave the swarm, and give files, threads and memory back. Idempotent."""
        self.__dict__["_slowllm"].close()


class AutoDistributedModelForCausalLM(ForCausalLM):
    """A causal language model of any family."""

    base_marker = AutoDistributedModel


class AutoDistributedSpeculativeModel(ForSpeculation):
    """A causal language model of any family that verifies a small model's drafts."""

    base_marker = AutoDistributedModel


class AutoDistributedModelForSequenceClassification(ForSequenceClassification):
    """A sequence classification of any family."""

    base_marker = AutoDistributedModel


class DistributedBloomModel(AutoDistributedModel):
    """The base model of a BLOOM."""

    family = "bloom"


class DistributedBloomForCausalLM(AutoDistributedModelForCausalLM):
    """A BLOOM."""

    family = "bloom"


class DistributedBloomForSequenceClassification(AutoDistributedModelForSequenceClassification):
    """A BLOOM that classifies."""

    family = "bloom"


class DistributedFalconModel(AutoDistributedModel):
    """The base model of a Falcon."""

    family = "falcon"


class DistributedFalconForCausalLM(AutoDistributedModelForCausalLM):
    """A Falcon."""

    family = "falcon"


class DistributedFalconForSequenceClassification(AutoDistributedModelForSequenceClassification):
    """A Falcon that classifies."""

    family = "falcon"


class DistributedLlamaModel(AutoDistributedModel):
    """The base model of a Llama."""

    family = "llama"


class DistributedLlamaForCausalLM(AutoDistributedModelForCausalLM):
    """A Llama."""

    family = "llama"


class DistributedLlamaForSequenceClassification(AutoDistributedModelForSequenceClassification):
    """A Llama that classifies."""

    family = "llama"


class DistributedLlamaForSpeculativeGeneration(AutoDistributedSpeculativeModel):
    """A Llama that verifies a small model's drafts."""

    family = "llama"


class DistributedMixtralModel(AutoDistributedModel):
    """The base model of a Mixtral."""

    family = "mixtral"


class DistributedMixtralForCausalLM(AutoDistributedModelForCausalLM):
    """A Mixtral."""

    family = "mixtral"


class DistributedMixtralForSequenceClassification(AutoDistributedModelForSequenceClassification):
    """A Mixtral that classifies."""

    family = "mixtral"
