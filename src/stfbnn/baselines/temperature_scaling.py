"""Temperature scaling: one number, fitted on held-out data, that divides the logits (Guo et al., 2017).

It is the competitor that any calibration method must pass: it costs nothing, keeps the accuracy, and leaves the
network as certain about strange examples as about ordinary ones.
"""

from __future__ import annotations

import math

import torch
from scipy.optimize import brentq
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.evaluation.checks import ArrayLike, as_finite, as_labels

LOWEST = 0.01
"""The lowest temperature: where every example is right, the likelihood asks for an ever lower one."""

HIGHEST = 100.0
"""The highest temperature: where the logits say nothing true, the likelihood asks for an ever higher one."""


def fit_temperature(logits: ArrayLike, targets: ArrayLike) -> float:
    """Find the temperature τ that minimises the mean negative log-likelihood of softmax(logits / τ).

    The likelihood is convex in β = 1/τ, with derivative mean(E_softmax(βz)[z] − z_y), so its one zero is found by
    bracketing and no local optimum is possible. Fit on data that the network was not trained on: on its own
    training data the result goes the wrong way.

    Args:
        logits: Logits of held-out examples, N x K, finite.
        targets: N integer labels in [0, K).

    Returns:
        τ in [``LOWEST``, ``HIGHEST``]: a bound where the optimum lies at or beyond it (``LOWEST`` where all
        examples are right, ``HIGHEST`` where the logits carry no truth), and 1 where the likelihood does not
        depend on τ at all (all logits of each example equal).

    Raises:
        InputError: Shapes are wrong, a logit is not finite or a label is out of range.
    """
    scores = _checked(logits)
    labels = as_labels(targets, *scores.shape)
    # Relative to the target's logit, so that no two large numbers are subtracted.
    margins = scores - scores.gather(1, labels[:, None])

    def slope(log_temperature: float) -> float:
        weights = torch.softmax(margins / math.exp(log_temperature), dim=1)
        return float((weights * margins).sum(1).mean())

    low, high = math.log(LOWEST), math.log(HIGHEST)
    if not bool(margins.any()):
        return 1.0
    if slope(low) <= 0:
        return LOWEST
    if slope(high) >= 0:
        return HIGHEST
    return math.exp(brentq(slope, low, high, xtol=1e-12))


def scale(logits: Tensor, temperature: float) -> Tensor:
    """Divide logits by a temperature; the most probable class stays the same.

    Args:
        logits: Logits of any shape.
        temperature: τ, positive and finite; above 1 it makes predictions less confident.

    Returns:
        Logits of the same shape, dtype and device.

    Raises:
        InputError: The temperature is not a positive finite number.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise InputError(f"temperature must be a positive finite number, but it is {temperature}")
    return logits / temperature


def _checked(logits: ArrayLike) -> Tensor:
    scores = as_finite(logits, "logits")
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise InputError(f"logits must be N x K with at least 2 classes, but have shape {tuple(scores.shape)}")
    return scores
