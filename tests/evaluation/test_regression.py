"""Figures of a regression against numerical integration, scipy and loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from stfbnn.errors import InputError
from stfbnn.evaluation import regression


@pytest.mark.parametrize(("mean", "std", "target"), [(0.0, 1.0, 0.3), (2.0, 0.5, -1.0), (-1.0, 3.0, 4.0)])
def test_crps_is_the_integral_that_defines_it(mean: float, std: float, target: float) -> None:
    below, _ = quad(lambda y: norm.cdf(y, mean, std) ** 2, -40, target)
    above, _ = quad(lambda y: norm.sf(y, mean, std) ** 2, target, 40)
    assert regression.crps([mean], [std], [target]) == pytest.approx(below + above, rel=1e-6)


def test_crps_tends_to_the_absolute_error() -> None:
    assert regression.crps([1.0, 2.0], [1e-9, 1e-9], [1.5, 4.0]) == pytest.approx(1.25)


def test_all_figures() -> None:
    random = np.random.default_rng(0)
    mean, std = random.normal(size=50_000), random.uniform(0.5, 2, size=50_000)
    targets = mean + std * random.normal(size=50_000)
    found = regression.regression_metrics(mean, std, norm.logpdf(targets, mean, std), targets)
    assert found.count == 50_000
    assert found.rmse == pytest.approx(math.sqrt(np.mean((mean - targets) ** 2)))
    assert found.mean_log_density == pytest.approx(norm.logpdf(targets, mean, std).mean())
    assert found.sharpness == pytest.approx(math.sqrt((std**2).mean()))
    assert found.sharpness == pytest.approx(found.rmse, rel=0.02)  # calibrated by construction
    low, high = norm.interval(0.9, mean, std)
    assert found.coverage_90 == pytest.approx(((low <= targets) & (targets <= high)).mean())
    for level, share in ((0.5, found.coverage_50), (0.9, found.coverage_90), (0.95, found.coverage_95)):
        assert share == pytest.approx(level, abs=4 * math.sqrt(level * (1 - level) / 50_000))


def test_several_targets_an_example() -> None:
    mean, std, targets = np.zeros((3, 2)), np.ones((3, 2)), np.array([[0, 0], [0, 0], [3.0, 3.0]])
    found = regression.regression_metrics(mean, std, np.zeros(3), targets)
    assert (found.count, found.rmse, found.coverage_95) == (3, pytest.approx(math.sqrt(3)), pytest.approx(2 / 3))


@pytest.mark.parametrize(
    ("mean", "std", "targets", "message"),
    [
        (np.zeros((3, 1)), np.ones((3, 1)), np.zeros(3), r"not broadcast: mean \(3, 1\), .*targets \(3,\)"),
        (np.zeros(3), np.ones(1), np.zeros(3), r"std \(1,\)"),
        (np.zeros(3), np.array([1, 0, 1]), np.zeros(3), "must be positive, but the smallest is 0"),
        (np.zeros(3), np.ones(3), np.array([0, np.nan, 0]), "targets hold 1 NaN"),
        (np.array([0, np.inf, 0]), np.ones(3), np.zeros(3), "means hold 1 infinite"),
        (np.zeros((1, 1, 1)), np.ones((1, 1, 1)), np.zeros((1, 1, 1)), "N or N x D"),
    ],
)
def test_bad_input(mean: object, std: object, targets: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        regression.crps(mean, std, targets)
    with pytest.raises(InputError, match=message):
        regression.interval_coverage(mean, std, targets, 0.9)


def test_bad_density_and_level() -> None:
    with pytest.raises(InputError, match=r"shape \(2,\), but has shape \(2, 1\)"):
        regression.regression_metrics(np.zeros(2), np.ones(2), np.zeros((2, 1)), np.zeros(2))
    with pytest.raises(InputError, match="plus infinity"):
        regression.mean_log_density([math.inf])
    assert regression.mean_log_density([-math.inf]) == -math.inf
    with pytest.raises(InputError, match="between 0 and 1, but it is 95"):
        regression.interval_coverage([0.0], [1.0], [0.0], 95)
    with pytest.raises(InputError, match=r"mean \(2,\), targets \(2, 1\)"):
        regression.rmse(np.zeros(2), np.zeros((2, 1)))
