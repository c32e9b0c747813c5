"""The binary kl and its inverses: against many digits, exact identities and finite differences."""

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stfbnn.errors import InputError
from stfbnn.guarantees.kl_inversion import (
    binary_kl,
    binary_kl_gradients,
    differentiable_upper_inverse,
    lower_inverse,
    upper_inverse,
    upper_inverse_gradients,
)

RISKS = (
    0.0,
    5e-324,
    1e-300,
    1e-100,
    1e-20,
    1e-12,
    1e-5,
    0.01,
    0.3,
    0.5,
    0.7,
    0.99,
    1 - 1e-5,
    1 - 1e-12,
    1 - 2**-53,
    1.0,
)
BUDGETS = (0.0, 1e-300, 1e-20, 1e-15, 1e-12, 1e-6, 1e-3, 0.1, 1.0, 10.0, 100.0, 1e3)
TOLERANCE = 1e-12

risks = st.floats(0, 1) | st.sampled_from(RISKS)
budgets = st.floats(0, 1e3) | st.floats(0, 1e-6) | st.sampled_from(BUDGETS)


def exact(q: float, p: object) -> object:
    """kl with so many digits that nothing cancels."""
    first, second = mpmath.mpf(q), mpmath.mpf(p)
    total = first * mpmath.log(first / second) if first > 0 else mpmath.mpf(0)
    return total + ((1 - first) * mpmath.log((1 - first) / (1 - second)) if first < 1 else 0)


@pytest.mark.parametrize("q", RISKS)
def test_the_inverses_lie_within_a_trillionth_of_the_exact_ones(q: float) -> None:
    with mpmath.workdps(700):
        for c in BUDGETS:
            up, low = float(upper_inverse(q, c)), float(lower_inverse(q, c))
            assert 0 <= low <= q <= up <= 1
            if c == 0:
                assert low == up == q
                continue
            margin = mpmath.mpf(TOLERANCE)
            # kl grows away from q, so a step of the tolerance must carry it across c, or out of [0, 1].
            beyond, before = mpmath.mpf(up) + margin, mpmath.mpf(up) - margin
            assert beyond >= 1 or exact(q, beyond) >= c
            assert before <= q or exact(q, before) <= c
            beyond, before = mpmath.mpf(low) - margin, mpmath.mpf(low) + margin
            assert beyond <= 0 or exact(q, beyond) >= c
            assert before >= q or exact(q, before) <= c


def test_tight_budgets_keep_relative_accuracy_of_the_step() -> None:
    """c = 1e-15 at q = 0.5: p − q = √(c/2), where the textbook formula has no digit left."""
    assert float(upper_inverse(0.5, 1e-15)) - 0.5 == pytest.approx(math.sqrt(0.5e-15), rel=1e-7)
    naive = 0.5 * math.log(0.5 / (0.5 + 2e-9)) + 0.5 * math.log(0.5 / (0.5 - 2e-9))
    assert abs(naive - 8e-18) > 1e-18
    assert float(binary_kl(0.5, 0.5 + 2e-9)) == pytest.approx(2 * (0.5 + 2e-9 - 0.5) ** 2, rel=1e-9)


def test_kl_agrees_with_many_digits_also_where_it_cancels() -> None:
    random = np.random.default_rng(0)
    q = random.random(200)
    p = np.clip(q + random.choice([-1, 1], 200) * 10.0 ** random.uniform(-14, 0, 200), 1e-12, 1 - 1e-12)
    with mpmath.workdps(60):
        expected = np.array([float(exact(float(a), float(b))) for a, b in zip(q, p, strict=True)])
    np.testing.assert_allclose(binary_kl(q, p), expected, rtol=1e-9, atol=0)


def test_kl_at_the_ends() -> None:
    assert float(binary_kl(0.0, 0.0)) == float(binary_kl(1.0, 1.0)) == float(binary_kl(0.3, 0.3)) == 0
    assert float(binary_kl(0.0, 1.0)) == float(binary_kl(1.0, 0.0)) == float(binary_kl(0.3, 1.0)) == math.inf
    assert float(binary_kl(0.3, 0.0)) == math.inf
    assert float(binary_kl(0.0, 0.3)) == pytest.approx(-math.log(0.7), rel=1e-14)
    assert float(binary_kl(1.0, 0.3)) == pytest.approx(-math.log(0.3), rel=1e-14)


@given(st.floats(0, 1e3))
def test_without_errors_the_inverse_is_a_closed_form(c: float) -> None:
    assert float(upper_inverse(0.0, c)) == pytest.approx(-math.expm1(-c), rel=1e-15)
    assert float(lower_inverse(1.0, c)) == pytest.approx(math.exp(-c), rel=1e-15)
    assert float(upper_inverse(1.0, c)) == 1.0
    assert float(lower_inverse(0.0, c)) == 0.0


@settings(max_examples=200)
@given(risks, budgets)
def test_the_divergence_at_the_inverse_is_the_budget(q: float, c: float) -> None:
    up, low = upper_inverse(q, c), lower_inverse(q, c)
    assert low <= q <= up
    # Within the rounding of p itself: a neighbour of p may have another divergence.
    assert float(binary_kl(q, max(q, up - 1e-13))) <= c * (1 + 1e-9)
    assert up + 1e-13 >= 1 or float(binary_kl(q, up + 1e-13)) >= c * (1 - 1e-9)
    assert float(binary_kl(q, min(q, low + 1e-13))) <= c * (1 + 1e-9)
    assert low <= 1e-13 or float(binary_kl(q, low - 1e-13)) >= c * (1 - 1e-9)


@settings(max_examples=200)
@given(risks, risks, budgets, budgets)
def test_the_inverse_rises_with_both_arguments(q: float, other: float, c: float, more: float) -> None:
    low, high = sorted((q, other))
    little, much = sorted((c, more))
    assert upper_inverse(low, little) <= upper_inverse(high, little) + 1e-14
    assert upper_inverse(low, little) <= upper_inverse(low, much) + 1e-14


@given(st.floats(2**-20, 1 - 2**-20), budgets)
def test_lower_and_upper_mirror_each_other(q: float, c: float) -> None:
    assert float(lower_inverse(q, c)) == pytest.approx(1 - float(upper_inverse(1 - q, c)), abs=1e-14)


def test_arrays_give_what_single_numbers_give() -> None:
    q, c = np.meshgrid(RISKS, BUDGETS)
    together = upper_inverse(q, c)
    assert together.shape == q.shape
    assert together.dtype == np.float64
    single = [[float(upper_inverse(a, b)) for a, b in zip(*rows, strict=True)] for rows in zip(q, c, strict=True)]
    np.testing.assert_allclose(together, single, rtol=0, atol=1e-14)


def test_gradients_are_finite_differences() -> None:
    q, p = np.array([0.05, 0.2, 0.5, 0.9]), np.array([0.1, 0.15, 0.8, 0.95])
    step = 1e-6
    by_q, by_p = binary_kl_gradients(q, p)
    np.testing.assert_allclose(by_q, (binary_kl(q + step, p) - binary_kl(q - step, p)) / (2 * step), rtol=1e-6)
    np.testing.assert_allclose(by_p, (binary_kl(q, p + step) - binary_kl(q, p - step)) / (2 * step), rtol=1e-6)
    c = np.array([0.01, 0.3, 0.1, 0.02])
    by_q, by_c = upper_inverse_gradients(q, c)
    np.testing.assert_allclose(by_q, (upper_inverse(q + step, c) - upper_inverse(q - step, c)) / (2 * step), rtol=1e-5)
    np.testing.assert_allclose(by_c, (upper_inverse(q, c + step) - upper_inverse(q, c - step)) / (2 * step), rtol=1e-5)


def test_gradients_at_the_ends() -> None:
    assert [float(one) for one in upper_inverse_gradients(0.2, 0.0)] == [1.0, math.inf]
    by_q, by_c = upper_inverse_gradients(0.0, 0.5)
    assert float(by_q) == math.inf
    assert float(by_c) == pytest.approx(math.exp(-0.5))
    assert [float(one) for one in upper_inverse_gradients(1.0, 0.5)] == [0.0, 0.0]
    assert [float(one) for one in binary_kl_gradients(0.4, 0.4)] == [0.0, 0.0]


def test_the_inverse_of_tensors_has_gradients() -> None:
    q = torch.tensor([0.02, 0.3, 0.6], dtype=torch.float64, requires_grad=True)
    c = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(differentiable_upper_inverse, (q, c), rtol=1e-5)
    found = differentiable_upper_inverse(q.float(), c.float())
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.detach().numpy(), upper_inverse(q.detach().numpy(), 0.05), rtol=1e-6)


def test_no_errors_leave_a_finite_gradient_for_objectives() -> None:
    q = torch.zeros((), requires_grad=True)
    found = differentiable_upper_inverse(q, torch.tensor(0.1))
    found.backward()
    assert float(found.detach()) == pytest.approx(1 - math.exp(-0.1))
    assert q.grad is not None
    assert 1 < float(q.grad) < 100


@pytest.mark.parametrize(("q", "c"), [(-0.1, 1.0), (1.1, 1.0), (math.nan, 1.0), (0.5, -1e-9), (0.5, math.nan)])
def test_bad_numbers_are_refused(q: float, c: float) -> None:
    for inverse in (upper_inverse, lower_inverse):
        with pytest.raises(InputError, match=r"must be"):
            inverse(q, c)


def test_an_unlimited_budget_gives_the_whole_interval() -> None:
    assert float(upper_inverse(0.3, math.inf)) == pytest.approx(1.0, abs=1e-15)
    assert float(lower_inverse(0.3, math.inf)) == pytest.approx(0.0, abs=1e-15)
