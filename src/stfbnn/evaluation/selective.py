"""What is gained by not answering on the most uncertain examples? Risk against coverage, accuracy against rejection.

Throughout, a higher score means "less certain" (entropy, mutual information, one minus the confidence), as in
:mod:`stfbnn.evaluation.ood`. An example's error is what answering on it costs: 0 or 1 for a right or a wrong class, or any
non-negative loss. Coverage is the share of examples that are answered, and risk their mean error (El-Yaniv and Wiener,
2010; Geifman and El-Yaniv, 2017).

Equal scores: a threshold takes them all or none, so the curves have one point a distinct score. The figures that need
every coverage (:func:`aurc`, :func:`selective_accuracy`) give the expected value over random orders of equal scores. So
nothing here depends on the order of the examples, and a network whose confidence is exactly 1 on half of them gains and
loses nothing by it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.evaluation.checks import ArrayLike, as_finite, require_same_shape

_ROUNDING = 1e-9
"""What a share times a count may exceed a whole number by and still be it: .07 x 100 is 7.000000000000001."""


@dataclass(frozen=True)
class RiskCoverageCurve:
    """The risk at every threshold that a user could set, the most certain examples first.

    Attributes:
        coverages: Shares of examples answered, rising, the last one 1.
        risks: Mean errors of the examples answered at each coverage.
        area: :func:`aurc` of all examples; a thinned curve keeps it.
    """

    coverages: tuple[float, ...]
    risks: tuple[float, ...]
    area: float

    def at_most(self, points: int) -> RiskCoverageCurve:
        """Thin the curve for a plot or a file: points of this curve, near to evenly spaced coverages.

        Args:
            points: How many points may remain, at least 2. The first and the last one do.

        Raises:
            InputError: ``points`` is less than 2.
        """
        kept = _spread(self.coverages, points)
        return RiskCoverageCurve(_at(self.coverages, kept), _at(self.risks, kept), self.area)


@dataclass(frozen=True)
class AccuracyRejectionCurve:
    """The accuracy on what is left when the least certain examples are rejected, at every threshold.

    Attributes:
        rejections: Shares of examples rejected, rising, the first one 0.
        accuracies: Accuracies on the examples that are left.
    """

    rejections: tuple[float, ...]
    accuracies: tuple[float, ...]

    def at_most(self, points: int) -> AccuracyRejectionCurve:
        """Thin the curve for a plot or a file: points of this curve, near to evenly spaced rejections.

        Args:
            points: How many points may remain, at least 2. The first and the last one do.

        Raises:
            InputError: ``points`` is less than 2.
        """
        kept = _spread(self.rejections, points)
        return AccuracyRejectionCurve(_at(self.rejections, kept), _at(self.accuracies, kept))


def risk_coverage_curve(scores: ArrayLike, errors: ArrayLike) -> RiskCoverageCurve:
    """Compute the risk at every threshold; equal scores are answered together.

    Args:
        scores: How uncertain each example is, (N,), finite, higher for less certain.
        errors: What answering on it costs, (N,): booleans, 0 and 1, or a finite non-negative loss.

    Returns:
        The curve, one point for each distinct score.

    Raises:
        InputError: They are not of one length in one dimension, not finite, or an error is negative.
    """
    levels = _levels(scores, errors)
    answered = np.cumsum(levels.counts)
    return RiskCoverageCurve(
        coverages=tuple((answered / answered[-1]).tolist()),
        risks=tuple((np.cumsum(levels.sums) / answered).tolist()),
        area=float(_expected_risks(levels).mean()),
    )


def accuracy_rejection_curve(scores: ArrayLike, errors: ArrayLike) -> AccuracyRejectionCurve:
    """Compute the accuracy on what is left at every threshold (Nadeem et al., 2009).

    It is the risk-coverage curve of 0-1 errors read from the other end.

    Args:
        scores: How uncertain each example is, (N,), finite, higher for less certain.
        errors: Whether its answer is wrong, (N,): booleans, or 0 and 1.

    Returns:
        The curve, one point for each distinct score.

    Raises:
        InputError: They are not of one length in one dimension, not finite, or an error is neither 0 nor 1.
    """
    levels = _levels(scores, errors, binary=True)
    answered = np.cumsum(levels.counts)
    rejections = 1 - answered / answered[-1]
    accuracies = np.cumsum(levels.counts - levels.sums) / answered
    return AccuracyRejectionCurve(tuple(rejections[::-1].tolist()), tuple(accuracies[::-1].tolist()))


def aurc(scores: ArrayLike, errors: ArrayLike) -> float:
    """Area under the risk-coverage curve: the mean over k of the risk of the k most certain examples; lower is better.

    With the errors ℓ_(1), …, ℓ_(N) ordered from the most to the least certain example (Geifman, Uziel and El-Yaniv,
    2019, where it is the mean of the selective risk over the thresholds that are the examples' own scores)::

        AURC = 1/N Σ_k 1/k Σ_{i ≤ k} ℓ_(i)

    Of equal scores every order counts the same: the expected value has each ℓ_(i) replaced by the mean error of the
    examples that share its score. A score that knows nothing has the overall risk as its area, in expectation, or
    exactly if it is constant.

    Args:
        scores: How uncertain each example is, (N,), finite, higher for less certain.
        errors: What answering on it costs, (N,): booleans, 0 and 1, or a finite non-negative loss.

    Returns:
        The area, in the unit of the errors.

    Raises:
        InputError: They are not of one length in one dimension, not finite, or an error is negative.
    """
    return float(_expected_risks(_levels(scores, errors)).mean())


def excess_aurc(scores: ArrayLike, errors: ArrayLike) -> float:
    """E-AURC: :func:`aurc` less that of the best score there is for these errors; 0 is the best ranking.

    The best score orders examples by their errors (Geifman, Uziel and El-Yaniv, 2019). Its area is counted exactly,
    not by their approximation r + (1 − r) ln(1 − r) for 0-1 errors of mean r.

    Args:
        scores: How uncertain each example is, (N,), finite, higher for less certain.
        errors: What answering on it costs, (N,): booleans, 0 and 1, or a finite non-negative loss.

    Returns:
        The excess, in the unit of the errors, at least 0.

    Raises:
        InputError: They are not of one length in one dimension, not finite, or an error is negative.
    """
    area = aurc(scores, errors)
    losses = _losses(errors)
    # Another best ranking may come out below this one by a rounding error.
    return max(area - aurc(losses, losses), 0.0)


def selective_accuracy(scores: ArrayLike, errors: ArrayLike, coverage: float) -> float:
    """Accuracy on the most certain share ``coverage`` of the examples.

    Answered are exactly ⌈coverage · N⌉ examples, so that methods are compared at the same coverage whatever ties their
    scores have; of equal scores on the border the expected value over random choices is given.

    Args:
        scores: How uncertain each example is, (N,), finite, higher for less certain.
        errors: Whether its answer is wrong, (N,): booleans, or 0 and 1.
        coverage: The share to answer on, in (0, 1].

    Returns:
        The accuracy, in [0, 1].

    Raises:
        InputError: They are not of one length in one dimension, not finite, an error is neither 0 nor 1, or
            ``coverage`` is out of range.
    """
    if not 0 < coverage <= 1:
        raise InputError(f"coverage must be a share in (0, 1], but it is {coverage}")
    risks = _expected_risks(_levels(scores, errors, binary=True))
    answered = max(math.ceil(coverage * len(risks) - _ROUNDING), 1)
    return 1 - float(risks[answered - 1])


@dataclass(frozen=True)
class _Levels:
    """The distinct scores from the most certain on: how many examples have each, and the sum of their errors."""

    counts: NDArray[np.int64]
    sums: NDArray[np.float64]


def _levels(scores: ArrayLike, errors: ArrayLike, binary: bool = False) -> _Levels:
    uncertainty, losses = as_finite(scores, "scores"), _losses(errors)
    require_same_shape(scores=uncertainty, errors=losses)
    if uncertainty.ndim != 1:
        raise InputError(
            f"scores and errors must be one number an example, but have shape {tuple(uncertainty.shape)}; flatten dense "
            f"predictions first"
        )
    if binary and bool(((losses != 0) & (losses != 1)).any()):
        raise InputError(
            "for an accuracy, errors must be 0 (right) or 1 (wrong); for another loss see risk_coverage_curve"
        )
    _, level, counts = np.unique(uncertainty.numpy(), return_inverse=True, return_counts=True)
    return _Levels(counts, np.asarray(np.bincount(level, weights=losses.numpy()), dtype=np.float64))


def _losses(errors: ArrayLike) -> Tensor:
    # Whether an answer is wrong is a boolean in every user's code, and the checks refuse booleans.
    if not isinstance(errors, Tensor) and np.asarray(errors).dtype == np.bool_:
        errors = torch.from_numpy(np.array(errors))
    if isinstance(errors, Tensor) and errors.dtype == torch.bool:
        errors = errors.double()
    losses = as_finite(errors, "errors")
    if float(losses.min()) < 0:
        raise InputError(f"errors must not be negative, but the smallest is {float(losses.min()):.4g}")
    return losses


def _expected_risks(levels: _Levels) -> NDArray[np.float64]:
    """The risk of the k most certain examples for k = 1 … N, in expectation over the orders of equal scores."""
    losses = np.repeat(levels.sums / levels.counts, levels.counts)
    return np.cumsum(losses) / np.arange(1, len(losses) + 1)


def _spread(positions: tuple[float, ...], points: int) -> list[int]:
    """Indices of at most ``points`` of the rising positions, near to evenly spaced ones, with both ends."""
    if points < 2:
        raise InputError(f"a curve needs at least 2 points, its ends, but points is {points}")
    if len(positions) <= points:
        return list(range(len(positions)))
    found = np.asarray(positions)
    wanted = np.linspace(found[0], found[-1], points)
    above = np.searchsorted(found, wanted).clip(1, len(found) - 1)
    nearest = above - (wanted - found[above - 1] < found[above] - wanted)
    return [int(index) for index in np.unique(nearest)]


def _at(values: tuple[float, ...], indices: list[int]) -> tuple[float, ...]:
    return tuple(values[index] for index in indices)
