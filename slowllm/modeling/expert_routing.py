"""Which tokens went to which expert, and in what order are the experts' outputs added?

Knows hidden states and what a router chose; knows no weights, no models, and nothing of where experts come from. The order is that
of transformers' own loop (`eager`): experts ascend, and within an expert the first choices of all tokens come before the second.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from slowllm.errors import NonFiniteError, RouterError


@dataclass(frozen=True, eq=False)
class Routing:
    """What a module of experts is called with.

    Attributes:
        hidden: (T, H) in the compute dtype, a row a token.
        top_k_index: (T, k) integers, the experts that each token chose. `num_experts` is the sentinel of expert parallelism: it stands
            for an expert that another machine has, and is skipped.
        top_k_weights: (T, k) floating point, what each chosen expert's output is multiplied by.
        num_experts: how many experts the module has.
    """

    hidden: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor
    num_experts: int

    def __post_init__(self) -> None:
        shape = self.top_k_index.shape
        assert self.hidden.dim() == 2, "hidden states have a row a token"
        assert shape == self.top_k_weights.shape, "each chosen expert has a weight"
        assert shape[:-1] == self.hidden.shape[:1], "each token chooses"

    def check(self, where: str, text: Tensor | None = None) -> None:
        """Check what the router chose; waits for the device.

        Args:
            where: the name of the module of experts, for the error.
            text: (T,) bool, which tokens are no padding; None if all of them count. The weights of padding may be NaN.

        Raises:
            RouterError: an expert is chosen that there is not.
            NonFiniteError: a weight is NaN.
        """
        if not self.top_k_index.numel():
            return
        least, most = (int(value) for value in self.top_k_index.aminmax())
        if least < 0 or most > self.num_experts:
            raise RouterError(
                f"{where}: its router chose expert {least if least < 0 else most}, but the experts are "
                f"0 to {self.num_experts - 1}; the router's tensors are damaged, or belong to another model"
            )
        bad = self.top_k_weights.isnan().any(-1)
        if text is not None:
            bad &= text.to(bad.device)
        if bool(bad.any()):
            raise NonFiniteError(
                f"{where}: its router gave NaN as a weight at token {int(bad.nonzero()[0])}; "
                "the weights are damaged, or their numbers are too large for the compute dtype (try float32)"
            )

    @cached_property
    def _sorted(self) -> tuple[Tensor, list[int]]:
        """The choices in the order of their experts, as k * T places, and where those of each expert end."""
        flat = self.top_k_index.T.reshape(-1)
        counts = torch.bincount(flat, minlength=self.num_experts + 1).tolist()
        return flat.argsort(stable=True), list(accumulate(counts))

    @cached_property
    def experts(self) -> tuple[int, ...]:
        """The experts that some token chose, in ascending order."""
        _, ends = self._sorted
        begins = [0, *ends]
        return tuple(expert for expert in range(self.num_experts) if begins[expert] < ends[expert])

    def places(self, expert: int) -> tuple[Tensor, Tensor]:
        """Return which tokens chose an expert, and as which of their choices: two (n,) int64."""
        order, ends = self._sorted
        chosen = order[ends[expert - 1] if expert else 0 : ends[expert]]
        num_tokens = len(self.hidden)
        return chosen % num_tokens, chosen // num_tokens

    def rows(self, expert: int) -> Tensor:
        """Return the hidden states that an expert computes with, (n, H).

        Gradients with respect to `hidden` are summed in the order in which autograd saw these calls: for the bits of `eager`, experts
        have to ascend here, whatever the order in which they are multiplied.
        """
        return self.hidden[self.places(expert)[0]]


class ExpertSum:
    """Adds experts' weighed outputs in ascending order of the experts, in whatever order they arrive.

    An output that arrives before its turn is kept; when experts ascend, nothing is kept but the sum (T, H).
    """

    def __init__(self, routing: Routing, dtype: torch.dtype | None = None) -> None:
        """Begin with zeros.

        Args:
            routing: which experts will arrive, each once.
            dtype: in which outputs are added; None for that of the hidden states.
        """
        self._routing = routing
        self._sum = torch.zeros_like(routing.hidden, dtype=dtype)
        self._awaited = deque(routing.experts)
        self._kept: dict[int, Tensor | None] = {}

    def add(self, expert: int, outputs: Tensor) -> None:
        """Take the outputs (n, H) of an expert for its rows."""
        assert expert in self._awaited, "a chosen expert arrives once"
        assert expert not in self._kept, "a chosen expert arrives once"
        self._kept[expert] = outputs
        self._add_those_whose_turn_it_is()

    def skip(self, expert: int) -> None:
        """Do without an expert, whether it has arrived or not: nobody needs the sums of those rows that chose it."""
        if expert in self._awaited:
            self._kept[expert] = None
            self._add_those_whose_turn_it_is()

    def _add_those_whose_turn_it_is(self) -> None:
        while self._awaited and self._awaited[0] in self._kept:
            first = self._awaited.popleft()
            outputs = self._kept.pop(first)
            if outputs is not None:
                self._add(first, outputs)

    def _add(self, expert: int, outputs: Tensor) -> None:
        tokens, choices = self._routing.places(expert)
        weighed = outputs * self._routing.top_k_weights[tokens, choices, None]
        self._sum.index_add_(0, tokens, weighed.to(self._sum.dtype))

    def result(self) -> Tensor:
        """Return the sum (T, H) in the dtype of the hidden states, when all experts have arrived."""
        assert not self._awaited, f"{len(self._awaited)} of the chosen experts have not arrived"
        return self._sum.to(self._routing.hidden.dtype)
