"""Figures of a classifier against loops, scikit-learn and torchmetrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, log_loss
from torchmetrics.functional.classification import multiclass_calibration_error

from stfbnn.errors import InputError
from stfbnn.evaluation import calibration

Arrays = tuple[NDArray[np.float64], NDArray[np.int64]]


def example(seed: int, count: int = 400, classes: int = 5, sharpness: float = 2.0) -> Arrays:
    random = np.random.default_rng(seed)
    scores = np.exp(sharpness * random.normal(size=(count, classes)))
    probs = scores / scores.sum(1, keepdims=True)
    return probs, random.integers(0, classes, size=count)


def looped_gap(values: NDArray[np.float64], outcomes: NDArray[np.float64], bins: int) -> float:
    """The calibration error as the papers write it, one example at a time."""
    groups: list[list[int]] = [[] for _ in range(bins)]
    for index, value in enumerate(values):
        groups[min(int(value * bins), bins - 1)].append(index)
    return sum(
        len(group) / len(values) * abs(float(np.mean(values[group])) - float(np.mean(outcomes[group])))
        for group in groups
        if group
    )


@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_other_implementations(seed: int) -> None:
    probs, targets = example(seed, sharpness=1.0 + seed)
    confidences, hits = probs.max(1), (probs.argmax(1) == targets).astype(float)
    found = calibration.classification_metrics(probs, np.log(probs), targets)
    assert found.count == 400
    assert found.accuracy == pytest.approx(accuracy_score(targets, probs.argmax(1)))
    assert found.nll == pytest.approx(log_loss(targets, probs, labels=range(5)))
    brier = sum(sum((probs[n, k] - (targets[n] == k)) ** 2 for k in range(5)) for n in range(400))
    assert found.brier == pytest.approx(brier / 400)
    assert found.ece == pytest.approx(looped_gap(confidences, hits, 15))
    classwise = [looped_gap(probs[:, k], (targets == k).astype(float), 15) for k in range(5)]
    assert found.classwise_ece == pytest.approx(np.mean(classwise))
    order = np.argsort(confidences)
    groups = np.split(order, [400 * k // 15 for k in range(1, 15)])
    adaptive = sum(len(g) / 400 * abs(confidences[g].mean() - hits[g].mean()) for g in groups)
    assert found.adaptive_ece == pytest.approx(adaptive)


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_ece_agrees_with_torchmetrics_where_no_confidence_is_one(bins: int) -> None:
    probs, targets = (torch.as_tensor(part) for part in example(9, count=2000))
    theirs = multiclass_calibration_error(probs, targets, num_classes=5, n_bins=bins)
    assert calibration.ece(probs, targets, bins=bins) == pytest.approx(float(theirs), abs=1e-6)


def test_confidence_of_one_shares_the_last_bin() -> None:
    # .96 and right, 1 and wrong: in one bin the mean confidence is .98 and the accuracy .5.
    probs = torch.tensor([[0.96, 0.04], [1.0, 0.0]])
    targets = torch.tensor([0, 1])
    assert calibration.ece(probs, targets) == pytest.approx(0.48)
    assert calibration.nll(probs.log(), targets) == math.inf


def test_single_precision_is_summed_in_double() -> None:
    probs, targets = example(3, count=20_000)
    single = torch.as_tensor(probs, dtype=torch.float32)
    assert calibration.brier(single, targets) == pytest.approx(calibration.brier(probs, targets), abs=1e-7)


def test_reliability_curve() -> None:
    probs = np.array([[0.55, 0.45], [0.58, 0.42], [0.9, 0.1], [0.2, 0.8]])
    curve = calibration.reliability_curve(probs, [0, 1, 0, 0], bins=5)
    assert curve.edges == pytest.approx((0, 0.2, 0.4, 0.6, 0.8, 1))
    assert curve.counts == (0, 0, 2, 0, 2)
    assert curve.confidences == pytest.approx((math.nan, math.nan, 0.565, math.nan, 0.85), nan_ok=True)
    assert curve.accuracies == pytest.approx((math.nan, math.nan, 0.5, math.nan, 0.5), nan_ok=True)
    assert curve.ece == pytest.approx((2 * 0.065 + 2 * 0.35) / 4)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(1, 60), st.integers(2, 6), st.integers(1, 20))
def test_order_of_the_examples_does_not_matter(seed: int, count: int, classes: int, bins: int) -> None:
    probs, targets = example(seed, count, classes)
    probs = np.round(probs, 1)  # many ties
    probs[:, 0] += 1 - probs.sum(1)
    probs = np.clip(probs, 0, None)
    probs /= probs.sum(1, keepdims=True)
    order = np.random.default_rng(seed + 1).permutation(count)
    for figure in (calibration.ece, calibration.adaptive_ece, calibration.classwise_ece):
        direct = figure(probs, targets, bins=bins)
        assert direct == pytest.approx(figure(probs[order], targets[order], bins=bins), abs=1e-12)
        assert 0 <= direct <= 1
    assert calibration.reliability_curve(probs, targets, bins=bins).ece == pytest.approx(
        calibration.ece(probs, targets, bins=bins)
    )
    assert sum(calibration.reliability_curve(probs, targets, bins=bins).counts) == count


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.floats(0.5, 3.0))
def test_targets_drawn_from_the_probabilities_are_calibrated(seed: int, sharpness: float) -> None:
    probs, _ = example(seed, 20_000, 4, sharpness)
    draws = np.random.default_rng(seed + 1).random((len(probs), 1))
    targets = np.minimum((probs.cumsum(1) < draws).sum(1), 3)
    # Sampling noise of an ECE with 15 bins is about sqrt(15 · 2/π · .25 / N) = .011 at most.
    assert calibration.ece(probs, targets) < 0.02
    assert calibration.adaptive_ece(probs, targets) < 0.02
    assert calibration.classwise_ece(probs, targets) < 0.02
    flattened = probs**3 / (probs**3).sum(1, keepdims=True)
    assert calibration.ece(flattened, targets) > calibration.ece(probs, targets)


@pytest.mark.parametrize(
    ("probs", "targets", "message"),
    [
        ([[0.5, 0.5]], [2], "must be in 0 to 1.*such as 2"),
        ([[0.5, 0.5]], [-1], "such as -1"),
        ([[0.5, 0.5]], [0.0], "must be integer class labels, but they are torch.float64"),
        ([[0.5, 0.5]], [0, 1], r"shape \(1,\).*shape \(2,\)"),
        ([[0.5, 0.5]], [[0]], r"shape \(1, 1\)"),
        ([[0.5, math.nan]], [0], "hold 1 NaN"),
        ([[0.5, math.inf]], [0], "1 infinite"),
        ([[0.5, 0.5], [0.5, 0.6]], [0, 1], "1 of 2 rows do not, such as row 1 with 1.1"),
        ([[1.5, -0.5]], [0], r"must not be negative, but the smallest is -0\.5; are they logits"),
        ([0.5, 0.5], [0], r"N x K matrix.*\(2,\)"),
        ([[1.0]], [0], r"\(1, 1\); for a binary problem give both"),
        (np.zeros((0, 3)), np.zeros(0, dtype=int), "are empty"),
        ([[1j, 0]], [0], "must be real"),
        ([["a", "b"]], [0], "must be a tensor or an array of numbers"),
    ],
)
def test_bad_input(probs: object, targets: object, message: str) -> None:
    for figure in (calibration.ece, calibration.accuracy, calibration.brier, calibration.reliability_curve):
        with pytest.raises(InputError, match=message):
            figure(probs, targets)


def test_bad_logarithms() -> None:
    with pytest.raises(InputError, match="apply log_softmax first"):
        calibration.nll([[2.0, -1.0]], [0])
    with pytest.raises(InputError, match="must sum to 1"):
        calibration.nll([[-math.inf, -math.inf]], [0])
    with pytest.raises(InputError, match=r"not the logarithms of probs: they differ by up to 0\.4"):
        calibration.classification_metrics([[0.5, 0.5]], np.log([[0.9, 0.1]]), [0])
    with pytest.raises(InputError, match=r"probs \(1, 2\), log_probs \(1, 3\)"):
        calibration.classification_metrics([[0.5, 0.5]], np.log([[0.5, 0.25, 0.25]]), [0])
    with pytest.raises(InputError, match="at least 1"):
        calibration.ece([[0.5, 0.5]], [0], bins=0)
