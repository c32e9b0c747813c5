"""Confidence intervals of what is counted on members and on others: rates, differences, and the area under the ROC curve.

Each of them stays inside its range and has a width where a plain standard error would be 0, as it is for an attack that never
errs: the intervals of attacks that succeed, or find nothing, matter most.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv, expit, logit, ndtri, stdtrit
from scipy.stats import rankdata

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimated:
    """A figure and its confidence interval.

    Attributes:
        value: The figure.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    def shifted(self, change: Callable[[float], float]) -> Estimated:
        """A growing function of the figure, and of both ends."""
        return Estimated(change(self.value), change(self.low), change(self.high))

    def show(self, digits: int = 3) -> str:
        """The figure with its interval behind it."""
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def rate(hits: int, count: int, confidence: float = 0.95) -> Estimated:
    """A share of ``count`` with the exact interval of Clopper and Pearson (1934), which covers at least as often as it says.

    Args:
        hits: How many of them.
        count: Of how many; at least 1.
        confidence: Coverage.
    """
    tail = (1 - confidence) / 2
    low = float(betaincinv(hits, count - hits + 1, tail)) if hits else 0.0
    high = float(betaincinv(hits + 1, count - hits, 1 - tail)) if hits < count else 1.0
    return Estimated(hits / count, low, high)


def rate_difference(hits: tuple[int, int], counts: tuple[int, int], confidence: float = 0.95) -> Estimated:
    """The first share minus the second, with the interval of Newcombe (1998, method 10), from Wilson's for each.

    Args:
        hits: How many in each group.
        counts: Of how many.
        confidence: Coverage.
    """
    first, second = (hit / count for hit, count in zip(hits, counts, strict=True))
    lows, highs = zip(*(_wilson(hit, count, confidence) for hit, count in zip(hits, counts, strict=True)), strict=True)
    down, up = math.hypot(first - lows[0], highs[1] - second), math.hypot(highs[0] - first, second - lows[1])
    return Estimated(first - second, max(-1.0, first - second - down), min(1.0, first - second + up))


def mean_difference(first: Floats, second: Floats, confidence: float = 0.95) -> Estimated:
    """The first mean minus the second, with Welch's t interval for unequal variances; at least two numbers in each."""
    shares = [float(np.var(group, ddof=1)) / len(group) for group in (first, second)]
    difference, error = float(np.mean(first) - np.mean(second)), math.sqrt(sum(shares))
    if not error:
        return Estimated(difference, difference, difference)
    freedom = sum(shares) ** 2 / sum(
        share**2 / (len(group) - 1) for share, group in zip(shares, (first, second), strict=True)
    )
    reach = float(stdtrit(freedom, 0.5 + confidence / 2)) * error
    return Estimated(difference, difference - reach, difference + reach)


def area(members: Floats, others: Floats, confidence: float = 0.95) -> Estimated:
    """Probability that a member scores above another example, ties counting half, with DeLong's interval (1988).

    The variance comes from ranks (Sun and Xu 2014), the interval is symmetric on the logit scale, which covers better near 1.
    Where the estimated variance is 0 (all pairs alike) the interval is `identical`'s.

    Args:
        members: Scores of at least two members.
        others: Scores of at least two others.
        confidence: Coverage.
    """
    counts = len(members), len(others)
    ranks = rankdata(np.concatenate([members, others]))
    # How often each member beats the others, and how often each of the others is beaten.
    beats = (ranks[: counts[0]] - rankdata(members)) / counts[1]
    beaten = 1 - (ranks[counts[0] :] - rankdata(others)) / counts[0]
    value = float(np.clip(beats.mean(), 0, 1))
    variance = float(np.var(beats, ddof=1) / counts[0] + np.var(beaten, ddof=1) / counts[1])
    # Of numbers that are equal up to rounding the variance may come out as 1e-33.
    if variance < 1e-24 or value in (0.0, 1.0):
        same = identical(min(counts), confidence)
        return Estimated(value, same * value, same * value + 1 - same)
    reach = float(ndtri(0.5 + confidence / 2)) * math.sqrt(variance) / (value * (1 - value))
    return Estimated(value, float(expit(logit(value) - reach)), float(expit(logit(value) + reach)))


def identical(count: int, confidence: float = 0.95) -> float:
    """How rare the outcome that ``count`` independent trials all had might be after all: ((1 − confidence) / 2)^(1 / count)."""
    return float(((1 - confidence) / 2) ** (1 / count))


def _wilson(hits: int, count: int, confidence: float) -> tuple[float, float]:
    """Wilson's score interval (1927)."""
    z = float(ndtri(0.5 + confidence / 2))
    share, weight = hits / count, z * z / count
    centre = (share + weight / 2) / (1 + weight)
    reach = math.sqrt(share * (1 - share) * weight + weight * weight / 4) / (1 + weight)
    # At 0 and at 1 an end is the share itself, but for rounding.
    return min(share, centre - reach), max(share, centre + reach)
