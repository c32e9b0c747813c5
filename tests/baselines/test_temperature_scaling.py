"""The temperature against a closed form, an independent optimiser and the truth it was drawn from."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from stfbnn.baselines import fit_temperature, scale
from stfbnn.baselines.temperature_scaling import HIGHEST, LOWEST
from stfbnn.errors import InputError


def test_closed_form() -> None:
    # Two classes, margin 2 throughout, right three times of four: sigmoid(2/τ) = 3/4, so τ = 2 / ln 3.
    logits = np.array([[2.0, 0.0]] * 4)
    assert fit_temperature(logits, [0, 0, 0, 1]) == pytest.approx(2 / math.log(3), rel=1e-10)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.floats(0.3, 8))
def test_minimises_the_likelihood(seed: int, spread: float) -> None:
    random = np.random.default_rng(seed)
    logits = spread * random.normal(size=(200, 4))
    targets = np.where(random.random(200) < 0.5, logits.argmax(1), random.integers(0, 4, 200))

    def loss(log_temperature: float) -> float:
        return float(-log_softmax(logits / math.exp(log_temperature), axis=1)[np.arange(200), targets].mean())

    found = fit_temperature(torch.as_tensor(logits), torch.as_tensor(targets))
    theirs = minimize_scalar(loss, bounds=(math.log(LOWEST), math.log(HIGHEST)), method="bounded")
    assert loss(math.log(found)) <= theirs.fun + 1e-12
    assert math.log(found) == pytest.approx(theirs.x, abs=1e-3)


def test_recovers_the_temperature_and_scales_along() -> None:
    random = np.random.default_rng(0)
    logits = 2 * random.normal(size=(40_000, 3))
    noisy = logits + random.gumbel(size=logits.shape)  # its argmax is a draw from softmax(logits)
    targets = noisy.argmax(1)
    assert fit_temperature(3.5 * logits, targets) == pytest.approx(3.5, rel=0.03)
    assert fit_temperature(7 * logits, targets) == pytest.approx(2 * fit_temperature(3.5 * logits, targets))
    shifted = logits + 1e6 * random.normal(size=(40_000, 1))
    assert fit_temperature(shifted, targets) == pytest.approx(fit_temperature(logits, targets), rel=1e-6)


def test_degenerate_cases() -> None:
    right = np.array([[5.0, 0.0], [0.0, 5.0]])
    assert fit_temperature(right, [0, 1]) == LOWEST
    assert fit_temperature(1e6 * right, [0, 1]) == LOWEST
    assert fit_temperature(right, [1, 0]) == HIGHEST
    assert fit_temperature(np.ones((3, 4)), [0, 1, 2]) == 1


def test_scale() -> None:
    logits = torch.tensor([[1.0, 3.0]], requires_grad=True)
    scaled = scale(logits, 2.0)
    assert torch.equal(scaled, torch.tensor([[0.5, 1.5]]))
    assert scaled.dtype == torch.float32
    assert scaled.requires_grad


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_bad_temperature(temperature: float) -> None:
    with pytest.raises(InputError, match="positive finite number"):
        scale(torch.zeros(1, 2), temperature)


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        ([[0.0, math.nan]], [0], "logits hold 1 NaN"),
        ([[0.0, -math.inf]], [0], "logits hold 1 infinite"),
        ([[0.0, 1.0]], [2], "0 to 1"),
        ([0.0, 1.0], [0], r"N x K.*\(2,\)"),
        ([[0.0]], [0], "at least 2 classes"),
    ],
)
def test_bad_input(logits: object, targets: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit_temperature(logits, targets)
