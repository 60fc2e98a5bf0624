"""What is said of two models after all texts: means, quantiles, agreement, perplexities with intervals, worst places.

Pure statistics on numbers of each place; knows no model. Intervals are percentiles of a bootstrap over texts (Efron,
1979): tokens of one text are not independent of each other, but texts are.
"""

from __future__ import annotations

import array
import heapq
import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slowllm.inference.compare import Compared
from slowllm.inference.likelihood import safe_exp
from slowllm.inference.text_files import Text

Floats = NDArray[np.float64]
QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999, 1.0)
# Resamples of the texts, and the share of them that lies within an interval.
NUM_RESAMPLES, CONFIDENCE = 1000, 0.95


@dataclass(frozen=True)
class TextTotals:
    """Sums over the places of one text.

    Attributes:
        file: of the text.
        line: of that file.
        num_places: tokens that are predicted.
        kl: mean KL(A || B) of a place, in nats; NaN without places.
        agreement: share of the places where both find the same token likeliest; NaN without places.
        nll_a: sum of negative log-likelihoods under A.
        nll_b: the same under B.
    """

    file: str
    line: int
    num_places: int
    kl: float
    agreement: float
    nll_a: float
    nll_b: float

    @property
    def perplexity_a(self) -> float:
        """Under A; NaN without places."""
        return safe_exp(self.nll_a / self.num_places) if self.num_places else math.nan

    @property
    def perplexity_b(self) -> float:
        """Under B; NaN without places."""
        return safe_exp(self.nll_b / self.num_places) if self.num_places else math.nan


@dataclass(frozen=True)
class WorstPlace:
    """A place where two models are far apart.

    Attributes:
        kl: KL(A || B), in nats.
        text: that it is in.
        position: of the token among the text's, from 1: the first has no place.
        log_prob_a: of the token that stands there, under A.
        log_prob_b: the same under B.
        likeliest_a: the token that A finds likeliest.
        likeliest_b: the token that B finds likeliest.
    """

    kl: float
    text: Text
    position: int
    log_prob_a: float
    log_prob_b: float
    likeliest_a: int
    likeliest_b: int


@dataclass(frozen=True)
class Estimate:
    """A number with its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """What is said of all texts.

    Attributes:
        num_texts: that were compared.
        num_places: tokens that were predicted.
        kl: the mean KL(A || B) of a place, in nats.
        quantiles: of the divergences of places, each share with its value.
        agreement: share of the places where both find the same token likeliest.
        perplexity_a: of all tokens.
        perplexity_b: of all tokens.
        perplexity_ratio: B's over A's; resampled with both on the same texts, so it is surer than the two.
    """

    num_texts: int
    num_places: int
    kl: Estimate
    quantiles: tuple[tuple[float, float], ...]
    agreement: Estimate
    perplexity_a: Estimate
    perplexity_b: Estimate
    perplexity_ratio: Estimate


class ComparisonTotals:
    """Sums over texts. Of each place four bytes are kept, and of each text five numbers.

    Args:
        num_worst: places that are kept whole.
    """

    def __init__(self, num_worst: int) -> None:
        self._num_worst = num_worst
        self._kl = array.array("f")
        # Of each text: places, sums of divergences and of agreeing places, and of both models' losses.
        self._sums = array.array("d")
        self._worst: list[tuple[float, int, WorstPlace]] = []
        self._counter = itertools.count()

    def add(self, compared: Compared) -> TextTotals:
        """Count one text, and return its totals."""
        found, text = compared.divergence, compared.text
        agrees = found.a.likeliest == found.b.likeliest
        count = len(found.kl)
        sums = [
            float(tensor.double().sum())
            for tensor in (found.kl, agrees, -found.a.log_probs, -found.b.log_probs)
        ]
        self._sums.extend([count, *sums])
        self._kl.extend(found.kl.tolist())
        best = found.kl.topk(min(self._num_worst, count))
        for kl, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            worst = WorstPlace(
                kl, text, place + 1, float(found.a.log_probs[place]), float(found.b.log_probs[place]),
                int(found.a.likeliest[place]), int(found.b.likeliest[place]),
            )  # fmt: skip
            # Of equal ones the first stays.
            heapq.heappush(self._worst, (kl, -next(self._counter), worst))
            if len(self._worst) > self._num_worst:
                heapq.heappop(self._worst)
        kl, agreeing, nll_a, nll_b = sums
        share = (math.nan, math.nan) if not count else (kl / count, agreeing / count)
        return TextTotals(text.file, text.line.number, count, *share, nll_a, nll_b)

    @property
    def worst(self) -> list[WorstPlace]:
        """The places where the models are farthest apart, the worst first."""
        return [place for _, _, place in sorted(self._worst, reverse=True)]

    def summary(self, seed: int = 0) -> Summary:
        """Return what is said of all texts.

        Args:
            seed: of the bootstrap.
        """
        sums = np.frombuffer(self._sums, np.float64).reshape(-1, 5)
        kl = np.frombuffer(self._kl, np.float32)
        quantiles = np.quantile(kl, QUANTILES) if len(kl) else [math.nan] * len(QUANTILES)
        resampled = _resampled(sums, seed)
        whole = sums.sum(0)[None]
        kl_mean, agreement, *perplexities = (
            _estimate(values, resamples)
            for values, resamples in zip(_figures(whole), _figures(resampled), strict=True)
        )
        return Summary(
            len(sums), int(whole[0, 0]), kl_mean,
            tuple((share, float(value)) for share, value in zip(QUANTILES, quantiles, strict=True)), agreement,
            *perplexities,
        )  # fmt: skip


def _figures(sums: Floats) -> list[Floats]:
    """Return of sums (R, 5) the mean divergence, agreement, both perplexities and their ratio, (R,) each."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        kl, agreement, nll_a, nll_b = (sums[:, column] / sums[:, 0] for column in range(1, 5))
        return [kl, agreement, np.exp(nll_a), np.exp(nll_b), np.exp(nll_b - nll_a)]


def _resampled(sums: Floats, seed: int) -> Floats:
    """Return the sums (R, 5) over resampled texts."""
    generator = np.random.default_rng(seed)
    if not len(sums):
        return np.zeros((1, sums.shape[1]))
    drawn = [sums[generator.integers(len(sums), size=len(sums))].sum(0) for _ in range(NUM_RESAMPLES)]
    resampled: Floats = np.stack(drawn)
    return resampled


def _estimate(whole: Floats, resampled: Floats) -> Estimate:
    # A resample of texts that have no place says nothing.
    known = resampled[~np.isnan(resampled)]
    if not len(known):
        return Estimate(float(whole[0]), math.nan, math.nan)
    low, high = np.quantile(known, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(float(whole[0]), float(low), float(high))
