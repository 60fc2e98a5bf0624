"""A trial of a recipe on a task. Owns the parameters that are learned, and their optimizer.

The batches, rates and updates of a trial follow from its recipe and the number of the step alone, so that it can be
resumed after a kill, and gives the same numbers beside other trials as alone. Knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._dynamo  # or the optimizer's first step would import it, for 1.5 s, between two sweeps
from torch import Tensor, nn
from transformers import get_scheduler

from slowllm.errors import TuningError
from slowllm.modeling.soft_prompts import Kind, SoftPrompt
from slowllm.rounding import ceil_div
from slowllm.tuning.examples import Task
from slowllm.tuning.recipe import Recipe

# A trial has diverged if its loss is worse than guessing, and more than so many times the first one, for so many steps
# in a row.
DIVERGED, DIVERGED_STEPS = 2.0, 5
# Without validation, a prompt is kept if its loss is at most so many times the first one.
GOOD = 1.5
# The attributes that a state keeps, beside tensors and `best_loss`.
SAVED = ("step", "first_loss", "good_step", "num_worse", "num_bad", "failure", "ended")


@dataclass
class Trial:
    """One prompt that is tuned.

    Attributes:
        name: for messages and folders.
        task: the examples that it learns.
        recipe: how it learns them.
        start: the prompt at the beginning; what is not tuned stays as it is there.
        step: updates so far.
        first_loss: of its first step.
        best_loss: the lowest of its validations.
        good_step: updates of the prompt that is kept.
        num_worse: validations since the best one.
        num_bad: steps in a row whose loss had diverged.
        failure: why it stopped early, if something was wrong.
        ended: whether there is nothing more to do.
        values: the parameters that are tuned, by name.
    """

    name: str
    task: Task
    recipe: Recipe
    start: SoftPrompt
    step: int = 0
    first_loss: float | None = None
    best_loss: float = math.inf
    good_step: int = 0
    num_worse: int = 0
    num_bad: int = 0
    failure: str | None = None
    ended: bool = False
    values: dict[str, nn.Parameter] = field(init=False)
    _good: dict[str, Tensor] = field(init=False)
    _optimizer: torch.optim.Optimizer = field(init=False)
    _scale: Callable[[int], float] = field(init=False)

    def __post_init__(self) -> None:
        self.values = {
            name: nn.Parameter(tensor) for name, tensor in _tuned(self.start, self.first_block).items()
        }
        self._good = self._copies()
        recipe = self.recipe
        # One tensor after the other, because fused kernels may round differently.
        self._optimizer = torch.optim.AdamW(
            self.values.values(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, foreach=False
        )
        scheduler = get_scheduler(recipe.schedule, self._optimizer, recipe.warmup_steps, self.num_steps)
        lambdas = getattr(scheduler, "lr_lambdas", None)
        self._scale = lambdas[0] if lambdas else lambda step: 1.0

    @property
    def num_steps(self) -> int:
        """The number of updates until the end."""
        return self.recipe.num_updates(self.task)

    @property
    def first_block(self) -> int:
        """The lowest block that is tuned."""
        num_blocks = len(self.start.vectors) or len(self.start.pairs)
        return 0 if self.recipe.top is None else max(0, num_blocks - self.recipe.top)

    @property
    def _epoch_steps(self) -> int:
        return ceil_div(len(self.task.train), self.recipe.step_examples)

    @property
    def epoch(self) -> float:
        """Passes over the examples so far."""
        return self.step / self._epoch_steps

    @property
    def validates(self) -> bool:
        """Whether a validation of the prompt is due now."""
        if not self.task.validation:
            return False
        every = self.recipe.eval_every or self._epoch_steps
        return self.step % every == 0 or self.step == self.num_steps

    def batch(self) -> list[int]:
        """Return the numbers of the examples of the next update; each epoch has an order of its own."""
        if self.step >= self.num_steps:
            return []
        epoch, place = divmod(self.step, self._epoch_steps)
        generator = torch.Generator("cpu").manual_seed(self.recipe.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.task.train), generator=generator).tolist()
        count = self.recipe.step_examples
        return order[place * count : (place + 1) * count]

    def leaves(self) -> dict[str, Tensor]:
        """Return copies of the parameters that require a gradient, for one rider."""
        return {name: value.detach().clone().requires_grad_(True) for name, value in self.values.items()}

    def prompt(self, values: Mapping[str, Tensor] | None = None) -> SoftPrompt:
        """Return the prompt made of `values`, by default of the parameters as they are now."""
        values = values or {name: value.detach() for name, value in self.values.items()}
        start, first = self.start, self.first_block
        if start.kind == "prefix":
            return SoftPrompt("prefix", pairs=(*start.pairs[:first], *values["pairs"].unbind()))
        embeddings = values.get("embeddings", start.embeddings)
        if start.kind == "shallow":
            return SoftPrompt("shallow", embeddings)
        return SoftPrompt("deep", embeddings, (*start.vectors[:first], *values["vectors"].unbind()))

    @property
    def result(self) -> SoftPrompt:
        """The prompt that is kept: the best by validation, else the last good one."""
        return self.prompt(self._good)

    def judge(self, loss: float) -> None:
        """Record the loss of a validation of the prompt as it is now."""
        if loss < self.best_loss:
            self.best_loss, self.num_worse = loss, 0
            self._keep()
        else:
            self.num_worse += 1
        if self.recipe.patience is not None and self.num_worse >= self.recipe.patience:
            self.ended = True

    def learn(self, loss: float, gradients: Mapping[str, Tensor], vocabulary: int) -> tuple[float, float]:
        """Update the parameters; return the norm of the gradient before clipping, and the learning rate.

        Raises:
            TuningError: the gradient is not finite, or the loss has diverged; the parameters stay as they are.
        """
        where = f"{self.name}: step {self.step + 1}"
        guess = math.log(len(self.task.labels) if self.task.compares else vocabulary)
        self.first_loss = loss if self.first_loss is None else self.first_loss
        self.num_bad = self.num_bad + 1 if loss > max(guess, DIVERGED * self.first_loss) else 0
        if self.num_bad == DIVERGED_STEPS:
            raise TuningError(
                f"{where}: the loss has grown from {self.first_loss:.3g} to {loss:.3g}, where guessing gives {guess:.3g}; "
                f"lower the learning rate of {self.recipe.learning_rate:g}"
            )
        for name, value in self.values.items():
            value.grad = gradients[name]
        limit = self.recipe.max_grad_norm or math.inf
        norm = float(nn.utils.clip_grad_norm_(self.values.values(), limit))
        if not math.isfinite(norm):
            raise TuningError(
                f"{where}: the gradient is {norm}; lower the learning rate of {self.recipe.learning_rate:g}, or compute in "
                "float32"
            )
        rate = self.recipe.learning_rate * self._scale(self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        if not self.task.validation and loss <= GOOD * self.first_loss:
            self._keep()
        self._optimizer.step()
        self.step += 1
        if self.step == self.num_steps and not self.task.validation:
            if not self.num_bad and all(bool(value.isfinite().all()) for value in self.values.values()):
                self._keep()
            self.ended = True
        return norm, rate

    def _keep(self) -> None:
        self._good, self.good_step = self._copies(), self.step

    def _copies(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.values.items()}

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return all that is needed to resume: tensors by name, and a JSON object."""
        tensors = {f"value.{n}": t for n, t in self._copies().items()}
        tensors |= {f"good.{n}": t for n, t in self._good.items()}
        for name, value in self.values.items():
            for key, tensor in self._optimizer.state[value].items():
                tensors[f"optimizer.{name}.{key}"] = tensor.detach().clone()
        if self.start.embeddings is not None:
            tensors["start.embeddings"] = self.start.embeddings
        tensors |= {f"start.pairs.{n}": pair.contiguous() for n, pair in enumerate(self.start.pairs)}
        about = {name: getattr(self, name) for name in SAVED}
        return tensors, {**about, "best_loss": None if self.best_loss == math.inf else self.best_loss}

    def restore(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Resume from what `saved` returned."""
        for name, value in self.values.items():
            value.data.copy_(tensors[f"value.{name}"])
            self._good[name] = tensors[f"good.{name}"]
            prefix = f"optimizer.{name}."
            state = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
            if state:
                self._optimizer.state[value] = state
        for name in SAVED:
            setattr(self, name, about[name])
        self.best_loss = math.inf if about["best_loss"] is None else about["best_loss"]


def _tuned(start: SoftPrompt, first: int) -> dict[str, Tensor]:
    """Return the tensors of a prompt that are tuned from block `first` on, by name."""
    if start.kind == "prefix":
        return {"pairs": torch.stack(start.pairs[first:])}
    assert start.embeddings is not None, "a shallow or deep prompt"
    # Below the first block, embeddings are tuned only where nothing is frozen.
    values = {} if first else {"embeddings": start.embeddings.clone()}
    if start.kind == "deep":
        width = next(vectors.shape[1] for vectors in start.vectors if vectors is not None)
        zeros = torch.zeros(len(start.embeddings), width)
        values["vectors"] = torch.stack([zeros if v is None else v for v in start.vectors[first:]])
    return values


def restored_start(start: Mapping[str, Tensor], kind: Kind, num_blocks: int, width: int) -> SoftPrompt:
    """Return the prompt that a trial began with, from the tensors of `Trial.saved`."""
    if kind == "prefix":
        return SoftPrompt("prefix", pairs=tuple(start[f"start.pairs.{n}"] for n in range(num_blocks)))
    embeddings = start["start.embeddings"]
    vectors = [torch.zeros(len(embeddings), width) for _ in range(num_blocks if kind == "deep" else 0)]
    return SoftPrompt(kind, embeddings, tuple(vectors))
