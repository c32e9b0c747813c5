"""Are a regression's error bars right? Error, density, coverage and width of predictive distributions.

Coverage and the ranked probability score take the predictive distribution as a Gaussian with the given mean and
standard deviation; the log density is given by the caller, who knows the whole distribution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.stats import norm
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.evaluation.checks import ArrayLike, as_finite, as_floats, require_same_shape


@dataclass(frozen=True)
class RegressionMetrics:
    """The figures of a regression on one set of examples, in the targets' unit where they have one.

    Attributes:
        count: Number of examples.
        rmse: Root of the mean squared error.
        mean_log_density: Mean log predictive density of the targets, in nats; higher is better.
        crps: Mean continuous ranked probability score; lower is better.
        sharpness: Root of the mean predictive variance; a calibrated prediction has it near the rmse.
        coverage_50: Share of targets within the central 50 % interval; best near .5.
        coverage_90: The same for 90 %.
        coverage_95: The same for 95 %.
    """

    count: int
    rmse: float
    mean_log_density: float
    crps: float
    sharpness: float
    coverage_50: float
    coverage_90: float
    coverage_95: float


def regression_metrics(
    mean: ArrayLike, std: ArrayLike, log_density: ArrayLike, targets: ArrayLike
) -> RegressionMetrics:
    """Compute all the figures of a regression.

    Args:
        mean: Predictive means, N or N x D.
        std: Predictive standard deviations (noise included), of the same shape, positive.
        log_density: Log predictive density of each example's target, N.
        targets: The targets, of the shape of ``mean``.

    Returns:
        The figures; over N x D the errors, widths and coverages are averaged over all N·D numbers.

    Raises:
        InputError: Shapes differ, numbers are not finite, or a standard deviation is not positive.
    """
    centre, width, truth = _checked(mean, std, targets)
    densities = as_floats(log_density, "log_density")
    if densities.shape != truth.shape[:1]:
        raise InputError(
            f"log_density must be one number an example, of shape ({len(truth)},), but has shape "
            f"{tuple(densities.shape)}; sum it over the target's dimensions"
        )
    return RegressionMetrics(
        count=len(truth),
        rmse=rmse(centre, truth),
        mean_log_density=mean_log_density(densities),
        crps=crps(centre, width, truth),
        sharpness=sharpness(width),
        coverage_50=interval_coverage(centre, width, truth, 0.5),
        coverage_90=interval_coverage(centre, width, truth, 0.9),
        coverage_95=interval_coverage(centre, width, truth, 0.95),
    )


def rmse(mean: ArrayLike, targets: ArrayLike) -> float:
    """Root of the mean squared error, in the targets' unit.

    Args:
        mean: Predictive means, N or N x D.
        targets: The targets, of the same shape.

    Raises:
        InputError: Shapes differ or numbers are not finite.
    """
    centre, truth = as_finite(mean, "means"), as_finite(targets, "targets")
    require_same_shape(mean=centre, targets=truth)
    return float((centre - truth).square().mean().sqrt())


def mean_log_density(log_density: ArrayLike) -> float:
    """Mean log predictive density in nats; minus infinity where a target has density 0.

    Args:
        log_density: Log predictive density of each example's target, N.

    Raises:
        InputError: Numbers are missing, NaN or plus infinity (a density with no width).
    """
    densities = as_floats(log_density, "log_density")
    if bool((densities == math.inf).any()):
        raise InputError("log_density holds plus infinity: a predictive standard deviation is 0; give it some noise")
    return float(densities.mean())


def interval_coverage(mean: ArrayLike, std: ArrayLike, targets: ArrayLike, level: float) -> float:
    """Share of targets within the Gaussian's central interval of probability ``level``, bounds included.

    Args:
        mean: Predictive means, N or N x D.
        std: Predictive standard deviations, of the same shape, positive.
        targets: The targets, of the same shape.
        level: The interval's probability, in (0, 1).

    Returns:
        The share, in [0, 1]; best near ``level``.

    Raises:
        InputError: Shapes differ, numbers are not finite, or a standard deviation or the level is out of range.
    """
    if not 0 < level < 1:
        raise InputError(f"level must be a probability between 0 and 1, but it is {level}")
    centre, width, truth = _checked(mean, std, targets)
    reach = float(norm.ppf((1 + level) / 2))
    return float(((truth - centre).abs() <= reach * width).double().mean())


def sharpness(std: ArrayLike) -> float:
    """Root of the mean predictive variance, in the targets' unit, to be read beside the rmse.

    Args:
        std: Predictive standard deviations, N or N x D, positive.

    Raises:
        InputError: A standard deviation is not finite and positive.
    """
    return float(_positive(std).square().mean().sqrt())


def crps(mean: ArrayLike, std: ArrayLike, targets: ArrayLike) -> float:
    """Mean continuous ranked probability score of a Gaussian, in the targets' unit.

    With z = (y − μ)/σ it is σ (z (2Φ(z) − 1) + 2φ(z) − 1/√π) (Gneiting and Raftery, 2007, equation 21); it tends
    to the absolute error as σ tends to 0.

    Args:
        mean: Predictive means, N or N x D.
        std: Predictive standard deviations, of the same shape, positive.
        targets: The targets, of the same shape.

    Raises:
        InputError: Shapes differ, numbers are not finite, or a standard deviation is not positive.
    """
    centre, width, truth = _checked(mean, std, targets)
    z = (truth - centre) / width
    density = (-z.square() / 2).exp() / math.sqrt(2 * math.pi)
    # 2Φ(z) − 1 is the error function of z/√2.
    scores = width * (z * torch.erf(z / math.sqrt(2)) + 2 * density - 1 / math.sqrt(math.pi))
    return float(scores.mean())


def _checked(mean: ArrayLike, std: ArrayLike, targets: ArrayLike) -> tuple[Tensor, Tensor, Tensor]:
    centre, width, truth = as_finite(mean, "means"), _positive(std), as_finite(targets, "targets")
    require_same_shape(mean=centre, std=width, targets=truth)
    if not 1 <= truth.ndim <= 2:
        raise InputError(f"means, stds and targets must be of shape N or N x D, but have {tuple(truth.shape)}")
    return centre, width, truth


def _positive(std: ArrayLike) -> Tensor:
    width = as_finite(std, "standard deviations")
    if float(width.min()) <= 0:
        raise InputError(f"standard deviations must be positive, but the smallest is {float(width.min()):.4g}")
    return width
