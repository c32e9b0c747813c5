"""Predictions of numbers with noise of their own, and of counts, against quadrature, summation and torch.distributions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from torch.distributions import Categorical as TorchCategorical
from torch.distributions import Independent, MixtureSameFamily, Normal
from torch.distributions import Poisson as TorchPoisson

from stfbnn.errors import InputError
from stfbnn.likelihood import HeteroscedasticGaussian, Poisson
from stfbnn.predictive import HeteroscedasticPrediction, PoissonPrediction, sums_for

OUTPUTS = torch.randn(5, 8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
WEIGHTS = torch.tensor([0.1, 0.3, 0.2, 0.25, 0.15], dtype=torch.float64)
TARGETS = torch.randn(8, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
COUNTS = torch.randint(0, 6, (8, 4), generator=torch.Generator().manual_seed(1))


def heteroscedastic(outputs: torch.Tensor, weights: torch.Tensor | None = None) -> HeteroscedasticPrediction:
    sums = sums_for(HeteroscedasticGaussian(), 1.0)
    sums.add(outputs, weights)
    prediction = sums.finish(at_mean=False)
    assert isinstance(prediction, HeteroscedasticPrediction)
    return prediction


def counted(outputs: torch.Tensor, weights: torch.Tensor | None = None) -> PoissonPrediction:
    sums = sums_for(Poisson(), 1.0)
    sums.add(outputs, weights)
    prediction = sums.finish(at_mean=False)
    assert isinstance(prediction, PoissonPrediction)
    return prediction


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_numbers_with_noise_of_their_own_are_a_mixture(weights: torch.Tensor | None) -> None:
    pred = heteroscedastic(OUTPUTS, weights)
    mixing = TorchCategorical(torch.ones(8, 5) if weights is None else weights.expand(8, 5))
    parts = Independent(Normal(OUTPUTS[..., :2].movedim(0, 1), (OUTPUTS[..., 2:] / 2).exp().movedim(0, 1)), 1)
    mixture = MixtureSameFamily(mixing, parts)
    torch.testing.assert_close(pred.mean, mixture.mean)
    torch.testing.assert_close(pred.std.square(), mixture.variance)
    torch.testing.assert_close(pred.log_density(TARGETS), mixture.log_prob(TARGETS))
    each = torch.ones(5).double() / 5 if weights is None else weights
    torch.testing.assert_close(pred.aleatoric, torch.einsum("s,snk->nk", each, OUTPUTS[..., 2:].exp()))
    torch.testing.assert_close(pred.std.square(), pred.aleatoric + pred.epistemic)


def test_the_mixtures_moments_are_those_of_its_density() -> None:
    pred = heteroscedastic(OUTPUTS[:, :1, [0, 2]], WEIGHTS)

    def density(y: float) -> float:
        return math.exp(float(pred.log_density(torch.tensor([y], dtype=torch.float64))))

    total, mean, square = (quad(lambda y, p=power: y**p * density(y), -40, 40, limit=200)[0] for power in (0, 1, 2))
    assert total == pytest.approx(1, abs=1e-6)
    assert mean == pytest.approx(float(pred.mean), abs=1e-6)
    assert square - mean**2 == pytest.approx(float(pred.std) ** 2, rel=1e-6)


def test_one_column_meets_a_vector_of_targets() -> None:
    pred = heteroscedastic(OUTPUTS[..., [0, 2]])
    assert pred.mean.shape == (8, 1)
    torch.testing.assert_close(pred.log_density(TARGETS[:, 0]), pred.log_density(TARGETS[:, :1]))


@given(st.lists(st.tuples(st.floats(-10, 10), st.floats(-1e4, 1e4)), min_size=1, max_size=5))
@settings(deadline=None)
def test_wild_noise_stays_finite(draws: list[tuple[float, float]]) -> None:
    pred = heteroscedastic(torch.tensor(draws).unsqueeze(1))
    for value in (pred.mean, pred.std, pred.aleatoric, pred.epistemic, pred.log_density(torch.zeros(1))):
        assert torch.isfinite(value).all()
    assert (pred.aleatoric > 0).all()
    assert (pred.epistemic >= 0).all()


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_counts_are_a_mixture(weights: torch.Tensor | None) -> None:
    pred = counted(OUTPUTS, weights)
    mixing = TorchCategorical(torch.ones(8, 5) if weights is None else weights.expand(8, 5))
    mixture = MixtureSameFamily(mixing, Independent(TorchPoisson(OUTPUTS.exp().movedim(0, 1)), 1))
    torch.testing.assert_close(pred.mean, mixture.mean)
    torch.testing.assert_close(pred.std.square(), mixture.variance)
    torch.testing.assert_close(pred.log_density(COUNTS), mixture.log_prob(COUNTS.double()))
    torch.testing.assert_close(pred.log_density(COUNTS.float()), pred.log_density(COUNTS))
    torch.testing.assert_close(pred.aleatoric, pred.mean)


def test_the_moments_of_counts_are_those_of_their_probabilities() -> None:
    pred = counted(OUTPUTS[:, :1, :1].expand(5, 120, 1), WEIGHTS)
    numbers = torch.arange(120)
    law = pred.log_density(numbers).exp().numpy()
    assert law.sum() == pytest.approx(1, abs=1e-9)
    mean = (law * np.arange(120)).sum()
    assert mean == pytest.approx(float(pred.mean[0]), rel=1e-9)
    assert (law * np.arange(120) ** 2).sum() - mean**2 == pytest.approx(float(pred.std[0]) ** 2, rel=1e-8)


@pytest.mark.parametrize("pred", [heteroscedastic(OUTPUTS), counted(OUTPUTS)])
def test_what_is_undefined_is_refused(pred: HeteroscedasticPrediction | PoissonPrediction) -> None:
    for name in ("entropy", "probs"):
        with pytest.raises(InputError, match=r"\.std"):
            getattr(pred, name)


def test_targets_that_do_not_fit_are_refused() -> None:
    for targets, message in ((TARGETS[:, 0], "shape"), (TARGETS / 0, "infinite"), (TARGETS.long(), "float targets")):
        with pytest.raises(InputError, match=message):
            heteroscedastic(OUTPUTS).log_density(targets)
    for counts, message in ((COUNTS[:, 0], "shape"), (COUNTS - 9, "negative"), (COUNTS + 0.5, "whole")):
        with pytest.raises(InputError, match=message):
            counted(OUTPUTS).log_density(counts)
