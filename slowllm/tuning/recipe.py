"""How a soft prompt is trained: kind, length, learning rate, schedule, steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from slowllm.errors import InputError, counted
from slowllm.options import PromptKind
from slowllm.rounding import ceil_div
from slowllm.tuning.examples import Task, check_text

Init = Literal["text", "vocab", "random"]
Schedule = Literal["constant", "linear", "cosine"]
MAX_RATE = 1e6


@dataclass(frozen=True)
class Recipe:
    """How a soft prompt is tuned.

    Attributes:
        kind: ``shallow``, ``deep`` or ``prefix``; see `soft_prompts`.
        num_tokens: virtual tokens.
        init: initial values: the embeddings (of a prefix, the keys and values) of a ``text``, of tokens drawn from the
            vocabulary (``vocab``), or ``random`` numbers with their mean and spread. Vectors of a deep prompt start at 0.
        init_text: for ``text``; repeated or cut to `num_tokens`.
        top: how many of the uppermost blocks are tuned; the others keep their initial values. None for all.
        num_steps: number of updates.
        num_epochs: passes over the examples; if given, it replaces `num_steps`.
        batch_size: examples of a batch.
        accumulate: batches of an update.
        learning_rate: highest rate of AdamW (Loshchilov and Hutter, 2019).
        weight_decay: of AdamW.
        schedule: of the learning rate, after the warm-up.
        warmup_steps: over which the rate rises from 0.
        max_grad_norm: to which a gradient is clipped; 0 for never.
        seed: of the initial values and of the order of examples.
        eval_every: steps between validations; None for once an epoch.
        patience: stop after so many validations in a row that are no better; None for never.
    Raises:
        InputError: a value is out of its range, or two do not go together.
    """

    kind: PromptKind = "shallow"
    num_tokens: int = 8
    init: Init = "vocab"
    init_text: str | None = None
    top: int | None = None
    num_steps: int = 100
    num_epochs: int | None = None
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 0.03
    weight_decay: float = 0.0
    schedule: Schedule = "linear"
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    seed: int = 0
    eval_every: int | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        for name, words in (("kind", PromptKind), ("init", Init), ("schedule", Schedule)):
            if getattr(self, name) not in get_args(words):
                raise InputError(
                    f"{name} {getattr(self, name)!r} is unknown; use one of {', '.join(get_args(words))}"
                )
        for name, least in (
            ("num_tokens", 1), ("top", 1), ("num_steps", 1), ("num_epochs", 1), ("batch_size", 1), ("accumulate", 1),
            ("warmup_steps", 0), ("seed", 0), ("eval_every", 1), ("patience", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is None and name in ("top", "num_epochs", "eval_every", "patience"):
                continue
            if type(value) is not int or value < least:
                raise InputError(f"{name} must be a whole number of at least {least}, not {value!r}")
        for name in ("learning_rate", "weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise InputError(f"{name} must be a number of at least 0, not {value!r}")
        if self.seed >= 1 << 32:
            raise InputError(f"seed must be less than 2**32, not {self.seed}")
        if not 0 < self.learning_rate <= MAX_RATE:
            raise InputError(
                f"learning_rate must be above 0 and at most {MAX_RATE:g}, not {self.learning_rate:g}"
            )
        if self.init_text is not None:
            check_text("init_text", self.init_text)
        if (self.init == "text") != bool(self.init_text):
            raise InputError("init_text goes with init='text', and only with it")
        if self.top is not None and self.kind == "shallow":
            raise InputError(
                "top goes with a deep prompt or a prefix: a shallow one is all below the first block"
            )
        if self.num_epochs is None and self.warmup_steps >= self.num_steps:
            raise InputError(
                f"warmup_steps {self.warmup_steps} leave none of the {counted(self.num_steps, 'step')}"
            )

    @property
    def step_examples(self) -> int:
        """Examples of an update."""
        return self.batch_size * self.accumulate

    def num_updates(self, task: Task) -> int:
        """Return the number of updates on a task."""
        if self.num_epochs is None:
            return self.num_steps
        return self.num_epochs * ceil_div(len(task.train), self.step_examples)


def make_trials(tasks: Sequence[Task], recipes: Sequence[Recipe]) -> Iterator[tuple[str, Task, Recipe]]:
    """Yield a name, a task and a recipe for every recipe on every task.

    Raises:
        InputError: two recipes are the same, or one has no steps left after its warm-up.
    """
    if any(recipe in recipes[:n] for n, recipe in enumerate(recipes)):
        raise InputError("two trials have the same recipe; they would come out alike")
    rates = {recipe.learning_rate for recipe in recipes}
    seeds = {recipe.seed for recipe in recipes}
    are_told_apart = len({(recipe.learning_rate, recipe.seed) for recipe in recipes}) == len(recipes)
    for task in tasks:
        for number, recipe in enumerate(recipes, 1):
            if recipe.warmup_steps >= (num_steps := recipe.num_updates(task)):
                raise InputError(
                    f"warmup_steps {recipe.warmup_steps} leave none of the {counted(num_steps, 'step')}"
                )
            parts = [task.name] if len(tasks) > 1 else []
            parts += [f"lr-{recipe.learning_rate}"] if len(rates) > 1 else []
            parts += [f"seed-{recipe.seed}"] if len(seeds) > 1 else []
            parts += [] if are_told_apart else [f"recipe-{number}"]
            yield "_".join(parts) or task.name, task, recipe
