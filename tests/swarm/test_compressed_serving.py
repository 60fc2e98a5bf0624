"""Hidden states that are sent in fewer bytes: how far logits and gradients then are from a local model's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.served import Served, same, texts
from tests.support.serving import serving

# The largest distance of a logit, over the largest logit, after two hops: rounding of 2^-8, 2^-11 and 1/254 of a row's
# largest value, four times, in a model of six blocks. Measured: a third of it.
TOLERANCES = {"none": 0.0, "bfloat16": 0.02, "float16": 0.003, "int8": 0.05}


@pytest.mark.parametrize(
    "compression",
    [how if how == "int8" else pytest.param(how, marks=pytest.mark.long) for how in TOLERANCES],
)
def test_logits_and_gradients_are_as_near_as_the_compression_allows(compression: str, served: Served) -> None:
    ids, _ = texts()

    def computed(model: Any) -> list[Tensor]:
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_(True)
        logits = model(inputs_embeds=embeddings).logits
        logits.logsumexp(-1).sum().backward()
        return [logits.detach(), embeddings.grad]

    with (
        serving(served.whole, "0:3", compression=compression) as first,
        serving(served.whole, "3:6", *first.network.addresses[:1], compression=compression),
        served.load(swarm=first.network.addresses) as lm,
        served.load_local() as local,
    ):
        for ours, theirs in zip(computed(lm.model), computed(local.model), strict=True):
            distance = (ours - theirs).abs().max() / theirs.abs().max()
            assert distance <= TOLERANCES[compression]
            assert bool(distance) == bool(TOLERANCES[compression]), "it was not compressed"


@pytest.mark.long
def test_a_model_in_bfloat16_has_the_bits_of_a_local_one(served: Served) -> None:
    ids, mask = texts()
    with (
        serving(served.whole, "0:2", dtype="bfloat16") as first,
        serving(served.whole, "2:6", *first.network.addresses[:1], dtype="bfloat16"),
        served.load(swarm=first.network.addresses) as lm,
        served.load_local(dtype="bfloat16") as local,
        torch.no_grad(),
    ):
        assert lm.model.dtype == torch.bfloat16
        same(lambda model: [model(ids).logits], lm.model, local.model)
        same(
            lambda model: [model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0)],
            lm.model, local.model,
        )  # fmt: skip
