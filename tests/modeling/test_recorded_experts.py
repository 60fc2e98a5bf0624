"""Riders that run backward at a block of experts: each has its own bits, and the experts are brought once for all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import slowllm
from slowllm.errors import CheckpointError, UnsupportedError
from slowllm.modeling.held_weight import HeldWeight, Holder
from slowllm.modeling.recorded_experts import ExpertsNode, RecordedExperts, RecordedGradients
from tests.support.families import resident, save_tiny
from tests.support.native_checkpoints import quantised, store_mxfp4
from tests.support.stores import make_store

IDS = torch.arange(5, 35).view(2, 15)
TEXTS = [IDS[:1, :4], IDS, IDS[1:, :9], IDS[:1, 3:6]]


def streamed(folder: Path, dtype: str = "float32", **options: Any) -> Any:
    options = {"granularity": "experts", "resident": False, "poison": True, **options}
    return slowllm.load(folder, dtype=dtype, **options)


def gradient(model: Any, plain: Any, ids: Tensor) -> Tensor:
    """Return the gradient of a text's loss with respect to its embeddings (B, T, H)."""
    embedded = plain.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embedded, labels=ids, use_cache=False).loss.backward()
    assert embedded.grad is not None
    return embedded.grad


def job(lm: Any, plain: Any, ids: Tensor) -> Callable[[], Tensor]:
    return lambda: gradient(lm.model, plain, ids)


def asked(lm: Any, work: Callable[[], Any]) -> int:
    """Return how many experts are brought meanwhile."""
    before: int = lm.experts.demand.num_asked
    work()
    return int(lm.experts.demand.num_asked) - before


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "deepseek-v3", "qwen3-next-hybrid"])
def test_gradients_of_riders_together_have_the_bits_of_each_alone(
    name: str, exact: bool, tiny: Callable[..., Path]
) -> None:
    plain: Any = resident(tiny(name))
    wanted = [gradient(plain, plain, ids) for ids in TEXTS]
    with streamed(tiny(name), exact=exact) as lm:
        found = lm.ride([job(lm, plain, ids) for ids in TEXTS])
    for ours, theirs in zip(found, wanted, strict=True):
        if exact:
            assert torch.equal(ours, theirs)
        else:
            torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)


def test_coded_experts_have_their_gradients_as_well(tmp_path: Path) -> None:
    save_tiny("gpt-oss", tmp_path / "plain", torch.bfloat16)
    folder = quantised(tmp_path / "plain", tmp_path / "mxfp4", {"quant_method": "mxfp4"}, store_mxfp4)
    plain: Any = resident(folder, torch.bfloat16)
    with streamed(folder, "bfloat16") as lm:
        found = lm.ride([job(lm, plain, ids) for ids in TEXTS])
    assert all(map(torch.equal, found, [gradient(plain, plain, ids) for ids in TEXTS]))


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_riders_of_a_store_have_the_gradients_of_each_alone(
    codec: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    make_store(tiny("mixtral", torch.bfloat16), tmp_path / "store", codec)
    plain: Any = resident(tiny("mixtral", torch.bfloat16), torch.bfloat16)
    with streamed(tmp_path / "store", "bfloat16") as lm:
        alone = [gradient(lm.model, plain, ids) for ids in TEXTS]
        found = lm.ride([job(lm, plain, ids) for ids in TEXTS])
    assert all(map(torch.equal, found, alone))


@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
def test_on_the_way_down_each_expert_is_brought_twice_however_many_riders_want_it(
    name: str, tiny: Callable[..., Path]
) -> None:
    plain: Any = resident(tiny(name))
    with streamed(tiny(name)) as lm:
        with torch.no_grad():
            up = asked(lm, lambda: lm.ride([lambda ids=ids: lm.model(ids) for ids in TEXTS]))
        together = asked(lm, lambda: lm.ride([job(lm, plain, ids) for ids in TEXTS]))
        alone = sum(asked(lm, job(lm, plain, ids)) for ids in TEXTS)
    assert together == 3 * up
    assert together < alone


@pytest.mark.parametrize("autocast", [torch.bfloat16, None])
def test_autocast_reaches_the_experts(autocast: torch.dtype | None, tiny: Callable[..., Path]) -> None:
    plain: Any = resident(tiny("mixtral"))
    context = functools.partial(
        torch.autocast, "cpu", autocast or torch.bfloat16, enabled=autocast is not None
    )

    def work(model: Any) -> Tensor:
        with context():
            return gradient(model, plain, IDS)

    with streamed(tiny("mixtral")) as lm:
        found = lm.ride([lambda: work(lm.model)] * 2)
    wanted = work(plain)
    assert torch.equal(wanted, gradient(plain, plain, IDS)) == (autocast is None)
    assert all(torch.equal(one, wanted) for one in found)


def test_a_text_whose_loss_does_not_reach_the_experts_has_its_gradient(tiny: Callable[..., Path]) -> None:
    plain: Any = resident(tiny("mixtral"))

    def of_first_block(model: Any) -> Tensor:
        embedded = plain.get_input_embeddings()(IDS).detach().requires_grad_()
        states = model(inputs_embeds=embedded, output_hidden_states=True, use_cache=False).hidden_states
        (found,) = torch.autograd.grad(states[1].sum(), embedded)
        return found

    with streamed(tiny("mixtral")) as lm:
        found = lm.ride([lambda: of_first_block(lm.model), job(lm, plain, IDS)])
    assert torch.equal(found[0], of_first_block(plain))
    assert torch.equal(found[1], gradient(plain, plain, IDS))


@pytest.mark.parametrize("meeting", [RecordedExperts, RecordedGradients])
def test_an_expert_that_fails_on_the_way_down_ends_those_who_need_it(
    meeting: type, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain: Any = resident(tiny("olmoe"))
    texts = [torch.tensor([[number, number + 1]]) for number in range(5, 13)]
    wanted = [gradient(plain, plain, ids) for ids in texts]
    inner = meeting.take  # type: ignore[attr-defined]
    chosen: list[set[int]] = []

    def take(self: Any, number: int, weights: Any) -> None:
        recorded = self if meeting is RecordedExperts else self._recorded
        if recorded._module is last:
            if broken is None:
                chosen[-1].add(number)
            elif number == broken:
                raise CheckpointError("this expert cannot be read")
        inner(self, number, weights)

    def attempt(lm: Any, ids: Tensor) -> Tensor | str:
        try:
            return gradient(lm.model, plain, ids)
        except CheckpointError as error:
            return str(error)

    with streamed(tiny("olmoe")) as lm:
        last, broken = lm.model.model.layers[-1].mlp.experts, None
        monkeypatch.setattr(meeting, "take", take)
        for ids in texts:
            chosen.append(set())
            gradient(lm.model, plain, ids)
        broken = min(number for number in range(64) if 0 < sum(number in one for one in chosen) < len(texts))
        found: Sequence[Any] = lm.ride([lambda ids=ids: attempt(lm, ids) for ids in texts])
        monkeypatch.undo()
        again = lm.ride([job(lm, plain, ids) for ids in texts])
    for one, other, experts in zip(found, wanted, chosen, strict=True):
        if broken in experts:
            assert one == "this expert cannot be read"
        else:
            assert torch.equal(one, other)
    assert all(map(torch.equal, again, wanted))


def test_autograd_comes_to_a_node_for_each_node_before_it_and_for_the_block() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    first = ExpertsNode(3 * x.detach(), [(x * 1, x[:, :1])], lambda gradient: [3 * gradient, None])
    second = ExpertsNode(5 * first.output.detach(), [(first.output, x[:, :1])], lambda g: [5 * g, None])
    loss = (second.output * second.output).sum()
    for node in (second, first):
        (gradient,) = torch.autograd.grad(loss, [node.output], retain_graph=True)
        node.compute_gradients(gradient)
    (found,) = torch.autograd.grad(loss, [x])
    torch.testing.assert_close(found, 2 * 225 * x.detach())


def test_a_weight_of_an_expert_that_is_not_held_is_not_read() -> None:
    holder, matrix = Holder(), torch.randn(4, 6)
    weight = HeldWeight(matrix.to("meta"), holder, "up", torch.device("cpu"))
    with pytest.raises(AssertionError, match="held while its gradient"):
        torch.ones(2, 6) @ weight.T
    holder.weights = {"up": matrix}
    assert torch.equal(torch.ones(2, 6) @ weight.T, torch.ones(2, 6) @ matrix.T)
    assert torch.equal(weight[1:, ::2].clone(), matrix[1:, ::2])
    with pytest.raises(UnsupportedError, match="cannot be written to"):
        weight.add_(1)
