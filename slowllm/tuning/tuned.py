"""The outcome of a trial: what `tune` returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slowllm.html import facts_html, line_html
from slowllm.modeling.soft_prompts import SoftPrompt
from slowllm.tuning.recipe import Recipe

# A step or a validation, as `tune` tells of it and as it is written to a log.
Record = dict[str, Any]


@dataclass(frozen=True)
class Tuned:
    """The outcome of a trial.

    Attributes:
        name: of the trial.
        prompt: the best by validation, else the last.
        recipe: how it was tuned.
        records: of its steps and validations, in order.
        failure: why it stopped early, if something was wrong.
    """

    name: str
    prompt: SoftPrompt
    recipe: Recipe
    records: tuple[Record, ...]
    failure: str | None = None

    def _values(self, name: str) -> list[float]:
        return [float(record[name]) for record in self.records if name in record]

    def figures(self) -> list[tuple[str, str]]:
        """Return what a reader wants to know, by names."""
        recipe, losses = self.recipe, self._values("loss")
        validation, accuracies = self._values("validation_loss"), self._values("accuracy")
        found = [
            ("trial", self.name),
            ("prompt", f"{recipe.kind}, {recipe.num_tokens} virtual tokens, rate {recipe.learning_rate:g}"),
            ("steps", f"{len(losses):,}"),
            ("loss", f"{losses[0]:.4f} to {losses[-1]:.4f}" if losses else ""),
        ]
        if validation:
            found.append(("best validation loss", f"{min(validation):.4f}"))
        if accuracies:
            found.append(("accuracy", f"{accuracies[0]:.3f} to {accuracies[-1]:.3f}"))
        return found + ([("failure", self.failure)] if self.failure else [])

    def _repr_html_(self) -> str:
        (_, name), *facts = self.figures()
        return f"<div>{facts_html(name, facts)}{line_html(self._values('loss'), 'loss')}</div>"
