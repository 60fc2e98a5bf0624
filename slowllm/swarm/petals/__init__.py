"""Petals' classes on slowllm's swarm: programs written for Petals run after their import is changed.

They return what `slowllm.load(..., swarm=...).model` is, under Petals' names. docs/petals.md says what differs.
"""

from __future__ import annotations

from slowllm.swarm.petals.client_config import ClientConfig as ClientConfig
from slowllm.swarm.petals.config import AutoDistributedConfig as AutoDistributedConfig
from slowllm.swarm.petals.config import DistributedBloomConfig as DistributedBloomConfig
from slowllm.swarm.petals.config import DistributedFalconConfig as DistributedFalconConfig
from slowllm.swarm.petals.config import DistributedLlamaConfig as DistributedLlamaConfig
from slowllm.swarm.petals.config import DistributedMixtralConfig as DistributedMixtralConfig
from slowllm.swarm.petals.families import AutoDistributedModel as AutoDistributedModel
from slowllm.swarm.petals.families import AutoDistributedModelForCausalLM as AutoDistributedModelForCausalLM
from slowllm.swarm.petals.families import (
    AutoDistributedModelForSequenceClassification as AutoDistributedModelForSequenceClassification,
)
from slowllm.swarm.petals.families import AutoDistributedSpeculativeModel as AutoDistributedSpeculativeModel
from slowllm.swarm.petals.families import DistributedBloomForCausalLM as DistributedBloomForCausalLM
from slowllm.swarm.petals.families import (
    DistributedBloomForSequenceClassification as DistributedBloomForSequenceClassification,
)
from slowllm.swarm.petals.families import DistributedBloomModel as DistributedBloomModel
from slowllm.swarm.petals.families import DistributedFalconForCausalLM as DistributedFalconForCausalLM
from slowllm.swarm.petals.families import (
    DistributedFalconForSequenceClassification as DistributedFalconForSequenceClassification,
)
from slowllm.swarm.petals.families import DistributedFalconModel as DistributedFalconModel
from slowllm.swarm.petals.families import DistributedLlamaForCausalLM as DistributedLlamaForCausalLM
from slowllm.swarm.petals.families import (
    DistributedLlamaForSequenceClassification as DistributedLlamaForSequenceClassification,
)
from slowllm.swarm.petals.families import (
    DistributedLlamaForSpeculativeGeneration as DistributedLlamaForSpeculativeGeneration,
)
from slowllm.swarm.petals.families import DistributedLlamaModel as DistributedLlamaModel
from slowllm.swarm.petals.families import DistributedMixtralForCausalLM as DistributedMixtralForCausalLM
from slowllm.swarm.petals.families import (
    DistributedMixtralForSequenceClassification as DistributedMixtralForSequenceClassification,
)
from slowllm.swarm.petals.families import DistributedMixtralModel as DistributedMixtralModel
from slowllm.swarm.petals.inference_session import InferenceSession as InferenceSession
from slowllm.swarm.petals.remote_sequential import RemoteSequential as RemoteSequential
