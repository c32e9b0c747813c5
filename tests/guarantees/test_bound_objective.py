"""The bounds as objectives: values by direct formulas, gradients by differences, tangents from above, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from core_models import classification, mlp
from stfbnn.conversion import bayesianize
from stfbnn.errors import InputError
from stfbnn.guarantees.objective import BoundedCrossEntropy, BoundObjective
from stfbnn.inference.estimators import Sampler, SharedSample
from stfbnn.inference.minibatch import MinibatchLoss
from stfbnn.likelihood import Bernoulli, Categorical, Gaussian
from stfbnn.posterior import LowRank
from stfbnn.prior import Normal

FORMS = ["quadratic", "lambda", "mcallester"]
RISKS = st.floats(0.0, 1.0)
KLS = st.floats(0.0, 1e5)
SIZES = st.integers(8, 10**6)
DELTAS = st.floats(1e-6, 0.5)


def direct(form: str, risk: float, kl: float, n: int, delta: float, k: int = 1) -> float:
    """Written out from the papers, with n where the library has B."""
    total = kl + np.log(2 * np.sqrt(n) / delta) + np.log(k)
    if form == "mcallester":
        return float(risk + np.sqrt(total / (2 * n)))
    if form == "quadratic":
        return float((np.sqrt(risk + total / (2 * n)) + np.sqrt(total / (2 * n))) ** 2)
    lam = 2 / (np.sqrt(2 * n * risk / total + 1) + 1)
    return float(risk / (1 - lam / 2) + total / (n * lam * (1 - lam / 2)))


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=50, deadline=None)
@given(risk=RISKS, kl=KLS, n=SIZES, delta=DELTAS, k=st.integers(1, 50))
def test_values_are_those_of_the_formulas(form: str, risk: float, kl: float, n: int, delta: float, k: int) -> None:
    objective = BoundObjective(form, n, delta, k)
    assert float(objective.value(scalar(risk), scalar(kl))) == pytest.approx(direct(form, risk, kl, n, delta, k))
    assert objective.tangent(risk, kl).bound == pytest.approx(direct(form, risk, kl, n, delta, k))


@settings(max_examples=50, deadline=None)
@given(risk=RISKS, kl=st.floats(0.0, 1e4), n=SIZES, delta=DELTAS)
def test_the_closed_form_lambda_is_the_minimiser_and_its_bound_is_the_quadratic_one(
    risk: float, kl: float, n: int, delta: float
) -> None:
    objective = BoundObjective("lambda", n, delta)
    found = minimize_scalar(
        lambda lam: float(objective.value(scalar(risk), scalar(kl), lam)),
        bounds=(1e-7, 1.999),
        method="bounded",
        options={"xatol": 1e-10},
    )
    lam = objective.best_lambda(risk, kl)
    at_best = float(objective.value(scalar(risk), scalar(kl), lam))
    assert at_best <= found.fun * (1 + 1e-9)
    # Flat at its least: so near in value means only so near in λ.
    assert lam == pytest.approx(found.x, rel=1e-3)
    assert at_best == pytest.approx(direct("quadratic", risk, kl, n, delta), rel=1e-9)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=50, deadline=None)
@given(risk=st.floats(0.01, 0.9), kl=st.floats(1.0, 1e4), n=SIZES, delta=DELTAS)
def test_the_slopes_are_those_of_differences(form: str, risk: float, kl: float, n: int, delta: float) -> None:
    tangent = BoundObjective(form, n, delta).tangent(risk, kl)
    step = 1e-5
    by_risk = (direct(form, risk + step, kl, n, delta) - direct(form, risk - step, kl, n, delta)) / (2 * step)
    by_kl = (direct(form, risk, kl * (1 + step), n, delta) - direct(form, risk, kl * (1 - step), n, delta)) / (
        2 * step * kl
    )
    assert tangent.by_risk == pytest.approx(by_risk, rel=1e-4)
    # The difference of two nearly equal numbers, where KL is small beside what else there is.
    assert tangent.by_kl == pytest.approx(by_kl, rel=1e-3, abs=1e-10)
    assert tangent.temperature == pytest.approx(n * tangent.by_kl / tangent.by_risk)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=100, deadline=None)
@given(at=st.tuples(RISKS, KLS), to=st.tuples(RISKS, KLS), n=SIZES, delta=DELTAS)
def test_the_tangent_lies_above_the_bound_everywhere(
    form: str, at: tuple[float, float], to: tuple[float, float], n: int, delta: float
) -> None:
    tangent = BoundObjective(form, n, delta).tangent(*at)
    line = tangent.bound + tangent.by_risk * (to[0] - at[0]) + tangent.by_kl * (to[1] - at[1])
    assert line >= direct(form, *to, n, delta) * (1 - 1e-9)


def test_the_temperature_of_the_lambda_form_is_one_over_lambda() -> None:
    tangent = BoundObjective("lambda", 5000, 0.025).tangent(0.1, 30.0)
    assert tangent.lam is not None
    assert tangent.temperature == pytest.approx(1 / tangent.lam)
    assert BoundObjective("quadratic", 5000, 0.025).tangent(0.1, 30.0).temperature == pytest.approx(1 / tangent.lam)


@pytest.mark.parametrize("p_min", [1e-5, 1e-2, 0.3])
def test_the_loss_is_the_bounded_cross_entropy(p_min: float) -> None:
    logits = 6 * torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(4, (200,), generator=torch.Generator().manual_seed(1))
    probabilities = np.exp(logits.double().numpy())
    probabilities /= probabilities.sum(1, keepdims=True)
    true = probabilities[np.arange(200), targets.numpy()]
    expected = -np.log(np.maximum(true, p_min)) / np.log(1 / p_min)
    loss = BoundedCrossEntropy(Categorical(), p_min)
    bounded, wrong = loss.losses(logits, targets)
    np.testing.assert_allclose(bounded.numpy(), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(wrong.numpy(), probabilities.argmax(1) != targets.numpy())
    assert 0 <= float(bounded.min()) < float(bounded.max()) <= 1
    torch.testing.assert_close(loss.log_prob(logits, targets), -bounded)
    given_probabilities = BoundedCrossEntropy(Categorical("probabilities"), p_min)
    torch.testing.assert_close(given_probabilities.losses(logits.softmax(1), targets)[0], bounded, rtol=1e-4, atol=1e-5)


def test_clipped_examples_have_no_gradient_and_the_others_that_of_differences() -> None:
    logits = torch.tensor([[0.0, 30.0], [0.5, -0.2]], dtype=torch.float64, requires_grad=True)
    loss = BoundedCrossEntropy(Categorical(), 1e-5)
    targets = torch.tensor([0, 0])
    (gradient,) = torch.autograd.grad(loss.losses(logits, targets)[0].sum(), logits)
    assert not gradient[0].any()
    assert torch.autograd.gradcheck(lambda z: loss.losses(z, targets[:1])[0], logits[1:])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["mean-field", LowRank(rank=2), "filterwise", "full"], ids=str)
def test_the_tangents_gradient_in_q_is_that_of_the_bound(form: str, family: str) -> None:
    x, y = classification(40)
    bnn = bayesianize(
        mlp(hidden=4).double(), x[:2].double(), posterior=family, prior=Normal(std=0.3, center="pretrained")
    )
    bnn.posterior.set_std(torch.full((bnn.layout.size,), 0.2, dtype=torch.float64))
    objective, loss = BoundObjective(form, 40, 0.05), BoundedCrossEntropy(Categorical(), 1e-3)
    batch = MinibatchLoss(bnn, loss, x.double(), y)
    posterior = bnn.posterior
    leaves = tuple(posterior.parameters())
    sampler = Sampler(leaves, posterior.draw, lambda: (torch.empty(0), torch.empty(0)), posterior.noise_size)
    noise = torch.randn(posterior.noise_size, generator=torch.Generator().manual_seed(3)).double()

    @torch.no_grad()
    def bound() -> float:
        risk = loss.losses(bnn.outputs(posterior.draw(noise), x.double()), y)[0].mean()
        return direct(form, float(risk), float(posterior.kl(bnn.prior)), 40, 0.05)

    found = SharedSample().estimate(batch, sampler, torch.Generator().manual_seed(3))
    with torch.enable_grad():
        kl = posterior.kl(bnn.prior)
    tangent = objective.tangent(found.nll, float(kl.detach()))
    pull = torch.autograd.grad(kl, leaves)
    for leaf, by_risk, by_kl in zip(leaves, found.gradients, pull, strict=True):
        slope = tangent.by_risk * (by_risk + tangent.temperature / 40 * by_kl)
        for index in torch.nonzero(slope).tolist()[:: max(1, int(slope.numel() // 10))]:
            place, step = tuple(index), 1e-6
            before = leaf.data[place].clone()
            leaf.data[place] = before + step
            high = bound()
            leaf.data[place] = before - step
            low = bound()
            leaf.data[place] = before
            assert float(slope[place]) == pytest.approx((high - low) / (2 * step), rel=1e-3, abs=1e-6)


def test_what_no_bound_allows_is_refused() -> None:
    with pytest.raises(InputError, match="objective must be one of"):
        BoundObjective("catoni", 100, 0.05)
    with pytest.raises(InputError, match="at least 8 examples"):
        BoundObjective("quadratic", 7, 0.05)
    for delta in (0.0, 1.0, -0.1, math.nan, True):
        with pytest.raises(InputError, match="delta must be a probability"):
            BoundObjective("quadratic", 100, delta)
    for p_min in (0.0, 1.0, -1e-5, math.nan, True):
        with pytest.raises(InputError, match="p_min must be a probability"):
            BoundedCrossEntropy(Categorical(), p_min)
    for other in (Gaussian(), Bernoulli()):
        with pytest.raises(InputError, match="one class an example"):
            BoundedCrossEntropy(other)
    for uneven in (Categorical(class_weights=[1.0, 2.0]), Categorical(ignore_index=-100)):
        with pytest.raises(InputError, match="counts every example alike"):
            BoundedCrossEntropy(uneven)
    with pytest.raises(InputError, match="one class an example, but the targets"):
        BoundedCrossEntropy(Categorical()).check(torch.randn(4, 3, 5), torch.zeros(4, 5, dtype=torch.long))
