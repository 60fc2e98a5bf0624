"""Sums of any number of values in bounded memory: curves, histograms and the calibration of answers.

Pure arithmetic; knows nothing of models, plots or pages.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

# More points of a curve than this cannot be told apart in a plot.
MAX_POINTS = 800


class Series:
    """A curve of at most `max_points`: where more values come, each point is the mean of neighbours.

    Args:
        max_points: at least 2.
    """

    def __init__(self, max_points: int = MAX_POINTS) -> None:
        assert max_points >= 2, "a curve has two points"
        self._max_points = max_points
        # For each point the sum of its places, of its values, and their number; all but the last have `_stride` values.
        self._points: list[tuple[float, float, int]] = []
        self._stride = 1
        self.num_values = 0

    def add(self, x: float, y: float) -> None:
        """Add a value at a place; what is no finite number is left out."""
        if not (math.isfinite(x) and math.isfinite(y)):
            return
        self.num_values += 1
        if self._points and self._points[-1][2] < self._stride:
            sum_x, sum_y, count = self._points[-1]
            self._points[-1] = (sum_x + x, sum_y + y, count + 1)
            return
        if len(self._points) == self._max_points:
            pairs = zip(self._points[::2], [*self._points[1::2], (0.0, 0.0, 0)], strict=False)
            self._points = [(a[0] + b[0], a[1] + b[1], a[2] + b[2]) for a, b in pairs]
            self._stride *= 2
            self.num_values -= 1
            self.add(x, y)
            return
        self._points.append((x, y, 1))

    @property
    def stride(self) -> int:
        """How many values a point stands for; the last one may stand for fewer."""
        return self._stride

    def points(self) -> tuple[list[float], list[float]]:
        """Return the places and the values of the curve."""
        return (
            [sum_x / count for sum_x, _, count in self._points],
            [sum_y / count for _, sum_y, count in self._points],
        )


class Histogram:
    """Counts of values between edges; those beyond the outermost edges are counted in the first and the last bin.

    Args:
        edges: two at least, rising.
    """

    def __init__(self, edges: list[float]) -> None:
        assert len(edges) > 1, "a bin has two edges"
        assert edges == sorted(set(edges)), "edges rise"
        self.edges = edges
        self.counts = [0] * (len(edges) - 1)

    def add(self, value: float) -> None:
        """Count a value; a lower edge belongs to its bin, and NaN to none."""
        if not math.isnan(value):
            index = bisect.bisect_right(self.edges, value) - 1
            self.counts[min(max(index, 0), len(self.counts) - 1)] += 1


def equal_edges(low: float, high: float, num_bins: int) -> list[float]:
    """Return the edges of bins of equal width."""
    return [low + (high - low) * index / num_bins for index in range(num_bins)] + [high]


@dataclass
class CalibrationBin:
    """Answers whose probability lies between two edges.

    Attributes:
        num_answers: in it.
        num_correct: of them.
        confidence_sum: of their probabilities.
    """

    num_answers: int = 0
    num_correct: int = 0
    confidence_sum: float = 0.0

    @property
    def accuracy(self) -> float:
        """Share of right answers; 0 in an empty bin."""
        return self.num_correct / max(1, self.num_answers)

    @property
    def confidence(self) -> float:
        """Mean probability of the answers; 0 in an empty bin."""
        return self.confidence_sum / max(1, self.num_answers)


class Calibration:
    """How often answers are right, by the probability that the model gives them.

    Args:
        num_bins: of equal width, from 0 to 1.
    """

    def __init__(self, num_bins: int = 10) -> None:
        self.bins = [CalibrationBin() for _ in range(num_bins)]

    def add(self, confidence: float, is_correct: bool) -> None:
        """Count an answer; one whose probability is no number is left out."""
        if not 0.0 <= confidence <= 1.0 + 1e-6:
            return
        one = self.bins[min(int(confidence * len(self.bins)), len(self.bins) - 1)]
        one.num_answers += 1
        one.num_correct += is_correct
        one.confidence_sum += confidence

    @property
    def num_answers(self) -> int:
        """Answers in all."""
        return sum(one.num_answers for one in self.bins)

    @property
    def expected_error(self) -> float:
        """The expected calibration error: how far accuracy and probability are apart, over all answers (Guo et al., 2017)."""
        gaps = (one.num_answers * abs(one.accuracy - one.confidence) for one in self.bins)
        return math.fsum(gaps) / max(1, self.num_answers)
