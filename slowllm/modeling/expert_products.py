"""How does transformers' own module of experts compute with one expert at a time?

Knows what the decorator of such modules says of them (`use_experts_implementation`: gates, biases, transposed matrices, a norm behind
each expert) and lets each family apply its own gate; knows nothing of where an expert's matrices come from. The bits are those of the
family's own loop (`eager`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from slowllm.errors import ArchitectureError
from slowllm.modeling.expert_routing import ExpertSum, Routing
from slowllm.modeling.experts import expert_modules, weights_of
from slowllm.modeling.finite import UNKNOWN_MASK
from slowllm.streaming.call_context import current_call
from slowllm.streaming.lazy_weight import multiply_each

# The name by which a model's config asks for `experts_forward`.
IMPLEMENTATION = "slowllm"
# The attribute in which a module of experts finds its own name in the model.
_NAME = "_slowllm_name"
# The attribute in which it finds what computes experts that are read when a router asks for them.
ON_DEMAND = "_slowllm_on_demand"
# Families whose loop adds outputs in another dtype than that of the hidden states, which the decorator does not say. No causal language
# model of transformers does more in another dtype; OpenAI's privacy filter, a classifier, also multiplies in float32.
_ADDS_IN_FLOAT32 = frozenset({"Inkling2Experts"})
_ADDS_AS_WEIGHTS = frozenset({"NemotronHExperts"})


class OnDemandExperts(Protocol):
    """Computes experts that are not in the module; `streamed_experts.StreamedExperts` does."""

    def forward(self, routing: Routing) -> Tensor:
        """Return (T, H) in the compute dtype, as `experts_forward` does."""


def expert_output(module: nn.Module, weights: Mapping[str, Tensor], rows: Tensor) -> Tensor:
    """Return what one expert makes of hidden states.

    Args:
        module: of experts, for its flags, its activation, its gate and its norm; its matrices are not read.
        weights: the expert's own tensors under the names of the module's parameters: matrices of two dimensions, biases of one.
        rows: (n, H) in the compute dtype.

    Returns:
        (n, H), not yet multiplied by the router's weights.
    """
    return expert_outputs(module, weights, [rows])[0]


def expert_outputs(
    module: nn.Module, weights: Mapping[str, Tensor], inputs: Sequence[Tensor]
) -> list[Tensor]:
    """Return what one expert makes of each of several inputs, with the bits that it has alone; see `expert_output`."""
    inner = _products(module, weights, "gate_up_proj" if module.has_gate else "up_proj", inputs)
    act: Callable[[Tensor], Tensor] = module._apply_gate if module.has_gate else module.act_fn  # type: ignore[assignment]
    outer = _products(module, weights, "down_proj", [act(one) for one in inner])
    return [module.post_expert_norm(one) for one in outer] if module.has_post_expert_norm else outer  # type: ignore[operator]


def _products(
    module: nn.Module, weights: Mapping[str, Tensor], name: str, inputs: Sequence[Tensor]
) -> list[Tensor]:
    products = multiply_each(inputs, weights[name], is_transposed=bool(module.is_transposed))
    return [product + weights[f"{name}_bias"] for product in products] if module.has_bias else products


def sum_dtype(module: nn.Module, routing: Routing) -> torch.dtype:
    """Return the dtype in which a family adds the outputs of its experts."""
    kinds = {kind.__name__ for kind in type(module).__mro__}
    if kinds & _ADDS_IN_FLOAT32:
        return torch.float32
    return routing.top_k_weights.dtype if kinds & _ADDS_AS_WEIGHTS else routing.hidden.dtype


def experts_forward(module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute a module of experts, one chosen expert after the other, in ascending order.

    Args:
        module: of experts, with its weights, or with what has them brought.
        hidden: (T, H) in the compute dtype.
        top_k_index: (T, k) int64, see `Routing`.
        top_k_weights: (T, k) floating point.

    Returns:
        (T, H) in the compute dtype, with the bits of the family's own loop, and with its gradients' bits.

    Raises:
        RouterError: an expert is chosen that there is not.
        NonFiniteError: a weight of the router is NaN at a position that holds text.
    """
    routing = Routing(hidden, top_k_index, top_k_weights, _num_experts(module))
    routing.check(getattr(module, _NAME, type(module).__name__), _text(len(hidden), hidden.device))
    streamed: OnDemandExperts | None = getattr(module, ON_DEMAND, None)
    if streamed is not None:
        return streamed.forward(routing)
    total = ExpertSum(routing, sum_dtype(module, routing))
    for expert in routing.experts:
        total.add(expert, expert_output(module, weights_of(module, expert), routing.rows(expert)))
    return total.result()


def compute_one_by_one(model: PreTrainedModel) -> None:
    """Let all modules of experts of a model compute with `experts_forward`.

    Those that do not go through transformers' interface compute as before.

    Raises:
        ArchitectureError: transformers lets a module of experts keep another way.
    """
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
    model.set_experts_implementation(IMPLEMENTATION)
    for name, module in expert_modules(model).items():
        if module.config._experts_implementation != IMPLEMENTATION:  # type: ignore[union-attr]
            raise ArchitectureError(f"{name}: transformers does not let its experts be computed one by one")
        setattr(module, _NAME, name)


def _num_experts(module: nn.Module) -> int:
    assert isinstance(module.num_experts, int), "a decorated module counts its experts"
    return module.num_experts


def _text(num_tokens: int, device: torch.device) -> Tensor | None:
    """Return which rows of a call hold text, (T,) bool; None if all do. Where it cannot be known, none is said to."""
    mask = current_call().text_mask
    if mask is None:
        return None
    length = num_tokens // max(len(mask), 1)
    if mask is UNKNOWN_MASK or mask.dim() != 2 or len(mask) * length != num_tokens or mask.shape[1] < length:
        return torch.zeros(num_tokens, dtype=torch.bool, device=device)
    return mask[:, mask.shape[1] - length :].reshape(-1).bool()
