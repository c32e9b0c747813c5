"""What a few seeds allow to be said: means with their errors, paired comparisons, and which methods may be printed bold.

Every comparison is paired over seeds, for a seed fixes the division of the data and the trained network that all methods
start from: what is common to them cancels. With three seeds a t test has two degrees of freedom and little power, so a
method that is not significantly worse has not been shown to be as good.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

from stfbnn.benchmark.records import Record
from stfbnn.errors import InputError
from stfbnn.evaluation.checks import ArrayLike, as_finite

SeedValues = Mapping[str, Mapping[int, float]]
"""The figure of each method at each seed, of one task."""


@dataclass(frozen=True)
class Summary:
    """A mean over seeds.

    Attributes:
        mean: The mean.
        standard_error: Standard deviation over the root of the count; None for one value.
        standard_deviation: With ``count - 1`` in the denominator; None for one value.
        count: How many values.
    """

    mean: float
    standard_error: float | None
    standard_deviation: float | None
    count: int


@dataclass(frozen=True)
class PairedTest:
    """Student's t test of paired differences, two-sided.

    Attributes:
        difference: Mean of the first minus the second.
        standard_error: Of that mean, with the correction for random divisions where it was asked for.
        low: Lower end of its confidence interval.
        high: Upper end.
        p_value: Probability of a mean at least as far from 0 if the true one is 0 and differences are normal.
        count: How many pairs.
    """

    difference: float
    standard_error: float
    low: float
    high: float
    p_value: float
    count: int


@dataclass(frozen=True)
class Standing:
    """How the methods of one task stand to the best of them.

    Attributes:
        best: The method with the best mean; None where fewer than two methods could be compared.
        bold: The methods to print bold, by the rule of :func:`standing`; empty where nothing may be.
        p_values: For each other method the p-value of its difference from ``best``, adjusted for all pairs; 1 where the test
            has no answer.
        left_out: Methods that lack a seed which another method has.
    """

    best: str | None
    bold: frozenset[str]
    p_values: Mapping[str, float]
    left_out: tuple[str, ...]


def by_task(
    records: Iterable[Record], figure: Callable[[Record], float | None]
) -> dict[str, dict[str, dict[int, float]]]:
    """Arrange one figure of many records.

    Args:
        records: The records.
        figure: Takes the figure from a record that has figures; None or a number that is not finite stands for none.

    Returns:
        For each task, each method and each seed the figure, where there is one.
    """
    table: dict[str, dict[str, dict[int, float]]] = {}
    for record in records:
        value = None if record.raw is None else figure(record)
        if value is not None and math.isfinite(value):
            table.setdefault(record.task, {}).setdefault(record.method, {})[record.seed] = float(value)
    return table


def summary(values: ArrayLike) -> Summary:
    """Mean, spread and standard error of one figure over seeds.

    Args:
        values: One number a seed, finite.

    Raises:
        InputError: There are none, or they are not finite numbers in one dimension.
    """
    numbers = _vector(values, "values")
    count = len(numbers)
    if count == 1:
        return Summary(float(numbers[0]), None, None, 1)
    deviation = float(numbers.std(ddof=1))
    return Summary(float(numbers.mean()), deviation / math.sqrt(count), deviation, count)


def paired(
    values_a: ArrayLike, values_b: ArrayLike, level: float = 0.95, test_to_train: float = 0.0
) -> PairedTest | None:
    """Compare two methods that were run on the same seeds.

    Student's t with ``n - 1`` degrees of freedom. With three seeds it has little power: for p below .05 the mean difference
    must be 4.3 times its standard error. A test by ranks would be no way out, for Wilcoxon's signed-rank test of three pairs
    never gives a p-value below .25.

    The test takes the pairs for independent. Random divisions of one data set are not: their test sets overlap, and so do
    their training sets. For these the variance of the mean is taken as ``(1/n + test_to_train) s²`` in place of ``s²/n``
    (Nadeau and Bengio, "Inference for the generalization error", 2003); without it such splits find differences of nothing.

    Args:
        values_a: The first method's figures, one a seed.
        values_b: The second's, in the same order of seeds.
        level: Confidence level of the interval.
        test_to_train: Test examples over training examples, where the seeds are random divisions of one data set (1/9 for the
            standard splits of UCI); 0 where the test data are fixed, and what is said holds for these.

    Returns:
        The test; None where there is no spread to judge by: fewer than two pairs, or differences that are all the same (up to
        rounding) though not 0, of which t would claim certainty. Methods that agree exactly have p = 1.

    Raises:
        InputError: Not one finite number a seed, not as many of the one as of the other, ``level`` outside (0, 1), or
            ``test_to_train`` negative or not finite.
    """
    first, second = _vector(values_a, "values of the first method"), _vector(values_b, "values of the second method")
    if len(first) != len(second):
        raise InputError(
            f"paired values must come from the same seeds, but there are {len(first)} of the first method and "
            f"{len(second)} of the second; give those seeds that both have"
        )
    _require_share(level, "level")
    if not 0 <= test_to_train < math.inf:
        raise InputError(f"test_to_train must be a ratio of at least 0, but it is {test_to_train}")
    count, differences = len(first), first - second
    if count < 2:
        return None
    mean, deviation = float(differences.mean()), float(differences.std(ddof=1))
    if not differences.any():
        return PairedTest(0.0, 0.0, 0.0, 0.0, 1.0, count)
    # Subtraction leaves this much of numbers of that size: .93 - .92 and .92 - .91 differ in their last digits.
    if deviation <= 8 * np.finfo(np.float64).eps * max(np.abs(first).max(), np.abs(second).max()):
        return None
    error = deviation * math.sqrt(1 / count + test_to_train)
    reach = float(stdtrit(count - 1, (1 + level) / 2)) * error
    p_value = min(1.0, 2 * float(stdtr(count - 1, -abs(mean) / error)))
    return PairedTest(mean, error, mean - reach, mean + reach, p_value, count)


def holm(p_values: ArrayLike) -> list[float]:
    """Adjust p-values for their number, by Holm's step-down method (Holm 1979).

    A hypothesis whose adjusted p-value is at most α is rejected; the probability of any false rejection is then at most α,
    whatever the dependence of the tests. The i-th smallest of m is ``max over j ≤ i of min(1, (m - j + 1) p_j)``.

    Args:
        p_values: One or more numbers in [0, 1].

    Returns:
        The adjusted ones, in the order given.

    Raises:
        InputError: They are not numbers in [0, 1].
    """
    numbers = _vector(p_values, "p-values")
    if numbers.min() < 0 or numbers.max() > 1:
        raise InputError(f"p-values must be in [0, 1], but they reach from {numbers.min()} to {numbers.max()}")
    order = np.argsort(numbers, kind="stable")
    factors = np.arange(len(numbers), 0, -1)
    adjusted = np.empty_like(numbers)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(factors * numbers[order]))
    return [float(value) for value in adjusted]


def standing(table: SeedValues, *, lower_is_better: bool, alpha: float = 0.05, test_to_train: float = 0.0) -> Standing:
    """Find the best method of a task and those that cannot be told from it.

    The rule. (1) Methods that have all seeds enter. (2) All pairs of them are tested by :func:`paired`, and the p-values are
    adjusted by :func:`holm` over ALL pairs; a pair without a test counts as p = 1. (3) The best is the method with the best
    mean; another is significantly worse if their adjusted p-value is at most ``alpha``. (4) If no method is significantly
    worse, nothing is bold. Otherwise the best is bold, and with it all that are not significantly worse: they are tied with the
    best.

    So bold print claims that the best is better than each method that is not bold, and the probability that any such claim is
    false is at most ``alpha``, however many of the methods are truly equal. The family must be all pairs, not the
    competitors alone, because the best was picked by the same figures: tested against its competitors alone, the luckiest of
    several equal methods would often look better than the unluckiest.

    Args:
        table: For each method its figure at each seed, finite.
        lower_is_better: Whether small figures are good ones.
        alpha: The family-wise error rate.
        test_to_train: As for :func:`paired`.

    Raises:
        InputError: A figure is not finite, or ``alpha`` or ``test_to_train`` is out of range.
    """
    _require_share(alpha, "alpha")
    seeds = sorted({seed for values in table.values() for seed in values})
    complete = {
        method: _vector([values[seed] for seed in seeds], f"values of {method}")
        for method, values in table.items()
        if seeds and len(values) == len(seeds)
    }
    left_out = tuple(method for method in table if method not in complete)
    if len(complete) < 2:
        return Standing(None, frozenset(), {}, left_out)
    pick = min if lower_is_better else max
    best = pick(complete, key=lambda method: float(complete[method].mean()))
    pairs = list(combinations(complete, 2))
    tests = [paired(complete[first], complete[second], test_to_train=test_to_train) for first, second in pairs]
    adjusted = holm([1.0 if test is None else test.p_value for test in tests])
    p_values = {
        next(method for method in pair if method != best): value
        for pair, value in zip(pairs, adjusted, strict=True)
        if best in pair
    }
    tied = {best, *(method for method, value in p_values.items() if value > alpha)}
    bold = frozenset(tied) if len(tied) < len(complete) else frozenset()
    return Standing(best, bold, p_values, left_out)


def best_rows(table: SeedValues, *, lower_is_better: bool, alpha: float = 0.05, test_to_train: float = 0.0) -> set[str]:
    """Find the methods to print bold: nothing unless significant, by the rule of :func:`standing`.

    Args:
        table: For each method its figure at each seed, finite.
        lower_is_better: Whether small figures are good ones.
        alpha: The family-wise error rate.
        test_to_train: As for :func:`paired`.

    Raises:
        InputError: As for :func:`standing`.
    """
    return set(standing(table, lower_is_better=lower_is_better, alpha=alpha, test_to_train=test_to_train).bold)


def time_to_reach(history: Sequence[tuple[float, float]], target: float) -> float | None:
    """How long a method took to a given negative log-likelihood.

    The first crossing, linear between the two measurements around it, so that a method which is measured seldom is not
    charged for it. A measurement that is not finite has not reached the target, and nothing is interpolated from it.

    Args:
        history: Seconds since the start and the negative log-likelihood then, in order of time.
        target: The value to reach; being equal to it is enough.

    Returns:
        Seconds; None where it was never reached. The first measurement's own time if that one is there already.

    Raises:
        InputError: Times are not finite or run backwards, or the target is not finite.
    """
    if not math.isfinite(target):
        raise InputError(f"the target must be a finite number, but it is {target}")
    times = [float(seconds) for seconds, _ in history]
    if not all(map(math.isfinite, times)) or any(b < a for a, b in pairwise(times)):
        raise InputError("the seconds of a history must be finite and never run backwards; order it by time")
    before: tuple[float, float] | None = None
    for seconds, value in history:
        if math.isfinite(value) and value <= target:
            if before is None:
                return float(seconds)
            start, above = before
            return float(start + (seconds - start) * (above - target) / (above - value))
        before = (seconds, value) if math.isfinite(value) else None
    return None


def _vector(values: ArrayLike, what: str) -> NDArray[np.float64]:
    numbers = as_finite(values, what)
    if numbers.ndim != 1:
        raise InputError(f"{what} must be in one dimension, but have shape {tuple(numbers.shape)}")
    return np.asarray(numbers.numpy(), dtype=np.float64)


def _require_share(value: float, what: str) -> None:
    if not 0 < value < 1:
        raise InputError(f"{what} must be in (0, 1), but it is {value}")
