"""Who comes to a module of experts, with which rows, and what comes of them.

Knows rows, sums and errors; knows no weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from slowllm.modeling.expert_products import sum_dtype
from slowllm.modeling.expert_routing import ExpertSum, Routing


class Taker(Protocol):
    """Somebody who needs experts."""

    @property
    def wants(self) -> Collection[int]:
        """The experts that are still needed."""

    def fail(self, number: int, error: BaseException, /) -> None:
        """Do without an expert."""


@dataclass(frozen=True, eq=False)
class Arrival:
    """What a rider comes with.

    Attributes:
        routing: of its rows.
        before: its hidden states before the norm, from which the next block's experts are guessed; None if they are not.
    """

    routing: Routing
    before: Tensor | None


class ExpertParty:
    """Riders whose rows are computed as one: all at the stop, or one.

    Args:
        module: of the experts.
        arrivals: of the riders.
    """

    def __init__(self, module: nn.Module, arrivals: Sequence[Arrival]) -> None:
        self._members = [one.routing for one in arrivals]
        first = self._members[0]
        self.routing = first
        if len(arrivals) > 1:
            self.routing = Routing(
                torch.cat([one.hidden for one in self._members]),
                torch.cat([one.top_k_index for one in self._members]),
                torch.cat([one.top_k_weights for one in self._members]),
                first.num_experts,
            )
        self._total = ExpertSum(self.routing, sum_dtype(module, self.routing))
        self._errors: dict[int, BaseException] = {}

    @property
    def wants(self) -> Collection[int]:
        """The experts that somebody needs who has not failed."""
        if not self._errors:
            return self.routing.experts
        left = [one for number, one in enumerate(self._members) if number not in self._errors]
        return set(itertools.chain.from_iterable(one.experts for one in left))

    def num_takers(self) -> list[int]:
        """Return for each expert how many riders have chosen it; of one rider alone, only for those that it has chosen."""
        if len(self._members) == 1:
            return [1] * len(self.routing.experts)
        lengths = torch.tensor([len(one.hidden) for one in self._members])
        riders = torch.arange(len(lengths)).repeat_interleave(lengths)[:, None]
        # The sentinel of experts elsewhere has a number of its own.
        index = self.routing.top_k_index
        pairs = (riders.to(index.device) * (self.routing.num_experts + 1) + index).unique()
        counts = torch.bincount(pairs % (self.routing.num_experts + 1), minlength=self.routing.num_experts)
        return counts[: self.routing.num_experts].tolist()

    def add(self, number: int, outputs: Tensor) -> None:
        """Take the outputs of an expert for its rows. Where they cannot be added, all members raise the error."""
        try:
            self._total.add(number, outputs)
        except Exception as error:  # the sum may lack those of another expert, which came before its turn
            self._errors = dict.fromkeys(range(len(self._members)), error)

    def fail(self, number: int, error: BaseException) -> None:
        """Do without an expert: those who need it raise the error, and what only they need is not awaited any more."""
        before = self.wants
        for place, one in enumerate(self._members):
            if number in one.experts:
                self._errors.setdefault(place, error)
        wanted = self.wants
        if wanted:
            for other in before:
                if other not in wanted:
                    self._total.skip(other)

    def outcomes(self) -> list[Tensor | BaseException]:
        """Return what comes of each rider, in order: the sum of its experts' outputs (T, H), or an error."""
        if len(self._errors) == len(self._members):
            return [self._errors[place] for place in range(len(self._members))]
        sums = self._total.result().split([len(one.hidden) for one in self._members])
        return [self._errors.get(place, total) for place, total in enumerate(sums)]

    @property
    def output_bytes(self) -> int:
        """The bytes of all outputs of all chosen experts."""
        return self.routing.top_k_index.numel() * self.routing.hidden.shape[1] * self.routing.hidden.itemsize
