"""What one expert is made of, and who chooses it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slowllm.modeling.experts import ExpertLayout, expert_layouts, expert_modules, picked_experts, weights_of
from slowllm.modeling.layout import find_blocks
from slowllm.modeling.routers import KeptRouter, Router, find_router
from tests.support.census import IDS, make_toy
from tests.support.expert_census import INTERFACE, TABLE, expert_rows, expert_toy, with_experts

MAIN = ("deepseek_v3", "glm4_moe", "gpt_oss", "mixtral", "olmoe", "qwen3_moe")
# Their routers ask for tokens, or for what the router before them knew.
NO_ROUTER = {"deepseek_v4", "zaya"}
# Their mixtures take hidden states as they are between two sublayers, or as hyper-connections mix them.
NO_NORM = {"flex_olmo", "gemma4", "gemma4_text", "qwen4_exp", "qwen4_exp_text"}
REACHED = [name for name, kind in expert_rows(TABLE.read_text()).items() if kind.way == INTERFACE]


def skeleton(architecture: str) -> Any:
    with torch.device("meta"):
        return make_toy(architecture, with_experts)


def test_an_expert_of_mixtral_is_two_matrices() -> None:
    layouts = expert_layouts(skeleton("mixtral"))
    assert layouts[1] == ExpertLayout(
        name="model.layers.1.mlp.experts",
        num_experts=8,
        shapes={"gate_up_proj": (192, 64), "down_proj": (64, 96)},
        dtypes={"gate_up_proj": torch.float32, "down_proj": torch.float32},
    )
    assert layouts[1].parameters == (
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
    )
    assert layouts[1].expert_bytes == (192 * 64 + 64 * 96) * 4


def test_an_expert_of_gpt_oss_has_biases() -> None:
    shapes = expert_layouts(skeleton("gpt_oss"))[0].shapes
    assert {key: len(shape) for key, shape in shapes.items()} == {
        "gate_up_proj": 2, "gate_up_proj_bias": 1, "down_proj": 2, "down_proj_bias": 1,
    }  # fmt: skip


@pytest.mark.parametrize("architecture", MAIN)
def test_layouts_cover_the_experts_parameters(architecture: str) -> None:
    model = skeleton(architecture)
    layouts = expert_layouts(model)
    assert [layout.name for layout in layouts] == list(expert_modules(model))
    parameters = dict(model.named_parameters())
    for layout in layouts:
        module = model.get_submodule(layout.name)
        assert set(layout.parameters) == {f"{layout.name}.{name}" for name, _ in module.named_parameters()}
        whole = sum(parameters[name].nbytes for name in layout.parameters)
        assert layout.num_experts * layout.expert_bytes == whole
        weights = weights_of(module, layout.num_experts - 1)
        assert {key: tuple(value.shape) for key, value in weights.items()} == layout.shapes
    matrices = {name for layout in layouts for name in layout.parameters if not name.endswith("_bias")}
    assert picked_experts(model) == matrices


def test_a_model_without_decorated_experts_has_no_layouts() -> None:
    assert expert_layouts(skeleton("llama")) == ()
    assert expert_layouts(skeleton("llama4_text")) == ()


def watched(model: nn.Module, block: nn.Module, router: Router) -> dict[str, Tensor]:
    """Run a model and return what came to a block's norm and to its router, and which experts were chosen."""
    seen: dict[str, Tensor] = {}
    (experts,) = expert_modules(block).values()
    hooks = [
        router.module.register_forward_pre_hook(lambda _, inputs: seen.update(hidden=inputs[0])),
        experts.register_forward_pre_hook(lambda _, inputs: seen.update(chosen=inputs[1])),
    ]
    if router.norm is not None:
        hooks.append(router.norm.register_forward_pre_hook(lambda _, inputs: seen.update(before=inputs[0])))
    with torch.no_grad():
        model(IDS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("architecture", REACHED)
def test_a_router_says_which_experts_its_block_will_choose(architecture: str) -> None:
    model = expert_toy(architecture)
    blocks = [block for block in find_blocks(model)[1] if expert_modules(block)]
    router = find_router(blocks[-1])
    if architecture in NO_ROUTER and router is None:
        return
    assert router is not None
    assert (router.norm is None) == (architecture in NO_NORM)
    kept = KeptRouter(router)
    seen = watched(model, blocks[-1], router)
    kept.keep()
    # It reads no other weight of its block.
    state = dict(blocks[-1].named_parameters()) | dict(blocks[-1].named_buffers())
    assert set(router.parameters) <= state.keys()
    for name in state.keys() - set(router.parameters):
        if state[name].is_floating_point():
            state[name].data.fill_(torch.nan)
    chosen = seen["chosen"].sort(-1).values
    assert torch.equal(router(seen["hidden"]).sort(-1).values, chosen)
    if "before" in seen:
        assert torch.equal(router.guess(seen["before"]).sort(-1).values, chosen)
    # What is kept can be asked when nothing of the block is left, and as often as one likes.
    for value in state.values():
        if value.is_floating_point():
            value.data.fill_(torch.nan)
    before = seen.get("before", seen["hidden"])
    for given in (before, before.reshape(-1, before.shape[-1])):
        assert torch.equal(kept.guess(given).sort(-1).values, chosen)
    one = before.reshape(-1, before.shape[-1])[:1]  # as in generation, which is where guesses are made
    assert torch.equal(kept.guess(one).sort(-1).values, chosen[:1])


@pytest.mark.parametrize("architecture", MAIN)
def test_main_families_have_a_norm_before_their_router(architecture: str) -> None:
    model = skeleton(architecture)
    blocks = find_blocks(model)[1]
    router = find_router(blocks[-1])
    assert router is not None
    assert router.norm is blocks[-1].post_attention_layernorm


def test_there_is_no_router_to_ask_where_it_asks_for_more_or_there_are_no_experts() -> None:
    assert find_router(find_blocks(skeleton("deepseek_v4"))[1][0]) is None  # tokens
    assert find_router(find_blocks(skeleton("zaya"))[1][1]) is None  # the state of the router before it
    assert find_router(find_blocks(skeleton("llama"))[1][0]) is None
    assert find_router(find_blocks(skeleton("glm4_moe"))[1][0]) is None  # a dense block before mixtures
