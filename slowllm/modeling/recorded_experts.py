"""Experts' products under autograd, cut out of a block's graph: what autograd keeps of each, and its gradients.

Riders that run backward at a block meet twice, and each time the experts are brought once for all of them: first for the
outputs, then for the gradients. In between, and whenever autograd runs for a whole block, nobody may wait for others. So
each expert's products are a graph of its own, and the block's graph has one node in their place, which returns gradients
that were computed before it is reached (see `recompute`). The products, and the order in which gradients are summed up,
are those of transformers' `eager` loop.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from slowllm.modeling.expert_products import expert_output, sum_dtype
from slowllm.modeling.expert_routing import ExpertSum, Routing
from slowllm.modeling.held_weight import Holder
from slowllm.streaming.stops import Weights

# Makes the weights of an expert that are in memory while its unit is held, of its number, what holds it, and the device.
MakeWeights = Callable[[int, Holder, torch.device], Mapping[str, Tensor]]


@dataclass
class _Product:
    """One expert's products with a rider's rows.

    Attributes:
        inputs: rows (n, H), and the router's weights (n, 1) that their outputs are multiplied by.
        weighed: (n, H) in the dtype in which outputs are added.
        holder: of the expert's weights.
    """

    inputs: tuple[Tensor, Tensor]
    weighed: Tensor
    holder: Holder


class RecordedExperts:
    """One rider's products with the experts of a module, recorded for their gradients; takes experts in any order.

    Args:
        module: of experts.
        routing: of the rider's rows, whose tensors belong to the block's graph.
        make_weights: see `MakeWeights`.
    Attributes:
        wants: the experts that are still needed.
    """

    def __init__(self, module: nn.Module, routing: Routing, make_weights: MakeWeights) -> None:
        self.wants: Collection[int] = routing.experts
        self._module, self._routing, self._make_weights = module, routing, make_weights
        self._dtype = sum_dtype(module, routing)
        # In the order in which `eager` reads them, which is that of the sums of their gradients.
        self._inputs: dict[int, tuple[Tensor, Tensor]] = {
            expert: (routing.rows(expert), routing.top_k_weights[(*routing.places(expert), None)])
            for expert in routing.experts
        }
        self._products: dict[int, _Product] = {}
        with torch.no_grad():
            self._total = ExpertSum(routing, self._dtype)
        self._error: BaseException | None = None

    def take(self, expert: int, weights: Weights) -> None:
        """Compute with an expert that is held for the time of this call."""
        holder = Holder()
        holder.weights = weights
        with torch.enable_grad():
            rows, shares = (
                value.detach().requires_grad_(value.requires_grad) for value in self._inputs[expert]
            )
            outputs = expert_output(self._module, self._make_weights(expert, holder, rows.device), rows)
            weighed = (outputs * shares).to(self._dtype)
        holder.weights = None
        self._products[expert] = _Product((rows, shares), weighed, holder)
        with torch.no_grad():
            self._total.add(expert, outputs)

    def fail(self, expert: int, error: BaseException) -> None:
        """Do without an expert: the rider raises the error."""
        self._error, self.wants = error, ()

    def outcome(self) -> Tensor | BaseException:
        """Return the sum of the experts' outputs (T, H), which is no part of a graph yet, or the error."""
        if self._error is not None:
            return self._error
        with torch.no_grad():
            return self._total.result()

    def gradients(self, expert: int, weights: Weights, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of an expert that is held for the time of this call.

        Args:
            expert: its number.
            weights: of it.
            gradient: (T, H) of the sum of the experts' outputs.

        Returns:
            of its rows (n, H) and of the router's weights for them (n, 1); None of what needs none.
        """
        product = self._products.pop(expert)
        tokens, _ = self._routing.places(expert)
        wanted = [value for value in product.inputs if value.requires_grad]
        product.holder.weights = weights
        found = iter(
            torch.autograd.grad(
                product.weighed, wanted, gradient.to(self._dtype).index_select(0, tokens), allow_unused=True
            )
        )
        return tuple(next(found) if value.requires_grad else None for value in product.inputs)

    def node(self, total: Tensor, gathered: Callable[[Tensor], list[Tensor | None]]) -> ExpertsNode:
        """Return what takes the products' place in the block's graph.

        Args:
            total: from `outcome`.
            gathered: called with the gradient (T, H) of the total; returns what `RecordedGradients.outcome` does.
        """
        return ExpertsNode(total, list(self._inputs.values()), gathered)


class RecordedGradients:
    """The gradients of one rider's products; takes experts in any order.

    Args:
        recorded: the products.
        gradient: (T, H) of their sum.
    Attributes:
        wants: the experts that are still needed.
    """

    def __init__(self, recorded: RecordedExperts, gradient: Tensor) -> None:
        self.wants: Collection[int] = recorded.wants
        self._recorded, self._gradient = recorded, gradient
        self._found: dict[int, tuple[Tensor | None, ...]] = {}
        self._error: BaseException | None = None

    def take(self, expert: int, weights: Weights) -> None:
        """Compute the gradients of an expert that is held for the time of this call."""
        self._found[expert] = self._recorded.gradients(expert, weights, self._gradient)

    def fail(self, expert: int, error: BaseException) -> None:
        """Do without an expert: the rider raises the error."""
        self._error, self.wants = error, ()

    def outcome(self) -> list[Tensor | None] | BaseException:
        """Return the gradients of rows and router's weights, by ascending expert, or the error."""
        if self._error is not None:
            return self._error
        return [value for expert in sorted(self._found) for value in self._found[expert]]


class ExpertsNode:
    """The place of a rider's experts in the graph of its block.

    Attributes:
        output: (T, H), the sum of the experts' outputs.
    """

    def __init__(
        self,
        total: Tensor,
        inputs: list[tuple[Tensor, Tensor]],
        gathered: Callable[[Tensor], list[Tensor | None]],
    ) -> None:
        self._gathered = gathered
        self._gradients: list[Tensor | None] | None = None
        flat = [value for pair in inputs for value in pair]
        self.output: Tensor = _Node.apply(self, total, *flat)  # type: ignore[no-untyped-call]

    def compute_gradients(self, gradient: Tensor) -> None:
        """Compute, together with others, what autograd will ask for when it comes here; (T, H) is the output's gradient."""
        self._gradients = self._gathered(gradient)

    @property
    def gradients(self) -> list[Tensor | None]:
        """What was computed; autograd comes here again for each node before this one, and for the whole block."""
        assert self._gradients is not None, "gradients are computed before autograd runs for the whole block"
        return self._gradients


class _Node(torch.autograd.Function):
    """Returns what is known already, forward and backward."""

    @staticmethod
    def forward(ctx: Any, node: ExpertsNode, total: Tensor, *inputs: Tensor) -> Tensor:
        ctx.node = node
        return total.view_as(total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
        return (None, None, *ctx.node.gradients)
