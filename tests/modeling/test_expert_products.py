"""One expert after the other has the bits of each family's own loop: logits, gradients and greedy tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralPreTrainedModel
from transformers.models.muse_spark.configuration_muse_spark import MuseSparkTextConfig
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts

import slowllm
from slowllm.errors import ArchitectureError, NonFiniteError, RouterError
from slowllm.modeling.expert_products import (
    compute_one_by_one,
    expert_output,
    experts_forward,
    sum_dtype,
)
from slowllm.modeling.expert_routing import ExpertSum, Routing
from slowllm.modeling.experts import expert_modules, weights_of
from tests.support.census import IDS
from tests.support.expert_census import (
    HEADING,
    INTERFACE,
    TABLE,
    computed,
    expert_rows,
    expert_toy,
    introspect,
    section,
)
from tests.support.families import resident

ROWS = expert_rows(TABLE.read_text())
REACHED = [name for name, kind in ROWS.items() if kind.way == INTERFACE]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", REACHED)
def test_one_by_one_has_the_bits_of_the_familys_own_loop(architecture: str, dtype: torch.dtype) -> None:
    model = expert_toy(architecture, dtype)
    assert expert_modules(model)
    model.set_experts_implementation("eager")
    wanted = dict(computed(model))
    assert wanted["gradient"].any()
    compute_one_by_one(model)
    for name, found in computed(model):
        assert torch.equal(found, wanted[name]), name


@pytest.mark.long
def test_the_table_lists_every_architecture_that_has_experts() -> None:
    assert introspect() == ROWS


def test_the_section_of_the_page_is_what_its_rows_say() -> None:
    (written,) = (part for part in TABLE.read_text().split("\n## ") if part.startswith(HEADING))
    assert f"## {written}".rstrip() == section(ROWS).rstrip()


def experts_of(architecture: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    module = next(iter(expert_modules(expert_toy(architecture, dtype)).values()))
    module.config._experts_implementation = "eager"
    return module


def inputs(module: nn.Module, dtype: torch.dtype, width: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(29, width, generator=generator).to(dtype).requires_grad_(True)
    scores, index = torch.randn(29, module.num_experts, generator=generator).topk(4)
    return hidden, index, scores.softmax(-1).to(dtype).requires_grad_(True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ["gpt_oss", "mixtral"])
def test_experts_may_arrive_in_any_order(architecture: str, dtype: torch.dtype) -> None:
    module = experts_of(architecture, dtype)
    hidden, index, weights = inputs(module, dtype)
    wanted = module(hidden, index, weights)
    gradient = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    wanted_gradients = torch.autograd.grad(wanted, [hidden, weights], gradient)
    for seed in range(5):
        routing = Routing(hidden, index, weights, module.num_experts)
        rows = {expert: routing.rows(expert) for expert in routing.experts}
        order = random.Random(seed).sample(routing.experts, len(routing.experts))
        total = ExpertSum(routing, sum_dtype(module, routing))
        for expert in order:
            total.add(expert, expert_output(module, weights_of(module, expert), rows[expert]))
        found = total.result()
        assert torch.equal(found, wanted)
        for one, other in zip(
            torch.autograd.grad(found, [hidden, weights], gradient), wanted_gradients, strict=True
        ):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_norm_behind_each_expert_is_applied(dtype: torch.dtype) -> None:
    # Of no causal language model, but the only class with such a norm.
    config = MuseSparkTextConfig(moe_hidden_size=64, moe_intermediate_size=32, num_local_experts=8)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    module = MuseSparkExperts(config)
    for parameter in module.parameters():
        parameter.data.normal_(std=0.2)
    module.to(dtype).requires_grad_(False)
    hidden, index, weights = inputs(module, dtype)
    assert module.has_post_expert_norm
    assert torch.equal(experts_forward(module, hidden, index, weights), module(hidden, index, weights))


def test_ascending_experts_leave_nothing_waiting() -> None:
    module = experts_of("mixtral")
    hidden, index, weights = (value.detach() for value in inputs(module, torch.float32))
    routing = Routing(hidden, index, weights, module.num_experts)
    total = ExpertSum(routing)
    for expert in routing.experts:
        total.add(expert, routing.rows(expert))
        assert not total._kept
    assert torch.equal(total.result(), total._sum)


def test_an_expert_of_another_machine_is_skipped() -> None:
    module = experts_of("mixtral")
    hidden, index, weights = (value.detach() for value in inputs(module, torch.float32))
    index = index.masked_fill(index >= 5, module.num_experts)
    wanted = module(hidden, index, weights)
    routing = Routing(hidden, index, weights, module.num_experts)
    routing.check("experts")
    assert routing.experts == (0, 1, 2, 3, 4)
    total = ExpertSum(routing)
    for expert in routing.experts:
        total.add(expert, expert_output(module, weights_of(module, expert), routing.rows(expert)))
    assert torch.equal(total.result(), wanted)


def test_no_tokens_are_no_experts() -> None:
    routing = Routing(torch.empty(0, 8), torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2), 4)
    routing.check("experts")
    assert routing.experts == ()
    assert ExpertSum(routing).result().shape == (0, 8)


@pytest.mark.parametrize("wrong", [-1, 9])
def test_an_expert_that_there_is_not_is_refused(wrong: int) -> None:
    model = expert_toy("mixtral")
    compute_one_by_one(model)
    module = model.model.layers[1].mlp.experts
    hidden, index, weights = (value.detach() for value in inputs(module, torch.float32))
    index[3, 1] = wrong
    with pytest.raises(
        RouterError, match=rf"^model\.layers\.1\.mlp\.experts: its router chose expert {wrong}, .*0 to 7"
    ):
        module(hidden, index, weights)


def test_a_router_of_nan_is_refused_by_name() -> None:
    model = expert_toy("mixtral")
    compute_one_by_one(model)
    model.model.layers[1].mlp.gate.weight[2, 3] = torch.nan
    with pytest.raises(
        NonFiniteError, match=r"^model\.layers\.1\.mlp\.experts: its router gave NaN .* at token 0"
    ):
        model(IDS)


def test_nan_at_padding_is_nobodys_business() -> None:
    weights = torch.ones(4, 1)
    weights[1] = torch.nan
    routing = Routing(torch.ones(4, 8), torch.zeros(4, 1, dtype=torch.int64), weights, 2)
    routing.check("experts", torch.tensor([True, False, True, True]))
    with pytest.raises(NonFiniteError, match=r"^experts: its router gave NaN as a weight at token 1"):
        routing.check("experts", torch.ones(4, dtype=torch.bool))


class Stranger(MixtralPreTrainedModel):
    """transformers looks for the experts' decorator in the file that defines a model's class, and finds none here."""

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__(config)
        self.experts = MixtralExperts(config)
        self.post_init()


def test_a_model_that_keeps_another_way_is_refused() -> None:
    model = Stranger(MixtralConfig(hidden_size=16, intermediate_size=16, num_local_experts=4))
    with pytest.raises(ArchitectureError, match=r"^experts: transformers does not let its experts"):
        compute_one_by_one(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["gpt-oss", "mixtral"])
def test_streamed_experts_may_be_computed_one_by_one(
    name: str, dtype: torch.dtype, tiny: Callable[..., Path]
) -> None:
    folder = tiny(name, dtype)
    plain = resident(folder, dtype, experts_implementation="eager")
    with slowllm.load(folder, dtype=str(dtype), keep_resident=False, poison=True) as lm, torch.no_grad():
        compute_one_by_one(lm.model)
        mask = torch.ones_like(IDS)
        mask[0, :4] = 0
        assert torch.equal(lm.model(IDS).logits, plain(IDS).logits)
        found = lm.model(IDS, attention_mask=mask).logits
        assert torch.equal(found, plain(IDS, attention_mask=mask).logits)
