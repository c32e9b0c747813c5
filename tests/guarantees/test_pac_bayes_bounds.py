"""The bounds: their relations, their values by an independent root search, and the Monte-Carlo part's error rate."""

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import binom

from stfbnn.errors import InputError
from stfbnn.guarantees.bounds import (
    best_lambda,
    budget,
    lambda_bound,
    maurer_seeger,
    mcallester,
    monte_carlo_upper,
    quadratic_bound,
)

risks = st.floats(0, 1)
divergences = st.floats(0, 1e5)
sizes = st.integers(8, 10**6)
levels = st.floats(1e-6, 0.5)


def test_maurer_seeger_is_the_root_that_mpmath_finds() -> None:
    n, delta, kl, risk = 10_000, 0.025, 120.0, 0.03
    allowed = (kl + math.log(2 * math.sqrt(n) / delta)) / n

    def excess(p: object) -> object:
        return risk * mpmath.log(risk / p) + (1 - risk) * mpmath.log((1 - risk) / (1 - p)) - allowed

    expected = float(mpmath.findroot(excess, (0.031, 0.2), solver="anderson"))
    assert maurer_seeger(risk, kl, n, delta) == pytest.approx(expected, abs=1e-12)


@given(risks, divergences, sizes, levels, st.floats(0.001, 1.999))
def test_the_inverted_bound_is_never_above_its_relaxations(
    risk: float, kl: float, n: int, delta: float, lam: float
) -> None:
    inverted = maurer_seeger(risk, kl, n, delta)
    assert inverted <= 1
    for other in (
        quadratic_bound(risk, kl, n, delta),
        lambda_bound(risk, kl, n, delta, lam),
        mcallester(risk, kl, n, delta),
    ):
        assert inverted <= other + 1e-12


@given(st.floats(0.001, 1), divergences, sizes, levels)
def test_the_best_lambda_makes_the_lambda_bound_the_quadratic_one(risk: float, kl: float, n: int, delta: float) -> None:
    lam = best_lambda(risk, kl, n, delta)
    assert 0 < lam <= 1
    assert lambda_bound(risk, kl, n, delta, lam) == pytest.approx(quadratic_bound(risk, kl, n, delta), rel=1e-9)


def test_the_best_lambda_is_what_a_search_finds() -> None:
    arguments = (0.04, 200.0, 5000, 0.05)
    found = minimize_scalar(lambda lam: lambda_bound(*arguments, lam), bounds=(0.01, 1.9), method="bounded")
    assert best_lambda(*arguments) == pytest.approx(found.x, abs=1e-4)


@given(risks, divergences, sizes, st.integers(1, 1000))
def test_picking_among_k_priors_is_a_union_bound(risk: float, kl: float, n: int, k: int) -> None:
    assert maurer_seeger(risk, kl, n, 0.05, priors=k) == pytest.approx(maurer_seeger(risk, kl, n, 0.05 / k), abs=1e-12)


@pytest.mark.parametrize("bound", [maurer_seeger, quadratic_bound, mcallester])
def test_tensors_give_the_same_numbers_and_gradients(bound: object) -> None:
    assert callable(bound)
    risk = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    kl = torch.tensor(50.0, dtype=torch.float64, requires_grad=True)
    value = bound(risk, kl, 1000, 0.05)
    assert float(value.detach()) == pytest.approx(bound(0.1, 50.0, 1000, 0.05), abs=1e-12)
    value.backward()
    step = 1e-5
    by_risk = (bound(0.1 + step, 50.0, 1000, 0.05) - bound(0.1 - step, 50.0, 1000, 0.05)) / (2 * step)
    by_kl = (bound(0.1, 50.0 + step, 1000, 0.05) - bound(0.1, 50.0 - step, 1000, 0.05)) / (2 * step)
    assert risk.grad is not None
    assert kl.grad is not None
    assert float(risk.grad) == pytest.approx(by_risk, rel=1e-5)
    assert float(kl.grad) == pytest.approx(by_kl, rel=1e-4)


def test_the_lambda_bound_of_tensors_has_gradients_in_lambda_too() -> None:
    lam = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    value = lambda_bound(
        torch.tensor(0.1, dtype=torch.float64), torch.tensor(50.0, dtype=torch.float64), 1000, 0.05, lam
    )
    value.backward()
    step = 1e-6
    slope = (lambda_bound(0.1, 50.0, 1000, 0.05, 0.5 + step) - lambda_bound(0.1, 50.0, 1000, 0.05, 0.5 - step)) / (
        2 * step
    )
    assert lam.grad is not None
    assert float(lam.grad) == pytest.approx(slope, rel=1e-6)


def test_without_a_kl_the_bound_stays_above_the_exact_binomial_limit() -> None:
    """Clopper and Pearson's is the best there is for a single classifier, so no valid bound lies below it at equal δ."""
    for errors in (0, 3, 40):
        p = maurer_seeger(errors / 500, 0.0, 500, 0.05)
        assert binom.cdf(errors, 500, p) <= 0.05


def test_the_monte_carlo_limit_fails_no_more_often_than_it_may() -> None:
    """Losses of different expectations, as those of different examples have; 4000 repetitions, δ' = 0.2."""
    random = np.random.default_rng(3)
    chances = random.beta(0.5, 3, size=300)
    sums = (random.random((4000, 300)) < chances).sum(axis=1)

    def share_below(level: float) -> float:
        limits = {total: monte_carlo_upper(float(total), 300, level) for total in set(sums.tolist())}
        return float(np.mean([limits[total] < chances.mean() for total in sums.tolist()]))

    assert share_below(0.2) <= binom.ppf(1 - 1e-4, 4000, 0.2) / 4000
    # It is no vacuous limit: where it may fail nearly always, it does fail.
    assert share_below(0.999) > 0.05


def test_more_draws_make_the_monte_carlo_limit_tighter() -> None:
    limits = [monte_carlo_upper(0.1 * draws, draws, 0.025) for draws in (10, 100, 1000, 10**6)]
    assert limits == sorted(limits, reverse=True)
    assert limits[-1] == pytest.approx(0.1, abs=2e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, 7, 0.05), "at least 8"),
        ((1.0, 100.0, 0.05), "at least 8"),
        ((-1.0, 100, 0.05), "at least 0"),
        ((float("nan"), 100, 0.05), "at least 0"),
        ((1.0, 100, 0.0), "delta"),
        ((1.0, 100, 1.0), "delta"),
        ((1.0, 100, 0.05, 0), "priors"),
    ],
)
def test_what_the_theorem_does_not_cover_is_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        budget(*arguments)  # type: ignore[type-var]


def test_bad_lambdas_and_sums_are_refused() -> None:
    for lam in (0.0, 2.0, -1.0):
        with pytest.raises(InputError, match="between 0 and 2"):
            lambda_bound(0.1, 1.0, 100, 0.05, lam)
    with pytest.raises(InputError, match="cannot sum"):
        monte_carlo_upper(11.0, 10, 0.05)
    with pytest.raises(InputError, match="positive integer"):
        monte_carlo_upper(0.0, 0, 0.05)
    with pytest.raises(InputError, match="delta_monte_carlo"):
        monte_carlo_upper(0.0, 10, 1.5)
