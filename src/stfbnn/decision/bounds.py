"""What a count of errors, or a mean of losses in [0, 1], says of the risk behind it: tests, limits and sample sizes.

All are valid for any number of examples, not only in the limit of many.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import betainc, betaincinv, xlogy

Floats: TypeAlias = NDArray[np.float64]
PValues: TypeAlias = Callable[[Any, Any, float], Floats]
"""From sums of losses, numbers of examples and a risk to the p-values of "the risk is that or more"."""


def binomial_p_values(errors: Any, counts: Any, risk: float) -> Floats:
    """P(Bin(m, risk) ≤ errors): how likely so few errors are if each of m answers is wrong with that probability or more.

    At most δ exactly where the one-sided Clopper–Pearson upper limit at confidence 1 − δ is at most ``risk``.

    Args:
        errors: Whole numbers of errors, at most ``counts``.
        counts: Numbers of examples m, at least 1, of the same shape.
        risk: In (0, 1).
    """
    errors, counts = np.broadcast_arrays(np.asarray(errors, np.float64), np.asarray(counts, np.float64))
    # The binomial distribution function is a regularised incomplete beta function, but where the count is its largest.
    below = errors < counts
    tails: Floats = betainc(np.where(below, counts - errors, 1.0), errors + 1, 1 - risk)
    return np.where(below, tails, 1.0)


def hoeffding_bentkus_p_values(sums: Any, counts: Any, risk: float) -> Floats:
    """The same for independent losses in [0, 1] with means of ``risk`` or more, which need not be equally distributed.

    The smaller of Hoeffding's bound exp(−m·kl(mean, risk)) (1963, theorem 1) and Bentkus's e·P(Bin(m, risk) ≤ ⌈sum⌉)
    (2004), as Bates et al. (arXiv 2101.02703) combine them. Both bound the lower tail of one statistic, so
    the smaller does too.

    Args:
        sums: Sums of losses, at most ``counts``.
        counts: Numbers of examples m, at least 1, of the same shape.
        risk: In (0, 1).
    """
    sums, counts = np.broadcast_arrays(np.asarray(sums, np.float64), np.asarray(counts, np.float64))
    mean = np.minimum(sums / counts, risk)
    divergence = xlogy(mean, mean / risk) + xlogy(1 - mean, (1 - mean) / (1 - risk))
    bentkus = math.e * binomial_p_values(np.minimum(np.ceil(sums), counts), counts, risk)
    found: Floats = np.minimum(1.0, np.minimum(np.exp(-counts * divergence), bentkus))
    return found


def upper_limit(total: float, count: int, level: float, whole: bool) -> float:
    """The largest risk that is not rejected at this level, one-sided.

    Args:
        total: The number of errors, or the sum of losses in [0, 1].
        count: Of how many examples; 0 says nothing, so that the limit is 1.
        level: The probability δ that the risk is above the limit.
        whole: Whether the losses can only be 0 or 1: then Clopper and Pearson's limit, else that of Hoeffding and Bentkus.
    """
    if total >= count:
        return 1.0
    if whole:
        return float(betaincinv(total + 1, count - total, 1 - level))
    mean = total / count

    def excess(risk: float) -> float:
        return float(hoeffding_bentkus_p_values(total, count, risk)) - level

    # At a risk equal to the mean the p-value is 1, and it falls from there.
    lowest, highest = max(mean, 1e-15), 1 - 1e-15
    return 1.0 if excess(highest) >= 0 else float(brentq(excess, lowest, highest, xtol=1e-12))


def interval(total: float, count: int, confidence: float, whole: bool) -> tuple[float, float]:
    """A two-sided confidence interval of the risk, each limit at half of 1 − confidence.

    Args:
        total: The number of errors, or the sum of losses in [0, 1].
        count: Of how many examples; 0 gives (0, 1).
        confidence: In (0, 1).
        whole: As for `upper_limit`; Clopper and Pearson's interval (1934) where True.
    """
    level = (1 - confidence) / 2
    low = 1 - upper_limit(count - total, count, level, whole)
    return low, upper_limit(total, count, level, whole)


def least_rejectable(risk: float, level: float) -> int:
    """The fewest examples, all without loss, that reject "the risk is that or more": the smallest m with (1 − risk)^m ≤ level.

    The same for both tests, as both give (1 − risk)^m where nothing is lost.
    """
    return math.ceil(math.log(level) / math.log1p(-risk))
