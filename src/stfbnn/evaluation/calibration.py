"""Do predicted probabilities mean what they say? Accuracy, proper scores and calibration errors of a classifier.

For dense predictions, every position that is not left out is one example: `per_position` makes them so.

Binning is done here and not by torchmetrics: its bins give a confidence of exactly 1, which overconfident networks
have often, a bin of its own. Where no confidence is exactly 1 the two agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.evaluation.checks import ArrayLike, as_labels, as_log_probabilities, as_probabilities, require_same_shape

BINS = 15
"""Bins of the calibration errors, the number that nearly all papers use."""


@dataclass(frozen=True)
class ReliabilityCurve:
    """Confidence against accuracy, bin by bin; the last bin is closed on the right, the others are open there.

    Attributes:
        edges: Edges of the bins, one more than there are bins, in [0, 1].
        confidences: Mean confidence of the examples in each bin; NaN where it is empty.
        accuracies: Their accuracy, in [0, 1]; NaN where the bin is empty.
        counts: How many examples each bin holds.
    """

    edges: tuple[float, ...]
    confidences: tuple[float, ...]
    accuracies: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def ece(self) -> float:
        """The expected calibration error: the mean gap between the two, weighted by the bins' counts."""
        bins = zip(self.confidences, self.accuracies, self.counts, strict=True)
        gaps = (abs(confidence - accuracy) * count for confidence, accuracy, count in bins if count)
        return sum(gaps) / sum(self.counts)


@dataclass(frozen=True)
class ClassificationMetrics:
    """The figures of a classifier on one set of examples; lower is better for all but the accuracy.

    Attributes:
        count: Number of examples.
        accuracy: Share of examples whose most probable class is the target, in [0, 1].
        nll: Mean negative log-likelihood, in nats.
        brier: Mean over examples of the squared error summed over classes, in [0, 2].
        ece: Expected calibration error of the top label, 15 bins of equal width.
        adaptive_ece: The same with bins of equal mass.
        classwise_ece: Mean over classes of each class probability's calibration error.
    """

    count: int
    accuracy: float
    nll: float
    brier: float
    ece: float
    adaptive_ece: float
    classwise_ece: float


def classification_metrics(probs: ArrayLike, log_probs: ArrayLike, targets: ArrayLike) -> ClassificationMetrics:
    """Compute all the figures of a classifier.

    Args:
        probs: Predictive probabilities, N x K.
        log_probs: Their logarithms, N x K, given apart because the logarithm of a rounded 0 is lost.
        targets: N integer labels in [0, K).

    Returns:
        The figures.

    Raises:
        InputError: Shapes, ranges or sums are wrong, or ``log_probs`` are not those of ``probs``.
    """
    probabilities, labels = _checked(probs, targets)
    logarithms = as_log_probabilities(log_probs)
    require_same_shape(probs=probabilities, log_probs=logarithms)
    apart = float((logarithms.exp() - probabilities).abs().max())
    if apart > 1e-2:
        raise InputError(f"log_probs are not the logarithms of probs: they differ by up to {apart:.3g} after exp")
    return ClassificationMetrics(
        count=len(labels),
        accuracy=accuracy(probabilities, labels),
        nll=nll(logarithms, labels),
        brier=brier(probabilities, labels),
        ece=ece(probabilities, labels),
        adaptive_ece=adaptive_ece(probabilities, labels),
        classwise_ece=classwise_ece(probabilities, labels),
    )


def per_position(values: Tensor, targets: Tensor, ignore_index: int | None = None) -> tuple[Tensor, Tensor]:
    """Dense predictions as one row a position, without those that are left out: what the figures here take.

    Args:
        values: Probabilities or their logarithms, (N, K, …).
        targets: Class indices, (N, …).
        ignore_index: The target that marks positions to leave out; None for none.

    Returns:
        The M positions' values, (M, K), and targets, (M,), on the CPU, in the order of ``targets.flatten()``.

    Raises:
        InputError: The shapes do not agree, or all positions are left out.
    """
    expected = (*values.shape[:1], *values.shape[2:])
    if values.ndim < 2 or tuple(targets.shape) != expected:
        raise InputError(
            f"for predictions of shape {tuple(values.shape)}, classes at dimension 1, targets must have the shape {expected}, "
            f"but theirs is {tuple(targets.shape)}"
        )
    rows, labels = values.detach().cpu().movedim(1, -1).flatten(0, -2), targets.detach().cpu().flatten()
    if ignore_index is None:
        return rows, labels
    counted = labels != ignore_index
    if not bool(counted.any()):
        raise InputError(f"all targets are ignore_index={ignore_index}: there is nothing to evaluate")
    return rows[counted], labels[counted]


def accuracy(probs: ArrayLike, targets: ArrayLike) -> float:
    """Share of examples whose most probable class (the first of equals) is the target.

    Args:
        probs: Predictive probabilities, N x K.
        targets: N integer labels in [0, K).

    Raises:
        InputError: Shapes, ranges or sums are wrong.
    """
    probabilities, labels = _checked(probs, targets)
    return float((probabilities.argmax(1) == labels).double().mean())


def nll(log_probs: ArrayLike, targets: ArrayLike) -> float:
    """Mean negative log-likelihood in nats; infinite where a target has probability 0.

    Args:
        log_probs: Logarithms of the predictive probabilities, N x K.
        targets: N integer labels in [0, K).

    Raises:
        InputError: Shapes, ranges or sums are wrong.
    """
    logarithms = as_log_probabilities(log_probs)
    labels = as_labels(targets, *logarithms.shape)
    return float(-logarithms.gather(1, labels[:, None]).mean())


def brier(probs: ArrayLike, targets: ArrayLike) -> float:
    """Brier score: the squared error summed over classes, averaged over examples (Brier, 1950), in [0, 2].

    Args:
        probs: Predictive probabilities, N x K.
        targets: N integer labels in [0, K).

    Raises:
        InputError: Shapes, ranges or sums are wrong.
    """
    probabilities, labels = _checked(probs, targets)
    truth = torch.nn.functional.one_hot(labels, probabilities.shape[1])
    return float((probabilities - truth).square().sum(1).mean())


def reliability_curve(probs: ArrayLike, targets: ArrayLike, bins: int = BINS) -> ReliabilityCurve:
    """Bin examples by the probability of their most probable class, in bins of equal width.

    Args:
        probs: Predictive probabilities, N x K.
        targets: N integer labels in [0, K).
        bins: How many bins.

    Returns:
        The curve.

    Raises:
        InputError: Shapes, ranges or sums are wrong, or there is less than one bin.
    """
    probabilities, labels = _checked(probs, targets)
    confidences, hits = _top(probabilities, labels)
    edges = _equal_width(confidences, bins)
    counts, means, rates = _binned(confidences, hits, edges)
    return ReliabilityCurve(
        edges=(0.0, *edges.tolist(), 1.0),
        confidences=tuple(means.tolist()),
        accuracies=tuple(rates.tolist()),
        counts=tuple(int(count) for count in counts),
    )


def ece(probs: ArrayLike, targets: ArrayLike, bins: int = BINS) -> float:
    """Expected calibration error of the top label (Naeini et al., 2015; Guo et al., 2017), bins of equal width.

    Args:
        probs: Predictive probabilities, N x K.
        targets: N integer labels in [0, K).
        bins: How many bins.

    Raises:
        InputError: Shapes, ranges or sums are wrong, or there is less than one bin.
    """
    return _top_label_error(probs, targets, bins, _equal_width)


def adaptive_ece(probs: ArrayLike, targets: ArrayLike, bins: int = BINS) -> float:
    """Calibration error of the top label with bins of equal mass (Nguyen and O'Connor, 2015).

    Equal confidences share a bin, so that the figure does not depend on the order of the examples; with many of
    them bins are fewer or uneven.

    Args:
        probs: Predictive probabilities, N x K.
        targets: N integer labels in [0, K).
        bins: How many bins.

    Raises:
        InputError: Shapes, ranges or sums are wrong, or there is less than one bin.
    """
    return _top_label_error(probs, targets, bins, _equal_mass)


def classwise_ece(probs: ArrayLike, targets: ArrayLike, bins: int = BINS) -> float:
    """Mean over classes of the calibration error of that class's probability (Kull et al., 2019).

    Args:
        probs: Predictive probabilities, N x K.
        targets: N integer labels in [0, K).
        bins: How many bins of equal width.

    Raises:
        InputError: Shapes, ranges or sums are wrong, or there is less than one bin.
    """
    probabilities, labels = _checked(probs, targets)
    classes = probabilities.shape[1]
    errors = (
        _gap(column, (labels == index).double(), _equal_width(column, bins))
        for index, column in enumerate(probabilities.T.contiguous())
    )
    return sum(errors) / classes


def _checked(probs: ArrayLike, targets: ArrayLike) -> tuple[Tensor, Tensor]:
    probabilities = as_probabilities(probs)
    return probabilities, as_labels(targets, *probabilities.shape)


def _top(probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Each example's confidence, and 1 where its most probable class is the target."""
    confidences, chosen = probs.max(1)
    return confidences, (chosen == labels).double()


def _top_label_error(
    probs: ArrayLike, targets: ArrayLike, bins: int, inner_edges: Callable[[Tensor, int], Tensor]
) -> float:
    confidences, hits = _top(*_checked(probs, targets))
    return _gap(confidences, hits, inner_edges(confidences, bins))


def _equal_width(values: Tensor, bins: int) -> Tensor:
    """The edges between ``bins`` bins of equal width in [0, 1]."""
    _require_bins(bins)
    return torch.arange(1, bins, dtype=values.dtype) / bins


def _equal_mass(values: Tensor, bins: int) -> Tensor:
    """The edges between ``bins`` bins of equal mass: the smallest value of each bin but the first."""
    _require_bins(bins)
    starts = torch.arange(1, bins) * len(values) // bins
    return values.sort().values[starts]


def _require_bins(bins: int) -> None:
    if bins < 1:
        raise InputError(f"bins must be at least 1, but they are {bins}")


def _binned(values: Tensor, outcomes: Tensor, inner_edges: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean value and mean outcome of each bin; the means of an empty bin are NaN."""
    size = len(inner_edges) + 1
    index = torch.bucketize(values, inner_edges, right=True)
    counts = torch.bincount(index, minlength=size)
    means = torch.bincount(index, weights=values, minlength=size) / counts
    rates = torch.bincount(index, weights=outcomes, minlength=size) / counts
    return counts, means, rates


def _gap(values: Tensor, outcomes: Tensor, inner_edges: Tensor) -> float:
    counts, means, rates = _binned(values, outcomes, inner_edges)
    filled = counts > 0
    return float(((means - rates).abs() * counts)[filled].sum() / len(values))
