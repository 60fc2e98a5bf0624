"""What the results of a verb look like in its report: sums and first rows are kept as they come, in bounded memory.

Each class takes the results of one kind and returns sections of the page. Plots are drawn only there, because matplotlib
takes memory that the budget does not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from slowllm.entrypoints.report.page import PlotShown, Section, TableRows, TextShown, TokenShown
from slowllm.entrypoints.report.results import (
    LineScored,
    PromptContinued,
    QuestionAnswered,
    Result,
    StepDone,
    TaskMeasured,
)
from slowllm.entrypoints.report.series import Calibration, Histogram, Series, equal_edges
from slowllm.errors import counted

if TYPE_CHECKING:
    from slowllm.entrypoints.report.plots import Curve

# Texts that are shown token by token, and tokens of each.
NUM_COLOURED, NUM_COLOURED_TOKENS = 12, 200
# Templates in a plot; a table has the others.
MAX_SHARES = 40
# Of each curve of a trial, of which a run may have hundreds.
NUM_TRIAL_POINTS = 300
SURPRISAL_EDGES = equal_edges(0.0, 20.0, 40)

Decode = Callable[[int], str]


class Chapter(Protocol):
    """The results of one kind."""

    def add(self, result: Any) -> None:
        """Take a result."""

    def sections(self) -> list[Section]:
        """Return what the page shows of them."""


class LinesChapter:
    """Lines that were scored.

    Args:
        decode: returns the text of a token.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._rows = TableRows(
            ("line", "tokens", "log-likelihood", "mean NLL", "perplexity", "text"), "lines"
        )
        self._texts: list[TextShown] = []
        self._surprisal = Histogram(SURPRISAL_EDGES)
        self._means = Series()
        self._num_scored, self._log_likelihood = 0, 0.0

    def add(self, result: LineScored) -> None:
        """Take a line."""
        likelihood = result.likelihood
        self._rows.add(
            result.where, len(result.ids), likelihood.log_likelihood, likelihood.mean_nll, likelihood.perplexity,
            result.text,
        )  # fmt: skip
        for log_prob in likelihood.log_probs:
            self._surprisal.add(-log_prob)
        self._num_scored += len(likelihood.log_probs)
        self._log_likelihood += likelihood.log_likelihood
        self._means.add(self._rows.num_rows, likelihood.mean_nll)
        if len(self._texts) < NUM_COLOURED:
            unscored = [None] * (len(result.ids) - len(likelihood.log_probs))
            pairs = zip(result.ids, [*unscored, *likelihood.log_probs], strict=True)
            tokens = [
                TokenShown(self._decode(token), None if log_prob is None else -log_prob + 0.0)
                for token, log_prob in list(pairs)[:NUM_COLOURED_TOKENS]
            ]
            self._texts.append(TextShown(result.where, tokens))

    def sections(self) -> list[Section]:
        """Return surprisal of tokens, the first texts in colours, and the likelihood of lines."""
        from slowllm.entrypoints.report import plots

        tokens, lines = Section("Surprisal of tokens"), Section("Lines")
        if self._num_scored:
            mean = -self._log_likelihood / self._num_scored
            tokens.figures = [
                ("tokens scored", f"{self._num_scored:,}"),
                ("mean NLL of a token", f"{mean:.4f} nats"),
                ("perplexity", f"{math.exp(min(mean, 700.0)):,.4g}"),
            ]
            svg = plots.histogram(
                "Surprisal of tokens", self._surprisal, "surprisal of a token in nats", "tokens"
            )
            tokens.plots.append(
                PlotShown(svg, "How many tokens have which surprisal; 20 nats and more are in the last bar.")
            )
            tokens.text_caption = (
                f"The first {counted(len(self._texts), 'line')}, token by token: the darker, the more surprising; the number "
                "is shown on hover."
            )
            tokens.texts = self._texts
        if self._means.num_values > 1:
            svg = plots.curves(
                "Mean NLL of lines", [plots.Curve("lines", self._means)], "line, in the order of the input",
                "mean NLL in nats", from_zero=True,
            )  # fmt: skip
            lines.plots.append(
                PlotShown(svg, f"Mean negative log-likelihood of each line{_each(self._means)}.")
            )
        lines.tables.append(self._rows.shown())
        return [tokens, lines]


class AnswersChapter:
    """Questions that were answered."""

    def __init__(self) -> None:
        from slowllm.inference.eval_tasks import Tally

        self._tally, self._calibration = Tally(), Calibration()
        self._rows = TableRows(
            ("example", "template", "prediction", "right answer", "is right", "probability"), "questions"
        )

    def add(self, result: QuestionAnswered) -> None:
        """Take a question."""
        question, chosen = result.question, result.chosen
        confidence, is_correct = chosen.probabilities[chosen.best], chosen.best == question.gold
        self._tally.add(question, chosen.best)
        self._calibration.add(confidence, is_correct)
        self._rows.add(
            question.example, question.template, question.choices[chosen.best], question.choices[question.gold],
            "yes" if is_correct else "no", confidence,
        )  # fmt: skip

    def sections(self) -> list[Section]:
        """Return accuracy, calibration, and the first predictions."""
        from slowllm.entrypoints.report import plots

        if not self._tally.num_asked:
            return []
        accuracy, calibration = Section("Accuracy"), Section("Calibration")
        table = TableRows(("template", "right", "questions", "accuracy", "from", "to"), "templates")
        shares = []
        for row in self._tally.rows():
            name = "all" if row["template"] is None else row["template"]
            shares.append(plots.PlottedShare(name, row["accuracy"], row["low"], row["high"]))
            table.add(
                name, row["num_correct"], row["num_questions"], row["accuracy"], row["low"], row["high"]
            )
        shown = shares if len(shares) <= MAX_SHARES else [*shares[: MAX_SHARES - 1], shares[-1]]
        accuracy.plots.append(
            PlotShown(
                plots.shares("Accuracy of templates", shown, "accuracy"),
                "Accuracy of each template and of all of them, with Wilson's 95 % interval; in that of all, an example "
                "counts once.",
            )
        )
        accuracy.tables.append(table.shown())
        found = self._calibration
        calibration.figures = [("expected calibration error", f"{found.expected_error:.4f}")]
        calibration.plots.append(
            PlotShown(
                plots.reliability("Reliability of answers", found),
                "How often answers are right (bars and points), by the probability that the model gives them against the "
                "other choices; below, how many answers have it. Of a calibrated model the points lie on the diagonal.",
            )
        )
        predictions = Section("Predictions")
        predictions.tables.append(self._rows.shown())
        return [accuracy, calibration, predictions]


class TasksChapter:
    """Figures of lm-eval's tasks."""

    def __init__(self) -> None:
        self._rows = TableRows(("task", "metric", "value", "standard error"), "figures")
        self._found: list[TaskMeasured] = []

    def add(self, result: TaskMeasured) -> None:
        """Take a figure."""
        self._rows.add(result.task, result.metric, result.value, result.stderr)
        self._found.append(result)

    def sections(self) -> list[Section]:
        """Return the table, and a plot of what is a share."""
        from slowllm.entrypoints.report import plots

        section = Section("Tasks")
        shares = [
            plots.PlottedShare(
                f"{one.task}: {one.metric}", one.value,
                None if one.stderr is None else max(0.0, one.value - 1.96 * one.stderr),
                None if one.stderr is None else min(1.0, one.value + 1.96 * one.stderr),
            )
            for one in self._found
            if one.metric.startswith(("acc", "exact_match", "em", "f1")) and 0.0 <= one.value <= 1.0
        ]  # fmt: skip
        if shares:
            section.plots.append(
                PlotShown(
                    plots.shares("Tasks of lm-eval", shares[:MAX_SHARES], "share"),
                    "Shares of right answers, with 1.96 standard errors on either side where lm-eval gives them.",
                )
            )
        section.tables.append(self._rows.shown())
        return [section]


class _Trial:
    """The curves of one trial, and its best figures."""

    def __init__(self) -> None:
        self.loss, self.validation, self.rate = (Series(NUM_TRIAL_POINTS) for _ in range(3))
        self.first_loss: float | None = None
        self.last_loss: float | None = None
        self.best: float | None = None
        self.accuracy: float | None = None
        self.num_steps = 0


class StepsChapter:
    """Steps and validations of `tune`."""

    def __init__(self) -> None:
        self._trials: dict[str, _Trial] = {}
        self._rows = TableRows(
            ("trial", "step", "loss", "gradient norm", "learning rate", "tokens", "seconds", "validation", "accuracy"),
            "steps and validations",
        )  # fmt: skip

    def add(self, result: StepDone) -> None:
        """Take a record."""
        record = result.record
        trial = self._trials.setdefault(record["trial"], _Trial())
        step = int(record["step"])
        rate = record.get("learning_rate")
        self._rows.add(
            record["trial"], step, record.get("loss"), record.get("grad_norm"),
            None if rate is None else f"{rate:.4g}", record.get("num_tokens"), record.get("seconds"),
            record.get("validation_loss"), record.get("accuracy"),
        )  # fmt: skip
        if "loss" in record:
            loss = float(record["loss"])
            trial.num_steps, trial.last_loss = step, loss
            trial.first_loss = loss if trial.first_loss is None else trial.first_loss
            trial.loss.add(step, loss)
            trial.rate.add(step, float(record["learning_rate"]))
        else:
            loss = float(record["validation_loss"])
            trial.validation.add(step, loss)
            if trial.best is None or loss < trial.best:
                trial.best, trial.accuracy = loss, record.get("accuracy")

    def sections(self) -> list[Section]:
        """Return the curves of losses and learning rates, and the figures of each trial."""
        from slowllm.entrypoints.report import plots

        if not self._trials:
            return []
        section, steps = Section("Losses"), Section("Steps")
        losses: list[Curve] = []
        for name, trial in self._trials.items():
            losses.append(plots.Curve(name, trial.loss))
            if trial.validation.num_values:
                losses.append(plots.Curve(name, trial.validation, is_validation=True))
        section.plots.append(
            PlotShown(
                plots.curves("Losses", losses, "step", "loss in nats"),
                "Loss of training against the step; broken lines with points are validations.",
            )
        )
        rates = [plots.Curve(name, trial.rate) for name, trial in self._trials.items()]
        section.plots.append(
            PlotShown(
                plots.curves("Learning rate", rates, "step", "learning rate", from_zero=True),
                "Learning rate of each step.",
            )
        )
        table = TableRows(
            ("trial", "steps", "first loss", "last loss", "best validation", "accuracy there"), "trials"
        )
        for name, trial in self._trials.items():
            table.add(name, trial.num_steps, trial.first_loss, trial.last_loss, trial.best, trial.accuracy)
        section.tables.append(table.shown())
        steps.tables.append(self._rows.shown())
        return [section, steps]


class ContinuationsChapter:
    """Prompts that were continued."""

    def __init__(self) -> None:
        self._rows = TableRows(("prompt", "continuation", "tokens", "ended by"), "continuations")

    def add(self, result: PromptContinued) -> None:
        """Take a prompt."""
        for one in result.continuations:
            self._rows.add(result.prompt, one.text, len(one.ids), one.finish_reason)

    def sections(self) -> list[Section]:
        """Return the continuations."""
        section = Section("Continuations")
        section.tables.append(self._rows.shown())
        return [section]


def chapter_for(result: Result, decode: Decode) -> Chapter:
    """Return the chapter, still empty, that takes results of this kind.

    Args:
        result: the first one.
        decode: returns the text of a token.
    """
    match result:
        case LineScored():
            return LinesChapter(decode)
        case QuestionAnswered():
            return AnswersChapter()
        case TaskMeasured():
            return TasksChapter()
        case StepDone():
            return StepsChapter()
        case PromptContinued():
            return ContinuationsChapter()


def sections_of(chapters: Sequence[Chapter]) -> list[Section]:
    """Return the sections of chapters, one after the other."""
    return [section for chapter in chapters for section in chapter.sections()]


def _each(series: Series) -> str:
    return "" if series.stride == 1 else f"; a point is the mean of {series.stride}"
